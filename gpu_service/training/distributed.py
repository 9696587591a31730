"""Where this process stands among its peers, told by torchrun's environment variables.

Owns the process group and the choice of backend and device: NCCL with one GPU per rank where
the host has GPUs, gloo on the CPU otherwise. One process group per process, on its main thread.
"""

import ctypes
import dataclasses
import datetime
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gpu_service.training import TrainingError

_PR_SET_PDEATHSIG = 1  # prctl(2)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """This process among `world_size` equal ones; `master` is HOST:PORT, empty when alone."""

    rank: int
    world_size: int
    local_rank: int
    master: str


def placement(environ: Mapping[str, str]) -> Placement:
    """The placement in torchrun's variables; a single process when there are none of them.

    Raises TrainingError when some are missing or make no sense.
    """
    if "RANK" not in environ:
        return Placement(rank=0, world_size=1, local_rank=0, master="")
    missing = [name for name in _VARIABLES if not environ.get(name)]
    if missing:
        raise TrainingError(
            f"RANK is set but {', '.join(missing)} not: start with torchrun, which sets "
            f"{', '.join(_VARIABLES)}, or unset RANK for a single process"
        )
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in _VARIABLES[:3])
    except ValueError as error:
        raise TrainingError(
            f"RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers: {error}"
        ) from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise TrainingError(f"RANK {rank} does not fit WORLD_SIZE {world_size}")
    master = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    return Placement(rank=rank, world_size=world_size, local_rank=local_rank, master=master)


@contextmanager
def process_group(place: Placement, *, timeout_s: float) -> Iterator[torch.device]:
    """Join the process group, and yield the device that this rank owns.

    Raises TrainingError when the others do not come within `timeout_s`, or go away later. Left
    without an error, it waits for all ranks, so that none is taken for lost by the others.
    """
    device = _device(place)
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            device_id=device if device.type == "cuda" else None,
            timeout=datetime.timedelta(seconds=timeout_s),
            rank=place.rank,
            world_size=place.world_size,
            # With a store of its own a single process runs the very same code as many.
            store=None if place.master else dist.HashStore(),  # type: ignore[attr-defined]
        )
    except (dist.DistError, RuntimeError) as error:
        raise TrainingError(
            f"rank {place.rank} of {place.world_size} did not find the others at {place.master} "
            f"within {timeout_s:g} s; is every launcher running, with the same --nnodes, and can "
            f"the hosts reach each other? ({_first_sentence(error)})"
        ) from None
    try:
        yield device
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        raise TrainingError(
            f"rank {place.rank} of {place.world_size} lost contact with another rank, which "
            f"failed or took longer than {timeout_s:g} s: see what that one printed "
            f"({_first_sentence(error)})"
        ) from None


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Have this process killed when torchrun's agent, its parent, is gone (Linux only).

    An agent that was killed cannot stop its ranks: they would train on beside the ranks of the
    next launch, and write to the same files.
    """
    if "TORCHELASTIC_RUN_ID" not in environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went away before that
        os.kill(os.getpid(), signal.SIGKILL)


def _device(place: Placement) -> torch.device:
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    if place.local_rank >= count:
        raise TrainingError(
            f"no GPU for LOCAL_RANK {place.local_rank}: this host has {count}; "
            f"start torchrun with --nproc-per-node={count}"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _lost_contact(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; only their text tells them from faults of the program.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _first_sentence(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
