"""Sequences, and many responses to one request, over real sockets."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from gpu_service import protocol
from gpu_service.messages import ErrorCode, Failure, Request, Response, Scalar
from tests.service.conftest import Worker
from tests.service.fakes import (
    BOUND_S,
    LAST,
    POISON,
    WAIT,
    CountEngine,
    SumEngine,
    frame,
    x_of,
)

StartWorker = Callable[..., Awaitable[Worker]]

FAR = -1e6  # from here to LAST, and to the values that mean something, are a million steps


@pytest.fixture
async def summing(start_worker: StartWorker) -> Worker:
    return await start_worker(SumEngine())


@pytest.fixture
async def counting(start_worker: StartWorker) -> Worker:
    return await start_worker(CountEngine())


async def reply(connection: ClientConnection) -> Response | Failure:
    async with asyncio.timeout(BOUND_S):
        received = protocol.decode_reply(await connection.recv())
    assert isinstance(received, Response | Failure)
    return received


async def response(connection: ClientConnection) -> Response:
    received = await reply(connection)
    assert isinstance(received, Response), received
    return received


async def value(connection: ClientConnection) -> float:
    return float((await response(connection)).outputs["y"][0, 0])


async def failure(connection: ClientConnection) -> Failure:
    received = await reply(connection)
    assert isinstance(received, Failure), received
    return received


def step(x: float, of: str | int = "s", **parameters: Scalar) -> bytes:
    return frame(x, id=None, sequence_id=of, **parameters)


def begin(x: float, of: str | int = "s", **parameters: Scalar) -> bytes:
    return step(x, of, sequence_start=True, **parameters)


async def told(connection: ClientConnection, message: str | bytes) -> Failure:
    await connection.send(message)
    return await failure(connection)


async def sums(connection: ClientConnection, *messages: bytes) -> list[float]:
    """The answers to some steps, each sent when the one before was answered."""
    values = []
    for message in messages:
        await connection.send(message)
        values.append(await value(connection))
    return values


# ------------------------------------------------------------------------------ sequences


async def test_a_sequence_keeps_its_state_from_begin_to_end(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1), step(2), step(3)) == [1, 3, 6]
        assert await sums(connection, step(4, sequence_end=True)) == [10]
        assert (await told(connection, step(5))).code == ErrorCode.NOT_FOUND
        assert await sums(connection, begin(7), step(1)) == [7, 8]  # from zeros again


async def test_steps_may_be_sent_without_waiting(summing: Worker) -> None:
    async with summing.connect() as connection:
        for n in range(20):
            flags = {"sequence_start": n == 0, "sequence_end": n == 19}
            await connection.send(frame(1, id=str(n), sequence_id="s", **flags))
        got = [await response(connection) for _ in range(20)]
    assert [(each.id, each.outputs["y"][0, 0]) for each in got] == [
        (str(n), n + 1) for n in range(20)
    ]


async def test_sequences_keep_apart_by_id_by_type_and_by_connection(summing: Worker) -> None:
    async with summing.connect() as one, summing.connect() as other:
        assert await sums(one, begin(1, "s"), begin(10, 1), begin(100, "1")) == [1, 10, 100]
        assert await sums(other, begin(1000, "s")) == [1000]
        assert await sums(one, step(1, "s"), step(1, 1), step(1, "1")) == [2, 11, 101]
        assert await sums(other, step(1, "s")) == [1001]
        assert (await told(other, step(1, 1))).code == ErrorCode.NOT_FOUND


async def test_steps_of_many_sequences_run_together(start_worker: StartWorker) -> None:
    worker = await start_worker(SumEngine(places=8))
    async with worker.connect() as connection:
        await connection.send(frame(WAIT, id="busy"))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await worker.until_metric("gpu_service_queued_samples", 0)
        for number in range(8):
            await connection.send(begin(number, number))
        await worker.until_metric("gpu_service_queued_samples", 8)
        worker.engine.gate.open()
        assert [await value(connection) for _ in range(9)] == [WAIT, *range(8)]
    assert await worker.metric("gpu_service_batch_samples_count") == 2


async def test_without_a_sequence_a_stateful_model_runs_from_zeros(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(5), frame(1), frame(2)) == [5, 1, 2]
        await connection.send(frame(1, 2, 3))
        assert (await response(connection)).outputs["y"][:, 0].tolist() == [1, 2, 3]
        assert await sums(connection, step(1)) == [6]


async def test_a_step_that_fails_changes_no_state(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1)) == [1]
        assert (await told(connection, step(POISON))).code == ErrorCode.INTERNAL
        assert await sums(connection, step(2)) == [3]
        assert (await told(connection, begin(POISON, "t"))).code == ErrorCode.INTERNAL
        assert await sums(connection, step(2, "t")) == [2]


WRONG = {
    "an unknown one": (step(1, "t"), ErrorCode.NOT_FOUND, "no sequence 't' on this connection"),
    "begun twice": (begin(1), ErrorCode.INVALID_ARGUMENT, "has begun already"),
    "two samples": (
        frame(1, 2, sequence_id="s"),
        ErrorCode.INVALID_ARGUMENT,
        "has one sample; got 2",
    ),
    "two samples at its begin": (
        frame(1, 2, sequence_id="t", sequence_start=True),
        ErrorCode.INVALID_ARGUMENT,
        "has one sample; got 2",
    ),
    "another model": (
        protocol.encode_request(
            Request(inputs=x_of(1), model_name="double", parameters={"sequence_id": "s"})
        ),
        None,
        "",
    ),
    "another version": (
        protocol.encode_request(
            Request(inputs=x_of(1), model_version="9", parameters={"sequence_id": "s"})
        ),
        None,
        "",
    ),
    "an id of no kind": (
        frame(1, sequence_id=1.5),
        ErrorCode.INVALID_ARGUMENT,
        "must be a text or a whole number",
    ),
    "a true id": (
        frame(1, sequence_id=True),
        ErrorCode.INVALID_ARGUMENT,
        "must be a text or a whole number",
    ),
    "an empty id": (
        frame(1, sequence_id=""),
        ErrorCode.INVALID_ARGUMENT,
        "must be a text or a whole number",
    ),
    "a flag that is none": (
        frame(1, sequence_id="s", sequence_end=1),
        ErrorCode.INVALID_ARGUMENT,
        "must be true or false",
    ),
    "flags without an id": (
        frame(1, sequence_start=True),
        ErrorCode.INVALID_ARGUMENT,
        "need a 'sequence_id'",
    ),
}


@pytest.mark.parametrize(("message", "code", "says"), WRONG.values(), ids=WRONG.keys())
async def test_steps_that_make_no_sense_are_refused_and_the_sequence_lives(
    summing: Worker, message: bytes, code: str | None, says: str
) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1)) == [1]
        told_ = await told(connection, message)
        assert told_.code in ((code,) if code else (ErrorCode.NOT_FOUND, "INVALID_ARGUMENT"))
        assert says in told_.message
        assert await sums(connection, step(1)) == [2]
        assert await summing.metric("gpu_service_in_flight_requests") == 0
        name = 'gpu_service_model_sequences{model="sum",version="1"}'
        assert await summing.metric(name) == 1


async def test_the_id_of_a_sequence_is_bounded_as_others_are(summing: Worker) -> None:
    async with summing.connect() as connection:
        told_ = await told(connection, begin(1, "s" * 129))
        assert told_.code == ErrorCode.INVALID_ARGUMENT
        assert len(told_.message) < 600
        assert await sums(connection, begin(1, "s" * 128), step(1, "s" * 128)) == [1, 2]


async def test_a_model_without_state_has_no_sequences(worker: Worker) -> None:
    async with worker.connect() as connection:
        told_ = await told(connection, begin(1))
        assert told_.code == ErrorCode.INVALID_ARGUMENT
        assert "model 'double' keeps no state" in told_.message


async def test_a_connection_has_so_many_sequences_and_not_more(start_worker: StartWorker) -> None:
    worker = await start_worker(SumEngine(), max_streams_per_connection=2)
    async with worker.connect() as connection, worker.connect() as other:
        assert await sums(connection, begin(1, "a"), begin(2, "b")) == [1, 2]
        told_ = await told(connection, begin(3, "c"))
        assert told_.code == ErrorCode.RESOURCE_EXHAUSTED
        assert told_.retry_after_ms is not None
        assert "2 sequences of this connection" in told_.message
        assert await sums(other, begin(4, "c")) == [4]
        assert await sums(connection, step(1, "a", sequence_end=True), begin(3, "c")) == [2, 3]
    assert await worker.metric('gpu_service_failures_total{reason="streams_full"}') == 1


async def test_a_model_has_so_many_sequences_and_not_more(start_worker: StartWorker) -> None:
    worker = await start_worker(SumEngine(places=2))
    async with worker.connect() as connection:
        async with worker.connect() as other:
            assert await sums(connection, begin(1)) == [1]
            assert await sums(other, begin(2)) == [2]
            told_ = await told(connection, begin(3, "t"))
            assert told_.code == ErrorCode.RESOURCE_EXHAUSTED
            assert told_.retry_after_ms is not None
            assert "2 sequences of this model" in told_.message
        # The other one has left, and its place with it.
        await worker.until_metric('gpu_service_model_sequences{model="sum",version="1"}', 1)
        assert await sums(connection, begin(3, "t"), step(1)) == [3, 2]


async def test_a_full_queue_begins_no_sequence(start_worker: StartWorker) -> None:
    worker = await start_worker(SumEngine(places=1), max_batch=1, max_queue=1)
    async with worker.connect() as connection:
        await connection.send(frame(WAIT, id="busy"))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await worker.until_metric("gpu_service_queued_samples", 0)
        await connection.send(frame(1, id="queued"))
        assert (await told(connection, begin(2))).code == ErrorCode.UNAVAILABLE
        worker.engine.gate.open()
        assert [await value(connection) for _ in range(2)] == [WAIT, 1]
        assert await sums(connection, begin(3), step(1)) == [3, 4]


async def test_a_sequence_is_cancelled_as_a_whole(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1)) == [1]
        await connection.send(frame(WAIT, id="busy", sequence_id="s"))
        await summing.until_metric("gpu_service_in_flight_requests", 1)
        await summing.until_metric("gpu_service_queued_samples", 0)
        await connection.send(frame(2, id="queued", sequence_id="s"))
        await connection.send(begin(5, "t", priority=4))
        await connection.send(protocol.encode_cancel_sequence("s").decode())
        cancelled = [await failure(connection) for _ in range(2)]
        assert [each.id for each in cancelled] == ["busy", "queued"]
        assert {each.code for each in cancelled} == {ErrorCode.CANCELLED}
        assert (await told(connection, step(1))).code == ErrorCode.NOT_FOUND
        await connection.send(begin(7))  # at once, while the old one's step still runs
        summing.engine.gate.open()
        assert sorted([await value(connection) for _ in range(2)]) == [5, 7]
        assert await sums(connection, step(1)) == [8]
    assert 2 not in summing.engine.seen


async def test_cancelling_a_step_leaves_its_sequence(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1)) == [1]
        await connection.send(frame(WAIT, id="busy"))
        await summing.until_metric("gpu_service_in_flight_requests", 1)
        await summing.until_metric("gpu_service_queued_samples", 0)
        await connection.send(frame(2, id="unwanted", sequence_id="s"))
        await connection.send(frame(3, id="wanted", sequence_id="s"))
        await connection.send(protocol.encode_cancel("unwanted").decode())
        assert (await failure(connection)).id == "unwanted"
        summing.engine.gate.open()
        assert [await value(connection) for _ in range(2)] == [WAIT, 4]


async def test_cancelling_a_sequence_that_is_not_there_is_harmless(summing: Worker) -> None:
    async with summing.connect() as connection, summing.connect() as other:
        assert await sums(other, begin(1)) == [1]
        await connection.send(protocol.encode_cancel_sequence("s").decode())
        assert await sums(connection, frame(1)) == [1]
        assert await sums(other, step(1)) == [2]


# ------------------------------------------------------------------------------ many responses


async def test_many_responses_come_in_order_and_the_last_says_so(counting: Worker) -> None:
    async with counting.connect() as connection:
        await connection.send(frame(1, id="m", max_responses=5))
        got = [await response(connection) for _ in range(5)]
        assert [(each.id, each.index, each.final) for each in got] == [
            ("m", index, index == 4) for index in range(5)
        ]
        assert [each.outputs["y"][0, 0] for each in got] == [2, 3, 4, 5, 6]
        assert got[0].parameters == {"worker": "test-worker"}
        await connection.send(frame(1, id="m"))  # its id is free again
        assert (await response(connection)).index is None
    assert await counting.metric('gpu_service_requests_total{code="OK"}') == 2
    assert await counting.metric("gpu_service_in_flight_requests") == 0


async def test_in_text_too(counting: Worker) -> None:
    request = Request(inputs=x_of(1), id="m", parameters={"max_responses": 3}, binary=False)
    async with counting.connect() as connection:
        await connection.send(protocol.encode_request(request), text=True)
        got = [await response(connection) for _ in range(3)]
    assert [(each.index, each.final) for each in got] == [(0, False), (1, False), (2, True)]


async def test_a_model_says_when_it_is_done(counting: Worker) -> None:
    async with counting.connect() as connection:
        await connection.send(frame(LAST - 3, max_responses=1000))
        got = [await response(connection) for _ in range(3)]
        assert [each.final for each in got] == [False, False, True]
        assert [each.outputs["end"].tolist() for each in got] == [[False], [False], [True]]
        await connection.send(frame(1))
        assert (await response(connection)).final


async def test_what_is_fed_back_need_not_be_asked_for(counting: Worker) -> None:
    request = Request(inputs=x_of(LAST - 2), outputs=(), parameters={"max_responses": 9})
    async with counting.connect() as connection:
        await connection.send(protocol.encode_request(request))
        got = [await response(connection) for _ in range(2)]
    assert [(each.outputs, each.final) for each in got] == [({}, False), ({}, True)]


async def test_others_are_answered_in_between(counting: Worker) -> None:
    async with counting.connect() as connection, counting.connect() as other:
        await connection.send(frame(2000, id="long", max_responses=1000))
        await connection.send(frame(5, id="short"))
        ids = [(await response(connection)).id for _ in range(1001)]
        assert ids.index("short") < 1000
        await other.send(frame(5))
        assert await value(other) == 6


async def test_many_responses_are_cancelled_midway(counting: Worker) -> None:
    async with counting.connect() as connection:
        await connection.send(frame(FAR, id="m", max_responses=1_000_000))
        for index in range(3):
            assert (await response(connection)).index == index
        await connection.send(protocol.encode_cancel("m").decode())
        async with asyncio.timeout(BOUND_S):
            while isinstance(received := await reply(connection), Response):
                assert not received.final
        assert (received.id, received.code) == ("m", ErrorCode.CANCELLED)
        await connection.send(frame(1, id="m"))
        assert (await response(connection)).final
        steps = len(counting.engine.seen)
        await connection.send(frame(2))
        await response(connection)
        assert len(counting.engine.seen) == steps + 1
    assert await counting.metric("gpu_service_in_flight_requests") == 0


async def test_a_cancel_that_had_to_wait_to_be_read_is_obeyed(start_worker: StartWorker) -> None:
    """It is read while the answers of a batch are sent, of which its request's next is one."""
    worker = await start_worker(CountEngine(), max_in_flight_per_connection=3)
    async with worker.connect() as connection, worker.connect() as other:
        await other.send(frame(WAIT))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await worker.until_metric("gpu_service_queued_samples", 0)
        for message in (
            frame(1, id="a"),
            frame(2, id="b"),
            frame(FAR, id="m", max_responses=1_000_000),
            protocol.encode_cancel("m").decode(),
            frame(4, id="c"),
        ):
            await connection.send(message)
        await worker.until_metric("gpu_service_queued_samples", 3)
        worker.engine.gate.open()
        kinds: dict[str | None, list[type]] = {}
        for _ in range(200):
            received = await reply(connection)
            kinds.setdefault(received.id, []).append(type(received))
            if {"a", "b", "c"} <= kinds.keys() and kinds.get("m", [])[-1:] == [Failure]:
                break
        assert kinds["m"][-1] is Failure


