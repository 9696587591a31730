"""Removing large folders without waiting for it: deleting a host's disk can take a minute where
the file system passes each freed block on to the drive (the `discard` mount option).

A folder is gone from its place at once; a process of its own, with low priority, frees the space
and ends by itself.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from lab.system import detach


def discard(folder: Path, *, home: Path) -> None:
    """Remove the folder, and what an earlier call that was cut short left. Both on one file
    system. Nothing happens where there is none."""
    trash = home / "trash"
    trash.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(trash / secrets.token_hex(8))
    if left := sorted(map(str, trash.iterdir())):
        remove = ["rm", "--recursive", "--force", "--one-file-system", "--", *left]
        # One at a time: more would only get in each other's way.
        one_by_one = ["flock", str(home / "trash.lock"), "nice", "-n", "19"]
        detach([*one_by_one, *remove], log=Path("/dev/null"))
