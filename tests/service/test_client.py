"""The client library against servers that misbehave, restart and die."""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest
from websockets.asyncio.server import ServerConnection, serve

from gpu_service.client import (
    Client,
    ClientError,
    DeadlineExceededError,
    InferenceError,
    UnreachableError,
    fetch_json,
    read_token,
)
from gpu_service.messages import Cancel, ProtocolError, Response, SessionInfo
from gpu_service.protocol import decode_message, decode_request, encode_response, encode_session
from tests.service.conftest import Process, Worker, metric
from tests.service.fakes import BOUND_S, POISON, WAIT, x_of

StartWorker = Callable[..., Awaitable[Worker]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_calls_run_at_the_same_time_and_get_their_own_results(worker: Worker) -> None:
    async with Client(worker.url) as client:
        results = await asyncio.gather(*(client.infer(x_of(n)) for n in range(200)))
    assert [result.outputs["y"][0, 0] for result in results] == [2 * n for n in range(200)]
    assert {(r.model_name, r.model_version, r.worker) for r in results} == {
        ("double", "7", "test-worker")
    }


async def test_an_error_reply_is_raised_with_its_code(worker: Worker) -> None:
    async with Client(worker.url) as client:
        with pytest.raises(InferenceError, match=r"^INTERNAL: ") as internal:
            await client.infer(x_of(POISON))
        assert internal.value.code == "INTERNAL"
        with pytest.raises(InferenceError, match="no model 'cat'"):
            await client.infer(x_of(1), model="cat")
        with pytest.raises(InferenceError, match="no version '1'"):
            await client.infer(x_of(1), version="1")
        assert (await client.infer(x_of(1), model="double", version="7")).worker == "test-worker"


async def test_shedding_tells_when_to_come_back(start_worker: StartWorker) -> None:
    worker = await start_worker(max_batch=1, max_queue=1)
    async with Client(worker.url, retry_refused=False) as client:
        busy = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        queued = asyncio.create_task(client.infer(x_of(1)))
        await worker.until_metric("gpu_service_queued_samples", 1)
        with pytest.raises(InferenceError) as caught:
            await client.infer(x_of(2))
        assert caught.value.code == "UNAVAILABLE"
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 0.05
        worker.engine.gate.open()
        await asyncio.gather(busy, queued)


async def test_refused_calls_come_back_until_they_are_taken(start_worker: StartWorker) -> None:
    worker = await start_worker(max_batch=1, max_queue=1)
    async with Client(worker.url, deadline_s=BOUND_S) as client:
        busy = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        calls = [asyncio.create_task(client.infer(x_of(n))) for n in range(8)]
        refused = 'gpu_service_requests_total{code="UNAVAILABLE"}'
        async with asyncio.timeout(BOUND_S):
            while await worker.metric(refused) < 10:  # so some of them more than once
                pass
        worker.engine.gate.open()
        results = await asyncio.gather(busy, *calls)
    assert [result.outputs["y"][0, 0] for result in results] == [
        2 * WAIT,
        *(2 * n for n in range(8)),
    ]


class Refusing:
    """A server that refuses each request so many times, then answers; it knows when each came."""

    def __init__(self, *, times: float, error: dict[str, object]) -> None:
        self._times = times
        self._error = error
        self.came: list[tuple[str | None, float]] = []

    async def __call__(self, connection: ServerConnection) -> None:
        async for message in connection:
            request = decode_request(message)
            self.came.append((request.id, asyncio.get_running_loop().time()))
            if len(self.came) > self._times:
                response = Response(
                    id=request.id, model_name="m", model_version="1", outputs=request.inputs
                )
                await connection.send(encode_response(response, binary=True))
            else:
                await connection.send(json.dumps({"id": request.id, "error": self._error}))


@contextlib.asynccontextmanager
async def served(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "A_NEWER_ONE"])
async def test_a_refused_call_does_not_come_back_too_early(code: str) -> None:
    error = {"code": code, "message": "full", "retry_after_ms": 30}
    refusing = Refusing(times=3, error=error)
    async with served(refusing) as url, Client(url, deadline_s=BOUND_S) as client:
        assert (await client.infer(x_of(5))).outputs["x"][0, 0] == 5
    assert len({request_id for request_id, _ in refusing.came}) == 1
    pauses = [
        later - earlier
        for (_, earlier), (_, later) in zip(refusing.came, refusing.came[1:], strict=False)
    ]
    assert len(pauses) == 3
    assert min(pauses) >= 0.03


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
async def test_a_refusal_may_leave_open_for_how_long_it_is(code: str) -> None:
    refusing = Refusing(times=2, error={"code": code, "message": "full"})
    async with served(refusing) as url, Client(url, deadline_s=BOUND_S) as client:
        await client.infer(x_of(5))
    assert len(refusing.came) == 3