@pytest.mark.parametrize(
    "most", [0, -1, 1_000_001, 1.5, "3", True], ids=lambda most: f"{type(most).__name__} {most}"
)
async def test_the_number_of_responses_is_bounded(counting: Worker, most: Scalar) -> None:
    async with counting.connect() as connection:
        told_ = await told(connection, frame(1, max_responses=most))
        assert told_.code == ErrorCode.INVALID_ARGUMENT
        assert "from 1 to 1000000" in told_.message


async def test_many_responses_are_of_one_sample(counting: Worker) -> None:
    async with counting.connect() as connection:
        told_ = await told(connection, frame(1, 2, max_responses=2))
        assert told_.code == ErrorCode.INVALID_ARGUMENT
        assert "one sample; got 2" in told_.message


async def test_a_model_without_feedback_gives_one_response(worker: Worker) -> None:
    async with worker.connect() as connection:
        told_ = await told(connection, frame(1, max_responses=2))
        assert told_.code == ErrorCode.INVALID_ARGUMENT
        assert "model 'double' gives one response" in told_.message
        await connection.send(frame(1, max_responses=1))
        assert (await response(connection)).final


async def test_an_error_is_the_last_response(counting: Worker) -> None:
    async with counting.connect() as connection:
        await connection.send(frame(POISON - 2, id="m", max_responses=9))
        assert [(await response(connection)).index for _ in range(2)] == [0, 1]
        assert (await failure(connection)).code == ErrorCode.INTERNAL
        await connection.send(frame(1, id="m"))
        assert (await response(connection)).final


