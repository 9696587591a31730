"""Frames as they come: in pieces, in fragments, wrong on purpose; keepalive and time-outs."""

import asyncio
import contextlib
import gc
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from websockets.protocol import Protocol

from gpu_service import protocol
from gpu_service.messages import Response
from gpu_service.session import Session
from tests.service.conftest import Worker
from tests.service.fakes import BOUND_S, WAIT, frame

StartWorker = Callable[..., Awaitable[Worker]]

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN = 0x80

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def ws(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A masked frame, as clients send them."""
    length = len(payload)
    if length < 126:
        head = bytes([opcode | FIN * fin, 0x80 | length])
    elif length < 1 << 16:
        head = struct.pack(">BBH", opcode | FIN * fin, 0x80 | 126, length)
    else:
        head = struct.pack(">BBQ", opcode | FIN * fin, 0x80 | 127, length)
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[at & 3] for at, byte in enumerate(payload))


class Raw:
    """A client that says what it is told to, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def shake_hands(self, more: bytes = b"") -> None:
        await self.send(HANDSHAKE + more)
        await self.handshake_answer()

    async def handshake_answer(self) -> None:
        answer = await self.reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 ")

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame."""
        async with asyncio.timeout(BOUND_S):
            first, length = await self.reader.readexactly(2)
            assert first & FIN
            if length == 126:
                (length,) = struct.unpack(">H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", await self.reader.readexactly(8))
            return first & 15, await self.reader.readexactly(length)

    async def reply(self) -> Response:
        opcode, payload = await self.frame()
        assert opcode == BINARY
        decoded = protocol.decode_reply(payload)
        assert isinstance(decoded, Response), decoded
        return decoded

    async def close_code(self) -> int:
        opcode, payload = await self.frame()
        assert opcode == CLOSE
        return int.from_bytes(payload[:2])

    async def until_eof(self) -> bytes:
        async with asyncio.timeout(BOUND_S):
            return await self.reader.read()


@contextlib.asynccontextmanager
async def raw(worker: Worker) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def client(worker: Worker) -> AsyncIterator[Raw]:
    async with raw(worker) as client:
        await client.shake_hands()
        yield client


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_pieces_of_any_size_make_the_same_messages(worker: Worker, size: int) -> None:
    stream = HANDSHAKE + ws(BINARY, frame(1, id="a")) + ws(PING, b"x") + ws(BINARY, frame(2))
    async with raw(worker) as client:
        for at in range(0, len(stream), size):
            await client.send(stream[at : at + size])
            await asyncio.sleep(0)
        await client.handshake_answer()
        got = [await client.frame() for _ in range(3)]
        assert sorted(opcode for opcode, _ in got) == [BINARY, BINARY, PONG]


async def test_requests_may_come_with_the_handshake(worker: Worker) -> None:
    async with raw(worker) as client:
        await client.shake_hands(ws(BINARY, frame(1, id="a")) + ws(BINARY, frame(2, id="b"))[:-3])
        assert (await client.reply()).id == "a"


@pytest.mark.parametrize("pieces", [2, 4096])
async def test_fragments_are_put_together(client: Raw, pieces: int) -> None:
    message = frame(5, id="f" * 100)
    cut = len(message) // 2
    await client.send(ws(BINARY, message[:cut], fin=False))
    await client.send(ws(CONT, b"", fin=False) * (pieces - 2))
    await client.send(ws(PING, b"between"))
    await client.send(ws(CONT, message[cut:]))
    assert await client.frame() == (PONG, b"between")
    assert (await client.reply()).outputs["y"][0, 0] == 10
    await client.send(ws(BINARY, frame(6)))
    assert (await client.reply()).outputs["y"][0, 0] == 12


async def test_fragments_that_are_too_large_together_close_with_1009(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_message_bytes=2048)
    async with raw(worker) as client:
        await client.shake_hands()
        await client.send(ws(BINARY, bytes(1500), fin=False) + ws(CONT, bytes(1500)))
        assert await client.close_code() == 1009


async def test_a_length_that_is_too_large_closes_before_the_rest_comes(client: Raw) -> None:
    await client.send(struct.pack(">BBQ", FIN | BINARY, 0x80 | 127, 1 << 40) + bytes(4))
    assert await client.close_code() == 1009


WRONG = {
    "no mask": bytes([FIN | BINARY, 2, 0, 0]),
    "an extension's bit": bytes([FIN | 0x40 | BINARY, 0x80, 0, 0, 0, 0]),
    "an unknown opcode": ws(3, b""),
    "a fragment of nothing": ws(CONT, b"x"),
    "a message among fragments": ws(BINARY, b"x", fin=False) + ws(BINARY, b"y"),
    "a ping in fragments": ws(PING, b"x", fin=False),
    "a long ping": ws(PING, bytes(126)),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_frame_closes_with_1002(client: Raw, data: bytes) -> None:
    await client.send(data)
    assert await client.close_code() == 1002
    assert await client.until_eof() == b""


async def test_text_in_fragments_that_is_no_utf8_closes_with_1007(client: Raw) -> None:
    await client.send(ws(TEXT, b'{"id"', fin=False) + ws(CONT, b"\xff"))
    assert await client.close_code() == 1007


async def test_a_close_is_answered_and_the_connection_ends(worker: Worker, client: Raw) -> None:
    await client.send(ws(CLOSE, (1000).to_bytes(2)))
    assert await client.close_code() == 1000
    assert await client.until_eof() == b""
    client.writer.close()
    await worker.until_metric("gpu_service_connections", 0)


def _are_there(*kinds: type) -> bool:
    # Never by isinstance(): some objects of torch warn when their __class__ is read.
    return any(issubclass(kind, kinds) for kind in map(type, gc.get_objects()))


async def test_who_only_asks_and_pings_holds_nothing_of_websockets(client: Raw) -> None:
    gc.collect()
    await client.send(ws(PING, b"?") + ws(BINARY, frame(1)))
    assert await client.frame() == (PONG, b"?")
    await client.frame()
    assert not _are_there(Protocol)


@pytest.mark.parametrize(
    "said",
    [
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
        HANDSHAKE[:20],
        HANDSHAKE,
        HANDSHAKE + ws(BINARY, frame(1)),
        HANDSHAKE + ws(CLOSE, (1000).to_bytes(2)),
        HANDSHAKE + ws(CONT, b"of nothing"),
    ],
    ids=["http", "refused", "half a handshake", "gone", "a request", "closed", "damaged"],
)
async def test_what_is_lost_is_freed_without_the_collector(worker: Worker, said: bytes) -> None:
    gc.collect()
    gc.disable()
    try:
        async with raw(worker) as client:
            await client.send(said)
            if said.startswith(HANDSHAKE):
                await client.handshake_answer()
        async with asyncio.timeout(BOUND_S):
            while _are_there(Session, Protocol):
                await asyncio.sleep(0)
    finally:
        gc.enable()


async def test_a_client_that_does_not_end_a_closed_connection_is_cut_off(
    worker: Worker, client: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session._CLOSE_TIMEOUT_S", 0.05)
    await client.send(ws(CLOSE, (1000).to_bytes(2)))
    await worker.until_metric("gpu_service_connections", 0)


async def test_who_does_not_shake_hands_is_cut_off(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session._OPEN_TIMEOUT_S", 0.05)
    async with raw(worker) as client:
        await client.send(HANDSHAKE[:20])
        with contextlib.suppress(ConnectionError):
            assert await client.until_eof() == b""


async def test_who_answers_pings_stays(start_worker: StartWorker) -> None:
    worker = await start_worker(ping_interval_s=0.1, ping_timeout_s=60)
    async with raw(worker) as client:
        await client.shake_hands()
        for _ in range(3):
            opcode, payload = await client.frame()
            assert opcode == PING
            await client.send(ws(PONG, payload))
        assert await worker.metric("gpu_service_connections") == 1


async def test_who_answers_another_ping_than_the_last_is_closed(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(ping_interval_s=0.1, ping_timeout_s=0.1)
    async with raw(worker) as client:
        await client.shake_hands()
        assert (await client.frame())[0] == PING
        await client.send(ws(PONG, b"something else"))
        assert await client.close_code() == 1011


async def test_who_is_not_read_because_the_device_is_busy_is_not_closed(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(
        ping_interval_s=0.1, ping_timeout_s=0.1, max_in_flight_per_connection=1
    )
    async with raw(worker) as client:
        await client.shake_hands(ws(BINARY, frame(WAIT)))
        pings = [await client.frame()]
        # A pong that is not read before the device has answered.
        await client.send(ws(PONG, pings[0][1]))
        async with raw(worker) as other:
            await other.shake_hands()
            while (got := await other.frame())[0] == PING:  # it is closed after its ping
                pass
            assert got[0] == CLOSE
        worker.engine.gate.open()
        assert isinstance(await client.reply(), Response)


async def test_pings_of_a_client_that_does_not_read_do_not_pile_up(worker: Worker) -> None:
    async with raw(worker) as client:
        await client.shake_hands()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        pings = ws(PING, bytes(125)) * 1000
        blocked = False
        for _ in range(1000):  # 125 MB of pongs, if it took them all
            client.writer.write(pings)
            try:
                await asyncio.wait_for(client.writer.drain(), 0.5)
            except TimeoutError:
                blocked = True
                break
        assert blocked
        client.writer.transport.abort()
    await worker.until_metric("gpu_service_connections", 0)
