"""Bad input of every kind: a clear error of that request, or a close that says why.

What `test_requests`, `test_policy` and `test_wire` say of ordinary mistakes is not repeated: here
are bombs, floods, halves of connections, and messages that are almost right. Whatever one client
does, another that was there before is served on.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from gpu_service import protocol
from gpu_service.messages import Failure, Response
from tests.service.conftest import Worker
from tests.service.fakes import BOUND_S, NOT_A_NUMBER, WAIT, frame
from tests.service.test_wire import (
    BINARY,
    CLOSE,
    CONT,
    FIN,
    HANDSHAKE,
    PING,
    PONG,
    TEXT,
    Raw,
    raw,
    ws,
)

StartWorker = Callable[..., Awaitable[Worker]]

INVALID, UNKNOWN = "INVALID_ARGUMENT", "NOT_FOUND"
LONG = "y" * 900_000
DEEP = 100_000


@contextlib.asynccontextmanager
async def bystander(worker: Worker) -> AsyncIterator[None]:
    """Another client, which is answered before and after."""
    async with worker.connect() as connection:
        await _good(connection)
        yield
        await _good(connection)


async def _good(connection: ClientConnection) -> None:
    await connection.send(frame(21, id="good"))
    async with asyncio.timeout(BOUND_S):
        received = protocol.decode_reply(await connection.recv())
    assert isinstance(received, Response), received
    assert received.id == "good"
    assert received.outputs["y"].tolist() == [[42, 1, -2]]


@pytest.fixture
async def watched(worker: Worker) -> AsyncIterator[Worker]:
    """A worker that has to serve somebody else throughout, and to forget all that it took."""
    async with bystander(worker):
        yield worker
    await worker.until_metric("gpu_service_in_flight_requests", 0)


@pytest.fixture
async def client(watched: Worker) -> AsyncIterator[Raw]:
    async with raw(watched) as client:
        await client.shake_hands()
        yield client


def text(*, tensor: dict[str, Any] | None = None, **changes: Any) -> str:
    plain = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]} | (tensor or {})
    return json.dumps({"id": "t", "inputs": [plain]} | changes)


def with_data(literal: str) -> str:
    """A text request whose data are this text, which need not be JSON."""
    return text(tensor={"data": "@"}).replace('"@"', literal)


def binary(header: str, data: bytes = bytes(12)) -> bytes:
    encoded = header.encode()
    encoded += b" " * (-(4 + len(encoded)) % 8)
    return struct.pack("<I", len(encoded)) + encoded + data


def with_size(size: Any, **changes: Any) -> str:
    """The header of a binary request that says so of its only tensor."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32"} | changes
    return json.dumps({"id": "t", "inputs": [tensor | {"parameters": {"binary_data_size": size}}]})


