"""Running commands, waiting with a bound, and the ties between a process and its children."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from lab.errors import LabError, WaitTimeoutError

LIBC: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1

_T = TypeVar("_T")


def run(command: Sequence[str], *, input_text: str | None = None, timeout_s: float = 60) -> str:
    """Run a command to its end and return its output.

    Raises LabError with the command and what it printed when it fails, is missing or hangs.
    """
    try:
        done = subprocess.run(
            command,
            input=input_text,
            stdin=subprocess.DEVNULL if input_text is None else None,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not installed; run: python -m lab setup") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"no end after {timeout_s:g} s: {' '.join(command)}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"failed ({done.returncode}): {' '.join(command)}\n{said}")
    return done.stdout


def detach(command: Sequence[str], *, log: Path, cwd: Path = Path("/")) -> None:
    """Start a process that outlives this one: with a session of its own, a child of nobody here,
    and what it prints in the log. Raises LabError when it can't be started."""
    with log.open("ab") as output:
        done = subprocess.run(
            ["setsid", "--fork", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            check=False,
        )
    if done.returncode:
        raise LabError(f"could not start {command[0]}; see {log}")


def wait_for(
    probe: Callable[[], _T | None],
    *,
    awaited: str,
    timeout_s: float,
    log: str,
    every_s: float = 0.02,
) -> _T:
    """Call `probe` until it returns something true, and return that.

    Raises WaitTimeoutError, which names what was awaited and the log to look in.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise WaitTimeoutError(awaited=awaited, timeout_s=timeout_s, log=log)
        time.sleep(every_s)
    return found


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process the signal when the thread that forked it ends. The
    process must check its parent afterwards where that may have ended before the call."""
    if LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
