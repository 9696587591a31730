"""`python -m gpu_service predict`: sends samples and prints the predictions, for people.

Owns nothing between calls. Samples come from a bundle, which also knows the true labels, from
files (.npy arrays, images), or from standard input; with JSON, a program can read the result.
Starts fast: no torch.
"""

import asyncio
import collections
import contextlib
import functools
import io
import itertools
import math
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec
import numpy
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, golden, images
from gpu_service.client import Client, ClientError, fetch_json
from gpu_service.device import Tensors

# A gateway binds a connection to a worker: with a few, a person sees more than one at work.
_CONNECTIONS = 4
_UNDER_WAY = 64

_DEADLINE_S = 30.0

STANDARD_INPUT = Path("-")

_HEADER = f"{'#':>6}  {'predicted':<12} {'confidence':>10}  {'true':<12} model, worker"


class InputError(Exception):
    """Samples that cannot be used; the message says which and why."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One sample to predict: inputs [1, …] by name; `truth` is its label, where known.

    `model` is whom to ask; None: the worker's default.
    """

    inputs: Tensors
    source: str
    truth: str | None = None
    model: str | None = None


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one sample. Either `error` says why there is none, or the rest is there.

    `confidence` is the probability that the greatest of the first output's values stands for,
    `outputs` holds all of them, nested as their shapes are, without the batch dimension.
    """

    sample: int  # from 1
    source: str
    predicted: str | None = None
    confidence: float | None = None
    truth: str | None = None
    model: str | None = None
    version: str | None = None
    worker: str | None = None
    outputs: dict[str, Any] | None = None
    error: str | None = None


class Model(msgspec.Struct):
    """What a server says about its model, as far as it is needed here."""

    class Input(msgspec.Struct):
        name: str
        datatype: str
        shape: list[int]

    class Parameters(msgspec.Struct):
        labels: list[str] = []

    name: str
    inputs: list[Input]
    parameters: Parameters


def main(
    *,
    url: str,
    path: Path | None,
    files: Sequence[Path],
    count: int | None,
    as_json: bool = False,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    output: TextIO = sys.stdout,
    standard_input: BinaryIO | None = None,
) -> int:
    """Predict `count` samples (default: each once) of the bundle in `path`, or of `files`.

    A file named `-` is standard input. Prints a table, or with `as_json` one `Prediction` a
    line. Returns 1 if any had no prediction, else 0. Raises InputError, bundle.BundleError, and
    client.ClientError when there is no server.
    """
    if files.count(STANDARD_INPUT) > 1:
        raise InputError("standard input (-) can be read once only")
    printer = _JsonPrinter(output) if as_json else _TablePrinter(output)
    return asyncio.run(
        _main(
            url,
            path=path,
            files=files,
            count=count,
            printer=printer,
            token=token,
            tls=tls,
            standard_input=standard_input or sys.stdin.buffer,
        )
    )


async def _main(
    url: str,
    *,
    path: Path | None,
    files: Sequence[Path],
    count: int | None,
    printer: "_TablePrinter | _JsonPrinter",
    token: str | None,
    tls: ssl.SSLContext | None,
    standard_input: BinaryIO,
) -> int:
    if path is not None:
        samples, labels = _from_bundle(path)
    else:
        model = await _served(url, tls)
        samples = [sample for file in files for sample in _from_file(file, model, standard_input)]
        labels = model.parameters.labels
    if not samples:
        raise InputError("there is not a single sample in what was given")
    total = count or len(samples)
    wanted = itertools.islice(itertools.cycle(samples), total)
    client_of = functools.partial(Client, url, deadline_s=_DEADLINE_S, token=token, tls=tls)
    return await _predict(client_of, wanted, total=total, labels=labels, printer=printer)


def _from_bundle(path: Path) -> tuple[list[Sample], list[str]]:
    manifest = bundle.read_manifest(path)
    labels = list(manifest.labels)
    tensors = bundle.load_samples(path)
    truths: list[str | None] = [None] * len(next(iter(tensors.values())))
    if bundle.LABEL in tensors:
        truths = [_name(labels, int(index)) for index in tensors[bundle.LABEL]]
    samples = [
        Sample(inputs=inputs, truth=truth, source=str(path), model=manifest.name)
        for inputs, truth in zip(golden.one_by_one(tensors), truths, strict=True)
    ]
    return samples, labels


async def _served(url: str, tls: ssl.SSLContext | None) -> Model:
    server = await fetch_json(url, "/v2", timeout_s=_DEADLINE_S, tls=tls)
    name = server["models"][0]["name"]
    metadata = await fetch_json(url, f"/v2/models/{name}", timeout_s=_DEADLINE_S, tls=tls)
    return msgspec.convert(metadata, Model)


def _from_file(file: Path, model: Model, standard_input: BinaryIO) -> list[Sample]:
    if len(model.inputs) != 1:
        names = ", ".join(spec.name for spec in model.inputs)
        raise InputError(f"model {model.name} has several inputs ({names}): files hold one array")
    spec = model.inputs[0]
    source, content = _read(file, standard_input)
    if images.is_image(content):
        try:
            pixels = images.decode(content)
            batches = [images.as_input(pixels, datatypes.NUMPY[spec.datatype], spec.shape[1:])]
        except images.ImageError as error:
            raise InputError(f"{source}: {error}") from None
    else:
        batches = [_as_batch(source, array, spec) for array in _arrays(source, content)]
    return [
        Sample(inputs={spec.name: batch[n : n + 1]}, source=source)
        for batch in batches
        for n in range(len(batch))
    ]


def _read(file: Path, standard_input: BinaryIO) -> tuple[str, bytes]:
    """What to call it, and what is in it."""
    if file != STANDARD_INPUT:
        try:
            return str(file), file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    if standard_input.isatty():
        raise InputError("standard input is a terminal; pipe a .npy array or an image into it")
    return "standard input", standard_input.read()


def _arrays(source: str, content: bytes) -> list[Any]:
    """The arrays in `content`: numpy.save writes several one after the other, too."""
    arrays: list[Any] = []
    stream = io.BytesIO(content)
    try:
        while not arrays or stream.tell() < len(content):
            arrays.append(numpy.load(stream, allow_pickle=False))
            if not isinstance(arrays[-1], numpy.ndarray):
                break  # an .npz file: refused by its reader
    except (OSError, ValueError, EOFError) as error:
        kinds = "a .npy array, a PNG or a PGM image"
        raise InputError(f"{source}: cannot be read as {kinds}: {error}") from None
    return arrays


def _as_batch(source: str, array: Any, spec: Model.Input) -> NDArray[Any]:
    """[n, …] as the model takes it, of one sample or many, with or without its axes of size 1."""
    dtype, shape = datatypes.NUMPY[spec.datatype], spec.shape[1:]
    if not isinstance(array, numpy.ndarray) or array.dtype.kind != dtype.kind:
        raise InputError(
            f"{source}: holds {getattr(array, 'dtype', 'several arrays')}, the model takes "
            f"{spec.datatype}; convert it as the training did (pixels 0…255 to 0…1, say)"
        )
    squeezed = [size for size in shape if size != 1]
    own = list(array.shape)
    for batch_shape in ([], own[:1]):
        rest = own[len(batch_shape) :]
        samples = math.prod(batch_shape)
        if images.fits(rest, shape):
            return array.astype(dtype).reshape([samples, *rest])
        if -1 not in shape and [size for size in rest if size != 1] == squeezed:
            return array.astype(dtype).reshape([samples, *shape])
    raise InputError(f"{source}: shape {own}, the model takes {shape} for one sample")


async def _predict(
    client_of: Callable[[], Client],
    samples: Iterator[Sample],
    *,
    total: int,
    labels: Sequence[str],
    printer: "_TablePrinter | _JsonPrinter",
) -> int:
    failed = 0
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(client_of()) for _ in range(min(_CONNECTIONS, total))
        ]
        printer.start()
        under_way: collections.deque[asyncio.Task[Prediction]] = collections.deque()
        for number, sample, client in zip(
            itertools.count(1), samples, itertools.cycle(clients), strict=False
        ):
            under_way.append(asyncio.create_task(_one(number, sample, client, labels)))
            if len(under_way) >= _UNDER_WAY:
                failed += not printer.add(await under_way.popleft())
        while under_way:
            failed += not printer.add(await under_way.popleft())
    printer.finish()
    return 1 if failed else 0


async def _one(number: int, sample: Sample, client: Client, labels: Sequence[str]) -> Prediction:
    try:
        result = await client.infer(sample.inputs, model=sample.model)
    except ClientError as error:
        return Prediction(sample=number, source=sample.source, truth=sample.truth, error=str(error))
    outputs = {name: array[0] for name, array in result.outputs.items()}
    index, confidence = _best(next(iter(outputs.values())))
    return Prediction(
        sample=number,
        source=sample.source,
        predicted=_name(labels, index),
        confidence=confidence,
        truth=sample.truth,
        model=result.model_name,
        version=result.model_version,
        worker=result.worker,
        outputs={name: array.tolist() for name, array in outputs.items()},
    )


def _best(scores: NDArray[Any]) -> tuple[int, float]:
    """The index of the greatest of logits [k], and the probability that it stands for."""
    scores = scores.astype("f8").ravel()
    index = int(scores.argmax())
    return index, float(1.0 / numpy.exp(scores - scores[index]).sum())


def _name(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else str(index)


class _JsonPrinter:
    """One JSON object a line, for programs."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def start(self) -> None:
        pass

    def add(self, prediction: Prediction) -> bool:
        """Print it; False if it is a failure."""
        print(msgspec.json.encode(prediction).decode(), file=self._output, flush=True)
        return prediction.error is None

    def finish(self) -> None:
        pass