BAD: dict[str, tuple[str | bytes, str | None, str, str]] = {
    # Sizes that are almost right.
    "an empty text": ("", None, INVALID, "not a message"),
    "a text of one character": ("{", None, INVALID, "not a message"),
    "a frame of 1 byte": (b"\0", None, INVALID, "header length of 4 bytes, got 1"),
    "a frame of 3 bytes": (b"\0\0\0", None, INVALID, "header length of 4 bytes, got 3"),
    "a header of no bytes": (bytes(4), None, INVALID, "not a message"),
    "a header one byte too long": (b"\x03\0\0\0{}", None, INVALID, "header length 3 reaches past"),
    "a header that is cut": (b"\x01\0\0\0{}", None, INVALID, "truncated"),
    "a size of 2**63": (binary(with_size(2**63)), "t", INVALID, "has 12 bytes"),
    "a size of 2**64": (binary(with_size(2**64)), "t", INVALID, "18446744073709551616"),
    "a size that is a fraction": (binary(with_size(12.0)), "t", INVALID, "number of its bytes"),
    "a huge shape": (
        binary(with_size(12, shape=[2**31 - 1] * 32)),
        "t",
        INVALID,
        "binary_data_size is 12",
    ),
    "a size beyond the largest": (text(tensor={"shape": [1, 2**31]}), "t", INVALID, "shape"),
    "a rank of 10,000": (text(tensor={"shape": [1] * 10_000}), "t", INVALID, "1 to 32 are allowed"),
    "rows for a flat shape": (with_data("[[1, 2], [3]]"), "t", INVALID, "inputs: 'x': data"),
    # One form in place of the other.
    "text in a binary frame": (text().encode(), None, INVALID, "reaches past the frame"),
    "a binary frame as text": (binary(with_size(12)).decode(), None, INVALID, "not a message"),
    "a tensor's bytes announced in text": (with_size(12), "t", INVALID, "in a text frame"),
    "data in a binary header": (binary(text()), "t", INVALID, "in a binary frame"),
    "a byte order mark": ("\ufeff" + text(), None, INVALID, "not a message"),
    "JSON twice": (text() + text(), None, INVALID, "not a message"),
    "an unpaired surrogate": (text(id="\ud800"), None, INVALID, "not a message"),
    # What JSON lacks.
    "NaN": (with_data("[NaN, 2, 3]"), None, INVALID, "not a message"),
    "infinity": (with_data("[1, -Infinity, 3]"), None, INVALID, "not a message"),
    "a comment": (with_data("[1, 2, 3] // three"), None, INVALID, "not a message"),
    # Bombs.
    "nested objects": ('{"id":' * DEEP, None, INVALID, "not a message"),
    "nested inputs": ('{"inputs":' + "[" * DEEP, None, INVALID, "not a message"),
    "nested data": (with_data("[" * DEEP + "]" * DEEP), None, INVALID, "not a message"),
    "nested data, 33 deep": (with_data("[" * 33 + "]" * 33), "t", INVALID, "nested 33 deep"),
    "nested parameters": (
        text(parameters="@").replace('"@"', '{"a":' * DEEP + "1" + "}" * DEEP),
        None,
        INVALID,
        "not a message",
    ),
    "a number of 100,000 digits": (with_data(f"[{'9' * 100_000}, 2, 3]"), "t", INVALID, "fit FP32"),
    "an exponent beyond all": (with_data("[1e999999999, 2, 3]"), "t", INVALID, "fit FP32"),
    "40,000 unknown fields": (
        json.dumps({"id": "t"} | {f"field {n}": n for n in range(40_000)}),
        "t",
        INVALID,
        "field 0",
    ),
    "100,000 inputs": (json.dumps({"id": "t", "inputs": [{}] * 100_000}), "t", INVALID, "name"),
    "the same input 10,000 times": (
        text(inputs=json.loads(text())["inputs"] * 10_000),
        "t",
        INVALID,
        "occurs twice",
    ),
    "30,000 wanted outputs": (
        text(outputs=[{"name": str(n)} for n in range(30_000)]),
        "t",
        INVALID,
        "has the outputs 'y'; got '0', '1', '10', '100'",
    ),
    # Long strings, which no error repeats.
    "a long id": (text(id=LONG), None, INVALID, "id has 900000 characters, at most 128"),
    "a long model": (text(model_name=LONG), "t", UNKNOWN, "no model 'yyy"),
    "a long version": (text(model_version=LONG), "t", UNKNOWN, "no version 'yyy"),
    "a long name": (text(tensor={"name": LONG}), "t", INVALID, "got 'yyy"),
    "a long datatype": (text(tensor={"datatype": LONG}), "t", INVALID, "unknown datatype 'yyy"),
    "a long output": (text(outputs=[{"name": LONG}]), "t", INVALID, "got 'yyy"),
    "a long field": (
        text().replace('"id"', f'"{LONG}": 1, "id"'),
        "t",
        INVALID,
        "unknown field `yyy",
    ),
    "long data": (with_data(f'"{LONG}"'), "t", INVALID, "nested 0 deep"),
    "a name of control characters": (
        text(model_name="\x1b[31m\r\n"),
        "t",
        UNKNOWN,
        r"no model '\x1b[31m\r\n'",
    ),
    # Wrong types.
    "a number as id": (text(id=7), None, INVALID, "Expected `str | null`, got `int`"),
    "no name": (text(tensor={"name": None}), "t", INVALID, "Expected `str`, got `null`"),
    "a shape of fractions": (text(tensor={"shape": [1.0, 3.5]}), "t", INVALID, "Expected `int`"),
    "true as a size": (text(tensor={"shape": [True, 3]}), "t", INVALID, "Expected `int`"),
    "parameters in a list": (text(parameters=["a"]), "t", INVALID, "Expected `object`"),
    "an object as parameter": (text(parameters={"a": {}}), "t", INVALID, "`$.parameters[...]`"),
    "null as parameter": (text(parameters={"a": None}), "t", INVALID, "`$.parameters[...]`"),
    "a priority in words": (text(parameters={"priority": "9"}), "t", INVALID, "from 0 to 9"),
    "a huge priority": (text(parameters={"priority": 10**30}), "t", INVALID, "from 0 to 9"),
    "a negative timeout": (text(parameters={"timeout_ms": -0.5}), "t", INVALID, "greater than 0"),
    "true as timeout": (text(parameters={"timeout_ms": True}), "t", INVALID, "greater than 0"),
    "a cancel without an object": ('{"cancel": "t"}', None, INVALID, "Expected `object | null`"),
}


