"""The client library against servers that misbehave, restart and die."""

import asyncio
import contextlib
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
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
)
from gpu_service.protocol import ProtocolError, Response, decode_request, encode_response
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


@pytest.mark.parametrize("code", ["UNAVAILABLE", "A_NEWER_ONE"])
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
    return any(call.paused for call in client._calls.values())


async def test_a_call_that_waits_to_come_back_survives_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_service.client._BACKOFF_FIRST_S", 0.0)
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
    monkeypatch.setattr("gpu_service.client._BACKOFF_FIRST_S", 0.0)
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


async def test_metadata_is_fetched_over_http(worker: Worker) -> None:
    server = await fetch_json(worker.url, "/v2", timeout_s=BOUND_S)
    assert server["worker"] == "test-worker"
    with pytest.raises(InferenceError, match="HTTP 404"):
        await fetch_json(worker.url, "/v2/models/none", timeout_s=BOUND_S)
    with pytest.raises(UnreachableError, match="Connection refused"):
        await fetch_json(f"ws://127.0.0.1:{free_port()}", "/v2", timeout_s=BOUND_S)
