"""Requests and replies over real sockets, with a model that needs no torch."""

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from gpu_service import protocol
from gpu_service.messages import ErrorCode, Failure, Response, SessionInfo
from tests.service.conftest import Worker
from tests.service.fakes import BOUND_S, NOT_A_NUMBER, POISON, WAIT, frame

StartWorker = Callable[..., Awaitable[Worker]]


async def reply(connection: ClientConnection) -> Response | Failure:
    async with asyncio.timeout(BOUND_S):
        return protocol.decode_reply(await connection.recv())


async def failure(connection: ClientConnection) -> Failure:
    received = await reply(connection)
    assert isinstance(received, Failure), received
    return received


async def is_alive(connection: ClientConnection) -> bool:
    await connection.send(frame(21, id="alive?"))
    received = await reply(connection)
    return isinstance(received, Response) and received.outputs["y"].tolist() == [[42, 1, -2]]


def text(**changes: Any) -> str:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    return json.dumps({"id": "t", "inputs": [tensor]} | changes)


async def test_a_text_request_gets_a_text_reply(socket_: ClientConnection) -> None:
    await socket_.send(text(model_name="double", model_version="7"))
    message = await socket_.recv()
    assert isinstance(message, str)
    assert json.loads(message) == {
        "id": "t",
        "model_name": "double",
        "model_version": "7",
        "outputs": [{"name": "y", "shape": [1, 3], "datatype": "FP32", "data": [2, 4, 6]}],
        "parameters": {"worker": "test-worker"},
    }


async def test_a_binary_request_gets_a_binary_reply(socket_: ClientConnection) -> None:
    await socket_.send(frame(1, 2, id="b"))
    message = await socket_.recv()
    assert isinstance(message, bytes)
    response = protocol.decode_reply(message)
    assert isinstance(response, Response)
    assert (response.id, response.model_name, response.model_version) == ("b", "double", "7")
    assert response.outputs["y"].tolist() == [[2, 1, -2], [4, 1, -2]]
    assert response.parameters == {"worker": "test-worker"}


async def test_a_request_without_an_id_is_answered_without_one(socket_: ClientConnection) -> None:
    await socket_.send(frame(1, id=None))
    received = await reply(socket_)
    assert isinstance(received, Response)
    assert received.id is None


async def test_only_the_outputs_asked_for_are_returned(socket_: ClientConnection) -> None:
    await socket_.send(text(outputs=[{"name": "y"}]))
    received = await reply(socket_)
    assert isinstance(received, Response)
    assert received.outputs.keys() == {"y"}
    await socket_.send(text(outputs=[]))
    received = await reply(socket_)
    assert isinstance(received, Response)
    assert received.outputs == {}


async def test_replies_come_as_they_are_ready_and_are_matched_by_id(
    worker: Worker, socket_: ClientConnection
) -> None:
    await socket_.send(frame(WAIT, id="slow"))
    await worker.until_metric("gpu_service_in_flight_requests", 1)
    # Not fit for the model, so it is answered while the first one still runs.
    await socket_.send(text(id="wrong", model_name="other"))
    assert (await failure(socket_)).id == "wrong"
    await socket_.send(frame(3, id="fast"))
    worker.engine.gate.open()
    ids = [(await reply(socket_)).id for _ in range(2)]
    assert ids == ["slow", "fast"]


async def test_many_requests_in_flight_on_many_connections_keep_apart(worker: Worker) -> None:
    async def client(number: int) -> None:
        async with worker.connect() as connection:
            expected = {}
            for n in range(50):
                value = 1000 * (number + 1) + n
                await connection.send(frame(value, id=str(n)))
                expected[str(n)] = 2.0 * value
            got = {}
            for _ in range(50):
                received = await reply(connection)
                assert isinstance(received, Response)
                got[received.id] = received.outputs["y"][0, 0]
            assert got == expected

    await asyncio.gather(*map(client, range(8)))
    assert await worker.metric('gpu_service_requests_total{code="OK"}') == 400
    assert await worker.metric("gpu_service_in_flight_requests") == 0
    assert await worker.metric('gpu_service_stage_seconds_count{stage="queue"}') == 400
    assert await worker.metric("gpu_service_batch_samples_sum") == 400