@pytest.mark.parametrize(("message", "id_", "code", "says"), BAD.values(), ids=BAD.keys())
async def test_a_bad_message_gets_its_error_and_the_connection_lives(
    watched: Worker, message: str | bytes, id_: str | None, code: str, says: str
) -> None:
    async with watched.connect() as connection:
        await connection.send(message)
        answer = await connection.recv()
        assert type(answer) is type(message)
        assert len(answer) < 1000
        received = protocol.decode_reply(answer)
        assert isinstance(received, Failure), received
        assert (received.id, received.code) == (id_, code)
        assert says in received.message
        await _good(connection)
    assert await watched.metric(f'gpu_service_requests_total{{code="{code}"}}') == 1


GOOD: dict[str, str | bytes] = {
    "unknown parameters": text(parameters={"colour": "blue", "": 1e300, "big": 10**30}),
    "40,000 parameters": text(parameters={f"{n}": n for n in range(40_000)}),
    "a field twice, of which the last counts": '{"id": "first", ' + text()[1:],
    "white space": f"{' ' * 500_000}{text()}{' ' * 500_000}",
    "escapes": text().replace('"x"', '"\\u0078"'),
    "the least number": with_data("[-0.0, 5e-324, 1E-400]"),
}


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD.keys())
async def test_what_looks_strange_but_is_right_is_answered(
    watched: Worker, message: str | bytes
) -> None:
    async with watched.connect() as connection:
        await connection.send(message)
        received = protocol.decode_reply(await connection.recv())
        assert isinstance(received, Response), received
        assert received.id == "t"


async def test_a_million_keys_cost_their_own_request_only(start_worker: StartWorker) -> None:
    worker = await start_worker(max_message_bytes=64 << 20)
    keys = ",".join(f'"{n}":{n}' for n in range(1_000_000))
    async with bystander(worker), worker.connect() as connection:
        await connection.send(f'{{"id":"t",{keys}}}')
        received = protocol.decode_reply(await connection.recv())
        assert isinstance(received, Failure)
        assert (received.id, received.code) == ("t", INVALID)
        await _good(connection)


async def test_nan_in_binary_is_the_models_concern(watched: Worker) -> None:
    async with watched.connect() as connection:
        await connection.send(frame(float("nan"), float("inf")))
        received = protocol.decode_reply(await connection.recv())
        assert isinstance(received, Response)
        assert [str(value) for value in received.outputs["y"][:, 0]] == ["nan", "inf"]


async def test_nan_in_the_answer_of_a_text_request_fails_that_request(watched: Worker) -> None:
    async with watched.connect() as connection:
        await connection.send(with_data(f"[{NOT_A_NUMBER}, 0, 0]"))
        received = protocol.decode_reply(await connection.recv())
        assert isinstance(received, Failure)
        assert (received.id, received.code) == ("t", INVALID)
        assert "outputs: y holds NaN or infinity" in received.message
        await _good(connection)
    assert await watched.metric('gpu_service_failures_total{reason="not_json"}') == 1