async def test_a_refusal_for_longer_than_the_deadline_is_an_error_at_once() -> None:
    error = {"code": "UNAVAILABLE", "message": "full", "retry_after_ms": 3_600_000}
    refusing = Refusing(times=math.inf, error=error)
    async with served(refusing) as url, Client(url) as client:
        with pytest.raises(InferenceError, match="UNAVAILABLE: full") as caught:
            await client.infer(x_of(1), deadline_s=BOUND_S)
    assert caught.value.retry_after_s == 3600
    assert len(refusing.came) == 1


async def test_refusals_end_with_the_deadline() -> None:
    error = {"code": "UNAVAILABLE", "message": "full", "retry_after_ms": 1}
    refusing = Refusing(times=math.inf, error=error)
    async with served(refusing) as url, Client(url) as client:
        with pytest.raises((DeadlineExceededError, InferenceError), match=r"refused|UNAVAILABLE"):
            await client.infer(x_of(1), deadline_s=0.3)
    assert len(refusing.came) > 1


async def test_other_errors_are_not_tried_again() -> None:
    refusing = Refusing(times=math.inf, error={"code": "INTERNAL", "message": "broken"})
    async with served(refusing) as url, Client(url) as client:
        with pytest.raises(InferenceError, match="INTERNAL: broken"):
            await client.infer(x_of(1))
    assert len(refusing.came) == 1


async def test_closing_ends_a_call_that_was_told_to_come_back() -> None:
    error = {"code": "UNAVAILABLE", "message": "full", "retry_after_ms": 3_600_000}
    refusing = Refusing(times=math.inf, error=error)
    async with served(refusing) as url:
        async with Client(url) as client:
            call = asyncio.create_task(client.infer(x_of(1), deadline_s=1e6))
            async with asyncio.timeout(BOUND_S):
                while not refusing.came or not _paused(client):
                    await asyncio.sleep(0)
        with pytest.raises(ClientError, match="was closed"):
            await call


def _paused(client: Client) -> bool:
    return any(call.paused for call in client._connector._calls.values())


async def test_a_call_that_waits_to_come_back_survives_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.0)
    came = []

    async def handle(connection: ServerConnection) -> None:
        async for message in connection:
            request = decode_request(message)
            came.append(asyncio.get_running_loop().time())
            if len(came) == 1:
                error = {"code": "UNAVAILABLE", "message": "full", "retry_after_ms": 100}
                await connection.send(json.dumps({"id": request.id, "error": error}))
                connection.transport.close()
                return
            response = Response(
                id=request.id, model_name="m", model_version="1", outputs=request.inputs
            )
            await connection.send(encode_response(response, binary=True))

    async with served(handle) as url, Client(url, deadline_s=BOUND_S) as client:
        await client.infer(x_of(1))
        assert client.reconnects == 1
    assert len(came) == 2  # once more, not once for each reason to send it
    assert came[1] - came[0] >= 0.1  # nor before it is time


async def test_a_deadline_ends_one_call_and_no_other(worker: Worker) -> None:
    async with Client(worker.url) as client:
        patient = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        with pytest.raises(DeadlineExceededError, match=r"no answer within 0.05 s"):
            await client.infer(x_of(1), deadline_s=0.05)
        worker.engine.gate.open()
        assert (await patient).outputs["y"][0, 0] == 2 * WAIT
        assert (await client.infer(x_of(2))).outputs["y"][0, 0] == 4


async def test_what_nobody_waits_for_any_more_does_not_run(worker: Worker) -> None:
    async with Client(worker.url) as client:
        busy = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await worker.until_metric("gpu_service_queued_samples", 0)
        with pytest.raises(DeadlineExceededError):
            await client.infer(x_of(1), deadline_s=0.01)
        given_up = asyncio.create_task(client.infer(x_of(2)))
        await worker.until_metric("gpu_service_queued_samples", 1)
        given_up.cancel()
        await worker.until_metric("gpu_service_queued_samples", 0)
        worker.engine.gate.open()
        await busy
        await client.infer(x_of(3))
    assert worker.engine.seen == [WAIT, 3]