class _TablePrinter:
    """A table with a summary as its last line, for people."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._failed = 0
        self._right = 0
        self._with_truth = 0
        self._models: collections.Counter[str] = collections.Counter()
        self._workers: collections.Counter[str] = collections.Counter()

    def start(self) -> None:
        self._started_s = time.perf_counter()
        print(_HEADER, file=self._output)

    def add(self, prediction: Prediction) -> bool:
        """Print it; False if it is a failure."""
        if prediction.error is not None:
            self._failed += 1
            print(f"{prediction.sample:>6}  failed: {prediction.error}", file=self._output)
            return False
        model = f"{prediction.model} {prediction.version}"
        self._models[model] += 1
        self._workers[prediction.worker or ""] += 1
        right = prediction.truth in (None, prediction.predicted)
        if prediction.truth is not None:
            self._with_truth += 1
            self._right += right
        print(
            f"{prediction.sample:>6}  {prediction.predicted:<12} {prediction.confidence:>9.1%} "
            f"{' ' if right else '✗'} {prediction.truth or '?':<12} {model}, {prediction.worker}",
            file=self._output,
            flush=True,
        )
        return True

    def finish(self) -> None:
        done = self._models.total()
        parts = [f"{done} predictions in {time.perf_counter() - self._started_s:.2f} s"]
        if self._with_truth:
            parts.append(f"{self._right} of {self._with_truth} right")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if done:
            parts.append("model " + ", ".join(sorted(self._models)))
            by_worker = sorted(self._workers.items())
            parts.append("by " + ", ".join(f"{worker} ({n})" for worker, n in by_worker))
        print("; ".join(parts), file=self._output)
