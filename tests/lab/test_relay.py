"""The relay over real sockets of the loopback interface: needs neither root nor a lab."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from lab import names
from lab.errors import LabError
from lab.relay import Front, Route, gateway, listen, routes
from lab.state import LabPhase, LabState

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LIMIT_S = 20


class OpenDoor:
    """Stands for the way into the lab: sockets of this process's own network."""

    def socket(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


@asynccontextmanager
async def relay_to(
    target: tuple[str, int],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Front(OpenDoor(), target), "127.0.0.1", 0)
    async with server, asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()


@asynccontextmanager
async def relayed(
    handler: Handler,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    backend = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with backend, relay_to(backend.sockets[0].getsockname()) as ends:
        yield ends


async def test_what_is_sent_before_the_far_end_is_open_arrives() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(5)).upper())
        writer.close()

    async with relayed(handler) as (reader, writer):
        writer.write(b"hello")
        assert await reader.read() == b"HELLO"


async def test_half_close_lets_the_answer_through() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read()  # Ends with the client's half of the connection.
        writer.write(b"%d bytes" % len(asked))
        writer.close()

    async with relayed(handler) as (reader, writer):
        writer.write(b"x" * 300_000)
        writer.write_eof()
        assert await reader.read() == b"300000 bytes"


async def test_the_server_may_end_its_half_first() -> None:
    heard = asyncio.get_running_loop().create_future()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        heard.set_result(await reader.read())
        writer.close()

    async with relayed(handler) as (reader, writer):
        assert await reader.read() == b""
        writer.write(b"still here")
        writer.write_eof()
        assert await heard == b"still here"


async def test_a_slow_reader_slows_the_sender_and_loses_nothing() -> None:
    total_bytes = 64 << 20
    sent_bytes = 0
    paused = asyncio.Event()
    read_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_on.wait()
        got = 0
        while chunk := await reader.read(1 << 20):
            got += len(chunk)
        writer.write(str(got).encode())
        writer.close()

    async with relayed(handler) as (reader, writer):

        async def send() -> None:
            nonlocal sent_bytes
            block = bytes(1 << 16)
            while sent_bytes < total_bytes:
                writer.write(block)
                sent_bytes += len(block)
                try:
                    async with asyncio.timeout(0.5):
                        await writer.drain()
                except TimeoutError:
                    paused.set()
                    await writer.drain()
            writer.write_eof()

        task = asyncio.create_task(send())
        await paused.wait()
        # Kernel buffers and the relay's own: far less than what wants to go through.
        assert sent_bytes < total_bytes / 2
        read_on.set()
        assert await reader.read() == str(total_bytes).encode()
        await task


async def test_nobody_at_the_far_end_is_a_reset_not_an_empty_answer() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with relay_to(closed.getsockname()) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read()


async def test_a_reset_of_the_server_reaches_the_client() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.close()

    async with relayed(handler) as (reader, writer):
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await reader.read()


def state(name: str, *, number: int, hosts: list[str], gateway_port: int = 8009) -> LabState:
    return LabState(
        name=name,
        number=number,
        run_id="0",
        phase=LabPhase.UP,
        base="base-0",
        gateway_port=gateway_port,
        hosts=tuple(
            names.HostSpec(name=host, octet=names.allot_octet(host, taken=())) for host in hosts
        ),
    )


def test_routes_of_the_default_lab_include_localhost() -> None:
    found = {str(route): route.target for route in routes(state("lab", number=0, hosts=["gw1"]))}
    assert found == {
        "127.77.0.11:7722": ("10.77.0.11", 22),
        "127.77.0.11:8009": ("10.77.0.11", 8009),
        "127.0.0.1:8009": ("10.77.0.11", 8009),
        "[::1]:8009": ("10.77.0.11", 8009),
    }


def test_routes_of_other_labs_keep_to_their_own_addresses() -> None:
    other = state("other", number=9, hosts=["gw1", "gw2", "gpu1"], gateway_port=8010)
    assert {str(route) for route in routes(other)} == {
        "127.77.9.11:7722",
        "127.77.9.11:8010",
        "127.77.9.12:7722",
        "127.77.9.12:8010",
        "127.77.9.21:7722",
    }


@pytest.mark.parametrize(
    ("of", "address"),
    [
        (state("lab", number=0, hosts=["gpu1", "gw1"], gateway_port=8010), "localhost:8010"),
        (state("lab", number=0, hosts=["gw2"]), "127.77.0.12:8009"),
        (state("other", number=9, hosts=["gw2", "gw1"], gateway_port=8010), "127.77.9.12:8010"),
    ],
)
def test_the_first_gateway_is_reached_at(of: LabState, address: str) -> None:
    assert gateway(of) == address


def test_a_lab_without_a_gateway_says_how_to_get_one() -> None:
    with pytest.raises(LabError, match="up gw1"):
        gateway(state("other", number=9, hosts=["gpu1"]))


def test_a_taken_address_is_an_error_even_where_the_route_is_optional() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError) as caught:
            listen(Route(taken.getsockname(), ("10.77.0.11", 8009), optional=True))
    assert caught.value.errno == errno.EADDRINUSE


def test_only_an_optional_route_may_lack_its_address() -> None:
    elsewhere = ("192.0.2.200", 8009)
    assert listen(Route(elsewhere, ("10.77.0.11", 8009), optional=True)) is None
    with pytest.raises(OSError) as caught:
        listen(Route(elsewhere, ("10.77.0.11", 8009)))
    assert caught.value.errno == errno.EADDRNOTAVAIL
