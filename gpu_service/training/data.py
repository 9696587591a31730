"""Which samples are whose: the order of an epoch, its steps, and each rank's share of a step.

Pure but for the workers that a DataLoader starts. A step's batch is the same set of samples with
any number of ranks: they share it among them, and only its parts differ.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset

from gpu_service.training.task import Samples, Tensors

_VALIDATION_SEED = 2026  # not the run's: two seeds are compared on the same validation samples


def seed_of(*parts: int) -> int:
    """One seed out of several numbers; neighbours have nothing in common."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_step(device: torch.device, *parts: int) -> None:
    """Seed torch's default generators, of the CPU and of `device`, with `seed_of(*parts)`.

    `torch.manual_seed` does it for every kind of device, which takes 0.1 ms of each step.
    """
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class Batches(Sampler[list[int]]):
    """This rank's share of each step's batch, in an order of its own in each epoch.

    Like DistributedSampler, with three differences: an epoch can begin at any step, which is how
    a run goes on where it was; the batch of a step does not depend on the number of ranks; and
    with `keep_last`, the last and smaller batch is shared, too, without repeating a sample.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        keep_last: bool = False,
    ) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._steps = -(-count // batch_size) if keep_last else count // batch_size
        self._epoch, self._first = 0, 0

    def __len__(self) -> int:
        """The steps of a whole epoch."""
        return self._steps

    def set_epoch(self, epoch: int, *, first: int = 0) -> None:
        """Which epoch is next, from which of its steps on."""
        self._epoch, self._first = epoch, first

    def size(self, step: int) -> int:
        """The samples of a step, over all ranks."""
        return min(self._batch_size, self._count - step * self._batch_size)

    def weight(self, step: int) -> float:
        """The weight of this rank's samples in a step, so that DDP's mean is the batch's."""
        size = self.size(step)
        return self._world_size / size if self._rank < size else 0.0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self._seed, self._epoch))
        order = torch.randperm(self._count, generator=generator).tolist()
        for step in range(self._first, self._steps):
            start = step * self._batch_size
            batch = order[start : start + self._batch_size]
            # Every rank takes part in every step: one without samples has one of weight 0.
            yield batch[self._rank :: self._world_size] or batch[:1]


def load(samples: Samples, batches: Sampler[list[int]], *, workers: int, pin: bool) -> Any:
    """An iterable of the tensors [n, …] of each of `batches`; `pin`: in page-locked memory."""
    if isinstance(samples, TensorDataset):
        return DataLoader(samples, sampler=batches, batch_size=None)  # indexed with a whole batch
    return DataLoader(
        samples,  # type: ignore[arg-type]  # a protocol here, a base class there
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


class Turns(Sampler[list[int]]):
    """Batches for the evaluation: rank r has the samples r, r + world size, …: each once."""

    def __init__(self, count: int, *, batch_size: int, rank: int, world_size: int) -> None:
        mine = range(rank, count, world_size)
        self._parts = [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[list[int]]:
        yield from map(list, self._parts)


def hold_out(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """`samples` without a random `share` of them, and that share, the same in every run."""
    if not share:
        return samples, _chosen(samples, [])
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    order = torch.randperm(len(samples), generator=generator).tolist()
    held = round(share * len(samples))
    return _chosen(samples, sorted(order[held:])), _chosen(samples, sorted(order[:held]))


def on(device: torch.device, samples: Samples) -> Samples:
    """`samples`, those of a TensorDataset moved to `device` as a whole."""
    if not isinstance(samples, TensorDataset):
        return samples
    return TensorDataset(*(tensor.to(device) for tensor in samples.tensors))


def moved(tensors: Sequence[torch.Tensor], device: torch.device) -> Tensors:
    """`tensors` on `device`; from pinned memory, without waiting for the copy."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def _chosen(samples: Samples, indices: list[int]) -> Samples:
    if isinstance(samples, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in samples.tensors))
    return Subset(samples, indices)  # type: ignore[arg-type]
