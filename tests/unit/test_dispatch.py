import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import numpy
import pytest

from gpu_service.batching import Ticket
from gpu_service.bundle import TensorSpec
from gpu_service.dispatch import (
    BatchOutput,
    BrokenError,
    Dispatcher,
    Engine,
    FinishedBatch,
    Tensors,
)
from gpu_service.signature import ModelInfo

BOUND_S = 30.0  # of every wait; far longer than any takes


class Work(msgspec.Struct):
    inputs: Tensors


class Doubling(Engine):
    """Doubles x, raises where it holds 666, waits while told to."""

    model = ModelInfo(
        name="m",
        version="1",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=()),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=()),),
    )
    description = {"device": "none"}  # noqa: RUF012 - fixed

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.open = threading.Event()
        self.open.set()
        self.running = threading.Event()
        self.error: BaseException = RuntimeError("poisoned")
        self.is_broken = False
        self.checks = 0

    def check(self) -> None:
        self.checks += 1
        if self.is_broken:
            raise OSError("out of order")

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        x = numpy.concatenate([inputs["x"] for inputs in requests])
        self.batches.append(x.tolist())
        self.running.set()
        assert self.open.wait(BOUND_S)
        if self.is_broken:
            raise OSError("out of order")
        if (x == 666).any():
            raise self.error
        return BatchOutput(outputs={"y": 2 * x}, infer_s=0.001)


class Bench:
    """A dispatcher on the running loop, and what came out of it by first input value."""

    def __init__(self, engine: Doubling) -> None:
        self.engine = engine
        self.batches: list[FinishedBatch[Work]] = []
        self.results: dict[float, Any] = {}
        self._changed = asyncio.Event()
        self.dispatcher: Dispatcher[Work] = Dispatcher(
            lambda: engine, max_batch=4, max_queue=16, max_delay_s=0
        )
        self.dispatcher.open()
        self.expired: list[float] = []
        self.broken: list[BrokenError] = []
        self.dispatcher.start(
            self._on_batch, on_expired=self._on_expired, on_broken=self._on_broken
        )

    def submit(self, *x: float, **options: Any) -> Any:
        work = Work({"x": numpy.array(x, "<f4")})
        return self.dispatcher.submit(work, samples=len(x), **options)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _on_expired(self, ticket: Ticket[Work]) -> None:
        self.expired.append(float(ticket.payload.inputs["x"][0]))
        self._changed.set()

    def _on_broken(self, error: BrokenError) -> None:
        self.broken.append(error)
        self._changed.set()

    def _on_batch(self, batch: FinishedBatch[Work]) -> None:
        self.batches.append(batch)
        for outcome in batch.outcomes:
            key = float(outcome.ticket.payload.inputs["x"][0])
            result = outcome.result
            assert key not in self.results
            is_error = isinstance(result, BaseException)
            self.results[key] = result if is_error else result["y"].tolist()
        self._changed.set()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(Doubling())
    yield bench
    bench.engine.open.set()
    assert bench.dispatcher.close(timeout_s=BOUND_S)


async def until_running(engine: Doubling) -> None:
    assert await asyncio.to_thread(engine.running.wait, BOUND_S)
    engine.running.clear()


async def test_each_request_gets_its_own_rows(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.submit(3)
    await bench.until(lambda: len(bench.results) == 2)
    assert bench.results == {1: [2, 4], 3: [6]}


async def test_requests_of_one_turn_of_the_loop_run_together(bench: Bench) -> None:
    for x in (1, 2, 3):
        bench.submit(x)
    await bench.until(lambda: len(bench.results) == 3)
    assert bench.engine.batches == [[1, 2, 3]]
    assert [batch.samples for batch in bench.batches] == [3]  # and one wake-up brought all


async def test_requests_gather_while_the_engine_is_busy(bench: Bench) -> None:
    bench.engine.open.clear()
    bench.submit(1)
    await until_running(bench.engine)
    for x in (2, 3, 4, 5, 6):
        bench.submit(x)
        await asyncio.sleep(0)
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 6)
    assert bench.engine.batches == [[1], [2, 3, 4, 5], [6]]


@pytest.mark.parametrize("error", [ValueError("no"), MemoryError(), SystemExit(1)])
async def test_a_poisoned_request_fails_alone_and_the_thread_lives(
    bench: Bench, error: BaseException
) -> None:
    bench.engine.error = error
    for x in (1, 666, 3):
        bench.submit(x)
    await bench.until(lambda: len(bench.results) == 3)
    assert bench.results == {1: [2], 666: error, 3: [6]}
    assert bench.engine.batches == [[1, 666, 3], [1], [666], [3]]
    bench.submit(4)
    await bench.until(lambda: 4 in bench.results)
    assert bench.results[4] == [8]


