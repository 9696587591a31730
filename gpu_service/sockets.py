"""Where the listening socket comes from: systemd, which keeps it across restarts, or this process.

A socket that systemd hands over (sd_listen_fds(3)) stays open there when this process closes its
own descriptor: connections go on being accepted by the kernel, and the next process serves them.
"""

import os
import socket
from collections.abc import MutableMapping

from gpu_service.dispatch import StartupError

# The first descriptor that is handed over: SD_LISTEN_FDS_START.
_FIRST = 3

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def open_listener(
    host: str,
    port: int,
    *,
    environ: MutableMapping[str, str] = os.environ,
    first_descriptor: int = _FIRST,
) -> socket.socket:
    """systemd's socket where it handed one to this process, else one bound to `host`:`port`.

    Takes the variables of the hand-over out of `environ`. Raises StartupError.
    """
    count = _handed_over(environ)
    if count is None:
        return bind(host, port)
    if count != 1:
        raise StartupError(
            f"systemd handed over {count} sockets instead of one; check ListenStream= of the "
            f"worker's socket unit, and that no other socket unit names this service"
        )
    return _taken(first_descriptor)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound but not listening: a taken port shows at once, clients do not come yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; check --host and --port, and "
            f"with `ss -ltnp` what else listens there"
        ) from None
    return listener


def _handed_over(environ: MutableMapping[str, str]) -> int | None:
    """How many descriptors are for this process; None where nothing was handed over."""
    pid, count, _ = (environ.pop(name, "") for name in _VARIABLES)
    # The variables are inherited: LISTEN_PID says which process they are for.
    if pid != str(os.getpid()):
        return None
    if not count.isdecimal():
        raise StartupError(f"LISTEN_FDS is {count!r}; systemd sets it to a whole number")
    return int(count)


def _taken(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        taken = socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartupError(
            f"descriptor {descriptor}, handed over by systemd, is no socket: {error.strerror}"
        ) from None
    is_stream = taken.type == socket.SOCK_STREAM
    if is_stream and taken.family in (socket.AF_INET, socket.AF_INET6) and _listens(taken):
        return taken
    found = f"{taken.family.name} {taken.type.name}"
    taken.close()
    raise StartupError(
        f"systemd handed over a socket that is no listening TCP socket ({found}); the worker's "
        f"socket unit needs ListenStream=ADDRESS:PORT and Accept=no"
    )


def _listens(taken: socket.socket) -> bool:
    return bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
