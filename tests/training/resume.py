"""What one rank does in test_resume.py: runs that are interrupted and go on, in one process.

Run with torchrun's variables and a folder, into which it writes what came out.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench.training import tiny
from bench.training.ranks import Quiet, save
from gpu_service.training import distributed
from gpu_service.training.loop import Run, Trained
from gpu_service.training.settings import Settings, course
from gpu_service.training.snapshot import Snapshots
from gpu_service.training.task import Task

COMMON: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 12,
    "uneven": "keep",
    "deterministic": True,
    "snapshot_steps": 3,
}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("float64", {}),
    "everything": (
        "float64",
        {"accumulate": 2, "ema": 0.9, "clip_norm": 0.5, "validation": 0.2, "patience": 3},
    ),
    "zero": ("float64", {"zero": True, "ema": 0.9}),
    "fp16": ("float32", {"precision": "fp16", "compress": "fp16"}),
}
INTERRUPTED = (2, 11, 14)  # calls of `step` at which a run ends, each from the last one on


class InterruptionError(Exception):
    pass


class Interrupting(Quiet):
    """Ends the run at its step number `at`, from 1 on."""

    def __init__(self, settings: Settings, place: distributed.Placement, at: int) -> None:
        super().__init__(settings, place)
        self._left, self.said = at, []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, **_: Any) -> None:
        self._left -= 1
        if not self._left:
            raise InterruptionError


def main() -> None:
    folder = Path(sys.argv[1])
    place = distributed.placement(os.environ)
    report: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}

    with distributed.process_group(place, timeout_s=60) as device:

        def run(task: Task, settings: Settings, at: int = 0) -> Trained | None:
            monitor = Interrupting(settings, place, at)
            snapshots = Snapshots(
                Path(settings.snapshots) if settings.snapshots else None,
                place=place,
                device=device,
                course=course(settings),
            )
            one = Run(
                task=task,
                settings=settings,
                place=place,
                device=device,
                snapshots=snapshots,
                monitor=monitor,
            )
            try:
                return one.train()
            except InterruptionError:
                snapshots.wait()  # what a kill cannot take back
                return None
            finally:
                report.setdefault("said", []).extend(monitor.said)

        torch.use_deterministic_algorithms(True)
        for way, (dtype, changes) in WAYS.items():
            task = tiny.make(random=True, dtype=dtype)
            whole = run(task, Settings(**COMMON, **changes))
            snapshots = str(folder / f"{way}-{place.world_size}")
            settings = Settings(**COMMON, **changes, snapshots=snapshots)
            for at in INTERRUPTED:
                report.setdefault("interrupted", []).append(run(task, settings, at) is None)
            resumed = run(task, settings)
            for name, trained in (("whole", whole), ("resumed", resumed)):
                report[f"{way} {name}"] = trained.curve
                tensors |= {f"{way} {name}: {k}": v for k, v in trained.weights.items()}

        # Begun by this number of ranks, or by the one that the test ran before.
        task = tiny.make(random=False)
        settings = Settings(**COMMON, snapshots=str(folder / "shared"))
        if place.world_size == 3:
            run(task, settings, 11)
        else:
            trained = run(task, settings)
            tensors |= {f"shared: {k}": v for k, v in trained.weights.items()}
            whole = run(task, Settings(**COMMON))
            tensors |= {f"shared whole: {k}": v for k, v in whole.weights.items()}
    name = f"{place.rank}-of-{place.world_size}"
    save(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