async def test_an_address_without_a_server_is_an_error_at_once() -> None:
    with pytest.raises(UnreachableError, match="cannot connect: Connection refused"):
        async with Client(f"ws://127.0.0.1:{free_port()}"):
            pass
    with pytest.raises(UnreachableError, match="not a WebSocket address"):
        async with Client("http://127.0.0.1:9005"):
            pass
    with pytest.raises(UnreachableError, match="is not open"):
        await Client("ws://127.0.0.1:1").infer(x_of(1))


async def test_a_server_without_websocket_is_an_error_at_once(worker: Worker) -> None:
    with pytest.raises(UnreachableError, match="HTTP 200 in place of a WebSocket"):
        async with Client(worker.url + "/v2"):
            pass


async def test_a_full_server_is_an_error_at_once(start_worker: StartWorker) -> None:
    worker = await start_worker(max_connections=1)
    async with Client(worker.url):
        with pytest.raises(UnreachableError, match="HTTP 503"):
            async with Client(worker.url):
                pass


async def test_an_array_that_cannot_be_sent_fails_its_call(worker: Worker) -> None:
    async with Client(worker.url) as client:
        with pytest.raises(ProtocolError, match="complex64"):
            await client.infer({"x": numpy.zeros((1, 3), "c8")})
        await client.infer(x_of(1))


async def test_a_message_that_is_too_large_fails_alone(start_worker: StartWorker) -> None:
    worker = await start_worker(max_message_bytes=2048)
    async with Client(worker.url) as client:
        waiting = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        with pytest.raises(InferenceError, match="is more than the server takes"):
            await client.infer(x_of(*range(1000)))
        worker.engine.gate.open()
        assert (await waiting).outputs["y"][0, 0] == 2 * WAIT


async def test_a_message_is_measured_before_it_is_sent(start_worker: StartWorker) -> None:
    worker = await start_worker(max_message_bytes=2048)
    async with Client(worker.url) as client:
        with pytest.raises(InferenceError, match="is more than the server takes, which is 2048"):
            await client.infer(x_of(*range(1000)))
        await client.infer(x_of(1))
        assert client.reconnects == 0


async def test_what_is_cancelled_does_not_wait_for_what_is_not_read(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_in_flight_per_connection=4)
    async with Client(worker.url, deadline_s=BOUND_S) as client:
        calls = [asyncio.create_task(client.infer(x_of(WAIT, n))) for n in range(20)]
        await worker.until_metric("gpu_service_in_flight_requests", 3)
        for call in calls[:10]:
            call.cancel()
        cancelled = 'gpu_service_requests_total{code="CANCELLED"}'
        await worker.until_metric(cancelled, 3)  # the others were not sent
        await worker.until_metric("gpu_service_in_flight_requests", 3)
        worker.engine.gate.open()
        results = await asyncio.gather(*calls[10:])
        assert [result.outputs["y"][1, 0] for result in results] == [2 * n for n in range(10, 20)]
        assert await worker.metric(cancelled) == 3


async def test_what_a_server_says_of_itself_is_of_one_connection(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.0)
    async with Client(worker.url, deadline_s=BOUND_S) as client:
        await client.infer(x_of(1))
        first = client.session
        assert first is not None
        assert first.worker == "test-worker"
        assert first.limits["max_message_bytes"] == worker.settings.max_message_bytes
        assert first.models == ({"name": "double", "version": "7"},)
        for session in list(worker.server._sessions):
            session.abort()
        await client.infer(x_of(1))
        assert client.reconnects == 1
        second = client.session
        assert second is not None
        assert second.id != first.id
        assert second.limits == first.limits


@pytest.mark.parametrize(("objections", "greets"), [(1, False), (2, False), (1, True)])
async def test_a_server_that_knows_no_cancelling_does_not_fail_the_others(
    objections: int, greets: bool
) -> None:
    cancelled = asyncio.Event()

    async def handle(connection: ServerConnection) -> None:
        kept = None
        if greets:
            await connection.send(encode_session(SessionInfo(id="s")), text=True)
        async for message in connection:
            decoded = decode_message(message)
            if isinstance(decoded, Cancel):
                for _ in range(objections):
                    fault = {"code": "INVALID_ARGUMENT", "message": "not a message"}
                    await connection.send(json.dumps({"id": None, "error": fault}))
                assert kept is not None
                response = Response(
                    id=kept.id, model_name="m", model_version="1", outputs=kept.inputs
                )
                await connection.send(encode_response(response, binary=True))
                cancelled.set()
            elif decoded.inputs["x"][0, 0] == 1:
                kept = decoded

    async with served(handle) as url, Client(url, deadline_s=BOUND_S) as client:
        other = asyncio.create_task(client.infer(x_of(1)))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceededError):
            await client.infer(x_of(2), deadline_s=0.05)
        async with asyncio.timeout(BOUND_S):
            await cancelled.wait()
        if objections == 1 and not greets:
            assert (await other).outputs["x"][0, 0] == 1
        else:  # one has another reason, which may concern any call
            with pytest.raises(InferenceError, match="not a message"):
                await other


