"""The hand-over of a listening socket, as systemd does it: variables and a descriptor."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_service.device import StartupError
from gpu_service.sockets import bind_unix, open_listeners

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
    (taken,) = open_listeners(HOST, 1, environ=environ, first_descriptor=descriptor)
    with taken:
        assert taken.getsockname() == kept.getsockname()
        assert not taken.get_inheritable()
    assert environ == {"PATH": "/bin"}


def test_a_connect_between_two_processes_waits_for_the_next(kept: socket.socket) -> None:
    first = os.dup(kept.fileno())
    open_listeners(HOST, 1, environ=handed(), first_descriptor=first)[0].close()
    with socket.create_connection(kept.getsockname(), timeout=10) as client:
        client.sendall(b"hello")
        following = os.dup(kept.fileno())
        (second,) = open_listeners(HOST, 1, environ=handed(), first_descriptor=following)
        with second:
            accepted, _ = second.accept()
            with accepted:
                assert accepted.recv(5) == b"hello"


@pytest.mark.parametrize("environ", [{}, handed(pid=1), {"LISTEN_FDS": "1"}])
def test_without_a_hand_over_to_this_process_it_binds(environ: dict[str, str]) -> None:
    (bound,) = open_listeners(HOST, 0, environ=environ)
    with bound:
        assert bound.getsockname()[0] == HOST
        assert not bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert environ == {}


def descriptors_of(*kinds: socket.AddressFamily) -> int:
    """The first of as many descriptors in a row, each a listening socket of its kind."""
    made = []
    for family in kinds:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((HOST, 0) if family == socket.AF_INET else "")
        listener.listen()
        made.append(listener)
    first = 200  # above what a test has open
    for number, listener in enumerate(made):
        os.dup2(listener.fileno(), first + number, inheritable=True)
        listener.close()
    return first


TCP, UNIX = socket.AF_INET, socket.AF_UNIX


@pytest.mark.parametrize("kinds", [(TCP, UNIX), (UNIX, TCP)])
def test_a_unix_socket_may_come_with_that_of_tcp(kinds: tuple[socket.AddressFamily, ...]) -> None:
    first = descriptors_of(*kinds)
    tcp, unix = open_listeners(HOST, 0, "/unused", environ=handed("2"), first_descriptor=first)
    with tcp, unix:
        assert (tcp.family, unix.family) == (TCP, UNIX)


@pytest.mark.parametrize("kinds", [(), (UNIX,), (TCP, TCP), (TCP, UNIX, UNIX)])
def test_other_sockets_are_refused_and_closed(kinds: tuple[socket.AddressFamily, ...]) -> None:
    first = descriptors_of(*kinds)
    environ = handed(str(len(kinds)))
    with pytest.raises(StartupError, match=rf"handed over {len(kinds)} sockets instead of one"):
        open_listeners(HOST, 0, environ=environ, first_descriptor=first)
    for number in range(min(len(kinds), 2)):
        with pytest.raises(OSError):
            os.fstat(first + number)


def test_a_unix_socket_takes_the_place_of_one_that_was_left(tmp_path: Path) -> None:
    path = tmp_path / "9005.sock"
    left = bind_unix(str(path))
    left.close()
    with pytest.raises(ConnectionRefusedError), socket.socket(UNIX) as client:
        client.connect(str(path))
    tcp, unix = open_listeners(HOST, 0, str(path), environ={})
    with tcp, unix:
        unix.listen()
        with socket.socket(UNIX) as client:
            client.connect(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert [found.name for found in tmp_path.iterdir()] == ["9005.sock"]


def test_a_unix_socket_that_cannot_be_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"nowhere/x: No such file.*check --unix-socket"):
        bind_unix(str(tmp_path / "nowhere/x"))


def test_a_count_that_is_none_is_refused() -> None:
    with pytest.raises(StartupError, match="LISTEN_FDS is 'some'"):
        open_listeners(HOST, 0, environ=handed("some"))


@pytest.mark.parametrize(
    ("family", "kind", "named"),
    [
        (socket.AF_INET, socket.SOCK_DGRAM, "AF_INET SOCK_DGRAM"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "AF_UNIX SOCK_STREAM"),  # does not listen
        (socket.AF_INET, socket.SOCK_STREAM, "AF_INET SOCK_STREAM"),  # does not listen
    ],
)
def test_what_does_not_listen_for_streams_is_refused(
    family: socket.AddressFamily, kind: socket.SocketKind, named: str
) -> None:
    descriptor = socket.socket(family, kind).detach()
    with pytest.raises(StartupError, match=rf"no listening stream \({named}\)"):
        open_listeners(HOST, 0, environ=handed(), first_descriptor=descriptor)
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_what_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(StartupError, match=f"descriptor {reading}, handed over by systemd"):
            open_listeners(HOST, 0, environ=handed(), first_descriptor=reading)
    finally:
        os.close(reading)
        os.close(writing)
