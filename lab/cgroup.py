"""The lab's cgroups. Every process of a lab is in one, so that all of them, and no others, can be
ended at once, however they were left. Who enters: daemons themselves, as their first step.
"""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from lab.names import cgroup_name
from lab.system import wait_for

# What systemd's units can limit and systemd hands down itself; the machine's others stay alone.
_CONTROLLERS: Final = frozenset(("cpu", "io", "memory", "pids"))


class Cgroup:
    """A cgroup of the lab's, `gateway-lab-LAB[/PART]`, in each hierarchy that systemd cares about:
    cgroup v2 and, on a machine that still mounts it, v1's `name=systemd`."""

    def __init__(self, lab: str, part: str | None = None) -> None:
        self._tops = hierarchies()
        self._tail = Path(cgroup_name(lab), part or "")
        self.directories = [mount / self._tail for mount in self._tops]

    def create(self) -> None:
        for top, directory in zip(self._tops, self.directories, strict=True):
            directory.mkdir(parents=True, exist_ok=True)
            for level in reversed(directory.parents):
                if level.is_relative_to(top):
                    _hand_down_controllers(level)

    def enter(self) -> None:
        """Move the calling process in."""
        for directory in self.directories:
            (directory / "cgroup.procs").write_text("0")

    def leave(self) -> None:
        """Move the calling process out, to the top, and remove the cgroup if it is empty then."""
        for top, directory in zip(self._tops, self.directories, strict=True):
            with suppress(OSError):
                (top / "cgroup.procs").write_text("0")
                directory.rmdir()

    def pids(self) -> set[int]:
        """All processes inside, in all levels."""
        found: set[int] = set()
        for top in self.directories:
            for directory in _levels(top):
                with suppress(OSError):
                    found.update(map(int, (directory / "cgroup.procs").read_text().split()))
        return found

    def signal_kill(self) -> None:
        """Send SIGKILL to every process inside, at once: none can escape by forking meanwhile.
        Nothing happens where the cgroup doesn't exist."""
        # Only v2 can do this; whoever enters the v1 cgroup entered the v2 one before.
        with suppress(FileNotFoundError):
            (self.directories[0] / "cgroup.kill").write_text("1")

    def kill(self) -> None:
        """End every process inside, wait for that, and remove the cgroup."""
        self.signal_kill()
        wait_for(
            lambda: not self.pids(),
            awaited=f"the processes of {self.directories[0]} to end",
            timeout_s=20,
            log=f"{self.directories[0]}/cgroup.procs",
            every_s=0.002,
        )
        for directory in self.directories:
            _remove_cgroup(directory)


def _hand_down_controllers(level: Path) -> None:
    """Let the cgroups below limit what this one can, so that limits of the hosts' units take
    effect. Where a controller is mounted as v1 there is nothing to hand down: such limits have no
    effect in the hosts."""
    with suppress(FileNotFoundError):  # v1's hierarchy has no such files.
        has = _CONTROLLERS & set((level / "cgroup.controllers").read_text().split())
        given = set((level / "cgroup.subtree_control").read_text().split())
        if has - given:
            (level / "cgroup.subtree_control").write_text(
                " ".join(f"+{controller}" for controller in sorted(has - given))
            )


def _remove_cgroup(top: Path) -> None:
    """rmdir the cgroup and those below it. A cgroup whose last process is just being reaped is
    busy for a moment."""
    for directory in _levels(top):

        def gone(directory: Path = directory) -> bool:
            try:
                directory.rmdir()
            except FileNotFoundError:
                return True
            except OSError:
                return False
            return True

        wait_for(
            gone,
            awaited=f"{directory} to be free",
            timeout_s=10,
            log=f"{directory}/cgroup.procs",
            every_s=0.002,
        )


def _levels(top: Path) -> list[Path]:
    """The cgroup and all below it, the lowest first. Those that vanish meanwhile are passed over;
    the top is always there."""
    below = [Path(found) for found, _, _ in os.walk(top, topdown=False)]
    return below or [top]


@functools.cache
def hierarchies() -> tuple[Path, ...]:
    """Mount points of cgroup v2 (first) and of v1's `name=systemd` where there is one."""
    unified: list[Path] = []
    named: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = Path(before.split()[4])
        if kind == "cgroup2":
            unified.append(point)
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            named.append(point)
    return tuple(unified[:1] + named[:1])
