"""A Debian root file system from this machine's own apt sources, by mmdebstrap."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from lab.errors import LabError
from lab.system import die_with_parent

SUITE: Final = "bookworm"
BUILD_TIMEOUT_S: Final = 900

_UNUSED: Final = ("doc", "locale", "man")


def bootstrap(
    root: Path,
    include: Iterable[str],
    *,
    log_path: Path,
    progress: Callable[[str], None],
    options: Iterable[str] = (),
) -> None:
    """Make the folder `root` with the packages and all that they need; other work goes first.

    `options` are further ones of mmdebstrap.
    Raises LabError with the end of the log, which is at `log_path`.
    """
    command = [
        *("nice", "-n", "10"),
        # Namespaces of its own: what the build mounts and starts ends with it, also when this
        # process is killed.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("timeout", "--kill-after=5", str(BUILD_TIMEOUT_S)),
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase"),
        "--skip=check/empty",
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=Acquire::Check-Date "false"',
        "--aptopt=Acquire::Retries 3",
        # A build that a crash of the machine cuts short is thrown away: no need to sync files.
        "--dpkgopt=force-unsafe-io",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNUSED),
        f"--include={','.join(include)}",
        *options,
        *(SUITE, str(root), str(apt_sources())),
    ]
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),
        ) as build,
    ):
        if build.stderr is None:
            raise AssertionError("asked for a pipe")
        for line in build.stderr:
            log.write(line)
            log.flush()
            if line.startswith("I: ") and line.rstrip().endswith("..."):
                progress("  " + line.removeprefix("I: ").strip().removesuffix("..."))
    if build.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-12:])
        why = f"took more than {BUILD_TIMEOUT_S} s" if build.returncode == 124 else "failed"
        raise LabError(f"the build {why} ({build.returncode}); see {log_path}, which ends:\n{tail}")


def apt_sources() -> Path:
    """The file that says where this machine gets Debian's own packages from."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if path.is_file() and path.stat().st_size:
            return path
    raise LabError(
        "found neither /etc/apt/sources.list.d/debian.sources nor a filled /etc/apt/sources.list; "
        "images are made of the packages that they point to"
    )