# ------------------------------------------------------------------------------ who may connect

TOKEN = "dGhpcyBpcyBub3QgYSBzZWNyZXQ"


@pytest.fixture
def tokens_file(tmp_path: Path) -> str:
    file = tmp_path / "tokens"
    file.write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()} me\n")
    file.chmod(0o600)
    return str(file)


async def test_a_token_is_sent_and_shown_nowhere(
    start_worker: StartWorker, tokens_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    worker = await start_worker(tokens_file=tokens_file)
    async with Client(worker.url, token=TOKEN) as client:
        assert (await client.infer(x_of(1))).outputs["y"][0, 0] == 2
        assert TOKEN not in repr(client)
    # The server is in this process, too.
    ours = [record for record in caplog.records if record.name != "websockets.server"]
    assert ours
    assert TOKEN not in "\n".join(record.getMessage() for record in ours)
    with pytest.raises(ValueError, match="strip what surrounds it") as caught:
        Client(worker.url, token=f"{TOKEN}\n")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "problem"),
    [("another", "does not know this token"), (None, "asks for a token: `token=…` in a program")],
)
async def test_an_unknown_token_is_an_error_at_once(
    start_worker: StartWorker, tokens_file: str, token: str | None, problem: str
) -> None:
    worker = await start_worker(tokens_file=tokens_file)
    with pytest.raises(UnreachableError, match=f"HTTP 401: it {problem}") as caught:
        async with Client(worker.url, token=token):
            pass
    assert "another" not in str(caught.value)


async def test_a_token_that_is_withdrawn_ends_the_client_with_its_connection(
    start_worker: StartWorker, tokens_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.0)
    worker = await start_worker(tokens_file=tokens_file)
    async with Client(worker.url, token=TOKEN, deadline_s=BOUND_S) as client:
        call = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        Path(tokens_file).write_text(f"{'0' * 64} another\n")
        for session in list(worker.server._sessions):
            session.abort()
        with pytest.raises(UnreachableError, match="HTTP 401"):
            await call


async def test_too_many_connections_of_a_client_are_an_error_at_once(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_connections_per_client=1)
    async with Client(worker.url):
        with pytest.raises(UnreachableError, match="HTTP 429: too many connections of this"):
            async with Client(worker.url):
                pass


async def test_once_connected_a_client_waits_for_one_of_its_connections_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.001)
    handshakes = 0

    async def judge(connection: ServerConnection, _: object) -> object:
        nonlocal handshakes
        handshakes += 1
        return connection.respond(429, "too many\n") if 1 < handshakes < 5 else None

    async def handle(connection: ServerConnection) -> None:
        request = decode_request(await connection.recv())
        if handshakes == 1:
            connection.transport.abort()
            return
        response = Response(
            id=request.id, model_name="m", model_version="1", outputs=request.inputs
        )
        await connection.send(encode_response(response, binary=True))
        await connection.wait_closed()

    async with serve(handle, "127.0.0.1", 0, process_request=judge) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"ws://127.0.0.1:{port}", deadline_s=BOUND_S) as client:
            assert (await client.infer(x_of(3))).outputs["x"][0, 0] == 3
            assert client.reconnects == 1
    assert handshakes == 5


async def test_an_origin_that_is_not_allowed_is_explained() -> None:
    async def forbid(connection: ServerConnection, _: object) -> object:
        return connection.respond(403, "no\n")

    async with serve(lambda _: asyncio.sleep(0), "127.0.0.1", 0, process_request=forbid) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UnreachableError, match="HTTP 403: it does not allow this"):
            async with Client(f"ws://127.0.0.1:{port}"):
                pass


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token(file, {"GPU_SERVICE_TOKEN": "another"}) == TOKEN
    assert read_token(None, {"GPU_SERVICE_TOKEN": f"{TOKEN}\n"}) == TOKEN
    assert read_token(None, {}) is None
    with pytest.raises(ClientError, match="cannot be read: No such file"):
        read_token(tmp_path / "none", {})
    for content in (b"", b"two tokens", "schlüssel".encode()):
        file.write_bytes(content)
        with pytest.raises(ClientError, match="must hold one token"):
            read_token(file, os.environ)
    with pytest.raises(ClientError, match="GPU_SERVICE_TOKEN must hold one token"):
        read_token(None, {"GPU_SERVICE_TOKEN": "two tokens"})


