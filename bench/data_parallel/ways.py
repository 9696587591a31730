"""One model trained in three ways, a step at a time: by itself, with DataParallel, with DDP.

torch's DataParallel is for GPUs; on a CPU it passes straight through. `Emulated` does there what
it does: in every step it copies the model, hands each copy a part of the batch in a thread of its
own, and adds up the gradients. It is kinder than the original, which collects all outputs on one
device for the loss.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gpu_service.models.digits import DigitsCNN

PARTS = 2  # threads, or ranks
BATCH = 256

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step took, and of it: copying the model, and threads that computed but stood still.

    Alone on a quiet machine a thread always runs. In threads of one interpreter it waits for its
    lock, with DDP for the other ranks; and for the system, where others use the machine, too.
    """

    wall_s: float
    waiting_s: float
    copying_s: float = 0.0


class Clock:
    """The time since it was made, by the wall and of this thread."""

    def __init__(self) -> None:
        self._wall_s, self._ran_s = time.perf_counter(), time.thread_time()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._wall_s

    @property
    def waiting_s(self) -> float:
        return self.wall_s - (time.thread_time() - self._ran_s)


class Layers(nn.Module):
    """150 tiny layers: little arithmetic, much Python. Images [n, 1, 28, 28] → logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        tiny = [layer for _ in range(150) for layer in (nn.Linear(16, 16), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), *tiny, nn.Linear(16, 10))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "150 tiny layers": Layers,
    "digits CNN": lambda: DigitsCNN(width=16),
}


def batch(device: torch.device, size: int = BATCH) -> Batch:
    """Random images [size, 1, 28, 28] and labels; the speed does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((size, 1, 28, 28), generator=generator)
    return image.to(device), torch.randint(0, 10, (size,), generator=generator).to(device)


class Single:
    """One process, one thread, one device. Also a rank of DDP, if `model` is so wrapped."""

    def __init__(self, model: nn.Module, data: Batch) -> None:
        self._model, self._data = model, data
        self._optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(self) -> Step:
        clock = Clock()
        image, label = self._data
        cross_entropy(self._model(image), label).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        _finish(image.device)
        return Step(wall_s=clock.wall_s, waiting_s=clock.waiting_s)


class Emulated:
    """What DataParallel does, on a CPU: copies of the model in threads of one interpreter."""

    def __init__(self, model: nn.Module, data: Batch) -> None:
        self._model, self._data = model, data
        self._optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self._threads = ThreadPoolExecutor(PARTS)

    def step(self) -> Step:
        clock = Clock()
        replicas = [self._model, *(copy.deepcopy(self._model) for _ in range(PARTS - 1))]
        shares = zip(*(tensor.chunk(PARTS) for tensor in self._data), strict=True)
        copying_s = clock.wall_s
        waits = list(self._threads.map(self._part, replicas, shares))
        for replica in replicas[1:]:
            for own, other in zip(self._model.parameters(), replica.parameters(), strict=True):
                own.grad += other.grad
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Step(wall_s=clock.wall_s, waiting_s=sum(waits) / PARTS, copying_s=copying_s)

    def _part(self, replica: nn.Module, share: Batch) -> float:
        """Forward and backward of one copy; how long its thread waited."""
        clock = Clock()
        image, label = share
        (cross_entropy(replica(image), label) / PARTS).backward()
        return clock.waiting_s


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """With DDP, as the training program does it."""
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=True,
    )


def moved_bytes(model: nn.Module, *, way: str) -> int:
    """What a step moves between devices, over all of them, by what each way does."""
    state = sum(value.nbytes for value in model.state_dict().values())
    gradients = sum(value.nbytes for value in model.parameters())
    image, label = batch(torch.device("cpu"))
    others = PARTS - 1
    if way == "DataParallel":  # the model out, parts of the batch out, outputs and gradients back
        outputs = 4 * 10 * len(label)
        parts = (image.nbytes + label.nbytes + outputs) * others // PARTS
        return others * (state + gradients) + parts
    if way == "DDP":  # a ring: each rank sends 2 (n - 1) / n of the gradients
        return 2 * others * gradients
    return 0


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
