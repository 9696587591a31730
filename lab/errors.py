"""The lab's errors. Each says what is wrong, where, and what the person in front of it can do.

Pure; imported by every other module of the lab.
"""

from __future__ import annotations


class LabError(Exception):
    """Something about the lab that a person must act on; the message is the whole story."""


class LabNotUp(LabError):  # noqa: N818 - the name says the state
    """The named lab isn't running."""

    def __init__(self, name: str) -> None:
        option = "" if name == "lab" else f" --name {name}"
        super().__init__(f"the lab {name!r} is not up; start it with: python -m lab{option} up")
        self.name = name


class WaitTimeoutError(LabError):
    """Something awaited did not happen in its time."""

    def __init__(self, *, awaited: str, timeout_s: float, log: str) -> None:
        super().__init__(f"gave up after {timeout_s:g} s waiting for {awaited}; see {log}")
