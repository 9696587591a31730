"""qemu's monitor over its Unix socket (QMP): one command, one answer.

https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.errors import LabError


class Monitor:
    """A connection to the monitor of one VM; qemu talks to one client at a time."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Raises LabError where no qemu answers."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("r")
            self._lines.readline()  # qemu greets first
        except OSError as error:
            self._socket.close()
            raise LabError(f"no qemu answers at {path}: {error}") from None
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: str) -> Any:
        """What the command returns. Raises LabError with qemu's words."""
        message = {"execute": command, "arguments": arguments}
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
            while line := self._lines.readline():
                answer = json.loads(line)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise LabError(f"qemu: {command}: {answer['error']['desc']}")
                # Anything else is an event, of which there may be some in between.
        except OSError as error:
            raise LabError(f"qemu did not answer {command} at {self._path}: {error}") from None
        raise LabError(f"qemu ended at {command}; its console log says more")

    def snapshot(self, verb: str, tag: str) -> None:
        """`savevm`, `loadvm` or `delvm`: memory, devices and disk, inside the disk's file."""
        said = self.execute("human-monitor-command", **{"command-line": f"{verb} {tag}"})
        if said.strip():
            raise LabError(f"qemu: {verb} {tag}: {said.strip()}")
