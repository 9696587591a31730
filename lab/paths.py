"""Where the lab keeps its files, and the small JSON files that its processes leave there.

Each JSON file has one writer: `state.json` the command that holds the lab's lock, `relay.json`
the relay, `hosts/HOST/state.json` that host's supervisor. All others only read.
Imports nothing that is slow, so that an inventory file can use it for free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lab.errors import LabError

HOME_VARIABLE: Final = "GATEWAY_LAB_HOME"
DEFAULT_HOME: Final = Path("/var/lib/gateway-lab")


def home() -> Path:
    """Folder of everything the lab keeps. Raises LabError where it can't be used."""
    path = Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    if not path.is_absolute() or set(str(path)) & set(',:\\ "\n'):
        # These characters have a meaning in overlayfs' options and in ssh_config.
        raise LabError(f'{HOME_VARIABLE}={path}: give an absolute path without , : \\ " or space')
    return path


@dataclass(frozen=True, kw_only=True)
class HostPaths:
    """Files of one host of a lab."""

    directory: Path

    @property
    def upper(self) -> Path:
        """What the host wrote over the base image."""
        return self.directory / "upper"

    @property
    def work(self) -> Path:
        return self.directory / "work"

    @property
    def root(self) -> Path:
        """Mounted only in the mount namespace of the host's supervisor; empty to everyone else."""
        return self.directory / "root"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def supervisor_log(self) -> Path:
        return self.directory / "supervisor.log"


@dataclass(frozen=True, kw_only=True)
class LabPaths:
    """Files of one lab."""

    home: Path
    name: str

    @classmethod
    def of(cls, name: str) -> LabPaths:
        return cls(home=home(), name=name)

    @property
    def directory(self) -> Path:
        return self.home / "labs" / self.name

    @property
    def lock(self) -> Path:
        """Outside the lab's folder, so that it can be held while that folder is removed."""
        return self.home / "labs" / f"{self.name}.lock"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def relay(self) -> Path:
        return self.directory / "relay.json"

    @property
    def relay_log(self) -> Path:
        return self.directory / "relay.log"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    @property
    def ssh_key(self) -> Path:
        return self.directory / "ssh_key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    def host(self, name: str) -> HostPaths:
        return HostPaths(directory=self.directory / "hosts" / name)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None when there is no such file.

    Raises LabError for a file that holds no JSON object: files are renamed into place whole, so
    someone else wrote there.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise LabError(f"{path} is not JSON ({error}); run: python -m lab down") from None
    if not isinstance(found, dict):
        raise LabError(f"{path} holds no JSON object; run: python -m lab down")
    return found


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Replace the file in one step: a reader sees the old or the new text, never a part."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace the file in one step."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.chmod(mode)
    beside.replace(path)
