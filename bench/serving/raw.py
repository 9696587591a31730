"""The yardstick: the model alone, as `python -m bench.serving.raw BUNDLE`.

One torch thread, full batches that are there already, nothing around it but a sleep of PAUSE_S
before each. Each line of input, `BATCH SECONDS PAUSE_S`, is a measurement, and answered by a line:
samples a second, and the median of a forward's seconds. One process for all of them, so that
nothing has to be loaded between two that are compared.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness import CHECKOUT, CORES, ENVIRON
from gpu_service import bundle, models

_WARM_UPS = 10


class Raw:
    """That process, on the first core alone."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "bench.serving.raw", str(path)]
        self._process = subprocess.Popen(
            ["taskset", "-c", str(CORES[0]), *command],
            cwd=CHECKOUT,
            env=ENVIRON,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, *, batch: int, seconds: float, pause_s: float = 0.0) -> tuple[float, float]:
        """Samples a second of so large batches, and the median of one's seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(batch, seconds, pause_s, file=self._process.stdin, flush=True)
        if not (answer := self._process.stdout.readline()):
            sys.exit("the process of the raw forward has ended; what it said is above")
        rate, duration_s = map(float, answer.split())
        return rate, duration_s

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _measure(
    model: torch.nn.Module, inputs: list[torch.Tensor], seconds: float, pause_s: float
) -> tuple[float, float]:
    for _ in range(_WARM_UPS):
        model(*inputs)
    started = at = time.perf_counter()
    durations = []
    while at < started + seconds:
        if pause_s:
            time.sleep(pause_s)
            at = time.perf_counter()
        model(*inputs)
        durations.append(time.perf_counter() - at)
        at = time.perf_counter()
    rate = len(inputs[0]) * len(durations) / (at - started)
    return rate, sorted(durations)[len(durations) // 2]


def main() -> None:
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    model = models.load_model(path)
    specs = bundle.read_manifest(path).inputs
    with torch.inference_mode():
        for line in sys.stdin:
            batch, seconds, pause_s = line.split()
            inputs = [torch.rand(int(batch), *spec.shape) for spec in specs]
            print(*_measure(model, inputs, float(seconds), float(pause_s)), flush=True)


if __name__ == "__main__":
    main()
