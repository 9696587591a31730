"""A task of milliseconds in double precision, with all that could make two runs differ.

Noise on the inputs, dropout, a convolution in channels-last layout, and a number of samples that
no batch size divides. Nothing is downloaded; the samples are random, but the same everywhere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from gpu_service import bundle
from gpu_service.training.task import Source, Task

CLASSES = 3


class Net(nn.Module):
    """Images [n, 1, 8, 8] of `dtype` → logits [n, 3]."""

    def __init__(self, *, dropout: float = 0.2, dtype: str = "float64") -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(6 * 64, CLASSES),
        )
        self.to(dtype=getattr(torch, dtype), memory_format=torch.channels_last)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [n, 3]."""
        return self.layers(image)


def task() -> Task:
    """With noise and dropout, which differ from rank to rank."""
    return make(random=True)


def long() -> Task:
    """The same with more samples, for runs that last some seconds."""
    return make(random=True, count=2005)


def make(*, random: bool, count: int = 85, dtype: str = "float64") -> Task:
    """`count` training samples. Without `random`, a step computes the same on any ranks."""
    return Task(
        name="tiny",
        architecture=bundle.Architecture(
            name="bench.training.tiny:Net",
            arguments={"dropout": 0.2 if random else 0.0, "dtype": dtype},
        ),
        inputs=(_spec("image", (1, 8, 8), dtype),),
        outputs=(_spec("logits", (CLASSES,), dtype),),
        labels=("a", "b", "c"),
        source=Source(name="random numbers", sha256="0" * 64),
        train=samples(count, seed=1, dtype=dtype),
        test=samples(31, seed=2, dtype=dtype),
        loss=partial(cross_entropy, reduction="none"),
        augment=_noise if random else None,
    )


class Memory(nn.Module):
    """A step [n, 2] of a stream and the state [n, 5] → logits [n, 3] and the new state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 5)
        self.classes = nn.Linear(5, CLASSES)
        self.to(dtype=torch.float64)

    def forward(self, step: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step."""
        seen = self.cell(step, seen)
        return self.classes(seen), seen


def streams() -> Task:
    """40 streams of at most 6 steps; the label -1 stands where one has ended."""
    return Task(
        name="tiny-streams",
        architecture=bundle.Architecture(name="bench.training.tiny:Memory", arguments={}),
        inputs=(_spec("step", (2,), "float64"),),
        outputs=(_spec("logits", (CLASSES,), "float64"),),
        state=(_spec("seen", (5,), "float64"),),
        streams=True,
        labels=("a", "b", "c"),
        source=Source(name="random numbers", sha256="0" * 64),
        train=_streams(40, seed=3),
        test=_streams(9, seed=4),
        loss=_stream_loss,
    )


def samples(count: int, *, seed: int, dtype: str) -> TensorDataset:
    """Images whose class shows in their brightest third, and whose first pixel is their own."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    label = torch.randint(0, CLASSES, (count,), generator=generator)
    for index, third in enumerate(label.tolist()):
        image[index, 0, 2 * third : 2 * third + 2] += 0.3
    return TensorDataset(image.to(getattr(torch, dtype)), label)


def _streams(count: int, *, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand((count, 6, 2), generator=generator, dtype=torch.float64)
    label = (step.sum(dim=2).cumsum(dim=1) % CLASSES).long()
    length = torch.randint(1, 7, (count, 1), generator=generator)
    return TensorDataset(step, label.where(torch.arange(6) < length, -1))


def _stream_loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    losses = cross_entropy(logits.transpose(1, 2), label, ignore_index=-1, reduction="none")
    return losses.sum(dim=1) / (label >= 0).sum(dim=1)


def _noise(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return image + 0.1 * torch.randn_like(image), label


def _spec(name: str, shape: tuple[int, ...], dtype: str) -> bundle.TensorSpec:
    datatype = {"float64": "FP64", "float32": "FP32"}[dtype]
    return bundle.TensorSpec(name=name, datatype=datatype, shape=shape)
