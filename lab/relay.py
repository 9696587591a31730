"""The way into a lab from a plain shell: one process per lab (`python -m lab.relay LAB RUN_ID`),
one thread, that listens on loopback addresses of the machine and connects from inside the lab's
controller namespace. No packet of the machine's own network ever reaches the hosts' one.

The process alone writes relay.json, once it listens. On SIGHUP it reads the lab's state again and
listens for the hosts that were added.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, cast

from lab import names, network
from lab.errors import LabError
from lab.host import enter_run
from lab.paths import LabPaths, write_json
from lab.process import Process
from lab.state import LabState, process_to_json

PART: Final = "relay.daemon"
CONNECT_TIMEOUT_S: Final = 5
BACKLOG: Final = 4096
# How much may wait for a slow reader before its sender is paused.
HIGH_WATER_BYTES: Final = 1 << 20


@dataclass(frozen=True, order=True)
class Route:
    """Connections to `listen` on the machine go to `target` in the lab: (address, port) both.
    An `optional` one is left out where the machine has no such address."""

    listen: tuple[str, int]
    target: tuple[str, int]
    optional: bool = False

    def __str__(self) -> str:
        return address_text(self.listen)


def address_text(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def routes(state: LabState) -> list[Route]:
    """All routes of a lab: SSH of each host, the gateway port of each gateway, and for the default
    lab the same port of localhost to gw1."""
    found = []
    for host in state.hosts:
        own = host.loopback(number=state.number)
        found.append(Route((own, names.SSH_PORT), (host.address, names.HOST_SSH_PORT)))
        if names.is_gateway(host.name):
            target = (host.address, names.DEFAULT_GATEWAY_PORT)
            found.append(Route((own, state.gateway_port), target))
            if state.name == names.DEFAULT_LAB and host.name == "gw1":
                found.append(Route(("127.0.0.1", state.gateway_port), target))
                found.append(Route(("::1", state.gateway_port), target, optional=True))
    return found


def gateway(state: LabState) -> str:
    """ADDRESS:PORT of this machine that leads to the lab's first gateway; LabError without one."""
    first = next((host for host in state.hosts if names.is_gateway(host.name)), None)
    if first is None:
        raise LabError(f"the lab {state.name!r} has no gateway; add one with `up gw1`")
    target = (first.address, names.DEFAULT_GATEWAY_PORT)
    own = [route.listen[0] for route in routes(state) if route.target == target]
    return f"{'localhost' if '127.0.0.1' in own else own[0]}:{state.gateway_port}"


def listen(route: Route) -> socket.socket | None:
    """A listening socket; None for an optional one whose address this machine doesn't have.

    Raises OSError (EADDRINUSE) when someone else has it.
    """
    family = socket.AF_INET6 if ":" in route.listen[0] else socket.AF_INET
    try:
        server = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        if route.optional:
            return None
        raise
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(route.listen)
        server.listen(BACKLOG)
    except OSError as error:
        server.close()
        if route.optional and not _is_taken(error):
            return None
        raise
    return server


def _is_taken(error: OSError) -> bool:
    return error.errno == errno.EADDRINUSE


class Door(Protocol):
    """Makes the sockets that connect to the targets."""

    def socket(self) -> socket.socket: ...


class End(asyncio.Protocol):
    """One end of a relayed connection. What it reads, its peer writes; while the peer can't write,
    it doesn't read; when it reads the end, the peer sends the end and goes on reading."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.peer: End
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )

    def data_received(self, data: bytes) -> None:
        self.peer.transport.write(data)

    def pause_writing(self) -> None:
        self.peer.transport.pause_reading()

    def resume_writing(self) -> None:
        self.peer.transport.resume_reading()

    def eof_received(self) -> bool:
        self._ended = True
        if self.peer.transport.can_write_eof() and not self.peer.transport.is_closing():
            self.peer.transport.write_eof()
        return not self.peer._ended

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            _reset(self.peer.transport)
        else:
            self.peer.transport.close()


def _reset(transport: asyncio.Transport) -> None:
    """End a connection such that its far end sees a reset, not an orderly end of the data."""
    if not transport.is_closing():
        at_once = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    transport.abort()


class Front(End):
    """The machine's end: opens the lab's end, and keeps what comes before that is open."""

    def __init__(self, door: Door, target: tuple[str, int]) -> None:
        super().__init__()
        self._door = door
        self._target = target
        self._early = bytearray()
        self._connected = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Not paused here: Python 3.11.2 (Debian 12) begins to read after this all the same.
        self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        back = self._door.socket()
        end = End()
        end.peer = self
        try:
            back.setblocking(False)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.sock_connect(back, self._target)
            await loop.create_connection(lambda: end, sock=back)
        except OSError:  # TimeoutError is one, too.
            back.close()
            _reset(self.transport)
            return
        if self.transport.is_closing():
            end.transport.abort()
            return
        self.peer = end
        self._connected = True
        # In this order: writing may pause reading again.
        self.transport.resume_reading()
        end.transport.write(bytes(self._early))
        if self._ended:
            end.transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if self._connected:
            super().data_received(data)
        else:
            self._early += data
            self.transport.pause_reading()

    def eof_received(self) -> bool:
        if self._connected:
            return super().eof_received()
        self._ended = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connected:
            super().connection_lost(exc)


class Relay:
    """All routes of one lab, on the running event loop."""

    def __init__(self, *, paths: LabPaths, door: network.NetworkDoor) -> None:
        self._paths = paths
        self._door = door
        self._listening: dict[Route, asyncio.Server | None] = {}

    async def add(self, wanted: Iterable[Route]) -> None:
        """Listen for those that are not served yet, and say so in relay.json."""
        loop = asyncio.get_running_loop()
        for route in wanted:
            if route in self._listening:
                continue
            server = listen(route)
            if server is None:
                self._listening[route] = None
                continue
            target = route.target
            self._listening[route] = await loop.create_server(
                lambda target=target: Front(self._door, target),  # type: ignore[misc]
                sock=server,
                backlog=BACKLOG,
            )
        write_json(
            self._paths.relay,
            {
                "process": process_to_json(Process.of(os.getpid())),
                "listening": [
                    str(route) for route, server in self._listening.items() if server is not None
                ],
            },
        )


async def _serve(paths: LabPaths, state: LabState) -> None:
    relay = Relay(paths=paths, door=network.NetworkDoor(network.namespace_path(state.name)))
    again = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, again.set)
    present: LabState | None = state
    while present is not None:
        try:
            await relay.add(routes(present))
        except OSError as error:
            print(f"can't listen: {error}", file=sys.stderr, flush=True)
            if present is state:
                raise SystemExit(1) from None
        await again.wait()
        again.clear()
        present = LabState.read(paths)


def main(arguments: list[str]) -> int:
    lab, run_id = arguments
    # Like the service behind it: as many connections as the machine allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    entered = enter_run(lab, PART, run_id)
    if entered is None:
        print("the lab was taken down meanwhile", file=sys.stderr)
        return 1
    try:
        asyncio.run(_serve(*entered))
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
