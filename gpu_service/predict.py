"""`python -m gpu_service predict`: sends samples and prints the predictions, for people.

Owns nothing between calls. Samples come from a bundle, which also knows the true labels, or
from .npy files. Starts fast: no torch.
"""

import asyncio
import collections
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, golden
from gpu_service.client import Client, ClientError, InferResult, fetch_json
from gpu_service.dispatch import Tensors

# A gateway binds a connection to a worker: with a few, a person sees more than one at work.
_CONNECTIONS = 4
_UNDER_WAY = 64

_DEADLINE_S = 30.0

_HEADER = f"{'#':>6}  {'predicted':<12} {'confidence':>10}  {'true':<12} model, worker"


class InputError(Exception):
    """Samples that cannot be used; the message says which and why."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One sample to predict: inputs [1, …] by name; `truth` is its label, where known."""

    inputs: Tensors
    truth: str | None = None


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
    output: TextIO = sys.stdout,
) -> int:
    """Predict `count` samples (default: each once) of the bundle in `path`, or of `files`.

    Returns 1 if any had no prediction, else 0. Raises InputError, bundle.BundleError, and
    client.ClientError when there is no server.
    """
    return asyncio.run(_main(url, path=path, files=files, count=count, output=output))


async def _main(
    url: str, *, path: Path | None, files: Sequence[Path], count: int | None, output: TextIO
) -> int:
    if path is not None:
        samples, labels = _from_bundle(path)
    else:
        model = await _served(url)
        samples = [sample for file in files for sample in _from_file(file, model)]
        labels = model.parameters.labels
    wanted = itertools.islice(itertools.cycle(samples), count or len(samples))
    return await _predict(url, wanted, total=count or len(samples), labels=labels, output=output)


def _from_bundle(path: Path) -> tuple[list[Sample], list[str]]:
    labels = list(bundle.read_manifest(path).labels)
    tensors = bundle.load_samples(path)
    truths = [_name(labels, int(index)) for index in tensors[bundle.LABEL]]
    samples = [
        Sample(inputs=inputs, truth=truth)
        for inputs, truth in zip(golden.one_by_one(tensors), truths, strict=True)
    ]
    return samples, labels


async def _served(url: str) -> Model:
    server = await fetch_json(url, "/v2", timeout_s=_DEADLINE_S)
    name = server["models"][0]["name"]
    metadata = await fetch_json(url, f"/v2/models/{name}", timeout_s=_DEADLINE_S)
    return msgspec.convert(metadata, Model)


def _from_file(file: Path, model: Model) -> list[Sample]:
    if len(model.inputs) != 1:
        names = ", ".join(spec.name for spec in model.inputs)
        raise InputError(f"model {model.name} has several inputs ({names}): files hold one array")
    spec = model.inputs[0]
    try:
        array = numpy.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as a .npy array: {error}") from None
    batch = _as_batch(file, array, spec)
    return [Sample(inputs={spec.name: batch[n : n + 1]}) for n in range(len(batch))]


def _as_batch(file: Path, array: Any, spec: Model.Input) -> NDArray[Any]:
    """[n, …] as the model takes it, of one sample or many, with or without its axes of size 1."""
    dtype, shape = datatypes.NUMPY[spec.datatype], spec.shape[1:]
    if not isinstance(array, numpy.ndarray) or array.dtype.kind != dtype.kind:
        raise InputError(
            f"{file}: holds {getattr(array, 'dtype', 'several arrays')}, the model takes "
            f"{spec.datatype}; convert it as the training did (pixels 0…255 to 0…1, say)"
        )
    squeezed = [size for size in shape if size != 1]
    own = list(array.shape)
    for batch_shape in ([], own[:1]):
        rest = own[len(batch_shape) :]
        if rest == shape or [size for size in rest if size != 1] == squeezed:
            samples = math.prod(batch_shape)
            return array.astype(dtype).reshape([samples, *shape])
    raise InputError(f"{file}: shape {own}, the model takes {shape} for one sample")


async def _predict(
    url: str, samples: Iterator[Sample], *, total: int, labels: Sequence[str], output: TextIO
) -> int:
    started = time.perf_counter()
    tally = _Tally()
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(url, deadline_s=_DEADLINE_S))
            for _ in range(min(_CONNECTIONS, total))
        ]
        print(_HEADER, file=output)
        numbers = itertools.count(1)
        under_way: collections.deque[tuple[Sample, asyncio.Task[InferResult]]] = collections.deque()
        for sample, client in zip(samples, itertools.cycle(clients), strict=False):
            under_way.append((sample, asyncio.create_task(client.infer(sample.inputs))))
            if len(under_way) >= _UNDER_WAY:
                await _print(next(numbers), *under_way.popleft(), labels, tally, output)
        while under_way:
            await _print(next(numbers), *under_way.popleft(), labels, tally, output)
    print(tally.summary(time.perf_counter() - started), file=output)
    return 1 if tally.failed else 0


async def _print(
    number: int,
    sample: Sample,
    task: "asyncio.Task[InferResult]",
    labels: Sequence[str],
    tally: "_Tally",
    output: TextIO,
) -> None:
    try:
        result = await task
    except ClientError as error:
        tally.failed += 1
        print(f"{number:>6}  failed: {error}", file=output)
        return
    index, confidence = _best(next(iter(result.outputs.values()))[0])
    predicted = _name(labels, index)
    tally.add(result, predicted=predicted, truth=sample.truth)
    mark = " " if sample.truth in (None, predicted) else "✗"
    print(
        f"{number:>6}  {predicted:<12} {confidence:>9.1%} {mark} {sample.truth or '?':<12} "
        f"{result.model_name} {result.model_version}, {result.worker}",
        file=output,
        flush=True,
    )


def _best(scores: NDArray[Any]) -> tuple[int, float]:
    """The index of the greatest of logits [k], and the probability that it stands for."""
    scores = scores.astype("f8").ravel()
    index = int(scores.argmax())
    return index, float(1.0 / numpy.exp(scores - scores[index]).sum())


def _name(labels: Sequence[str], index: int) -> str:
    return labels[index] if 0 <= index < len(labels) else str(index)


class _Tally:
    """Counts for the last line."""

    def __init__(self) -> None:
        self.failed = 0
        self._right = 0
        self._with_truth = 0
        self._models: collections.Counter[str] = collections.Counter()
        self._workers: collections.Counter[str] = collections.Counter()

    def add(self, result: InferResult, *, predicted: str, truth: str | None) -> None:
        self._models[f"{result.model_name} {result.model_version}"] += 1
        self._workers[result.worker] += 1
        if truth is not None:
            self._with_truth += 1
            self._right += predicted == truth

    def summary(self, duration_s: float) -> str:
        done = self._models.total()
        parts = [f"{done} predictions in {duration_s:.2f} s"]
        if self._with_truth:
            parts.append(f"{self._right} of {self._with_truth} right")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if done:
            parts.append("model " + ", ".join(sorted(self._models)))
            by_worker = sorted(self._workers.items())
            parts.append("by " + ", ".join(f"{worker} ({n})" for worker, n in by_worker))
        return "; ".join(parts)
