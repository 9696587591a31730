"""Many responses and sequences through the client: slow consumers, lost connections, refusals.

`python -m tests.service.test_streams_client` serves the engine of the sequences.
"""

import asyncio
import collections
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from gpu_service import settings, worker
from gpu_service.blocking import BlockingClient
from gpu_service.bundle import TensorSpec
from gpu_service.client import (
    Client,
    ClientError,
    ConnectionLostError,
    DeadlineExceededError,
    InferenceError,
    InferResult,
    SequenceLostError,
)
from gpu_service.client_calls import FULL_RESPONSES, MOST_RESPONSES
from gpu_service.device import BatchOutput, Engine, Stream, Tensors
from gpu_service.messages import Cancel, ProtocolError, Request, Response
from gpu_service.protocol import decode_message, encode_response
from gpu_service.signature import ModelInfo
from tests.service.conftest import Process, Worker, metric
from tests.service.fakes import BOUND_S, POISON, WAIT, Gate

IN_FLIGHT = "gpu_service_in_flight_requests"
LAST = 5000.0


def spec(name: str, datatype: str = "FP32", shape: tuple[int, ...] = (1,)) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def x_of(value: float) -> dict[str, numpy.ndarray]:
    return {"x": numpy.array([[value]], "<f4")}


def sum_of(result: Any) -> float:
    return float(result.outputs["sum"][0, 0])


class SumEngine(Engine):
    """The sum of the values of a sequence so far. POISON fails, WAIT waits and adds nothing."""

    model = ModelInfo(
        name="sum",
        version="1",
        inputs=(spec("x"),),
        outputs=(spec("sum"),),
        state=(spec("total"),),
    )
    description: Mapping[str, str] = {"device": "none"}
    max_streams = 100

    def __init__(self, *, max_streams: int = 100) -> None:
        self.gate = Gate()
        self.max_streams = max_streams
        self.seen: list[float] = []
        self._totals = numpy.zeros(max_streams, "<f4")

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        values = [float(inputs["x"][0, 0]) for inputs in requests]
        self.seen += values
        if WAIT in values:
            self.gate.wait()
        if POISON in values:
            raise RuntimeError("poisoned")
        sums = []
        for value, stream in zip(values, streams, strict=True):
            before = 0.0 if stream is None or stream.is_fresh else self._totals[stream.slot]
            sums.append(before + (0 if value == WAIT else value))
            if stream is not None:
                self._totals[stream.slot] = sums[-1]
                stream.is_fresh = False
        outputs = {"sum": numpy.array(sums, "<f4").reshape(-1, 1)}
        return lambda: BatchOutput(outputs=outputs)


class CountEngine(Engine):
    """y = x + 1, again and again until LAST."""

    model = ModelInfo(
        name="count",
        version="1",
        inputs=(spec("x"),),
        outputs=(spec("y"), spec("end", "BOOL", ())),
        feedback={"y": "x"},
        done="end",
    )
    description: Mapping[str, str] = {"device": "none"}

    def __init__(self) -> None:
        self.gate = Gate()

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        x = numpy.concatenate([inputs["x"] for inputs in requests])
        if (x == POISON).any():
            raise RuntimeError("poisoned")
        return BatchOutput(outputs={"y": x + 1, "end": (x + 1 >= LAST)[:, 0]})


Serve = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start() -> AsyncIterator[Serve]:
    workers: list[Worker] = []

    async def start(engine: Any, **options: Any) -> Worker:
        started = Worker(engine, settings.Settings(bundle=(Path("unused"),), **options))
        workers.append(started)
        await started.start()
        return started

    yield start
    for started in workers:
        await started.stop()