async def test_a_response_that_no_text_can_carry_is_the_last_one(summing: Worker) -> None:
    request = Request(
        inputs=x_of(float(2**126)), id="m", parameters={"max_responses": 9}, binary=False
    )
    async with summing.connect() as connection:
        await connection.send(protocol.encode_request(request), text=True)
        received: Response | Failure = await reply(connection)
        while isinstance(received, Response):
            assert not received.final
            received = await reply(connection)
        assert "JSON cannot carry" in received.message
        assert await sums(connection, frame(1, id="m")) == [1]


async def test_a_client_that_leaves_ends_its_responses(counting: Worker) -> None:
    async with counting.connect() as staying:
        leaving = await counting.connect()
        await leaving.send(frame(FAR, max_responses=1_000_000))
        await response(leaving)
        leaving.transport.abort()
        await counting.until_metric('gpu_service_requests_total{code="CANCELLED"}', 1)
        await staying.send(frame(1))
        await response(staying)
        steps = len(counting.engine.seen)
        await staying.send(frame(2))
        await response(staying)
        assert len(counting.engine.seen) == steps + 1
        await leaving.wait_closed()
    assert await counting.metric("gpu_service_in_flight_requests") == 0


async def connect_and_not_read(worker: Worker) -> ClientConnection:
    """A client that reads nothing, with little room on the way to it."""
    before = set(worker.server._sessions)
    mine = socket.create_connection(("127.0.0.1", worker.port))
    connection = await worker.connect(sock=mine, max_queue=None)
    (session,) = worker.server._sessions - before
    its = session._transport.get_extra_info("socket")
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    its.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection.transport.pause_reading()
    return connection


