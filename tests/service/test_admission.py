"""Who may connect, how much one client may use, and what is said of it: over real sockets."""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response as HttpResponse
from websockets.typing import Origin, Subprotocol

from gpu_service import protocol, session
from gpu_service.client import Client
from gpu_service.messages import Failure, Response, SessionInfo
from tests.service.conftest import Process, Worker, get
from tests.service.fakes import BOUND_S, WAIT, frame, x_of
from tests.service.test_wire import BINARY, CONT, FIN, HANDSHAKE, PING, raw, ws

StartWorker = Callable[..., Awaitable[Worker]]

OURS = Subprotocol(protocol.SUBPROTOCOL)

SLOWLY = 0.0001  # requests a second: one is let through, and no test waits for the next


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def write_tokens(path: Path, **names: str) -> str:
    """A tokens file of these tokens and their names."""
    lines = [f"{hashlib.sha256(token.encode()).hexdigest()} {names[token]}" for token in names]
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return str(path)


async def refusal(connecting: Any) -> tuple[int, dict[str, str], HttpResponse]:
    """Status, error and response of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with connecting:
            pass
    response = caught.value.response
    assert response.headers["Content-Type"] == "application/json"
    return response.status_code, json.loads(response.body)["error"], response


async def answer_of(connection: ClientConnection, request: str | bytes) -> Response | Failure:
    await connection.send(request)
    async with asyncio.timeout(BOUND_S):
        answer = protocol.decode_reply(await connection.recv())
    assert not isinstance(answer, SessionInfo)
    return answer


async def is_answered(connection: ClientConnection) -> bool:
    return isinstance(await answer_of(connection, frame(1)), Response)


# ------------------------------------------------------------------ tokens


@pytest.fixture
async def guarded(start_worker: StartWorker, tmp_path: Path) -> Worker:
    file = write_tokens(tmp_path / "tokens", one="alice", two="bob", three="alice")
    return await start_worker(tokens_file=file)


async def test_without_a_token_a_handshake_is_refused(guarded: Worker) -> None:
    for headers in ({}, bearer("four")):
        status, error, response = await refusal(guarded.connect(additional_headers=headers))
        assert (status, error["code"]) == (401, "UNAUTHENTICATED")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert await guarded.metric("gpu_service_connections_refused_total") == 2
    assert await guarded.metric("gpu_service_connections_opened_total") == 0


async def test_a_token_opens_a_connection(guarded: Worker) -> None:
    async with guarded.connect(additional_headers=bearer("one")) as connection:
        assert await is_answered(connection)


async def test_a_browser_sends_its_token_as_a_subprotocol(guarded: Worker) -> None:
    offered = [OURS, Subprotocol("bearer.one")]
    async with guarded.connect(subprotocols=offered, origin=Origin("https://a.com")) as connection:
        assert connection.subprotocol == OURS
        assert connection.response is not None
        assert "bearer" not in str(connection.response.headers)
    with pytest.raises(InvalidStatus) as caught:
        async with guarded.connect(subprotocols=[Subprotocol("bearer.one")]):
            pass
    assert caught.value.response.status_code == 400
    assert b"open-inference.v2" in caught.value.response.body


async def test_a_token_in_the_address_is_refused(guarded: Worker) -> None:
    async with raw(guarded) as client:
        await client.send(handshake("/?token=one", "Authorization: Bearer one"))
        answer = await client.until_eof()
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"does not belong in an address" in answer


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2", "/metrics"])
async def test_the_http_side_needs_no_token(guarded: Worker, path: str) -> None:
    assert (await asyncio.to_thread(get, guarded.port, path))[0] == 200


async def test_tokens_rotate_without_a_restart(guarded: Worker) -> None:
    async with guarded.connect(additional_headers=bearer("one")) as before:
        write_tokens(Path(guarded.settings.tokens_file), four="alice")
        async with guarded.connect(additional_headers=bearer("four")) as connection:
            assert await is_answered(connection)
        assert (await refusal(guarded.connect(additional_headers=bearer("one"))))[0] == 401
        assert await is_answered(before)


def test_a_tokens_file_that_cannot_be_used_ends_the_start(
    spawn: Callable[..., Process], tmp_path: Path
) -> None:
    file = write_tokens(tmp_path / "tokens", one="alice")
    Path(file).chmod(0o644)
    process = spawn("--tokens-file", file)
    assert f"chmod o-rwx {file}" in process.until("start_failed")["reason"]
    assert process.wait() == 1


# ------------------------------------------------------------------ origins


async def test_pages_of_other_origins_may_not_connect(start_worker: StartWorker) -> None:
    worker = await start_worker(origins="https://*.example.com")
    for origin in (None, Origin("https://www.example.com")):
        async with worker.connect(origin=origin) as connection:
            assert await is_answered(connection)
    status, error, _ = await refusal(worker.connect(origin=Origin("https://example.net")))
    assert (status, error["code"]) == (403, "PERMISSION_DENIED")
    assert await worker.metric("gpu_service_connections_refused_total") == 1


# ------------------------------------------------------------------ connections of one client


async def test_a_client_may_have_so_many_connections(start_worker: StartWorker) -> None:
    worker = await start_worker(max_connections_per_client=2)
    async with worker.connect(), worker.connect():
        status, error, response = await refusal(worker.connect())
        assert (status, error["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert response.headers["Retry-After"] == "1"
        async with worker.connect(additional_headers={"X-Real-IP": "192.0.2.1"}) as other:
            assert await is_answered(other)
    await worker.until_metric("gpu_service_connections", 0)
    async with worker.connect() as connection:
        assert await is_answered(connection)


async def test_a_handshake_that_fails_is_no_connection(start_worker: StartWorker) -> None:
    worker = await start_worker(max_connections_per_client=1)
    for _ in range(3):
        with pytest.raises(InvalidStatus):
            async with worker.connect(subprotocols=[Subprotocol("unknown")]):
                pass
    async with worker.connect() as connection:
        assert await is_answered(connection)


async def test_a_named_client_is_counted_by_its_name(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    file = write_tokens(tmp_path / "tokens", one="alice", two="bob", three="alice")
    worker = await start_worker(tokens_file=file, max_connections_per_client=1)
    async with worker.connect(additional_headers=bearer("one")):
        elsewhere = {**bearer("three"), "X-Real-IP": "192.0.2.1"}
        assert (await refusal(worker.connect(additional_headers=elsewhere)))[0] == 429
        async with worker.connect(additional_headers=bearer("two")) as connection:
            assert await is_answered(connection)


async def test_a_full_worker_refuses_all_but_tells_strangers_nothing(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    file = write_tokens(tmp_path / "tokens", one="alice")
    worker = await start_worker(tokens_file=file, max_connections=1)
    async with worker.connect(additional_headers=bearer("one")):
        status, error, response = await refusal(worker.connect(additional_headers=bearer("one")))
        assert (status, error["message"]) == (503, "too many connections")
        assert response.headers["Retry-After"] == "1"
        assert (await refusal(worker.connect()))[0] == 401


async def test_a_browser_is_told_by_a_close_code_that_a_worker_is_full(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_connections=1)
    page = {"Origin": "https://app.example.com"}
    async with worker.connect() as first:
        async with worker.connect(additional_headers=page) as second:
            with pytest.raises(ConnectionClosed) as closed:
                await second.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "too many connections")
        through_a_gateway = {**page, "X-Real-IP": "192.0.2.1"}
        assert (await refusal(worker.connect(additional_headers=through_a_gateway)))[0] == 503
        assert await is_answered(first)
        assert await worker.metric("gpu_service_connections") == 1


# ------------------------------------------------------------------ requests of one client


async def test_too_many_requests_are_refused_by_their_ids(start_worker: StartWorker) -> None:
    worker = await start_worker(max_requests_per_s_per_client=SLOWLY)
    async with worker.connect() as connection, worker.connect() as second:
        assert await is_answered(connection)
        text = '{"id": "t", "inputs": []}'
        for sender, request, id_ in (
            (connection, frame(1, id="b"), "b"),
            (second, frame(1, id="other"), "other"),
            (connection, text, "t"),
            (connection, '{"id": "broken", "inputs": 1}', "broken"),
            (connection, b"\0", None),
        ):
            refused = await answer_of(sender, request)
            assert isinstance(refused, Failure)
            assert (refused.id, refused.code) == (id_, "RESOURCE_EXHAUSTED")
            assert refused.retry_after_ms is not None
            assert 0 < refused.retry_after_ms <= 1 / SLOWLY * 1000
        async with worker.connect(additional_headers={"X-Real-IP": "192.0.2.1"}) as other:
            assert await is_answered(other)
    assert await worker.metric('gpu_service_failures_total{reason="rate_limited"}') == 5
    assert await worker.metric("gpu_service_in_flight_requests") == 0


async def test_who_may_not_ask_may_still_cancel(start_worker: StartWorker) -> None:
    worker = await start_worker(max_requests_per_s_per_client=SLOWLY)
    async with worker.connect() as connection:
        await connection.send(frame(WAIT, id="w"))
        await connection.send(protocol.encode_cancel("w"), text=True)
        async with asyncio.timeout(BOUND_S):
            answer = protocol.decode_reply(await connection.recv())
        assert isinstance(answer, Failure)
        assert (answer.id, answer.code) == ("w", "CANCELLED")


async def test_refusals_of_a_client_that_does_not_read_do_not_pile_up(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_requests_per_s_per_client=SLOWLY)
    await never_read(worker, ws(BINARY, frame(1)))


async def test_a_client_of_the_library_comes_back_when_it_may(start_worker: StartWorker) -> None:
    worker = await start_worker(max_requests_per_s_per_client=50)
    async with Client(worker.url, deadline_s=BOUND_S) as client:
        results = await asyncio.gather(*(client.infer(x_of(n)) for n in range(60)))
    assert [result.outputs["y"][0, 0] for result in results] == [2 * n for n in range(60)]
    assert await worker.metric('gpu_service_failures_total{reason="rate_limited"}') > 0


# ------------------------------------------------------------------ fragments, floods, memory


async def test_a_message_of_too_many_frames_closes_with_1008(start_worker: StartWorker) -> None:
    worker = await start_worker(max_fragments=4)
    message = frame(5)
    async with raw(worker) as client:
        await client.shake_hands()
        begin, end = ws(BINARY, message[:9], fin=False), ws(CONT, message[9:])
        empty = ws(CONT, b"", fin=False)
        for _ in range(2):  # the count begins anew with each message
            await client.send(begin + empty * 2 + end)
            assert (await client.reply()).outputs["y"][0, 0] == 10
        await client.send(begin + empty * 3 + end)
        opcode, payload = await client.frame()
        assert (opcode, payload[:2]) == (8, (1008).to_bytes(2))
        assert payload[2:].decode() == "a message of more than 4 frames; send it in fewer"
        assert await client.until_eof() == b""


async def test_a_stream_of_empty_fragments_takes_no_memory(start_worker: StartWorker) -> None:
    worker = await start_worker(max_fragments=1 << 20)
    async with raw(worker) as client:
        await client.shake_hands()
        await client.send(ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 100_000)
        await client.send(ws(PING, b"through"))
        assert await client.frame() == (10, b"through")
        (served,) = worker.server._sessions
        assert served._message == b""
        assert len(served._unread) < 14


@pytest.mark.parametrize(
    "flood",
    [
        ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 20_000,
        ws(PING, b"") * 20_000,
        ws(BINARY, b"") * 20_000,
    ],
    ids=["empty fragments", "pings", "empty messages"],
)
async def test_a_flood_of_frames_leaves_the_others_their_turns(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, flood: bytes
) -> None:
    if not session.__file__.endswith(".py"):
        pytest.skip("session is compiled: it does not look for a function that was replaced")
    turn = 0
    frames_of: dict[int, int] = {}
    frame_head = session._frame_head

    def counting(data: bytes, at: int) -> tuple[int, int, int]:
        frames_of[turn] = frames_of.get(turn, 0) + 1
        return frame_head(data, at)

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(next_turn)

    worker = await start_worker(max_fragments=1 << 20)
    async with raw(worker) as client, raw(worker) as other:
        await client.shake_hands()
        await other.shake_hands()
        next_turn()
        monkeypatch.setattr(session, "_frame_head", counting)
        client.writer.write(flood)
        reading = asyncio.create_task(client.reader.read())
        async with asyncio.timeout(BOUND_S):
            while sum(frames_of.values()) < 20_000:
                await asyncio.sleep(0)
        await other.send(ws(BINARY, frame(1)))
        assert (await other.reply()).outputs["y"][0, 0] == 2
        reading.cancel()
    # Of one client; what is left of the one before may fall into the same turn.
    assert max(frames_of.values()) <= 2 * session._FRAMES_PER_TURN


async def never_read(worker: Worker, message: bytes) -> None:
    """Sends for as long as it is read, reads nothing, and sees what the worker keeps of it."""
    async with raw(worker) as client:
        await client.shake_hands()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        (served,) = worker.server._sessions
        async with asyncio.timeout(BOUND_S):
            while not (served._writing_paused and served._reading_paused):
                if client.writer.transport.get_write_buffer_size() < 1 << 16:
                    client.writer.write(message * 100)
                await asyncio.sleep(0)
        largest_reply = 1024
        most = session._WRITE_LIMIT_BYTES + worker.settings.max_in_flight_per_connection * (
            largest_reply
        )
        assert served._transport.get_write_buffer_size() <= most
        assert served._unanswered <= worker.settings.max_in_flight_per_connection
        assert len(served._unread) <= 1 << 18  # what the event loop reads at once
        client.writer.transport.abort()
    await worker.until_metric("gpu_service_connections", 0)


async def test_replies_to_a_client_that_does_not_read_do_not_pile_up(worker: Worker) -> None:
    await never_read(worker, ws(BINARY, frame(1, id=None)))


async def test_errors_to_a_client_that_does_not_read_do_not_pile_up(worker: Worker) -> None:
    await never_read(worker, ws(BINARY, b"\0"))


def handshake(target: str, *headers: str) -> bytes:
    lines = (
        f"GET {target} HTTP/1.1",
        "Host: x",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *headers,
    )
    return "\r\n".join((*lines, "\r\n")).encode()


@pytest.mark.parametrize("ends", [True, False])
async def test_a_handshake_that_is_too_long_is_refused(worker: Worker, ends: bool) -> None:
    headers = [f"X-{number}: {'x' * 8000}" for number in range(10)]
    request = handshake("/", *headers)
    async with raw(worker) as client:
        client.writer.write(request if ends else request[:-4])
        assert (await client.until_eof()).startswith(b"HTTP/1.1 431 ")


async def test_connections_without_a_handshake_are_bounded(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.server._BACKLOG", 1)
    worker = await start_worker(max_connections=1)
    async with raw(worker) as first, raw(worker) as second:
        for client in (first, second):
            await client.send(HANDSHAKE[:20])
        async with raw(worker) as third:
            with contextlib.suppress(ConnectionError):
                assert await third.until_eof() == b""
        await first.send(HANDSHAKE[20:])
        await first.handshake_answer()


# ------------------------------------------------------------------ session message


async def test_a_session_begins_with_its_limits(worker: Worker) -> None:
    told = {"X-Request-ID": "from-the-gateway"}
    async with worker.connect(subprotocols=[OURS], additional_headers=told) as connection:
        first = await connection.recv()
        assert isinstance(first, str)
        info = protocol.decode_reply(first)
        assert isinstance(info, SessionInfo)
        assert info.id == "from-the-gateway"
        assert info.worker == "test-worker"
        described = json.loads((await asyncio.to_thread(get, worker.port, "/v2"))[2])
        assert info.limits == described["limits"]
        assert info.models == ({"name": "double", "version": "7"},)
        assert await is_answered(connection)


async def test_the_session_comes_before_answers_to_what_came_with_the_handshake(
    worker: Worker,
) -> None:
    async with raw(worker) as client:
        asks = handshake("/", f"Sec-WebSocket-Protocol: {OURS}")
        await client.send(asks + ws(BINARY, frame(1)))
        await client.handshake_answer()
        opcode, first = await client.frame()
        assert opcode == 1
        assert len(json.loads(first)["session"]["id"]) == 32
        assert (await client.reply()).outputs["y"][0, 0] == 2


async def test_who_asks_for_no_subprotocol_gets_answers_only(worker: Worker) -> None:
    async with worker.connect() as connection:
        assert await is_answered(connection)


# ------------------------------------------------------------------ logs


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[dict[str, Any]]]:
    """The fields of all lines of an event."""
    caplog.set_level(logging.INFO, logger="gpu_service")

    def of(event: str) -> list[dict[str, Any]]:
        return [vars(r)["gpu_service_fields"] for r in caplog.records if r.message == event]

    return of


Lines = Callable[[str], list[dict[str, Any]]]


async def test_a_connection_is_logged_when_it_opens_and_when_it_ends(
    start_worker: StartWorker, tmp_path: Path, lines: Lines
) -> None:
    worker = await start_worker(tokens_file=write_tokens(tmp_path / "tokens", one="alice"))
    told = {**bearer("one"), "X-Request-ID": "r1", "X-Real-IP": "192.0.2.1"}
    who = {"request_id": "r1", "address": "192.0.2.1", "client": "alice"}
    async with worker.connect(additional_headers=told) as connection:
        assert lines("connection_opened") == [who]
        assert await is_answered(connection)
        await connection.close(1000, "done")
    await worker.until_metric("gpu_service_connections", 0)
    (line,) = lines("connection_closed")
    assert line.items() >= who.items()
    assert (line["code"], line["reason"], line["closed_by"]) == (1000, "done", "client")
    assert line["requests"] == 1
    assert line["bytes_received"] > len(frame(1))
    assert line["bytes_sent"] > 12
    assert line["duration_s"] >= 0
    assert "one" not in str(lines("connection_opened"))


async def test_it_is_logged_who_ended_a_connection(start_worker: StartWorker, lines: Lines) -> None:
    worker = await start_worker()
    async with raw(worker) as client:
        await client.shake_hands()
        client.writer.transport.abort()
    await worker.until_metric("gpu_service_connections", 0)
    async with raw(worker) as client:
        await client.shake_hands(bytes([FIN | BINARY, 0]))
        assert await client.close_code() == 1002
    await worker.until_metric("gpu_service_connections", 0)
    ended = [(line["code"], line["closed_by"]) for line in lines("connection_closed")]
    assert ended == [(1006, "nobody"), (1002, "server")]


async def test_a_restart_is_logged_as_the_end(start_worker: StartWorker, lines: Lines) -> None:
    worker = await start_worker()
    async with worker.connect() as connection:
        (served,) = worker.server._sessions
        served.drain()
        with pytest.raises(ConnectionClosed):
            await connection.recv()
    await worker.until_metric("gpu_service_connections", 0)
    (line,) = lines("connection_closed")
    assert (line["code"], line["closed_by"]) == (1012, "server")


async def test_a_refusal_is_logged(start_worker: StartWorker, lines: Lines) -> None:
    worker = await start_worker(origins="https://a.com")
    await refusal(worker.connect(origin=Origin("https://b.com")))
    (line,) = lines("connection_refused")
    assert (line["status"], line["address"]) == (403, "127.0.0.1")


async def test_a_flood_of_connects_does_not_fill_the_log(
    start_worker: StartWorker, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.server._LOGGED_CONNECTIONS", 3)
    monkeypatch.setattr("gpu_service.server._LOGGED_PER_S", BOUND_S * 10)
    worker = await start_worker()
    for _ in range(10):
        async with worker.connect():
            pass
    await worker.until_metric("gpu_service_connections", 0)
    assert len(lines("connection_opened")) == len(lines("connection_closed")) == 3