async def test_every_bad_message_of_a_burst_gets_its_own_error(watched: Worker) -> None:
    small = [case for case in BAD.values() if len(case[0]) < 1000]
    async with watched.connect() as connection:
        for message, *_ in small:
            await connection.send(message)
        for message, id_, code, says in small:
            answer = await connection.recv()
            assert type(answer) is type(message)
            received = protocol.decode_reply(answer)
            assert isinstance(received, Failure)
            assert (received.id, received.code) == (id_, code)
            assert says in received.message
        await _good(connection)


async def test_an_id_in_flight_is_taken_in_both_forms(watched: Worker) -> None:
    async with watched.connect() as busy:
        await busy.send(frame(WAIT, id="t"))
        await watched.until_metric("gpu_service_in_flight_requests", 1)
        for message in (text(), frame(1, id="t")):
            await busy.send(message)
            answer = await busy.recv()
            assert type(answer) is type(message)
            received = protocol.decode_reply(answer)
            assert isinstance(received, Failure)
            assert (received.id, received.code) == ("t", INVALID)
            assert "'t' is in flight on this connection already" in received.message
        async with watched.connect() as other:  # whose ids are its own
            await other.send(text())
            watched.engine.gate.open()
            assert isinstance(protocol.decode_reply(await other.recv()), Response)
        assert isinstance(protocol.decode_reply(await busy.recv()), Response)
    assert await watched.metric('gpu_service_failures_total{reason="duplicate_id"}') == 2


# ---------------------------------------------------------------- frames that end the connection


def close(payload: bytes) -> bytes:
    return ws(CLOSE, payload)


ENDS: dict[str, tuple[bytes, int, str]] = {
    "reserved bit 2": (bytes([FIN | 0x20 | BINARY, 0x80]) + bytes(4), 1002, "reserved bits"),
    "reserved bit 3": (bytes([FIN | 0x10 | TEXT, 0x80]) + bytes(4), 1002, "reserved bits"),
    "a reserved bit in a fragment": (
        ws(BINARY, b"x", fin=False) + bytes([FIN | 0x40, 0x80]) + bytes(4),
        1002,
        "reserved bits",
    ),
    "a control opcode that is none": (ws(11, b""), 1002, "invalid opcode"),
    "the last opcode": (ws(15, b""), 1002, "invalid opcode"),
    "a fragment after the last": (
        ws(TEXT, text()[:9].encode(), fin=False) + ws(CONT, text()[9:].encode()) + ws(CONT, b"x"),
        1002,
        "unexpected continuation",
    ),
    "text that begins among fragments": (
        ws(BINARY, b"x", fin=False) + ws(TEXT, b"y", fin=False),
        1002,
        "expected a continuation",
    ),
    "no mask, after good frames": (
        ws(PING, b"x") + bytes([FIN | PING, 0]),
        1002,
        "incorrect masking",
    ),
    "a close of one byte": (close(b"\x03"), 1002, "close frame too short"),
    "a close with a code that is never sent": (close(struct.pack(">H", 1006)), 1002, "status code"),
    "a close with a code that is none": (close(struct.pack(">H", 999)), 1002, "status code"),
    "a close whose reason is no UTF-8": (close(b"\x03\xe8\xff"), 1007, ""),
    "a close among fragments": (ws(BINARY, b"x", fin=False) + close(b"\x03\xe8"), 1002, "fragment"),
    "a long close": (close(bytes(126)), 1002, "control frame too long"),
    "text of half a character": (ws(TEXT, b'{"id": "\xc3'), 1007, "unexpected end of data at 8"),
    "text of an overlong slash": (ws(TEXT, b"\xc0\xaf"), 1007, "invalid start byte at 0"),
    "text of a surrogate": (ws(TEXT, b"\xed\xa0\x80"), 1007, "invalid continuation byte at 0"),
    "a binary frame as text": (ws(TEXT, frame(-1)), 1007, "invalid start byte"),
    "more than allowed": (ws(TEXT, b" " * ((1 << 20) + 1)), 1009, "exceeds limit of 1048576"),
    "2**63 bytes": (
        struct.pack(">BBQ", FIN | TEXT, 0xFF, 1 << 63) + bytes(4),
        1009,
        "exceeds limit of 1048576",
    ),
    "2**64 - 1 bytes": (b"\x82\xff" + b"\xff" * 8 + bytes(4), 1009, "exceeds limit of 1048576"),
}