BAD = {
    "no JSON": ("}{", None, "INVALID_ARGUMENT", "not a message"),
    "a JSON bomb": ("[" * 100_000, None, "INVALID_ARGUMENT", "not a message"),
    "not an object": ("[]", None, "INVALID_ARGUMENT", "Expected `object`"),
    "no inputs": ('{"id": "t"}', "t", "INVALID_ARGUMENT", "inputs"),
    "an unknown field": (text(input=[]), "t", "INVALID_ARGUMENT", "input"),
    "an unknown model": (text(model_name="cat"), "t", "NOT_FOUND", "no model 'cat'"),
    "an unknown version": (text(model_version="8"), "t", "NOT_FOUND", "no version '8'"),
    "an unknown output": (text(outputs=[{"name": "z"}]), "t", "INVALID_ARGUMENT", "'z'"),
    "a wrong name": (
        text(inputs=[{"name": "z", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]),
        "t",
        "INVALID_ARGUMENT",
        "takes the inputs 'x'; got 'z'",
    ),
    "a wrong shape": (
        text(inputs=[{"name": "x", "shape": [3], "datatype": "FP32", "data": [1, 2, 3]}]),
        "t",
        "INVALID_ARGUMENT",
        "shape [n, 3]",
    ),
    "a wrong datatype": (
        text(inputs=[{"name": "x", "shape": [1, 3], "datatype": "FP64", "data": [1, 2, 3]}]),
        "t",
        "INVALID_ARGUMENT",
        "got FP64",
    ),
    "no samples": (
        text(inputs=[{"name": "x", "shape": [0, 3], "datatype": "FP32", "data": []}]),
        "t",
        "INVALID_ARGUMENT",
        "at least one",
    ),
    "an empty frame": (b"", None, "INVALID_ARGUMENT", "header length"),
    "a header past the frame": (b"\xff\xff\xff\xff{}", None, "INVALID_ARGUMENT", "reaches past"),
    "a header that is no UTF-8": (
        struct.pack("<I", 11) + b'{"id": "\xff"}',
        None,
        "INVALID_ARGUMENT",
        "not a message",
    ),
    "a truncated tensor": (frame(1, id="t")[:-8], "t", "INVALID_ARGUMENT", "truncated"),
    "a long tensor": (frame(1, id="t") + bytes(8), "t", "INVALID_ARGUMENT", "the frame has"),
    "too many samples": (frame(*[1] * 65, id="t"), "t", "INVALID_ARGUMENT", "at most 64"),
    "a poisoned one": (frame(POISON, id="t"), "t", "INTERNAL", "log has the cause"),
}


@pytest.mark.parametrize(("message", "id_", "code", "says"), BAD.values(), ids=BAD.keys())
async def test_a_bad_request_gets_its_error_and_the_connection_lives(
    worker: Worker,
    socket_: ClientConnection,
    message: str | bytes,
    id_: str | None,
    code: str,
    says: str,
) -> None:
    await socket_.send(message)
    raw = await socket_.recv()
    assert type(raw) is type(message)
    received = protocol.decode_reply(raw)
    assert isinstance(received, Failure), received
    assert (received.id, received.code) == (id_, code)
    assert says in received.message
    assert await is_alive(socket_)
    assert await worker.metric(f'gpu_service_requests_total{{code="{code}"}}') == 1
    assert await worker.metric("gpu_service_in_flight_requests") == 0


async def test_an_id_may_not_be_used_twice_at_once(
    worker: Worker, socket_: ClientConnection
) -> None:
    await socket_.send(frame(WAIT, id="same"))
    await worker.until_metric("gpu_service_in_flight_requests", 1)
    await socket_.send(frame(1, id="same"))
    assert "in flight on this connection already" in (await failure(socket_)).message
    worker.engine.gate.open()
    assert isinstance(await reply(socket_), Response)
    await socket_.send(frame(1, id="same"))
    assert isinstance(await reply(socket_), Response)


async def test_nan_is_answered_in_binary_and_refused_in_text(socket_: ClientConnection) -> None:
    await socket_.send(frame(NOT_A_NUMBER))
    received = await reply(socket_)
    assert isinstance(received, Response)
    assert received.outputs["y"][0, 0] != received.outputs["y"][0, 0]
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [NOT_A_NUMBER, 0, 0]}
    await socket_.send(text(inputs=[tensor]))
    assert "JSON cannot carry" in (await failure(socket_)).message


