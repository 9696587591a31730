"""What one rank does in test_ranks.py: real training code, in a process of its own.

Run with torchrun's variables and a folder, into which it writes what the test looks at.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from bench.training import ranks, tiny
from gpu_service import bundle
from gpu_service.training import TrainingError, distributed, evaluation
from gpu_service.training.loop import Run, Trained
from gpu_service.training.settings import Settings
from gpu_service.training.snapshot import Snapshots
from gpu_service.training.task import Source, Task

COUNTS = (2, 7, 10)  # numbers of samples to evaluate
# Each changes the numbers a little, or not at all, and must give the same weights on every rank.
WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "clip_norm": 1.0},
    "compressed": {"compress": "fp16"},
    "zero, averaged": {"zero": True, "ema": 0.5},
}


class Recorder(torch.nn.Module):
    """Answers each sample's own number modulo 10, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        self.asked += number.long().tolist()
        return torch.nn.functional.one_hot(number.long() % 10, 10).float()


def main() -> None:
    folder = Path(sys.argv[1])
    place = distributed.placement(os.environ)
    report: dict[str, Any] = {}
    with distributed.process_group(place, timeout_s=60) as device:
        tensors = {}
        for dtype in ("float32", "float64"):
            tensors |= ranks.gradients(place, device, dtype)
        for name, (count, changes) in ranks.TRAJECTORIES.items():
            weights = ranks.trajectory(place, device, count=count, changes=changes)
            tensors |= {f"{name}: {key}": value for key, value in weights.items()}
        for way, changes in WAYS.items():
            trained = train(tiny.make(random=True, dtype="float32"), place, device, changes)
            tensors |= {f"{way}: {key}": value for key, value in trained.weights.items()}
            report[way] = trained.curve[-1]["loss"]
        trained = train(tiny.streams(), place, device, {"epochs": 5})
        tensors |= {f"streams: {key}": value for key, value in trained.weights.items()}
        result = evaluation.evaluate(
            task=tiny.streams(),
            model=model_of(tiny.streams(), trained.weights),
            samples=tiny.streams().test,
            device=device,
        )
        report["streams"] = {"metrics": result.metrics, "confusion": result.confusion}
        early = {"epochs": 40, "validation": 0.2, "patience": 2, "learning_rate": 0.1}
        trained = train(tiny.make(random=False), place, device, early)
        tensors |= {f"early: {key}": value for key, value in trained.weights.items()}
        report["early"] = trained.curve
        report["held out"] = validation_loss(trained.weights, device)
        report["diverged"] = divergence(place, device)
        report |= {str(count): evaluate(count, device) for count in COUNTS}
    name = f"{place.rank}-of-{place.world_size}"
    ranks.save(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


def train(
    task: Task, place: distributed.Placement, device: torch.device, changes: dict[str, Any]
) -> Trained:
    settings = Settings(**{"epochs": 3, "batch_size": 12, **changes})
    return Run(
        task=task,
        settings=settings,
        place=place,
        device=device,
        snapshots=Snapshots(None, place=place, device=device, course={}),
        monitor=ranks.Quiet(settings, place),
    ).train()


def validation_loss(weights: dict[str, torch.Tensor], device: torch.device) -> float:
    """Of the written weights, on the share that was held out."""
    from gpu_service.training import data

    task = tiny.make(random=False)
    _, held_out = data.hold_out(task.train, 0.2)
    model = model_of(task, weights)
    result = evaluation.evaluate(task=task, model=model, samples=held_out, device=device)
    return result.metrics["loss"]


def model_of(task: Task, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = task.build()
    model.load_state_dict(weights)
    return model


def divergence(place: distributed.Placement, device: torch.device) -> str:
    task = tiny.make(random=False)
    image, label = task.train.tensors
    broken = dataclasses.replace(task, train=TensorDataset(image * math.inf, label))
    try:
        train(broken, place, device, {})
    except TrainingError as error:
        return str(error)
    return ""


def evaluate(count: int, device: torch.device) -> dict[str, Any]:
    """Every third of `count` samples has a wrong label."""
    number = torch.arange(count)
    label = (number + (number % 3 == 2)) % 10
    task = Task(
        name="numbers",
        architecture=bundle.Architecture(name="digits_cnn", arguments={}),
        inputs=(bundle.TensorSpec(name="number", datatype="FP32", shape=()),),
        outputs=(bundle.TensorSpec(name="one_hot", datatype="FP32", shape=(10,)),),
        labels=tuple("0123456789"),
        source=Source(name="", sha256="0" * 64),
        train=TensorDataset(number.float(), label),
        test=TensorDataset(number.float(), label),
        loss=lambda output, _: output.sum(dim=1) * 2,
        measure=lambda output, label: {"label": label.double()},
    )
    model = Recorder()
    result = evaluation.evaluate(
        task=task, model=model, samples=task.test, device=device, batch_size=2
    )
    return {"asked": model.asked, "metrics": result.metrics, "confusion": result.confusion}


if __name__ == "__main__":
    main()