async def close_of(client: Raw) -> tuple[int, str]:
    """Code and reason of the close that comes next, but for answers."""
    while (got := await client.frame())[0] != CLOSE:
        assert got[0] in (TEXT, BINARY, PONG)
    return int.from_bytes(got[1][:2]), got[1][2:].decode()


@pytest.mark.parametrize(("data", "code", "says"), ENDS.values(), ids=ENDS.keys())
async def test_a_frame_that_breaks_the_protocol_closes_with_a_reason(
    watched: Worker, client: Raw, data: bytes, code: int, says: str
) -> None:
    await client.send(data)
    got, reason = await close_of(client)
    assert (got, says in reason) == (code, True), reason
    assert await client.until_eof() == b""
    client.writer.close()
    await watched.until_metric("gpu_service_connections", 1)


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("payload", [b"", b"{"])
async def test_more_fragments_than_allowed_close_with_1008(
    client: Raw, opcode: int, payload: bytes
) -> None:
    pieces = ws(opcode, payload, fin=False) + ws(CONT, b"", fin=False) * 4095
    await client.send(pieces + ws(PING, b"still there?"))
    assert await client.frame() == (PONG, b"still there?")
    await client.send(ws(CONT, b""))
    got, payload = await client.frame()
    assert (got, payload[:2]) == (CLOSE, (1008).to_bytes(2))
    assert b"4096" in payload


async def test_good_requests_before_a_bad_frame_are_not_answered_wrongly(
    watched: Worker, client: Raw
) -> None:
    await client.send(ws(TEXT, text(model_name="cat").encode()) + ws(3, b""))
    opcode, payload = await client.frame()
    assert (opcode, json.loads(payload)["error"]["code"]) == (TEXT, UNKNOWN)
    assert (await close_of(client))[0] == 1002


async def test_what_follows_a_close_is_not_taken(watched: Worker, client: Raw) -> None:
    await client.send(close(b"\x03\xe8") + ws(BINARY, frame(5, id="late")) * 100)
    assert await client.frame() == (CLOSE, b"\x03\xe8")
    assert await client.until_eof() == b""
    assert await watched.metric('gpu_service_requests_total{code="OK"}') == 1  # the bystander's


# --------------------------------------------------------------------------- floods and halves


async def test_a_flood_of_pings_is_answered_and_starves_nobody(
    watched: Worker, client: Raw
) -> None:
    flood = b"".join(ws(PING, struct.pack(">I", n)) for n in range(20_000))
    sending = asyncio.create_task(client.send(flood + ws(BINARY, frame(7))))
    async with watched.connect() as other:
        for n in range(20_000):
            if n % 5000 == 0:
                await _good(other)
            assert await client.frame() == (PONG, struct.pack(">I", n))
    await sending
    assert (await client.reply()).outputs["y"][0, 0] == 14


async def test_control_frames_between_fragments_do_not_count_as_such(client: Raw) -> None:
    message = frame(8)
    pieces = [ws(BINARY, message[:1], fin=False)]
    pieces += [ws(PING, b"x") + ws(PONG, b"unasked") for _ in range(5000)]
    await client.send(b"".join(pieces) + ws(CONT, message[1:]))
    for _ in range(5000):
        assert await client.frame() == (PONG, b"x")
    assert (await client.reply()).outputs["y"][0, 0] == 16


async def test_a_message_that_never_ends_is_bounded(client: Raw) -> None:
    piece = ws(CONT, bytes(60_000), fin=False)
    await client.send(ws(BINARY, b"", fin=False) + piece * 17)
    await client.send(ws(PING, b""))
    assert await client.frame() == (PONG, b"")
    await client.send(piece)
    assert (await close_of(client))[0] == 1009