async def test_only_the_poisoned_request_of_a_batch_fails(worker: Worker) -> None:
    async with worker.connect() as first, worker.connect() as second, worker.connect() as third:
        await first.send(frame(WAIT, id="busy"))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await first.send(frame(1, id="a"))
        await second.send(frame(POISON, id="b"))
        await third.send(frame(3, id="c"))
        await worker.until_metric("gpu_service_queued_samples", 3)
        worker.engine.gate.open()
        assert [(await reply(first)).id for _ in range(2)] == ["busy", "a"]
        assert (await failure(second)).code == ErrorCode.INTERNAL
        received = await reply(third)
        assert isinstance(received, Response)
        assert received.outputs["y"][0, 0] == 6


async def test_a_full_queue_sheds_load_with_a_hint(start_worker: StartWorker) -> None:
    worker = await start_worker(max_batch=4, max_queue=4)
    async with worker.connect() as connection:
        await connection.send(frame(WAIT, id="busy"))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await connection.send(frame(1, 2, 3, 4, id="queued"))
        await connection.send(frame(5, id="shed"))
        shed = await failure(connection)
        assert (shed.id, shed.code) == ("shed", ErrorCode.UNAVAILABLE)
        assert shed.retry_after_ms is not None
        assert shed.retry_after_ms >= 50
        worker.engine.gate.open()
        assert [(await reply(connection)).id for _ in range(2)] == ["busy", "queued"]
        assert await is_alive(connection)


async def test_requests_of_a_client_that_left_never_run(worker: Worker) -> None:
    async with worker.connect() as staying:
        await staying.send(frame(WAIT, id="busy"))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        leaving = await worker.connect()
        for n in range(5):
            await leaving.send(frame(100 + n, id=str(n)))
        await worker.until_metric("gpu_service_queued_samples", 5)
        leaving.transport.abort()
        await worker.until_metric("gpu_service_queued_samples", 0)
        await worker.until_metric('gpu_service_requests_total{code="CANCELLED"}', 5)
        worker.engine.gate.open()
        assert (await reply(staying)).id == "busy"
        assert await is_alive(staying)
    await leaving.wait_closed()
    assert worker.engine.seen == [WAIT, 21]


async def test_a_message_that_is_too_large_closes_with_1009(start_worker: StartWorker) -> None:
    worker = await start_worker(max_message_bytes=2048)
    async with worker.connect() as connection, worker.connect() as other:
        await connection.send(bytes(2049))
        with pytest.raises(ConnectionClosed) as caught:
            await connection.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009
        assert await is_alive(other)


async def test_text_that_is_no_utf8_closes_with_1007(
    worker: Worker, socket_: ClientConnection
) -> None:
    await socket_.send(b'{"id": "\xff"}', text=True)
    with pytest.raises(ConnectionClosed) as caught:
        await socket_.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1007


