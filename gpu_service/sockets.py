"""Where the listening sockets come from: systemd, which keeps them across restarts, or this
process. One is of TCP; a Unix socket may come with it, for a proxy on the same host.

A socket that systemd hands over (sd_listen_fds(3)) stays open there when this process closes its
own descriptor: connections go on being accepted by the kernel, and the next process serves them.
"""

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from gpu_service.device import StartupError

# The first descriptor that is handed over: SD_LISTEN_FDS_START.
_FIRST = 3

_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


# Whoever may enter the folder of a Unix socket, and belongs to its group, may connect.
_UNIX_MODE = 0o660


def open_listeners(
    host: str,
    port: int,
    unix_socket: str = "",
    *,
    environ: MutableMapping[str, str] = os.environ,
    first_descriptor: int = _FIRST,
) -> list[socket.socket]:
    """systemd's sockets where it handed some to this process, else bound ones; that of TCP first.

    Bound to `host`:`port`, and to the path `unix_socket` unless that is empty. Takes the variables
    of the hand-over out of `environ`. Raises StartupError.
    """
    count = _handed_over(environ)
    if count is None:
        bound = [bind(host, port)]
        return [*bound, bind_unix(unix_socket)] if unix_socket else bound
    taken = [_taken(first_descriptor + number) for number in range(min(count, 2))]
    taken.sort(key=lambda listener: listener.family == socket.AF_UNIX)
    kinds = [listener.family == socket.AF_UNIX for listener in taken]
    if count > 2 or kinds not in ([False], [False, True]):
        for listener in taken:
            listener.close()
        raise StartupError(
            f"systemd handed over {count} sockets instead of one of TCP, and at most one Unix "
            "socket; check ListenStream= of the worker's socket unit, and that no other socket "
            "unit names this service"
        )
    return taken


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


def bind_unix(path: str) -> socket.socket:
    """A Unix socket bound but not listening, in place of one that an earlier process left."""
    candidate = Path(f"{path}.candidate")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        candidate.unlink(missing_ok=True)
        listener.bind(str(candidate))
        candidate.chmod(_UNIX_MODE)
        candidate.rename(path)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen on {path}: {error.strerror}; check --unix-socket, and that the folder "
            "is there and this user may write to it"
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
    if is_stream and taken.family in _FAMILIES and _listens(taken):
        return taken
    found = f"{taken.family.name} {taken.type.name}"
    taken.close()
    raise StartupError(
        f"systemd handed over a socket that is no listening stream ({found}); the worker's socket "
        f"unit needs ListenStream=ADDRESS:PORT and Accept=no"
    )


def _listens(taken: socket.socket) -> bool:
    return bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