async def until_clogged(worker: Worker) -> None:
    async with asyncio.timeout(BOUND_S):
        while not any(session._requests._clogged for session in worker.server._sessions):
            await asyncio.sleep(0)


async def test_nothing_is_computed_for_a_client_that_does_not_read(counting: Worker) -> None:
    most = 100_000
    async with counting.connect() as other:
        connection = await connect_and_not_read(counting)
        await connection.send(frame(FAR, max_responses=most, id="m"))
        await until_clogged(counting)
        steps = len(counting.engine.seen)
        assert 1 < steps < most
        for _ in range(5):  # round trips, so that a step under way would have come to its end
            await other.send(frame(1))
            assert await value(other) == 2
        assert len(counting.engine.seen) == steps + 5
        assert await counting.metric("gpu_service_queued_samples") == 0

        connection.transport.resume_reading()
        async with asyncio.timeout(BOUND_S):
            for index in range(steps + 100):  # it goes on where it stopped, and nothing is lost
                received = protocol.decode_reply(await connection.recv())
                assert isinstance(received, Response)
                assert received.index == index
        assert len(counting.engine.seen) > steps + 100
        connection.transport.abort()
        await connection.wait_closed()
    await counting.until_metric("gpu_service_in_flight_requests", 0)


async def test_a_clogged_request_ends_with_its_connection(counting: Worker) -> None:
    connection = await connect_and_not_read(counting)
    await connection.send(frame(FAR, max_responses=1_000_000))
    await until_clogged(counting)
    connection.transport.abort()
    await connection.wait_closed()
    await counting.until_metric("gpu_service_in_flight_requests", 0)
    assert await counting.metric('gpu_service_failures_total{reason="disconnected"}') == 1


