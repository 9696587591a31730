"""The hand-over of a listening socket, as systemd does it: variables and a descriptor."""

import os
import socket
from collections.abc import Iterator

import pytest

from gpu_service.dispatch import StartupError
from gpu_service.sockets import open_listener

HOST = "127.0.0.1"


@pytest.fixture
def kept() -> Iterator[socket.socket]:
    """The socket as systemd keeps it."""
    with socket.create_server((HOST, 0)) as listener:
        yield listener


def handed(count: str = "1", *, pid: int | None = None) -> dict[str, str]:
    return {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": count, "LISTEN_FDNAMES": "a"}


def test_the_socket_that_was_handed_over_is_taken_and_the_variables_go(
    kept: socket.socket,
) -> None:
    environ = handed() | {"PATH": "/bin"}
    descriptor = os.dup(kept.fileno())
    os.set_inheritable(descriptor, True)
    with open_listener(HOST, 1, environ=environ, first_descriptor=descriptor) as taken:
        assert taken.getsockname() == kept.getsockname()
        assert not taken.get_inheritable()
    assert environ == {"PATH": "/bin"}


def test_a_connect_between_two_processes_waits_for_the_next(kept: socket.socket) -> None:
    first = open_listener(HOST, 1, environ=handed(), first_descriptor=os.dup(kept.fileno()))
    first.close()
    with socket.create_connection(kept.getsockname(), timeout=10) as client:
        client.sendall(b"hello")
        following = os.dup(kept.fileno())
        with open_listener(HOST, 1, environ=handed(), first_descriptor=following) as second:
            accepted, _ = second.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"


@pytest.mark.parametrize("environ", [{}, handed(pid=1), {"LISTEN_FDS": "1"}])
def test_without_a_hand_over_to_this_process_it_binds(environ: dict[str, str]) -> None:
    with open_listener(HOST, 0, environ=environ) as bound:
        assert bound.getsockname()[0] == HOST
        assert not bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert environ == {}


@pytest.mark.parametrize("count", ["0", "2"])
def test_more_or_less_than_one_is_refused(count: str) -> None:
    with pytest.raises(StartupError, match=rf"handed over {count} sockets instead of one"):
        open_listener(HOST, 0, environ=handed(count))


def test_a_count_that_is_none_is_refused() -> None:
    with pytest.raises(StartupError, match="LISTEN_FDS is 'some'"):
        open_listener(HOST, 0, environ=handed("some"))


@pytest.mark.parametrize(
    ("family", "kind", "named"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, "AF_INET SOCK_DGRAM"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "AF_UNIX SOCK_STREAM"),
        (socket.AF_INET, socket.SOCK_STREAM, "AF_INET SOCK_STREAM"),  # does not listen
    ],
)
def test_what_is_no_listening_tcp_socket_is_refused(
    family: socket.AddressFamily, kind: socket.SocketKind, named: str
) -> None:
    descriptor = socket.socket(family, kind).detach()
    with pytest.raises(StartupError, match=rf"no listening TCP socket \({named}\)"):
        open_listener(HOST, 0, environ=handed(), first_descriptor=descriptor)
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_what_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(StartupError, match=f"descriptor {reading}, handed over by systemd"):
            open_listener(HOST, 0, environ=handed(), first_descriptor=reading)
    finally:
        os.close(reading)
        os.close(writing)
