"""Priorities, deadlines, cancellation and broken devices, over real sockets."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gpu_service import protocol
from gpu_service.messages import ErrorCode, Failure, Response
from tests.service.conftest import Process, Worker, get
from tests.service.fakes import BOUND_S, BREAK, POISON, WAIT, frame


async def reply(connection: ClientConnection) -> Response | Failure:
    async with asyncio.timeout(BOUND_S):
        return protocol.decode_reply(await connection.recv())


async def failure(connection: ClientConnection) -> Failure:
    received = await reply(connection)
    assert isinstance(received, Failure), received
    return received


async def make_busy(worker: Worker, connection: ClientConnection) -> None:
    await connection.send(frame(WAIT, id="busy"))
    await worker.until_metric("gpu_service_in_flight_requests", 1)
    await worker.until_metric("gpu_service_queued_samples", 0)


def binary_cancel(request_id: str) -> bytes:
    header = protocol.encode_cancel(request_id)
    return len(header).to_bytes(4, "little") + header


async def test_the_urgent_request_overtakes(worker: Worker, socket_: ClientConnection) -> None:
    await make_busy(worker, socket_)
    for number, priority in enumerate((0, 5, 9)):
        await socket_.send(frame(number, id=f"p{priority}", priority=priority))
    await worker.until_metric("gpu_service_queued_samples", 3)
    worker.engine.gate.open()
    assert [(await reply(socket_)).id for _ in range(4)] == ["busy", "p9", "p5", "p0"]


async def test_a_request_that_waits_too_long_is_told_so_and_never_runs(
    worker: Worker, socket_: ClientConnection
) -> None:
    await make_busy(worker, socket_)
    await socket_.send(frame(1, id="late", timeout_ms=1))
    await socket_.send(frame(2, id="patient", timeout_ms=1000 * BOUND_S))
    late = await failure(socket_)  # although the device is still busy
    assert (late.id, late.code) == ("late", ErrorCode.DEADLINE_EXCEEDED)
    worker.engine.gate.open()
    assert [(await reply(socket_)).id for _ in range(2)] == ["busy", "patient"]
    assert worker.engine.seen == [WAIT, 2]
    assert await worker.metric('gpu_service_failures_total{reason="expired"}') == 1
    assert await worker.metric("gpu_service_in_flight_requests") == 0


@pytest.mark.parametrize("how", [lambda id_: protocol.encode_cancel(id_).decode(), binary_cancel])
async def test_a_queued_request_is_cancelled_by_a_message(
    worker: Worker, socket_: ClientConnection, how: Callable[[str], str | bytes]
) -> None:
    await make_busy(worker, socket_)
    await socket_.send(frame(1, id="unwanted"))
    await socket_.send(frame(2, id="wanted"))
    await socket_.send(how("unwanted"))
    cancelled = await failure(socket_)
    assert (cancelled.id, cancelled.code) == ("unwanted", ErrorCode.CANCELLED)
    worker.engine.gate.open()
    assert [(await reply(socket_)).id for _ in range(2)] == ["busy", "wanted"]
    assert worker.engine.seen == [WAIT, 2]
    assert await worker.metric('gpu_service_failures_total{reason="cancelled"}') == 1


async def test_a_running_request_is_cancelled_and_its_id_is_free(
    worker: Worker, socket_: ClientConnection
) -> None:
    await make_busy(worker, socket_)
    await socket_.send(protocol.encode_cancel("busy").decode())
    assert (await failure(socket_)).code == ErrorCode.CANCELLED
    await socket_.send(frame(2, id="busy"))
    worker.engine.gate.open()
    received = await reply(socket_)
    assert isinstance(received, Response)
    assert received.outputs["y"][0, 0] == 4


async def test_cancelling_what_is_not_there_is_harmless(
    worker: Worker, socket_: ClientConnection
) -> None:
    async with worker.connect() as other:
        await make_busy(worker, other)
        for _ in range(100):  # more than may be unanswered: they need no answer
            await socket_.send(protocol.encode_cancel("busy").decode())  # it is the other's
        await socket_.send(frame(3, id="next"))
        worker.engine.gate.open()
        assert (await reply(socket_)).id == "next"
        assert (await reply(other)).id == "busy"
    assert await worker.metric("gpu_service_in_flight_requests") == 0


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ('{"cancel": {}}', "id"),
        ('{"cancel": {"id": "a"}, "inputs": []}', "either 'inputs' or 'cancel'"),
        (frame(1, priority=10), "from 0 to 9"),
        (frame(1, priority=-1), "from 0 to 9"),
        (frame(1, priority=5.0), "from 0 to 9"),
        (frame(1, priority=True), "from 0 to 9"),
        (frame(1, timeout_ms=0), "greater than 0"),
        (frame(1, timeout_ms="5"), "greater than 0"),
    ],
)
async def test_wishes_that_make_no_sense_are_refused(
    socket_: ClientConnection, message: str | bytes, says: str
) -> None:
    await socket_.send(message)
    received = await failure(socket_)
    assert received.code == ErrorCode.INVALID_ARGUMENT
    assert says in received.message


async def test_a_timeout_of_any_length_is_taken(socket_: ClientConnection) -> None:
    await socket_.send(frame(1, timeout_ms=2**63))
    assert isinstance(await reply(socket_), Response)


async def test_the_limits_are_told(worker: Worker) -> None:
    described: dict[str, Any] = json.loads((await asyncio.to_thread(get, worker.port, "/v2"))[2])
    assert described["limits"] == {
        "max_batch": 64,
        "max_connections_per_client": 0,
        "max_fragments": 4096,
        "max_in_flight_per_connection": 64,
        "max_message_bytes": 1 << 20,
        "max_requests_per_s_per_client": 0,
        "max_streams": 1024,
        "max_streams_per_connection": 64,
        "priorities": [0, 9],
    }


async def test_a_broken_device_ends_the_process_for_its_manager_to_restart(
    spawn: Callable[..., Process],
) -> None:
    process = await asyncio.to_thread(spawn)
    await asyncio.to_thread(lambda: process.port)
    async with connect(process.url, compression=None, proxy=None) as connection:
        codes = []
        with pytest.raises(ConnectionClosed) as closed:
            for number in range(1000):
                await connection.send(frame(BREAK if number == 0 else number))
                codes.append((await failure(connection)).code)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert codes[:3] == [ErrorCode.INTERNAL] * 3
        assert set(codes[3:]) <= {ErrorCode.UNAVAILABLE, ErrorCode.INTERNAL}
    assert await asyncio.to_thread(process.wait) == 1
    broken = await asyncio.to_thread(process.until, "device_broken")
    assert "out of order" in broken["reason"]


async def test_poison_is_logged_but_does_not_fill_the_disk(spawn: Callable[..., Process]) -> None:
    process = await asyncio.to_thread(spawn)
    await asyncio.to_thread(lambda: process.port)
    async with connect(process.url, compression=None, proxy=None) as connection:
        for _ in range(100):
            await connection.send(frame(POISON))
            assert (await failure(connection)).code == ErrorCode.INTERNAL
        await connection.send(frame(1))
        assert isinstance(await reply(connection), Response)
    process.terminate()
    assert await asyncio.to_thread(process.wait) == 0
    await asyncio.to_thread(process.until, "stopped")
    logged = [line for line in process.lines if line["event"] == "request_failed"]
    assert 10 <= len(logged) < 100
