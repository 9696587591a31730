"""Tells systemd how the service is: sd_notify(3), without libsystemd.

Owns the datagram socket to the address in NOTIFY_SOCKET; does nothing where there is none.
"""

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends assignments such as `READY=1` to the service manager that started this process."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # A leading "@" stands for the zero byte of Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_s = _watchdog_s(environ) if address else None

    @property
    def watchdog_s(self) -> float | None:
        """The manager kills the service when it hears no WATCHDOG=1 for so long; None: never."""
        return self._watchdog_s

    def send(self, *assignments: str) -> None:
        """Send all in one datagram. OSError when the manager's socket is gone or wrong."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A manager that does not read must not stop the event loop: rather an error.
            sender.setblocking(False)
            sender.sendto("\n".join(assignments).encode(), self._address)


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    # The variables are inherited: WATCHDOG_PID says which process they are for.
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(environ["WATCHDOG_USEC"]) / 1e6
    except (KeyError, ValueError):
        return None
