"""Where the listening socket comes from."""

import socket

from gpu_service.dispatch import StartupError


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
