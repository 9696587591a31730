"""The streaming example, as its docstring says: trained on whole streams, served step by step."""

import asyncio
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from examples import watch as example
from gpu_service import bundle, models
from gpu_service.client import Client
from gpu_service.training import watch
from tests.service.conftest import ROOT, Process

STREAMS = 9


def commands() -> tuple[list[str], list[str]]:
    """The arguments of training and of `serve` in the docstring."""
    lines = str(example.__doc__).replace("\\\n", " ").splitlines()
    train, serve = (line for line in lines if line.startswith("    ") and "gpu_service" in line)
    return (
        shlex.split(train.partition("-m gpu_service.training ")[2]),
        shlex.split(serve.partition("-m gpu_service ")[2]),
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one epoch: what matters here is that it answers as it was trained."""
    folder = tmp_path_factory.mktemp("watch")
    arguments = [*commands()[0], "--epochs", "1", "--output", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "gpu_service.training", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return bundle.latest(folder / "watch")


def test_the_command_has_the_options_that_were_measured() -> None:
    assert tuple(commands()[0]) == (*watch.OPTIONS, "--output", "models")


def test_its_bundle_says_by_whom_it_was_tested(path: Path) -> None:
    manifest = bundle.verify(path)
    assert manifest.training is not None
    assert "by person: 5 and 10 of 1 to 10 are held out" in manifest.training.split
    assert (manifest.training.train_samples, manifest.training.test_samples) == (112, 28)
    assert set(manifest.training.metrics) == {"test_loss", "test_at_end", "test_accuracy"}
    answers = int((watch.task().test.tensors[2] >= 0).sum())  # type: ignore[attr-defined]
    assert sum(map(sum, manifest.training.confusion)) == answers
    assert "<svg" in (path / bundle.PICTURE).read_text()
    assert [spec.name for spec in manifest.state]


async def test_streams_of_many_clients_keep_their_state(
    spawn: Callable[..., Process], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = watch.task()
    movement, left, _ = (tensor[:STREAMS, :20] for tensor in task.test.tensors)
    with torch.inference_mode():
        (expected,) = task.whole(models.load_model(path))(movement, left)

    serve = ["serve", "--bundle", str(path), *commands()[1][3:]]
    process = await asyncio.to_thread(
        spawn, *serve, "--port", "0", "--threads", "1", module="gpu_service"
    )
    url = await asyncio.to_thread(lambda: process.url)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(url)) for _ in range(3)]
        sequences = [
            await stack.enter_async_context(clients[number % 3].sequence(model="watch"))
            for number in range(STREAMS)
        ]
        for step in range(movement.shape[1]):
            results = await asyncio.gather(
                *(
                    sequence.step(
                        {
                            "movement": movement[number, step][None].numpy(),
                            "left": left[number, step][None].numpy(),
                        }
                    )
                    for number, sequence in enumerate(sequences)
                )
            )
            answers = numpy.concatenate([result.outputs["logits"] for result in results])
            numpy.testing.assert_allclose(answers, expected[:, step], rtol=1e-3, atol=1e-3)

    await example.listen(url, number=1)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.partition(",")[0] in watch.LABELS
    assert lines[0].startswith("  0.5 s: ")
    assert len(lines) > 36
    assert all(line.partition(" s: ")[2] in watch.LABELS for line in lines)