async def test_closing_fails_what_still_waits(worker: Worker) -> None:
    async with Client(worker.url) as client:
        call = asyncio.create_task(client.infer(x_of(WAIT)))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
    with pytest.raises(ClientError, match="was closed"):
        await call
    with pytest.raises(ClientError, match="was closed"):
        await client.infer(x_of(1))


async def test_a_request_that_always_breaks_the_connection_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.0)
    received = 0

    async def break_off(connection: ServerConnection) -> None:
        nonlocal received
        await connection.recv()
        received += 1
        connection.transport.abort()

    async with serve(break_off, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"ws://127.0.0.1:{port}") as client:
            with pytest.raises(ClientError, match="given up after sending it 10 times"):
                await client.infer(x_of(1))
    assert received == 10


async def test_replies_that_are_none_fail_the_calls() -> None:
    async def babble(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send("hello")
        await connection.wait_closed()

    async with serve(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"ws://127.0.0.1:{port}") as client:
            with pytest.raises(InferenceError, match="not a message"):
                await client.infer(x_of(1))


async def test_a_restart_costs_a_caller_nothing_but_time(
    start_worker: StartWorker, spawn: Callable[..., Process], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = await asyncio.to_thread(spawn, GATE=str(gate))
    port = await asyncio.to_thread(lambda: first.port)
    async with Client(f"ws://127.0.0.1:{port}", deadline_s=BOUND_S) as client:
        waiting = [asyncio.create_task(client.infer(x_of(WAIT, n))) for n in range(40)]
        async with asyncio.timeout(BOUND_S):
            while await asyncio.to_thread(metric, port, "gpu_service_in_flight_requests") < 40:
                pass
        await asyncio.to_thread(first.kill)
        while_down = [asyncio.create_task(client.infer(x_of(n))) for n in range(40)]
        gate.touch()
        second = await asyncio.to_thread(spawn, "--port", str(port), GATE=str(gate))
        results = await asyncio.gather(*waiting, *while_down)
        assert await asyncio.to_thread(lambda: second.port) == port
        assert [result.outputs["y"][-1, 0] for result in results] == [
            2 * n for n in [*range(40), *range(40)]
        ]


async def test_a_server_that_stays_away_is_unreachable_at_the_deadline(
    spawn: Callable[..., Process],
) -> None:
    process = await asyncio.to_thread(spawn)
    port = await asyncio.to_thread(lambda: process.port)
    async with Client(f"ws://127.0.0.1:{port}") as client:
        await client.infer(x_of(1))
        await asyncio.to_thread(process.kill)
        with pytest.raises(UnreachableError, match=r"no answer within 0.5 s; ws://127"):
            await client.infer(x_of(1), deadline_s=0.5)


async def test_metadata_of_a_service_is_below_its_path() -> None:
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            there = self.path == "/digits/v2"
            body = b'{"worker":"w"}' if there else b"<html>404</html>"
            self.send_response(200 if there else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not to stderr."""

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"ws://127.0.0.1:{server.server_port}"
            found = await fetch_json(f"{url}/digits/", "/v2", timeout_s=BOUND_S)
            assert (found, asked) == ({"worker": "w"}, ["/digits/v2"])
            asked.clear()
            with pytest.raises(UnreachableError, match="/cats/v2 is not JSON"):
                await fetch_json(f"{url}/cats", "/v2", timeout_s=BOUND_S)
            assert asked == ["/cats/v2", "/v2"]
        finally:
            server.shutdown()
            thread.join()


async def test_metadata_is_found_from_any_path_that_takes_websockets(worker: Worker) -> None:
    server = await fetch_json(f"{worker.url}/any/where", "/v2", timeout_s=BOUND_S)
    assert server["worker"] == "test-worker"


async def test_metadata_is_fetched_over_http(worker: Worker) -> None:
    server = await fetch_json(worker.url, "/v2", timeout_s=BOUND_S)
    assert server["worker"] == "test-worker"
    with pytest.raises(InferenceError, match="HTTP 404"):
        await fetch_json(worker.url, "/v2/models/none", timeout_s=BOUND_S)
    with pytest.raises(UnreachableError, match="Connection refused"):
        await fetch_json(f"ws://127.0.0.1:{free_port()}", "/v2", timeout_s=BOUND_S)