async def test_a_connection_is_not_read_beyond_its_requests_in_flight(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(max_in_flight_per_connection=3)
    async with worker.connect() as connection, worker.connect() as other:
        await connection.send(frame(WAIT, id="0"))
        for n in range(1, 10):
            await connection.send(frame(n, id=str(n)))
        await worker.until_metric("gpu_service_in_flight_requests", 3)
        # A round trip of another connection: the loop had its chance to read more.
        await other.send(text(model_name="other"))
        await failure(other)
        assert await worker.metric("gpu_service_in_flight_requests") == 3
        worker.engine.gate.open()
        assert [(await reply(connection)).id for _ in range(10)] == [str(n) for n in range(10)]


async def test_a_client_that_does_not_read_is_not_read_either(start_worker: StartWorker) -> None:
    worker = await start_worker(max_in_flight_per_connection=4)
    # Wrong on purpose, because such requests are answered at once, and with long answers.
    wrong = json.dumps({"id": "w" * 128, "inputs": [], "y" * 1000: 1})
    narrow = socket.create_connection(("127.0.0.1", worker.port))
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that it is full soon
    async with worker.connect(sock=narrow) as connection, worker.connect() as other:
        connection.transport.pause_reading()
        sending = asyncio.create_task(_send_for_ever(connection, wrong))
        counter = 'gpu_service_requests_total{code="INVALID_ARGUMENT"}'
        async with asyncio.timeout(BOUND_S):
            while await _grows(worker, counter) or not sends_wait(connection):
                pass
        assert await worker.metric("gpu_service_in_flight_requests") == 0
        assert await is_alive(other)
        sending.cancel()
        connection.transport.abort()


def sends_wait(connection: ClientConnection) -> bool:
    return connection.transport.get_write_buffer_size() > 0


async def _send_for_ever(connection: ClientConnection, message: str) -> None:
    while True:
        await connection.send(message)


async def _grows(worker: Worker, name: str) -> bool:
    before = await worker.metric(name)
    for _ in range(20):
        if await worker.metric(name) != before:
            return True
    return False


async def test_too_many_connections_are_refused_with_503(start_worker: StartWorker) -> None:
    worker = await start_worker(max_connections=1)
    async with worker.connect() as connection:
        with pytest.raises(InvalidStatus) as caught:
            async with worker.connect():
                pass
        response = caught.value.response
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
        assert json.loads(response.body or b"")["error"]["code"] == "UNAVAILABLE"
        assert await is_alive(connection)
        assert await worker.metric("gpu_service_connections") == 1
    await worker.until_metric("gpu_service_connections", 0)
    async with worker.connect() as connection:
        assert await is_alive(connection)


async def test_the_subprotocol_is_optional_but_must_be_known(worker: Worker) -> None:
    async with worker.connect() as connection:
        assert connection.subprotocol is None
        assert await is_alive(connection)  # it is not greeted
    ours = Subprotocol(protocol.SUBPROTOCOL)
    async with worker.connect(subprotocols=[Subprotocol("other"), ours]) as connection:
        assert connection.subprotocol == "open-inference.v2"
        greeting = protocol.decode_reply(await connection.recv())
        assert isinstance(greeting, SessionInfo)
        assert greeting.worker == "test-worker"
        assert greeting.models == ({"name": "double", "version": "7"},)
        assert await is_alive(connection)
    with pytest.raises(InvalidStatus) as caught:
        async with worker.connect(subprotocols=[Subprotocol("open-inference.v3")]):
            pass
    assert caught.value.response.status_code == 400
    assert b"this server speaks open-inference.v2" in (caught.value.response.body or b"")


async def test_compression_is_declined(worker: Worker) -> None:
    async with connect(worker.url, compression="deflate", proxy=None) as connection:
        assert connection.response is not None
        assert "Sec-WebSocket-Extensions" not in connection.response.headers
        assert await is_alive(connection)


async def test_a_silent_client_is_closed_by_the_keepalive(
    start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.session._CLOSE_TIMEOUT_S", 0.1)
    worker = await start_worker(ping_interval_s=0.1, ping_timeout_s=0.1)
    connection = await worker.connect(ping_interval=None)
    connection.transport.pause_reading()
    await worker.until_metric("gpu_service_connections", 0)
    connection.transport.abort()
    await connection.wait_closed()
