"""The yardstick: the model alone, as `python -m bench.serving.raw BUNDLE BATCH SECONDS [PAUSE_S]`.

One torch thread, full batches that are there already, nothing around it but a sleep of PAUSE_S
before each. Prints samples a second, and the median of a forward's seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from gpu_service import bundle, models


def main() -> None:
    path, batch, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    pause_s = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    torch.set_num_threads(1)
    model = models.load_model(path)
    inputs = [torch.rand(batch, *spec.shape) for spec in bundle.read_manifest(path).inputs]
    with torch.inference_mode():
        for _ in range(10):
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
    print(batch * len(durations) / (at - started))
    print(sorted(durations)[len(durations) // 2])


if __name__ == "__main__":
    main()