async def test_an_output_of_another_length_is_an_error_of_the_batch(bench: Bench) -> None:
    bench.engine.run = lambda requests: BatchOutput(outputs={"y": numpy.zeros(1)})  # type: ignore[method-assign]
    bench.submit(1, 2)
    await bench.until(lambda: 1 in bench.results)
    assert "first dimension must be 2" in str(bench.results[1])


async def test_a_cancelled_request_never_reaches_the_engine(bench: Bench) -> None:
    bench.engine.open.clear()
    bench.submit(1)
    await until_running(bench.engine)
    ticket = bench.submit(2)
    bench.submit(3)
    assert bench.dispatcher.cancel(ticket)
    assert bench.dispatcher.queued_samples == 1
    bench.engine.open.set()
    await bench.until(lambda: 3 in bench.results)
    assert bench.engine.batches == [[1], [3]]
    assert 2 not in bench.results


async def test_a_request_cancelled_while_it_runs_is_not_delivered(bench: Bench) -> None:
    bench.engine.open.clear()
    ticket = bench.submit(1)
    await until_running(bench.engine)
    assert bench.dispatcher.cancel(ticket)
    bench.engine.open.set()
    bench.submit(2)
    await bench.until(lambda: 2 in bench.results)
    assert bench.results == {2: [4]}
    assert not bench.dispatcher.cancel(ticket)


async def test_a_request_whose_time_is_up_is_told_so_while_the_engine_is_busy(
    bench: Bench,
) -> None:
    bench.engine.open.clear()
    bench.submit(1, timeout_s=0.001)  # it starts at once, and so runs to its end
    await until_running(bench.engine)
    bench.submit(2, timeout_s=0.001)
    bench.submit(3, timeout_s=BOUND_S)
    await bench.until(lambda: bool(bench.expired))
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 2)
    assert bench.expired == [2]
    assert bench.results == {1: [2], 3: [6]}
    assert bench.engine.batches == [[1], [3]]
    assert not bench.dispatcher._timers  # nothing is held that was answered


async def fail_alone(bench: Bench, *keys: float) -> None:
    for key in keys:
        bench.submit(key)
        await bench.until(lambda key=key: key in bench.results)


async def test_a_device_that_fails_whatever_it_gets_is_found_broken(bench: Bench) -> None:
    bench.engine.is_broken = True
    await fail_alone(bench, 1, 2)
    assert bench.engine.checks == 0
    await fail_alone(bench, 3)
    await bench.until(lambda: bool(bench.broken))
    assert "the device fails: OSError: out of order" in str(bench.broken[0])
    ran = len(bench.engine.batches)
    await fail_alone(bench, 4)
    assert bench.results[4] is bench.broken[0]
    assert len(bench.engine.batches) == ran  # it is left alone
    assert len(bench.broken) == 1


async def test_poisoned_requests_do_not_make_a_device_broken(bench: Bench) -> None:
    for key in range(7):
        bench.submit(666 - 1000 * key, 666)
        await bench.until(lambda key=key: 666 - 1000 * key in bench.results)
    bench.submit(1)
    await bench.until(lambda: 1 in bench.results)
    assert bench.results[1] == [2]
    assert bench.engine.checks == 2
    assert bench.broken == []


async def test_one_success_clears_a_device_of_suspicion(bench: Bench) -> None:
    for key in (-1, -2, 10, -3, -4, 20):
        bench.submit(key, 666 if key < 0 else 0)
        await bench.until(lambda key=key: key in bench.results)
    assert bench.engine.checks == 0


async def test_an_idle_thread_answers_pings_and_a_hanging_one_does_not(bench: Bench) -> None:
    async def beats_after(beats: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while bench.dispatcher.beats == beats:
                await asyncio.sleep(0)

    beats = bench.dispatcher.beats
    bench.dispatcher.ping()
    await beats_after(beats)

    bench.engine.open.clear()
    bench.submit(1)
    await until_running(bench.engine)
    beats = bench.dispatcher.beats
    bench.dispatcher.ping()
    assert not bench.dispatcher.close(timeout_s=0.05)  # it does hang
    assert bench.dispatcher.beats == beats
    bench.engine.open.set()
    await beats_after(beats)


async def test_what_opening_the_engine_raises_is_raised_to_the_opener() -> None:
    def fail() -> Engine:
        raise OSError("no such device")

    dispatcher: Dispatcher[Work] = Dispatcher(fail, max_batch=1, max_queue=1, max_delay_s=0)
    with pytest.raises(OSError, match="no such device"):
        dispatcher.open()
    assert dispatcher.close(timeout_s=BOUND_S)