# ------------------------------------------------------------------------------ both


async def test_many_responses_of_a_stateful_model_have_a_state_of_their_own(
    summing: Worker,
) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(100)) == [100]
        await connection.send(frame(1, id="m", max_responses=4))
        assert [await value(connection) for _ in range(4)] == [1, 2, 4, 8]
        assert await sums(connection, step(1)) == [101]
        name = 'gpu_service_model_sequences{model="sum",version="1"}'
        assert await summing.metric(name) == 1


async def test_many_responses_to_a_step_go_on_with_its_sequence(summing: Worker) -> None:
    async with summing.connect() as connection:
        assert await sums(connection, begin(1)) == [1]
        await connection.send(step(1, max_responses=3))
        assert [await value(connection) for _ in range(3)] == [2, 4, 8]
        assert await sums(connection, step(1)) == [9]


async def test_a_step_behind_many_responses_does_not_get_between_them(summing: Worker) -> None:
    async with summing.connect() as connection:
        await connection.send(begin(WAIT, max_responses=3))
        await summing.until_metric("gpu_service_in_flight_requests", 1)
        await summing.until_metric("gpu_service_queued_samples", 0)
        await connection.send(frame(1, id="behind", sequence_id="s"))
        received = await reply(connection)
        summing.engine.gate.open()
        if isinstance(received, Failure):  # refused until the last of them
            assert received.id == "behind"
            rest = [await value(connection) for _ in range(3)]
        else:
            rest = [float(received.outputs["y"][0, 0])]
            rest += [await value(connection) for _ in range(3)]
        assert rest[:3] == [WAIT, 2 * WAIT, 4 * WAIT]


