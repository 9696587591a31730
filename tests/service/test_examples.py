"""The examples, as their own docstrings say: trained, bundled and served by those very commands."""

import asyncio
import contextlib
import importlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

from examples import audio, generator, image, text
from gpu_service import __main__ as command_line
from gpu_service import bundle, golden, models
from gpu_service.client import Client
from tests.service.conftest import Process

Spawn = Callable[..., Process]


class Example:
    """One example in a folder of its own."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.module = module
        self.folder = folder

    def command(self, name: str) -> list[str]:
        """The arguments of `python -m gpu_service NAME` in the docstring, for this folder."""
        lines = str(self.module.__doc__).replace("\\\n", " ").splitlines()
        start = f"python -m gpu_service {name} "
        (line,) = (line.strip() for line in lines if line.strip().startswith(start))
        arguments = shlex.split(line.removeprefix("python -m gpu_service "))
        places = ("build/", "models/")
        return [
            str(self.folder / word) if word.startswith(places) or word == "models" else word
            for word in arguments
        ]

    def make(self) -> Path:
        self.module.main(self.folder / "build")
        assert command_line.main(self.command("bundle")) == 0
        (path,) = (self.folder / "models").glob("*/*")
        return path

    def serve(self, spawn: Spawn) -> Process:
        return spawn(*self.command("serve"), "--port", "0", "--threads", "1", module="gpu_service")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModuleType], tuple[Example, Path]]:
    done: dict[str, tuple[Example, Path]] = {}

    def make(module: ModuleType) -> tuple[Example, Path]:
        name = module.__name__
        if name not in done:
            example = Example(module, tmp_path_factory.mktemp(name.rpartition(".")[2]))
            done[name] = example, example.make()
        return done[name]

    return make


def model_of(path: Path) -> torch.nn.Module:
    name = bundle.read_manifest(path).architecture.name
    return models.load_model(path, factories=(name,))


def right(outputs: Any, labels: Any) -> float:
    return float((numpy.asarray(outputs).argmax(-1) == numpy.asarray(labels)).mean())


async def ask_all(url: str, name: str, arrays: Sequence[Any]) -> list[Any]:
    async with Client(url) as client:
        results = await asyncio.gather(*(client.infer({name: array}) for array in arrays))
    return [result.outputs["logits"] for result in results]


@pytest.mark.parametrize("module", [image, text], ids=["image", "text"])
async def test_images_and_texts_of_any_size(
    spawn: Spawn, made: Callable[..., tuple[Example, Path]], module: ModuleType
) -> None:
    example, path = await asyncio.to_thread(made, module)
    (spec,) = bundle.read_manifest(path).inputs
    random = numpy.random.default_rng(5)
    if module is image:
        sizes = [(24, 24), (40, 33), (33, 40), (64, 48), (24, 24)]
        pairs = [image.pictures(random, 4, height=height, width=width) for height, width in sizes]
    else:
        pairs = [text.texts(random, 4) for _ in range(5)]
    process = await asyncio.to_thread(example.serve, spawn)
    url = await asyncio.to_thread(lambda: process.url)
    answers = await ask_all(url, spec.name, [inputs.numpy() for inputs, _ in pairs])
    model = model_of(path)
    for answer, (inputs, _) in zip(answers, pairs, strict=True):
        numpy.testing.assert_allclose(answer, model(inputs).detach(), rtol=1e-4, atol=1e-4)
    labels = numpy.concatenate([label for _, label in pairs])
    assert right(numpy.concatenate(answers), labels) >= 0.9


def test_padding_changes_nothing(made: Callable[..., tuple[Example, Path]]) -> None:
    model = model_of(made(text)[1])
    short = text.encode(["2026-01-31"])
    padded = text.encode(["2026-01-31", "something much longer than that"])[:1]
    torch.testing.assert_close(model(short), model(padded))


async def test_streams_of_sound_keep_their_state(
    spawn: Spawn,
    made: Callable[..., tuple[Example, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    example, path = await asyncio.to_thread(made, audio)
    model = model_of(path)
    sound, label = audio.melodies(numpy.random.default_rng(5), 24)
    heard = torch.zeros(len(sound), 48)
    expected = []
    for chunk in sound.unbind(1):
        logits, heard = model(chunk, heard)
        expected.append(logits.detach().numpy())
    assert right(expected[-1], label[:, -1]) >= 0.9

    process = await asyncio.to_thread(example.serve, spawn)
    url = await asyncio.to_thread(lambda: process.url)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(url))
        sequences = [await stack.enter_async_context(client.sequence()) for _ in sound]
        for chunk, logits in zip(sound.unbind(1), expected, strict=True):
            steps = (
                sequence.step({"sound": one[None].numpy()})
                for sequence, one in zip(sequences, chunk, strict=True)
            )
            results = await asyncio.gather(*steps)
            answer = numpy.concatenate([result.outputs["logits"] for result in results])
            numpy.testing.assert_allclose(answer, logits, rtol=1e-3, atol=1e-3)

    capsys.readouterr()
    await audio.listen(url)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sound.shape[1]
    assert lines[0] == "  25 ms: nothing"
    assert lines[-1].split()[-1] in ("rising", "falling")


async def test_one_request_has_as_many_responses_as_its_sentence_has_bytes(
    spawn: Spawn,
    made: Callable[..., tuple[Example, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    example, _ = await asyncio.to_thread(made, generator)
    process = await asyncio.to_thread(example.serve, spawn)
    url = await asyncio.to_thread(lambda: process.url)
    for sentence in generator.SENTENCES:
        capsys.readouterr()
        await generator.ask(url, sentence[:9])
        assert capsys.readouterr().out == sentence


@pytest.mark.parametrize("name", ["image", "text", "audio", "generator"])
def test_a_worker_runs_an_example_only_where_it_is_allowed(
    made: Callable[..., tuple[Example, Path]], name: str
) -> None:
    module = importlib.import_module(f"examples.{name}")
    example, path = made(module)
    with pytest.raises(bundle.BundleError, match="does not allow"):
        models.load_model(path)
    allowed = example.command("serve")[-1]
    model = models.load_model(path, factories=(allowed,))
    samples = bundle.load_samples(path)
    inputs = [torch.from_numpy(array) for array in golden.inputs_of(samples).values()]
    state = [torch.zeros(len(inputs[0]), *spec.shape) for spec in bundle.read_manifest(path).state]
    outputs = model(*inputs, *state)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = [spec.name for spec in bundle.read_manifest(path).outputs]
    arrays = {name: tensor.detach().numpy() for name, tensor in zip(names, outputs, strict=False)}
    assert golden.compare(arrays, samples).problem is None
