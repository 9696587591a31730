"""A model without torch for tests of the service, and raw clients of it.

`python -m tests.service.fakes …` serves it like `python -m gpu_service serve …` would.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy

from gpu_service import settings, worker
from gpu_service.bundle import TensorSpec
from gpu_service.device import BatchOutput, Engine, Stream, Tensors
from gpu_service.messages import Request, Scalar
from gpu_service.protocol import encode_request
from gpu_service.signature import ModelInfo

BOUND_S = 60.0  # of every wait; far longer than any takes

# Values of x that mean something.
POISON = 666.0  # the model raises
NOT_A_NUMBER = 777.0  # the model returns NaN
WAIT = 888.0  # the model waits at the gate
HANG = 999.0  # the model never returns
BREAK = 555.0  # the device fails from here on

MODEL = ModelInfo(
    name="double",
    version="7",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(3,)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(3,)),),
    labels=("a", "b", "c"),
    digest="d00b1e",
)


# y is the sum of all x of a sequence; its answers can be what comes next.
SUM = ModelInfo(
    name="sum",
    version="1",
    inputs=MODEL.inputs,
    outputs=MODEL.outputs,
    digest="5",
    state=(TensorSpec(name="total", datatype="FP32", shape=(3,)),),
    feedback={"y": "x"},
)

# The first value of y is that of x and one, until that is LAST.
COUNT = ModelInfo(
    name="count",
    version="1",
    inputs=MODEL.inputs,
    outputs=(*MODEL.outputs, TensorSpec(name="end", datatype="BOOL", shape=())),
    digest="c",
    feedback={"y": "x"},
    done="end",
)
LAST = 100_000.0


class Gate:
    """Closed until opened, by this process or, where it is a file, by another."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> None:
        deadline = time.monotonic() + BOUND_S
        while not self._event.wait(0.01):
            if self._path is not None and self._path.exists():
                return
            assert time.monotonic() < deadline, "nobody opened the gate"


class FakeEngine(Engine):
    """y = 2x, unless x is one of the values above. An `Engine`."""

    model = MODEL
    description: Mapping[str, str] = {"device": "none"}

    def __init__(self, gate: Gate | None = None, *, version: str | None = None) -> None:
        if version is not None:
            self.model = msgspec.structs.replace(self.model, version=version, digest=version)
        self.gate = gate or Gate()
        self.is_broken = False
        self.is_closed = threading.Event()
        self.seen: list[float] = []  # the first value of each request

    def check(self) -> None:
        if self.is_broken:
            raise RuntimeError("out of order")

    def close(self) -> None:
        self.is_closed.set()

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        assert not self.is_closed.is_set()
        self.seen += [float(inputs["x"][0, 0]) for inputs in requests]
        x = numpy.concatenate([inputs["x"] for inputs in requests])
        if (x == WAIT).any():
            self.gate.wait()
        if (x == HANG).any():
            threading.Event().wait()
        self.is_broken |= bool((x == BREAK).any())
        self.check()
        if (x == POISON).any():
            raise RuntimeError("poisoned")
        with numpy.errstate(over="ignore"):
            y = 2 * x
        y[x == NOT_A_NUMBER] = numpy.nan
        return BatchOutput(outputs={"y": y}, infer_s=1e-4)


class SumEngine(FakeEngine):
    """`SUM`, with room for the totals of some sequences."""

    model = SUM

    def __init__(
        self, gate: Gate | None = None, *, version: str | None = None, places: int = 4
    ) -> None:
        super().__init__(gate, version=version)
        self._totals = numpy.full((places, 3), numpy.nan, "<f4")

    @property
    def max_streams(self) -> int:
        return len(self._totals)

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        ran = self.run(requests)
        ys = []
        for inputs, stream in zip(requests, streams, strict=True):
            is_fresh = stream is None or stream.is_fresh
            with numpy.errstate(over="ignore"):
                ys.append(inputs["x"] + (0 if is_fresh else self._totals[stream.slot]))
        for y, stream in zip(ys, streams, strict=True):
            if stream is not None:
                assert len(y) == 1
                self._totals[stream.slot] = y[0]
                stream.is_fresh = False
        output = msgspec.structs.replace(ran, outputs={"y": numpy.concatenate(ys)})
        return lambda: output


class CountEngine(FakeEngine):
    """`COUNT`."""

    model = COUNT

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        ran = super().run(requests)
        y = numpy.concatenate([inputs["x"] for inputs in requests])
        y[:, 0] += 1
        return msgspec.structs.replace(ran, outputs={"y": y, "end": y[:, 0] >= LAST})


def x_of(*values: float) -> dict[str, numpy.ndarray]:
    """Inputs [n, 3] with these first values."""
    return {"x": numpy.array([[value, 0.5, -1] for value in values], "<f4")}


def frame(*values: float, id: str | None = "1", **parameters: Scalar) -> bytes:  # noqa: A002
    """A binary request of these first values."""
    return encode_request(Request(inputs=x_of(*values), id=id, parameters=parameters))


def main() -> int:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    named = {name.removeprefix("--").replace("-", "_"): text for name, text in options.items()}
    chosen = settings.load({"bundle": "unused", "port": "0", **named}, {})
    gate = Gate(Path(os.environ["GATE"])) if "GATE" in os.environ else None
    return worker.run(chosen, open_engine=lambda chosen, path: FakeEngine(gate))


if __name__ == "__main__":
    sys.exit(main())
