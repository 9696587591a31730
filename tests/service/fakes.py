"""A model without torch for tests of the service, and raw clients of it.

`python -m tests.service.fakes …` serves it like `python -m gpu_service serve …` would.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

from gpu_service import settings, worker
from gpu_service.bundle import TensorSpec
from gpu_service.dispatch import BatchOutput, Engine, Tensors
from gpu_service.protocol import Request, Scalar, encode_request
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

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.is_broken = False
        self.seen: list[float] = []  # the first value of each request

    def check(self) -> None:
        if self.is_broken:
            raise RuntimeError("out of order")

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
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
        y = 2 * x
        y[x == NOT_A_NUMBER] = numpy.nan
        return BatchOutput(outputs={"y": y}, infer_s=1e-4)


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
    return worker.run(chosen, open_engine=lambda _: FakeEngine(gate))


if __name__ == "__main__":
    sys.exit(main())
