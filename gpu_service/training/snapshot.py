"""What survives a crash: snapshots of a run, from which it goes on as if nothing had been.

Owns the folder of `--snapshots`. A snapshot is one safetensors file: tensors, and facts as JSON
in its header. Its name holds the position in the run and the beginning of its SHA-256. Rank 0
writes, on a thread of its own; any rank may find, so that hosts need not share the folder.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist

from gpu_service.training import TrainingError
from gpu_service.training.distributed import Placement

FORMAT = 1
KEPT = 2  # the newest, and one to fall back to

_NAME = re.compile(r"(\d{6,})-(\d{9,})-([0-9a-f]{16})\.safetensors")
_FACTS = "facts"
_WRITING = ".writing-"


class SnapshotError(Exception):
    """A file is not a whole snapshot; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run before `step` of `epoch`, both from 0. `facts` holds what JSON can."""

    epoch: int
    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def encode(snapshot: Snapshot) -> bytes:
    """The content of a snapshot's file. Tensors must be on the CPU, each with its own memory."""
    facts = {
        "format": FORMAT,
        "epoch": snapshot.epoch,
        "step": snapshot.step,
        "facts": snapshot.facts,
    }
    return safetensors.torch.save(
        snapshot.tensors, {_FACTS: json.dumps(facts, allow_nan=False, sort_keys=True)}
    )


def decode(content: bytes) -> Snapshot:
    """The snapshot in `content`. Raises SnapshotError."""
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"][_FACTS])
        if facts["format"] != FORMAT:
            raise SnapshotError(f"format {facts['format']}; this program reads {FORMAT}")
        return Snapshot(
            epoch=facts["epoch"], step=facts["step"], tensors=tensors, facts=facts["facts"]
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"not a snapshot: {error}") from None


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write the snapshot as a whole or not at all, and remove those before the last but one."""
    content = encode(snapshot)
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{snapshot.epoch:06}-{snapshot.step:09}-{digest}.safetensors"
    beside = folder / f"{_WRITING}{uuid.uuid4().hex}"
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.rename(path)
    _sync(folder)
    for old in _listed(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def newest(folder: Path, *, say: Callable[[str], None]) -> bytes | None:
    """The content of the newest whole snapshot in `folder`; None if there is none.

    One that is not whole is put aside as NAME.damaged, which `say` is told.
    """
    for path in _listed(folder):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # another host that shares the folder has put it aside
        actual = hashlib.sha256(content).hexdigest()[:16]
        if f"-{actual}." in path.name:
            return content
        aside = path.with_name(path.name + ".damaged")
        say(
            f"snapshot {path} is damaged: sha256 {actual}…, {len(content)} bytes; it is now "
            f"{aside.name}, and the run goes on from the one before it"
        )
        path.replace(aside)
    return None


class Snapshots:
    """The snapshots of one run, on one rank. Every rank calls `resume` and `save`.

    `folder` None: there are none. `course` is what a run that goes on must have in common with
    the one that was interrupted.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        place: Placement,
        device: torch.device,
        course: Mapping[str, Any],
    ) -> None:
        self._folder, self._place, self._device = folder, place, device
        self._course = dict(course)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "snapshot")
        self._writing: concurrent.futures.Future[Path] | None = None

    def __bool__(self) -> bool:
        return self._folder is not None

    def resume(self) -> Snapshot | None:
        """The newest whole snapshot that any host has, the same on every rank; None to begin.

        Raises TrainingError when it is of a run with other settings.
        """
        if self._folder is None:
            return None
        content = self._look()
        position = decode(content) if content else None
        mine = (position.epoch, position.step) if position else (-1, -1)
        found = torch.tensor([*mine, len(content or b"")], device=self._device)
        everybodys = [torch.zeros_like(found) for _ in range(self._place.world_size)]
        dist.all_gather(everybodys, found)
        newest_of = [(*each.tolist(), rank) for rank, each in enumerate(everybodys)]
        epoch, _, size, holder = max(newest_of)
        if epoch < 0:
            return None
        snapshot = decode(self._shared(content, size=size, holder=holder))
        self._compare(snapshot.facts["course"])
        return snapshot

    def save(
        self,
        *,
        epoch: int,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        """Copy the state now, and write it meanwhile. Waits until the one before is written.

        Raises TrainingError if that failed.
        """
        if self._folder is None or self._place.rank != 0:
            return
        self.wait()
        snapshot = Snapshot(
            epoch=epoch,
            step=step,
            tensors={
                name: value.detach().to("cpu", copy=True).contiguous().clone()
                for name, value in tensors.items()
            },
            facts={**facts, "course": self._course, "world_size": self._place.world_size},
        )
        self._writing = self._thread.submit(write, self._folder, snapshot)

    def wait(self) -> None:
        """Until the last snapshot is on the disk. Raises TrainingError if it cannot be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            raise TrainingError(
                f"--snapshots {self._folder}: cannot write a snapshot: {error.strerror or error}"
            ) from error

    def _look(self) -> bytes | None:
        """What this host has: one rank of each looks."""
        if self._place.local_rank != 0 or self._folder is None:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._place.rank == 0:
                for left in self._folder.glob(f"{_WRITING}*"):  # by a run that was killed
                    left.unlink(missing_ok=True)
            return newest(self._folder, say=print)
        except OSError as error:
            raise TrainingError(f"--snapshots {self._folder}: {error.strerror}") from error

    def _shared(self, content: bytes | None, *, size: int, holder: int) -> bytes:
        """The `content` that rank `holder` has, on every rank."""
        if self._place.rank == holder and content is not None:
            tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        else:
            tensor = torch.empty(size, dtype=torch.uint8, device=self._device)
        dist.broadcast(tensor, src=holder)
        return tensor.cpu().numpy().tobytes()

    def _compare(self, before: Mapping[str, Any]) -> None:
        differ = [
            f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in self._course.items()
            if before.get(name) != value
        ]
        if differ:
            raise TrainingError(
                f"--snapshots {self._folder}: holds a run with other settings "
                f"({'; '.join(differ)}); give the same ones, or another folder to begin anew"
            )


def _listed(folder: Path) -> list[Path]:
    """The snapshots in `folder`, the one that is furthest in its run first."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda each: (int(each[0][1]), int(each[0][2]), each[1].stat().st_mtime_ns))
    return [path for _, path in reversed(found)]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
