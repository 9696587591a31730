"""What one rank computes for the comparison of many ranks with one: real training code.

`python -m bench.training.ranks FOLDER` with torchrun's variables. Writes FOLDER/RANK-of-RANKS:
the gradients of one step on a whole batch, and the weights after 50 steps in several ways.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench.training import tiny
from gpu_service.training import data, distributed
from gpu_service.training.distributed import Placement
from gpu_service.training.learner import Learner
from gpu_service.training.loop import Run
from gpu_service.training.monitor import Monitor, Progress
from gpu_service.training.settings import Settings
from gpu_service.training.snapshot import Snapshots

BATCH = 12
STEPS = 50

# 120 samples are 10 batches; 125 are 10 and one of 5, and 121 are 10 and one that no more than
# one rank has a sample of.
TRAJECTORIES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (120, {"epochs": 5}),
    "accumulation": (120, {"epochs": 5, "accumulate": 3}),
    "uneven": (125, {"epochs": 5, "uneven": "keep"}),
    "uneven, accumulation": (121, {"epochs": 5, "uneven": "keep", "accumulate": 2}),
    "deterministic": (125, {"epochs": 5, "uneven": "keep", "deterministic": True}),
    "zero": (120, {"epochs": 5, "zero": True}),
    "clipped, averaged": (120, {"epochs": 5, "clip_norm": 0.1, "ema": 0.9}),
}


class Quiet(Monitor):
    """Tells nobody."""

    def say(self, text: str) -> None:
        pass

    def epoch(self, progress: Progress) -> None:
        pass


def main() -> None:
    folder = Path(sys.argv[1])
    place = distributed.placement(os.environ)
    with distributed.process_group(place, timeout_s=120) as device:
        tensors = {}
        for dtype in ("float32", "float64"):
            tensors |= gradients(place, device, dtype)
        for name, (count, changes) in TRAJECTORIES.items():
            weights = trajectory(place, device, count=count, changes=changes)
            tensors |= {f"{name}: {key}": value for key, value in weights.items()}
    save(tensors, folder / f"{place.rank}-of-{place.world_size}.safetensors")
    sys.stdout.flush()
    os._exit(0)


def gradients(place: Placement, device: torch.device, dtype: str) -> dict[str, torch.Tensor]:
    """Of one backward; each rank has its share of the same batch."""
    task = tiny.make(random=False, count=BATCH, dtype=dtype)
    settings = Settings(batch_size=BATCH)
    torch.manual_seed(0)
    learner = Learner(task=task, settings=settings, device=device, steps=1)
    batches = data.Batches(
        BATCH, batch_size=BATCH, seed=0, rank=place.rank, world_size=place.world_size
    )
    (batch,) = data.load(task.train, batches, workers=0, pin=False)
    losses = task.losses(learner.parallel, *task.divide(batch))
    (losses.sum() * batches.weight(0)).backward()
    named = learner.model.named_parameters()
    return {f"{dtype}: {name}": value.grad.contiguous() for name, value in named}


def trajectory(
    place: Placement, device: torch.device, *, count: int, changes: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights after 50 steps and more, in double precision."""
    settings = Settings(batch_size=BATCH, **changes)
    return (
        Run(
            task=tiny.make(random=False, count=count),
            settings=settings,
            place=place,
            device=device,
            snapshots=Snapshots(None, place=place, device=device, course={}),
            monitor=Quiet(settings, place),
        )
        .train()
        .weights
    )


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)


if __name__ == "__main__":
    main()
