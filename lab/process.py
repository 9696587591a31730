"""Identity of a process: pid *and* start time, so that a pid used again is never signalled.

Imports nothing that is slow: an inventory file goes through here.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that can be told from a later one with the same pid.

    `start_ticks`: field 22 of /proc/PID/stat, clock ticks since the machine booted. `boot_id`:
    of that boot, because after a reboot of the machine pid and ticks may well repeat.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises ProcessLookupError when there is no such process, or only a zombie of it."""
        start_ticks = _start_ticks(pid)
        if start_ticks is None:
            raise ProcessLookupError(pid)
        return cls(pid=pid, start_ticks=start_ticks, boot_id=boot_id())

    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.start_ticks and boot_id() == self.boot_id

    def send(self, number: signal.Signals) -> bool:
        """Signal the process; False when it is gone. Immune to a pid used again: the pidfd is
        opened first and the start time checked after, so the signal can't reach another one."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """None when there is no such process or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything; the fields are counted after it.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])
