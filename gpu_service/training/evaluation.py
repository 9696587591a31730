"""What a model is worth: every sample evaluated exactly once, shared among the ranks.

Needs a process group; all ranks call it with the same arguments and get the same result.
"""

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from gpu_service.training import data
from gpu_service.training.task import Samples, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Means over all samples; with labels, `confusion[true][predicted]` counts them.

    Of streams, it counts their answers, and so does the accuracy.
    """

    metrics: dict[str, float]
    confusion: tuple[tuple[int, ...], ...] = ()


@torch.inference_mode()
def evaluate(
    *,
    task: Task,
    model: nn.Module,
    samples: Samples,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
) -> Result:
    """The task's loss and measures of `model` on `samples`, and what follows from its labels.

    Rank r takes samples r, r + world size, …: ranks may differ by one sample, and none is
    repeated to even them out, as DistributedSampler would.
    """
    was_training = model.training
    model.eval()
    whole = task.whole(model)
    turns = data.Turns(
        len(samples), batch_size=batch_size, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    classes = len(task.labels)
    confusion = torch.zeros((classes, classes), dtype=torch.int64, device=device)
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for batch in data.load(samples, turns, workers=workers, pin=device.type == "cuda"):
        inputs, targets = task.divide(data.moved(batch, device))
        outputs = whole(*inputs)
        values: dict[str, torch.Tensor] = {"loss": task.loss(*outputs, *targets)}
        values |= task.measure(*outputs, *targets) if task.measure else {}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double().sum()
        if classes:
            label, answer = targets[0], outputs[0].argmax(dim=-1)
            pairs = (label * classes + answer)[label >= 0]
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        count += len(inputs[0])
    model.train(was_training)
    return _together(sums, confusion, count=count, expected=len(samples), device=device)


def by_class(
    confusion: tuple[tuple[int, ...], ...], labels: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Per label: precision, recall, f1 (0 where nothing was predicted, or is there), support."""
    figures = {}
    for index, label in enumerate(labels):
        support, hits = sum(confusion[index]), confusion[index][index]
        predicted = sum(row[index] for row in confusion)
        figures[label] = {
            "precision": hits / predicted if predicted else 0.0,
            "recall": hits / support if support else 0.0,
            "f1": 2 * hits / (predicted + support) if predicted + support else 0.0,
            "support": support,
        }
    return figures


def _together(
    sums: Mapping[str, torch.Tensor],
    confusion: torch.Tensor,
    *,
    count: int,
    expected: int,
    device: torch.device,
) -> Result:
    """The sums of all ranks as means. A rank that had no sample does not know their names."""
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(sums))
    every = max(names, key=len)
    total = torch.stack(
        [torch.tensor(float(count), dtype=torch.float64, device=device)]
        + [
            torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device)
            for name in every
        ]
    )
    dist.all_reduce(total)
    dist.all_reduce(confusion)
    if total[0] != expected:
        raise AssertionError(f"{total[0]:g} of {expected} samples were evaluated")
    metrics = dict(zip(every, (total[1:] / total[0]).tolist(), strict=True))
    table = tuple(tuple(row) for row in confusion.tolist())
    if answers := sum(map(sum, table)):
        metrics["accuracy"] = sum(row[index] for index, row in enumerate(table)) / answers
    return Result(metrics=metrics, confusion=table)
