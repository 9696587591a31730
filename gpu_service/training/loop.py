"""The training loop and the evaluation: what runs on every rank, in step with the others.

Owns the optimiser, its schedule and the order of the samples. Needs a process group; all
ranks must call these functions with the same arguments.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from gpu_service.training import TrainingError
from gpu_service.training.settings import Settings

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How an epoch went, over all ranks: `loss` is the mean over its samples."""

    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    images_per_s: float
    remaining_s: float


def train(
    *,
    model: nn.Module,
    samples: TensorDataset,
    augment: Augment,
    settings: Settings,
    device: torch.device,
    report: Callable[[Progress], None],
) -> None:
    """Train `model`, which is on `device`, in place: afterwards it is equal on every rank.

    `samples` holds (input [n, …], label [n] int64) on `device`. `report` is called after each
    epoch. Raises TrainingError, on every rank, when the loss is no longer a number.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sampler: DistributedSampler[Any] = DistributedSampler(
        samples, seed=settings.seed, drop_last=True
    )
    # Whole batches are picked at once (batch_size=None), not collated sample by sample.
    batches = BatchSampler(sampler, settings.batch_size // world_size, drop_last=True)
    loader = DataLoader(samples, sampler=batches, batch_size=None)
    if not len(batches):
        raise TrainingError(
            f"--batch-size {settings.batch_size}: there are only {len(samples)} training samples"
        )
    parallel = wrap(model, device)
    optimizer = torch.optim.AdamW(
        parallel.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    steps = len(batches) * settings.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=steps, pct_start=0.15
    )
    # A seed of its own per rank: two ranks must not distort their images alike.
    generator = torch.Generator(device).manual_seed(settings.seed * world_size + rank)
    model.train()
    started = time.monotonic()
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)  # without it every epoch would have the same order
        total = torch.zeros((), device=device)
        for image, label in loader:
            logits = parallel(augment(image, generator))
            loss = cross_entropy(logits, label, label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # DDP averages gradients in here
            optimizer.step()
            schedule.step()
            total += loss.detach()
        dist.all_reduce(total)
        loss_mean = total.item() / (len(batches) * world_size)
        if not math.isfinite(loss_mean):
            raise TrainingError(
                f"epoch {epoch + 1}: the loss is {loss_mean}; try a --learning-rate below "
                f"{settings.learning_rate:g}"
            )
        elapsed_s = time.monotonic() - started
        report(
            Progress(
                epoch=epoch + 1,
                epochs=settings.epochs,
                loss=loss_mean,
                learning_rate=float(schedule.get_last_lr()[0]),
                images_per_s=settings.batch_size * len(batches) * (epoch + 1) / elapsed_s,
                remaining_s=elapsed_s / (epoch + 1) * (settings.epochs - epoch - 1),
            )
        )


def wrap(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """`model` so that `backward` leaves in each gradient the mean over all ranks."""
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # gradients live in the communication buffers: no copies
        static_graph=True,  # every step uses every parameter: nothing to search for
    )


@torch.inference_mode()
def evaluate(
    *, model: nn.Module, samples: TensorDataset, device: torch.device, batch_size: int = 256
) -> dict[str, float]:
    """Accuracy and mean loss of `model` on `samples`, each counted once; equal on every rank.

    Rank r takes samples r, r + world_size, …: ranks may differ by one sample, and none is
    repeated to even them out, as DistributedSampler would.
    """
    model.eval()
    mine = torch.arange(dist.get_rank(), len(samples), dist.get_world_size(), device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for indices in torch.split(mine, batch_size):
        image, label = samples[indices]
        logits = model(image)
        correct = (logits.argmax(dim=1) == label).sum().item()
        loss = cross_entropy(logits, label, reduction="sum").item()
        sums += torch.tensor([correct, loss, len(label)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    correct_count, loss_sum, count = sums.tolist()
    if count != len(samples):
        raise AssertionError(f"{count} of {len(samples)} samples were evaluated")
    return {"test_accuracy": correct_count / count, "test_loss": loss_sum / count}