async def test_the_last_step_keeps_its_place_until_its_last_response(
    start_worker: StartWorker,
) -> None:
    worker = await start_worker(SumEngine(places=1))
    async with worker.connect() as connection, worker.connect() as other:
        await connection.send(begin(WAIT, sequence_end=True, max_responses=20))
        await worker.until_metric("gpu_service_in_flight_requests", 1)
        await worker.until_metric("gpu_service_queued_samples", 0)
        assert (await told(other, begin(1))).code == ErrorCode.RESOURCE_EXHAUSTED
        worker.engine.gate.open()
        got: list[Any] = []
        for n in range(20):
            # Whoever has been refused tries again: it must not get the place of one that runs.
            await other.send(frame(1, id=str(n), sequence_id=n, sequence_start=True))
            got.append((await response(connection)).outputs["y"][0, 0])
            await reply(other)
        assert got == [WAIT * 2**n for n in range(20)]


async def test_many_responses_hold_a_place_and_give_it_back(start_worker: StartWorker) -> None:
    worker = await start_worker(SumEngine(places=1))
    async with worker.connect() as connection:
        await connection.send(frame(0, id="m", max_responses=1_000_000))
        await response(connection)
        await connection.send(begin(1))
        received = await reply(connection)
        while isinstance(received, Response):
            assert received.id == "m"
            received = await reply(connection)
        assert received.code == ErrorCode.RESOURCE_EXHAUSTED
        await connection.send(protocol.encode_cancel("m").decode())
        while isinstance(received := await reply(connection), Response):
            pass
        assert received.code == ErrorCode.CANCELLED
        async with asyncio.timeout(BOUND_S):
            while True:  # its last step may be on the device still
                await connection.send(begin(1))
                if isinstance(await reply(connection), Response):
                    break