async def test_a_client_that_ends_its_half_is_forgotten(watched: Worker, client: Raw) -> None:
    await client.send(ws(BINARY, frame(WAIT)))
    await watched.until_metric("gpu_service_in_flight_requests", 1)
    client.writer.write_eof()
    await watched.until_metric("gpu_service_connections", 1)
    await watched.until_metric("gpu_service_in_flight_requests", 0)
    watched.engine.gate.open()


@pytest.mark.parametrize("sent", [b"", HANDSHAKE[:40], HANDSHAKE, HANDSHAKE + ws(TEXT, b"{}")[:5]])
async def test_a_client_that_vanishes_is_forgotten(watched: Worker, sent: bytes) -> None:
    async with raw(watched) as client:
        await client.send(sent)
        if sent.startswith(HANDSHAKE):
            await client.handshake_answer()
        connection = client.writer.get_extra_info("socket")
        linger = struct.pack("ii", 1, 0)  # so that it ends with a reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.writer.transport.abort()
    await watched.until_metric("gpu_service_connections", 1)


async def test_a_half_open_connection_is_closed_by_the_keepalive(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session._CLOSE_TIMEOUT_S", 0.05)
    worker = await start_worker(ping_interval_s=0.1, ping_timeout_s=0.1)
    async with raw(worker) as client:
        await client.shake_hands(ws(TEXT, b"{}")[:5])  # half a frame, and then nothing ever
        assert (await client.frame())[0] == PING
        assert await client.close_code() == 1011
        await worker.until_metric("gpu_service_connections", 0)


async def test_clients_that_came_together_are_pinged_at_different_times(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session.random.uniform", lambda least, most: 0)
    worker = await start_worker(ping_interval_s=3600)  # nobody waits for that
    async with raw(worker) as client:
        await client.shake_hands()
        assert (await client.frame())[0] == PING


# ------------------------------------------------------------------------- before the WebSocket


def handshake(**changes: str | None) -> bytes:
    headers = {
        "Host": "x",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode()


REFUSED: dict[str, tuple[bytes, int, bytes]] = {
    "another version": (handshake(Sec_WebSocket_Version="8"), 400, b"Sec-WebSocket-Version"),
    "a short key": (handshake(Sec_WebSocket_Key="c2hvcnQ="), 400, b"Sec-WebSocket-Key"),
    "no key": (handshake(Sec_WebSocket_Key=None), 400, b"Sec-WebSocket-Key"),
    "no upgrade": (handshake(Connection="close"), 426, b"Connection"),
    "another sub-protocol": (
        handshake(Sec_WebSocket_Protocol="open-inference.v1"),
        400,
        b"this server speaks open-inference.v2",
    ),
}


@pytest.mark.parametrize(("request_", "status", "says"), REFUSED.values(), ids=REFUSED.keys())
async def test_a_bad_handshake_is_refused_in_words(
    watched: Worker, request_: bytes, status: int, says: bytes
) -> None:
    async with raw(watched) as client:
        await client.send(request_ + ws(BINARY, frame(1)))
        answer = await client.until_eof()
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert says in answer.partition(b"\r\n\r\n")[2]


NO_HTTP = {
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(400),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a frame": ws(BINARY, frame(1)) + b"\n",
    "a long line": b"GET /" + b"a" * 20_000,
    "a long header": HANDSHAKE[:-2] + b"X: " + b"a" * 20_000,
    "a thousand headers": HANDSHAKE[:-2] + b"X: a\r\n" * 1000,
    "a body": HANDSHAKE[:-2] + b"Content-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP.keys())
async def test_what_is_no_handshake_ends_the_connection(
    watched: Worker, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session._OPEN_TIMEOUT_S", 0.2)  # TLS has no end of a line
    async with raw(watched) as client:
        with contextlib.suppress(ConnectionError):  # it may be reset, for not all was read
            await client.send(data)
            assert not (await client.until_eof()).startswith(b"HTTP/1.1 101")
    await watched.until_metric("gpu_service_connections", 1)