class Relay:
    """A TCP relay to a port, whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._port}"

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, down]
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, down), self._pump(up, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_service.client_link._BACKOFF_FIRST_S", 0.001)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not condition():
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def served(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def reply(request: Request, index: int, *, final: bool = False, version: str = "1") -> bytes:
    response = Response(
        id=request.id,
        model_name="count",
        model_version=version,
        outputs={"y": numpy.array([[index]], "<f4")},
        index=index,
        final=final,
    )
    return encode_response(response, binary=True)


def error(request: Request, code: str, **more: Any) -> str:
    return json.dumps({"id": request.id, "error": {"code": code, "message": "no", **more}})


def request_of(message: str | bytes) -> Request:
    decoded = decode_message(message)
    assert isinstance(decoded, Request)
    return decoded


# ------------------------------------------------------------------------------ many responses


async def test_responses_come_in_order_until_the_last(start: Serve) -> None:
    served = await start(CountEngine())
    async with Client(served.url) as client:
        results = [result async for result in client.stream_infer(x_of(0), max_responses=100)]
        ended = [result async for result in client.stream_infer(x_of(LAST - 3), max_responses=100)]
        only = [result async for result in client.stream_infer(x_of(0), max_responses=1)]
    assert [result.outputs["y"][0, 0] for result in results] == list(range(1, 101))
    assert [result.index for result in results] == list(range(100))
    assert [result.final for result in results] == [False] * 99 + [True]
    assert results[0].worker == "test-worker"
    assert [result.outputs["y"][0, 0] for result in ended] == [LAST - 2, LAST - 1, LAST]
    assert [(result.index, result.final) for result in only] == [(0, True)]


async def test_leaving_the_loop_cancels_the_request(start: Serve) -> None:
    served = await start(CountEngine())
    async with Client(served.url) as client:
        async for result in client.stream_infer(x_of(-1e6), max_responses=1_000_000):
            if result.index == 10:
                break
        await served.until_metric(IN_FLIGHT, 0)
        assert await served.metric('gpu_service_requests_total{code="CANCELLED"}') == 1
        assert client._connector._calls == {}


async def test_responses_that_came_before_a_lost_connection_do_not_come_twice(
    start: Serve,
) -> None:
    served = await start(CountEngine())
    async with Relay(served.port) as relay, Client(relay.url, deadline_s=BOUND_S) as client:
        values = []
        async for result in client.stream_infer(x_of(0), max_responses=500):
            values.append(float(result.outputs["y"][0, 0]))
            if len(values) in (3, 200):
                relay.cut()
        assert client.reconnects == 2
    assert values == list(range(1, 501))


async def test_without_resending_a_lost_connection_is_an_error(start: Serve) -> None:
    served = await start(CountEngine())
    async with Relay(served.port) as relay, Client(relay.url, deadline_s=BOUND_S) as client:
        count = 0
        with pytest.raises(ConnectionLostError, match="resend=False"):
            async for result in client.stream_infer(
                x_of(-1e6), max_responses=1_000_000, resend=False
            ):
                assert result.index == count
                count += 1
                if count == 3:
                    relay.cut()
        assert count >= 3


async def test_responses_of_two_versions_are_not_mixed() -> None:
    connections = 0

    async def handle(connection: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        request = request_of(await connection.recv())
        for index in range(2 if connections == 1 else 5):
            await connection.send(reply(request, index, version=str(connections)))
        if connections > 1:
            await connection.wait_closed()

    async with served(handle) as url, Client(url, deadline_s=BOUND_S) as client:
        indices = []
        with pytest.raises(ConnectionLostError, match="version '2' answers now"):
            async for result in client.stream_infer(x_of(0), max_responses=5):
                indices.append(result.index)
    assert indices == [0, 1]


async def test_an_error_comes_behind_the_responses_before_it(start: Serve) -> None:
    served = await start(CountEngine())
    async with Client(served.url) as client:
        values = []
        with pytest.raises(InferenceError, match="INTERNAL"):
            async for result in client.stream_infer(x_of(POISON - 3), max_responses=100):
                values.append(result.outputs["y"][0, 0])
        with pytest.raises(InferenceError, match="INVALID_ARGUMENT"):
            await anext(client.stream_infer({"z": numpy.zeros((1, 1), "<f4")}, max_responses=2))
    assert values == [POISON - 2, POISON - 1, POISON]


async def test_a_refusal_amid_responses_is_waited_for() -> None:
    sent = 0

    async def handle(connection: ServerConnection) -> None:
        nonlocal sent
        async for message in connection:
            request = request_of(message)
            sent += 1
            for index in range(2 if sent < 3 else 4):
                await connection.send(reply(request, index, final=index == 3))
            if sent < 3:
                await connection.send(error(request, "UNAVAILABLE", retry_after_ms=1))

    async with served(handle) as url, Client(url, deadline_s=BOUND_S) as client:
        results = [result.index async for result in client.stream_infer(x_of(0), max_responses=4)]
    assert results == [0, 1, 2, 3]
    assert sent == 3


async def test_a_deadline_is_of_each_response() -> None:
    cancelled = asyncio.Event()

    async def handle(connection: ServerConnection) -> None:
        request = request_of(await connection.recv())
        await connection.send(reply(request, 0))
        assert decode_message(await connection.recv()) == Cancel(request.id)
        cancelled.set()

    async with served(handle) as url, Client(url) as client:
        responses = client.stream_infer(x_of(0), max_responses=2, deadline_s=0.2)
        assert (await anext(responses)).index == 0
        with pytest.raises(DeadlineExceededError, match=r"within 0.2 s"):
            await anext(responses)
        async with asyncio.timeout(BOUND_S):
            await cancelled.wait()


class Flood:
    """Sends `count` responses of 16 KiB to the first request, and answers all others at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.sent = 0
        self.cancelled: list[str | None] = []
        self.mute = False  # not answering the others, either

    async def __call__(self, connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            flood = asyncio.create_task(
                self._flood(connection, request_of(await connection.recv()))
            )
            async for message in connection:
                decoded = decode_message(message)
                if isinstance(decoded, Cancel):
                    self.cancelled.append(decoded.id)
                elif not self.mute:
                    await connection.send(reply(decoded, 0, final=True))
            await flood

    async def _flood(self, connection: ServerConnection, request: Request) -> None:
        with contextlib.suppress(ConnectionClosed):
            for index in range(self._count):
                response = Response(
                    id=request.id,
                    model_name="m",
                    model_version="1",
                    outputs={"y": numpy.zeros((1, 4096), "<f4")},
                    index=index,
                    final=index + 1 == self._count,
                )
                await connection.send(encode_response(response, binary=True))
                self.sent = index + 1


def waiting_in(client: Client) -> int:
    return max(len(getattr(call, "_waiting", ())) for call in client._connector._calls.values())


async def test_a_slow_consumer_is_not_sent_more_than_it_takes() -> None:
    flood = Flood(2000)
    async with served(flood) as url, Client(url, deadline_s=BOUND_S) as client:
        responses = client.stream_infer(x_of(0), max_responses=2000)
        assert (await anext(responses)).index == 0
        await until(lambda: waiting_in(client) == FULL_RESPONSES)
        # It stays so however often the loop turns.
        for _ in range(2000):
            await asyncio.sleep(0)
        assert waiting_in(client) == FULL_RESPONSES
        assert flood.sent < 2000
        # A call in between is answered all the same.
        assert (await client.infer(x_of(1))).index == 0
        assert waiting_in(client) < MOST_RESPONSES
        indices = [result.index async for result in responses]
    assert indices == list(range(1, 2000))


async def test_a_consumer_that_keeps_others_waiting_is_ended() -> None:
    flood = Flood(5000)
    flood.mute = True
    async with served(flood) as url, Client(url, deadline_s=BOUND_S) as client:
        responses = client.stream_infer(x_of(0), max_responses=5000)
        assert (await anext(responses)).index == 0
        other = asyncio.create_task(client.infer(x_of(1)))
        await until(lambda: len(flood.cancelled) == 1)
        indices = []
        with pytest.raises(ClientError, match="1024 responses wait to be taken"):
            async for result in responses:
                indices.append(result.index)
        assert indices == list(range(1, MOST_RESPONSES + 1))
        other.cancel()


async def test_what_a_slow_consumer_lost_is_asked_for_when_it_has_room() -> None:
    asked: list[object] = []

    async def handle(connection: ServerConnection) -> None:
        async for message in connection:
            request = request_of(message)
            most = request.parameters.get("max_responses", 1)
            asked.append(most)
            assert isinstance(most, int)
            for index in range(most):
                await connection.send(reply(request, index, final=index + 1 == most))
                if len(asked) == 1 and index == FULL_RESPONSES:
                    return  # closes

    async with served(handle) as url, Client(url, deadline_s=BOUND_S) as client:
        responses = client.stream_infer(x_of(0), max_responses=200)
        indices = [(await anext(responses)).index]
        await until(lambda: waiting_in(client) == FULL_RESPONSES)
        await client.infer(x_of(0))
        assert client.reconnects == 1
        indices += [result.index async for result in responses]
    assert indices == list(range(200))
    assert asked == [200, 1, 200]


# ------------------------------------------------------------------------------ sequences


async def test_steps_are_of_one_sequence_and_run_in_order(start: Serve) -> None:
    served = await start(SumEngine())
    async with Client(served.url) as client:
        async with client.sequence(model="sum") as one, client.sequence() as other:
            assert sum_of(await one.step(x_of(1))) == 1
            assert sum_of(await other.step(x_of(10))) == 10
            results = await asyncio.gather(*(one.step(x_of(n)) for n in range(50)))
            assert [sum_of(result) for result in results] == [
                1 + sum(range(n + 1)) for n in range(50)
            ]
            assert sum_of(await other.finish(x_of(1))) == 11
            assert (one.steps, other.steps) == (51, 2)
            with pytest.raises(ClientError, match="has had its last step"):
                await other.step(x_of(1))
        assert sum_of(await client.infer(x_of(3))) == 3
        with pytest.raises(ClientError, match="was left"):
            await one.step(x_of(1))
        with pytest.raises(ClientError, match="entered once"):
            await one.__aenter__()
        with pytest.raises(ClientError, match="use it as"):
            await client.sequence().step(x_of(1))


async def test_steps_are_sent_ahead_of_the_answers(start: Serve) -> None:
    served = await start(SumEngine())
    async with Client(served.url, deadline_s=BOUND_S) as client, client.sequence() as sequence:
        await sequence.step(x_of(1))
        steps = [asyncio.create_task(sequence.step(x_of(n))) for n in (WAIT, *range(20))]
        await served.until_metric(IN_FLIGHT, 8)
        served.engine.gate.open()
        assert [sum_of(result) for result in await asyncio.gather(*steps)] == [
            1,
            *(1 + sum(range(n + 1)) for n in range(20)),
        ]


async def test_nothing_is_sent_ahead_that_could_not_be_replayed(start: Serve) -> None:
    served = await start(SumEngine())
    async with (
        Client(served.url, deadline_s=BOUND_S) as client,
        client.sequence(replay_bytes=0) as sequence,
    ):
        steps = [asyncio.create_task(sequence.step(x_of(n))) for n in (1, WAIT, 2, 3)]
        await until(lambda: WAIT in served.engine.seen)
        assert await served.metric(IN_FLIGHT) == 1
        served.engine.gate.open()
        assert [sum_of(result) for result in await asyncio.gather(*steps)] == [1, 1, 3, 6]


@pytest.mark.parametrize("how", ["finished", "left", "left with a step under way"])
async def test_the_place_of_an_ended_sequence_is_free_again(start: Serve, how: str) -> None:
    served = await start(SumEngine(max_streams=1))
    async with Client(served.url, retry_refused=False) as client:
        for _ in range(3):
            async with client.sequence() as sequence:
                assert sum_of(await sequence.step(x_of(2))) == 2
                if how == "finished":
                    await sequence.finish(x_of(2))
                elif how == "left with a step under way":
                    step = asyncio.create_task(sequence.step(x_of(2)))
                    await asyncio.sleep(0)
            if how == "left with a step under way":
                with pytest.raises(ClientError, match="was left"):
                    await step
            await until_no_sequences(served)


async def until_no_sequences(served: Worker) -> None:
    await until(lambda: served.registry.all()[0].channel.streams == 0)


async def test_a_sequence_waits_for_the_place_of_another(start: Serve) -> None:
    served = await start(SumEngine(max_streams=1))
    async with Client(served.url, deadline_s=BOUND_S) as client:
        async with client.sequence() as first, client.sequence() as second:
            await first.step(x_of(1))
            steps = [asyncio.create_task(second.step(x_of(n))) for n in range(3)]
            refused = 'gpu_service_requests_total{code="RESOURCE_EXHAUSTED"}'
            await served.until_metric(refused, 1)
            await first.finish(x_of(1))
            assert [sum_of(result) for result in await asyncio.gather(*steps)] == [0, 1, 3]
        async with (
            Client(served.url, retry_refused=False) as impatient,
            client.sequence() as first,
            impatient.sequence() as second,
        ):
            await first.step(x_of(1))
            with pytest.raises(InferenceError, match="RESOURCE_EXHAUSTED"):
                await second.step(x_of(1))


async def test_after_a_lost_connection_the_steps_are_replayed(start: Serve) -> None:
    served = await start(SumEngine())
    async with (
        Relay(served.port) as relay,
        Client(relay.url, deadline_s=BOUND_S) as client,
        client.sequence() as sequence,
    ):
        for n in range(20):
            await sequence.step(x_of(n))
        relay.cut()
        assert sum_of(await sequence.step(x_of(1))) == 191
        steps = [asyncio.create_task(sequence.step(x_of(n))) for n in (WAIT, 1, 2)]
        await until(lambda: WAIT in served.engine.seen)
        relay.cut()
        last = asyncio.create_task(sequence.finish(x_of(3)))
        await until(lambda: client.reconnects == 2)
        served.engine.gate.open()
        assert [sum_of(result) for result in await asyncio.gather(*steps, last)] == [
            191,
            192,
            194,
            197,
        ]


async def test_more_steps_than_can_be_replayed_are_lost_with_the_connection(start: Serve) -> None:
    served = await start(SumEngine())
    async with Relay(served.port) as relay, Client(relay.url, deadline_s=BOUND_S) as client:
        async with client.sequence(replay_bytes=1000) as sequence:
            results = await asyncio.gather(*(sequence.step(x_of(1)) for _ in range(20)))
            assert [sum_of(result) for result in results] == [*range(1, 21)]
            relay.cut()
            for _ in range(2):
                with pytest.raises(SequenceLostError, match=r"20 steps .* replay_bytes \(1000\)"):
                    await sequence.step(x_of(1))
        async with client.sequence(replay_bytes=0) as sequence:
            await sequence.step(x_of(1))
            assert sum_of(await sequence.step(x_of(1))) == 2


async def test_a_step_that_fails_has_not_happened(start: Serve) -> None:
    served = await start(SumEngine())
    async with (
        Relay(served.port) as relay,
        Client(relay.url, deadline_s=BOUND_S) as client,
        client.sequence() as sequence,
    ):
        for failing in (x_of(POISON), {"z": numpy.zeros((1, 1), "<f4")}):
            with pytest.raises(InferenceError, match=r"INTERNAL|INVALID_ARGUMENT"):
                await sequence.step(failing)
        assert sum_of(await sequence.step(x_of(1))) == 1
        values = (2, POISON, 3, POISON, 4)
        results = await asyncio.gather(
            *(sequence.step(x_of(n)) for n in values), return_exceptions=True
        )
        assert [sum_of(result) for result in results[::2]] == [3, 6, 10]
        assert all(isinstance(result, InferenceError) for result in results[1::2])
        with pytest.raises(ProtocolError, match="complex64"):
            await sequence.step({"x": numpy.zeros((1, 1), "c8")})
        relay.cut()
        assert sum_of(await sequence.step(x_of(5))) == 15
        with pytest.raises(InferenceError, match="INTERNAL"):
            await sequence.finish(x_of(POISON))
        assert sum_of(await sequence.finish(x_of(1))) == 16
    assert served.engine.seen.count(2) == 3  # first, after the cut, after the failed last step


async def test_a_step_that_is_not_waited_for_has_not_happened(start: Serve) -> None:
    served = await start(SumEngine())
    async with Client(served.url, deadline_s=BOUND_S) as client, client.sequence() as sequence:
        await sequence.step(x_of(1))
        with pytest.raises(DeadlineExceededError):
            await sequence.step(x_of(WAIT), deadline_s=0.05)
        served.engine.gate.open()
        assert sum_of(await sequence.step(x_of(2))) == 3
        served.engine.gate = Gate()
        steps = [asyncio.create_task(sequence.step(x_of(n))) for n in (WAIT, 10, 20, 30)]
        await served.until_metric(IN_FLIGHT, 4)
        steps[2].cancel()
        await asyncio.wait([steps[2]])
        served.engine.gate.open()
        kept = await asyncio.gather(*(steps[n] for n in (0, 1, 3)))
        assert [sum_of(result) for result in kept] == [3, 13, 43]
        assert sequence.steps == 5


class Breaking:
    """A server of sums whose connections break at POISON, and at a replay if it is `unlucky`."""

    def __init__(self) -> None:
        self.poisoned = 0
        self.unlucky = False

    async def __call__(self, connection: ServerConnection) -> None:
        total = 0.0
        async for message in connection:
            request = decode_message(message)
            if isinstance(request, Cancel):
                continue
            value = float(request.inputs["x"][0, 0])
            if value == POISON or self.unlucky:
                self.poisoned += 1
                connection.transport.abort()
                return
            total += value
            response = Response(
                id=request.id,
                model_name="sum",
                model_version="1",
                outputs={"sum": numpy.array([[total]], "<f4")},
            )
            await connection.send(encode_response(response, binary=True))


async def test_a_step_that_breaks_each_connection_is_given_up() -> None:
    breaking = Breaking()
    async with (
        served(breaking) as url,
        Client(url, deadline_s=BOUND_S) as client,
        client.sequence() as sequence,
    ):
        await sequence.step(x_of(1))
        with pytest.raises(ClientError, match="given up after sending it 10 times"):
            await sequence.step(x_of(POISON))
        assert breaking.poisoned == 10
        assert sum_of(await sequence.step(x_of(2))) == 3


async def test_a_replay_that_breaks_each_connection_is_given_up() -> None:
    breaking = Breaking()
    async with (
        served(breaking) as url,
        Client(url, deadline_s=BOUND_S) as client,
        client.sequence() as sequence,
    ):
        await sequence.step(x_of(1))
        breaking.unlucky = True
        with pytest.raises(SequenceLostError, match="11 times without a step between"):
            await sequence.step(x_of(2))
        assert breaking.poisoned == 11


async def test_closing_the_client_ends_its_sequences(start: Serve) -> None:
    served = await start(SumEngine())
    async with Client(served.url) as client:
        async with client.sequence() as sequence:
            step = asyncio.create_task(sequence.step(x_of(WAIT)))
            await served.until_metric(IN_FLIGHT, 1)
            await client.__aexit__(None, None, None)
            with pytest.raises(ClientError, match="client was closed"):
                await step
            with pytest.raises(ClientError, match="client was closed"):
                await sequence.step(x_of(1))
        served.engine.gate.open()
        await client.__aenter__()


class Chaos:
    """A server of sums that refuses, forgets sequences and breaks connections, as chance has it.

    Otherwise it does as the protocol says: steps of a connection run in the order they came,
    a while later; what is refused or wrong is answered at once.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def happens(self, share: float) -> bool:
        return self._random.random() < share

    async def __call__(self, connection: ServerConnection) -> None:
        sums: dict[object, list[float]] = {}
        queue: collections.deque[tuple[Request, list[float]]] = collections.deque()
        running = asyncio.create_task(self._run(connection, queue))
        try:
            with contextlib.suppress(ConnectionClosed):
                async for message in connection:
                    for answer in self._answers(message, sums, queue):
                        await connection.send(answer)
                    if self.happens(0.007):
                        connection.transport.abort()
        finally:
            running.cancel()

    def _answers(
        self,
        message: str | bytes,
        sums: dict[object, list[float]],
        queue: collections.deque[tuple[Request, list[float]]],
    ) -> list[str]:
        request = decode_message(message)
        if isinstance(request, Cancel):
            sums.pop(request.sequence_id, None)
            dropped = [
                each for each in queue if each[0].parameters["sequence_id"] == request.sequence_id
            ]
            for each in dropped:
                queue.remove(each)
            return [error(each, "CANCELLED") for each, _ in dropped]
        sequence_id = request.parameters["sequence_id"]
        if self.happens(0.005):
            sums.clear()  # as if the model had been unloaded: what is queued still runs
        if self.happens(0.05):
            return [error(request, "UNAVAILABLE", retry_after_ms=1)]
        if request.parameters.get("sequence_start"):
            assert sequence_id not in sums
            sums[sequence_id] = [0.0]
        if sequence_id not in sums:
            return [error(request, "NOT_FOUND")]
        queue.append((request, sums[sequence_id]))
        return []

    async def _run(
        self,
        connection: ServerConnection,
        queue: collections.deque[tuple[Request, list[float]]],
    ) -> None:
        while True:
            for _ in range(self._random.randrange(1, 5)):
                await asyncio.sleep(0)
            if not queue:
                continue
            request, total = queue.popleft()
            value = float(request.inputs["x"][0, 0])
            if value == POISON:
                await connection.send(error(request, "INTERNAL"))
                continue
            total[0] += value
            response = Response(
                id=request.id,
                model_name="sum",
                model_version="1",
                outputs={"sum": numpy.array([total], "<f4")},
            )
            await connection.send(encode_response(response, binary=True))


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_each_sum_is_of_the_steps_that_succeeded(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.client_calls._RETRY_AFTER_S", 0.001)
    monkeypatch.setattr("gpu_service.client_calls._SPREAD_MOST_S", 0.001)
    monkeypatch.setattr("gpu_service.client_sequence.MAX_SENDS", 1000)
    chance = random.Random(seed)

    async def use(client: Client) -> None:
        async with client.sequence() as sequence:
            expected = 0.0
            for _ in range(8):
                values = [
                    POISON if chance.random() < 0.05 else float(chance.randrange(100))
                    for _ in range(chance.randrange(1, 12))
                ]
                before = sequence.steps
                steps = [asyncio.create_task(sequence.step(x_of(value))) for value in values]
                for _ in range(chance.randrange(20)):
                    await asyncio.sleep(0)
                if chance.random() < 0.3:
                    chance.choice(steps).cancel()
                results = await asyncio.gather(*steps, return_exceptions=True)
                # Cancelled when its answer was there already, a step has happened all the same.
                came = [isinstance(result, InferResult) for result in results]
                late = sequence.steps - before - sum(came)
                assert late in (0, 1)
                for step, value, result in zip(steps, values, results, strict=True):
                    if step.cancelled():
                        expected += value * late
                        continue
                    if value == POISON:
                        assert isinstance(result, InferenceError)
                        continue
                    assert not isinstance(result, BaseException), result
                    expected += value
                    assert sum_of(result) == expected

    async with served(Chaos(seed)) as url, Client(url, deadline_s=BOUND_S) as client:
        await asyncio.gather(*(use(client) for _ in range(3)))
        assert client._connector._calls == {}
        assert not client._connector.followers


async def test_sequences_and_responses_survive_a_restart(spawn: Callable[..., Process]) -> None:
    module = "tests.service.test_streams_client"
    first = await asyncio.to_thread(spawn, module=module)
    port = await asyncio.to_thread(lambda: first.port)
    async with (
        Client(f"ws://127.0.0.1:{port}", deadline_s=BOUND_S) as client,
        client.sequence() as sequence,
    ):
        for n in range(10):
            await sequence.step(x_of(n))
        await asyncio.to_thread(first.kill)
        step = asyncio.create_task(sequence.step(x_of(5)))
        second = await asyncio.to_thread(spawn, "--port", str(port), module=module)
        assert sum_of(await step) == 50
        second.terminate()
        await asyncio.to_thread(second.wait)
        step = asyncio.create_task(sequence.step(x_of(6)))
        await asyncio.to_thread(spawn, "--port", str(port), module=module)
        assert sum_of(await step) == 56


# ------------------------------------------------------------------------------ blocking


async def test_the_blocking_client_has_both(start: Serve) -> None:
    counts, sums = await start(CountEngine()), await start(SumEngine())

    def use() -> None:
        with BlockingClient(counts.url, deadline_s=BOUND_S) as client:
            results = list(client.stream_infer(x_of(0), max_responses=50))
            assert [result.index for result in results] == list(range(50))
            for result in client.stream_infer(x_of(-1e6), max_responses=1_000_000):
                if result.index == 5:
                    break
            deadline = time.monotonic() + BOUND_S
            while metric(counts.port, IN_FLIGHT):
                assert time.monotonic() < deadline, "it was not cancelled"
            session = client.session
            assert session is not None
            assert session.worker == "test-worker"
            with pytest.raises(InferenceError, match="INVALID_ARGUMENT"):
                next(client.stream_infer({}, max_responses=2))
        with pytest.raises(ClientError, match="was closed"):
            next(client.stream_infer(x_of(0), max_responses=2))
        with (
            BlockingClient(sums.url, deadline_s=BOUND_S) as client,
            client.sequence() as sequence,
            ThreadPoolExecutor(4) as pool,
        ):
            got = list(pool.map(lambda _: sum_of(sequence.step(x_of(1))), range(40)))
            assert sorted(got) == list(range(1, 41))
            assert sum_of(sequence.finish(x_of(2))) == 42
            assert sequence.steps == 41

    await asyncio.to_thread(use)
    await until_no_sequences(sums)


async def test_a_blocking_sequence_may_outlive_its_client(start: Serve) -> None:
    served = await start(SumEngine())

    def use() -> None:
        with BlockingClient(served.url) as client:
            sequence = client.sequence()
            with sequence:
                sequence.step(x_of(1))
                client.close()
            with pytest.raises(ClientError, match="client was closed"):
                sequence.step(x_of(1))

    await asyncio.to_thread(use)


def main() -> int:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    named = {name.removeprefix("--").replace("-", "_"): text for name, text in options.items()}
    chosen = settings.load({"bundle": "unused", "port": "0", **named}, {})
    return worker.run(chosen, open_engine=lambda chosen, path: SumEngine())


if __name__ == "__main__":
    sys.exit(main())
