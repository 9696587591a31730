import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import numpy
import pytest

from gpu_service.batches import FinishedBatch, Limits
from gpu_service.batching import State, Ticket
from gpu_service.bundle import TensorSpec
from gpu_service.device import BatchOutput, BrokenError, Engine, Stream, StreamsFullError, Tensors
from gpu_service.dispatch import Channel, Dispatcher
from gpu_service.signature import ModelInfo
from tests.clock import Clock

BOUND_S = 30.0  # of every wait; far longer than any takes


class Work(msgspec.Struct):
    inputs: Tensors
    stream: Stream | None = None


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
        self.infer_s = 0.001
        self.closed = threading.Event()

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
        return BatchOutput(outputs={"y": 2 * x}, infer_s=self.infer_s)


class Stateful(Doubling):
    """Keeps the slot of each step's stream, None without one."""

    max_streams = 2

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[list[int | None]] = []

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        self.slots.append([None if stream is None else stream.slot for stream in streams])
        return super().launch(requests, streams)


class Quick(Doubling):
    """Says that up to three samples are quicker run than handed over."""

    quick_batch = 3

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []  # that ran each batch
        self.while_running: Callable[[], None] = lambda: None

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        self.threads.append(threading.current_thread().name)
        self.while_running()
        return super().run(requests)


class QuickStateful(Stateful):
    quick_batch = 3


class Overlapping(Doubling):
    """Launches at once; a result waits until `open`, and for its turn if there are turns."""

    overlaps = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, float]] = []
        self.turns: threading.Semaphore | None = None

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        x = numpy.concatenate([inputs["x"] for inputs in requests])
        self.events.append(("launched", x[0]))
        self.batches.append(x.tolist())

        def result() -> BatchOutput:
            self.running.set()
            assert self.open.wait(BOUND_S)
            assert self.turns is None or self.turns.acquire(timeout=BOUND_S)
            self.events.append(("fetched", x[0]))
            if (x == 666).any():
                raise self.error
            return BatchOutput(outputs={"y": 2 * x}, infer_s=0.001)

        return result


class Served:
    """One model of a bench, and what came out of it by first input value."""

    def __init__(self, bench: "Bench", engine: Doubling, **limits: Any) -> None:
        self.bench = bench
        self.engine = engine
        self.batches: list[FinishedBatch[Work]] = []
        self.results: dict[float, Any] = {}
        self.expired: list[float] = []
        self.channel: Channel[Work] = bench.dispatcher.add(
            engine, limits=Limits(**{"max_batch": 4, "max_queue": 16} | limits), events=self
        )

    def submit(self, *x: float, stream: Stream | None = None, **options: Any) -> Ticket[Work]:
        work = Work({"x": numpy.array(x, "<f4")}, stream)
        return self.channel.submit(work, samples=len(x), **options)

    def on_expired(self, ticket: Ticket[Work]) -> None:
        self.expired.append(float(ticket.payload.inputs["x"][0]))
        self.bench.changed.set()

    def on_batch(self, batch: FinishedBatch[Work]) -> None:
        self.batches.append(batch)
        for outcome in batch.outcomes:
            key = float(outcome.ticket.payload.inputs["x"][0])
            result = outcome.result
            assert key not in self.results
            is_error = isinstance(result, BaseException)
            self.results[key] = result if is_error else result["y"].tolist()
        self.bench.order += [float(each.ticket.payload.inputs["x"][0]) for each in batch.outcomes]
        self.bench.changed.set()


class Bench(Served):
    """A dispatcher on the running loop, and the first of its models."""

    def __init__(self, engine: Doubling, **options: Any) -> None:
        self.changed = asyncio.Event()
        self.broken: list[BrokenError] = []
        self.order: list[float] = []  # of all that was delivered, of any model
        self.dispatcher: Dispatcher[Work] = Dispatcher(**options)
        self.dispatcher.start(on_broken=self._on_broken)
        super().__init__(self, engine)
        self.served: list[Served] = [self]

    def add(self, engine: Doubling, **limits: Any) -> Served:
        served = Served(self, engine, **limits)
        self.served.append(served)
        return served

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def make_busy(self, x: float = 0) -> None:
        """The device runs a batch that does not end before `engine.open` is set."""
        self.engine.open.clear()
        self.submit(x)
        await until_running(self.engine)

    def close(self) -> None:
        for served in self.served:
            served.engine.open.set()
            if isinstance(served.engine, Overlapping) and served.engine.turns is not None:
                served.engine.turns.release(1000)
        assert self.dispatcher.close(timeout_s=BOUND_S)

    def _on_broken(self, error: BrokenError) -> None:
        self.broken.append(error)
        self.changed.set()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(Doubling())
    yield bench
    bench.close()


@pytest.fixture
async def stateful() -> AsyncIterator[Bench]:
    bench = Bench(Stateful())
    yield bench
    bench.close()


@pytest.fixture
async def overlapping() -> AsyncIterator[Bench]:
    bench = Bench(Overlapping())
    yield bench
    bench.close()


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


async def busy_with_four_more(bench: Bench, *, infer_s: float = 0.001) -> list[Ticket[Work]]:
    """The device is known to take so long for a sample, and is busy; a full batch waits."""
    bench.engine.infer_s = infer_s
    bench.submit(100)
    await bench.until(lambda: 100 in bench.results)
    await until_running(bench.engine)
    await bench.make_busy()
    tickets = [bench.submit(x) for x in (1, 2, 3, 4)]
    await asyncio.sleep(0)
    return tickets


async def test_a_quick_device_finds_its_next_batch_taken(bench: Bench) -> None:
    await busy_with_four_more(bench)
    assert bench.channel.queued_samples == 0
    assert bench.engine.batches == [[100], [0]]
    urgent = bench.submit(5, priority=9)
    await asyncio.sleep(0)
    assert urgent.state is State.QUEUED
    bench.engine.open.set()
    await bench.until(lambda: 5 in bench.results)
    assert bench.engine.batches == [[100], [0], [1, 2, 3, 4], [5]]


async def test_what_a_slow_device_runs_next_is_open_until_it_is_free(bench: Bench) -> None:
    await busy_with_four_more(bench, infer_s=1.0)
    assert bench.channel.queued_samples == 4
    bench.submit(5, priority=9)
    await asyncio.sleep(0)
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 7)
    assert bench.engine.batches == [[100], [0], [5, 1, 2, 3], [4]]


async def test_a_batch_that_is_not_full_is_not_taken_ahead(bench: Bench) -> None:
    bench.submit(100)
    await bench.until(lambda: 100 in bench.results)
    await until_running(bench.engine)
    await bench.make_busy()
    for x in (1, 2, 3):
        bench.submit(x)
    await asyncio.sleep(0)
    assert bench.channel.queued_samples == 3


async def test_what_was_taken_ahead_and_cancelled_is_not_delivered(bench: Bench) -> None:
    tickets = await busy_with_four_more(bench)
    assert bench.channel.cancel(tickets[1])
    bench.engine.open.set()
    await bench.until(lambda: 4 in bench.results)
    assert bench.results == {100: [200], 0: [0], 1: [2], 3: [6], 4: [8]}


async def test_the_next_one_is_taken_when_a_batch_is_delivered(bench: Bench) -> None:
    await busy_with_four_more(bench)  # a batch runs, and one was taken
    for x in range(5, 13):
        bench.submit(x)
    await asyncio.sleep(0)
    assert bench.channel.queued_samples == 8
    bench.engine.open.set()
    await bench.until(lambda: 12 in bench.results)
    assert bench.engine.batches[2:] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


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
    assert bench.channel.cancel(ticket)
    assert bench.channel.queued_samples == 1
    bench.engine.open.set()
    await bench.until(lambda: 3 in bench.results)
    assert bench.engine.batches == [[1], [3]]
    assert 2 not in bench.results


async def test_a_request_cancelled_while_it_runs_is_not_delivered(bench: Bench) -> None:
    bench.engine.open.clear()
    ticket = bench.submit(1)
    await until_running(bench.engine)
    assert bench.channel.cancel(ticket)
    bench.engine.open.set()
    bench.submit(2)
    await bench.until(lambda: 2 in bench.results)
    assert bench.results == {2: [4]}
    assert not bench.channel.cancel(ticket)


async def test_a_request_whose_time_is_up_is_told_so_while_the_engine_is_busy(
    bench: Bench,
) -> None:
    bench.engine.open.clear()
    started = bench.submit(1, timeout_s=BOUND_S)
    await until_running(bench.engine)
    bench.channel._expire(started)  # its time is up, too, but it runs to its end
    bench.submit(2, timeout_s=0.001)
    bench.submit(3, timeout_s=BOUND_S)
    await bench.until(lambda: bool(bench.expired))
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 2)
    assert bench.expired == [2]
    assert bench.results == {1: [2], 3: [6]}
    assert bench.engine.batches == [[1], [3]]
    assert not bench.channel._timers  # nothing is held that was answered


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


async def test_a_dispatcher_that_never_started_can_be_closed() -> None:
    dispatcher: Dispatcher[Work] = Dispatcher()
    assert dispatcher.close(timeout_s=BOUND_S)


async def test_the_thread_begins_with_what_it_was_told() -> None:
    names: list[str] = []
    dispatcher: Dispatcher[Work] = Dispatcher(
        on_thread=lambda: names.append(threading.current_thread().name)
    )
    dispatcher.start()
    assert dispatcher.close(timeout_s=BOUND_S)
    assert names == ["inference"]


async def test_an_expired_request_that_is_cancelled_before_it_was_told_so_is_told_nothing(
    bench: Bench,
) -> None:
    await bench.make_busy()
    ticket = bench.submit(2, timeout_s=BOUND_S)
    ticket.expires_at = 0.0  # the inference thread finds that before the timer does
    bench.submit(3)
    bench.engine.open.set()
    await bench.until(lambda: 3 in bench.results)
    assert ticket.state is State.EXPIRED
    assert bench.channel.cancel(ticket)
    assert not bench.channel.cancel(ticket)
    assert not bench.channel._timers
    assert (bench.expired, 2 in bench.results) == ([], False)


async def test_one_that_was_told_that_it_expired_cannot_be_cancelled(bench: Bench) -> None:
    await bench.make_busy()
    ticket = bench.submit(2, timeout_s=0.001)
    await bench.until(lambda: bool(bench.expired))
    assert not bench.channel.cancel(ticket)


# ------------------------------------------------------------------------------ several models


async def test_models_take_turns_the_oldest_first(bench: Bench) -> None:
    other = bench.add(Doubling())
    await bench.make_busy()
    for x in (1, 2, 3, 4):
        bench.submit(x)
    other.submit(-1)
    for x in (5, 6, 7, 8):
        bench.submit(x)
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 9 and len(other.results) == 1)
    assert bench.engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert bench.order == [0, 1, 2, 3, 4, -1, 5, 6, 7, 8]


async def test_a_batch_is_of_one_model(bench: Bench) -> None:
    other = bench.add(Doubling())
    bench.submit(1)
    other.submit(2)
    bench.submit(3)
    await bench.until(lambda: len(bench.results) == 2 and len(other.results) == 1)
    assert (bench.engine.batches, other.engine.batches) == ([[1, 3]], [[2]])


async def test_each_model_has_a_queue_of_its_own(bench: Bench) -> None:
    other = bench.add(Doubling(), max_queue=2, max_batch=2)
    await bench.make_busy()
    for x in range(1, 17):
        bench.submit(x)
    other.submit(-1, -2)
    assert (bench.channel.queued_samples, other.channel.queued_samples) == (16, 2)
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 17 and len(other.results) == 1)


async def test_a_failing_model_does_not_hurt_another(bench: Bench) -> None:
    other = bench.add(Doubling())
    for key in range(7):
        bench.submit(666 - 1000 * key, 666)
        other.submit(key)
        await bench.until(lambda key=key: key in other.results)
    await bench.until(lambda: len(bench.results) == 7)
    assert len(other.results) == 7
    assert bench.broken == []


async def test_a_broken_device_is_broken_for_all_models(bench: Bench) -> None:
    other = bench.add(Doubling())
    bench.engine.is_broken = True
    await fail_alone(bench, 1, 2, 3)
    await bench.until(lambda: bool(bench.broken))
    other.submit(4)
    await bench.until(lambda: 4 in other.results)
    assert other.results[4] is bench.broken[0]
    assert other.engine.batches == []
    assert len(bench.broken) == 1


# ------------------------------------------------------------------------------ models that go


async def until_closed(engine: Doubling) -> None:
    assert await asyncio.to_thread(engine.closed.wait, BOUND_S)


class Closing(Doubling):
    """Tells when it was closed; nothing may run after it."""

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        assert not self.closed.is_set()
        return super().run(requests)

    def close(self) -> None:
        assert not self.closed.is_set()
        self.closed.set()


async def test_a_model_that_is_removed_finishes_what_is_queued_and_is_closed(bench: Bench) -> None:
    other = bench.add(Closing())
    await bench.make_busy()
    for x in range(1, 7):
        other.submit(x)
    bench.dispatcher.remove(other.channel)
    assert not other.engine.closed.is_set()
    bench.engine.open.set()
    await until_closed(other.engine)
    await bench.until(lambda: len(other.results) == 6)
    assert other.engine.batches == [[1, 2, 3, 4], [5, 6]]
    bench.submit(9)
    await bench.until(lambda: 9 in bench.results)


async def test_a_removed_model_does_not_stay_for_as_long_as_another_is_busy(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = bench.add(Closing())
    await bench.make_busy()
    for x in range(1, 9):
        bench.submit(x)
    seen: list[bool] = []
    run = bench.engine.run

    def noting(requests: Sequence[Tensors]) -> BatchOutput:
        seen.append(other.engine.closed.is_set())
        return run(requests)

    monkeypatch.setattr(bench.engine, "run", noting)
    bench.dispatcher.remove(other.channel)
    bench.engine.open.set()
    await bench.until(lambda: len(bench.results) == 9)
    assert seen == [True, True]


async def test_a_removed_model_runs_what_was_taken_ahead() -> None:
    with contextlib.closing(Bench(Closing())) as bench:
        await busy_with_four_more(bench)
        assert not bench.channel.queued_samples
        bench.dispatcher.remove(bench.channel)
        bench.engine.open.set()
        await until_closed(bench.engine)
        await bench.until(lambda: 4 in bench.results)
        assert bench.results[4] == [8]


async def test_an_idle_model_is_closed_at_once(bench: Bench) -> None:
    other = bench.add(Closing())
    bench.dispatcher.remove(other.channel)
    await until_closed(other.engine)
    assert other.channel not in bench.dispatcher._channels


async def test_a_model_is_not_closed_while_its_last_batch_runs(bench: Bench) -> None:
    other = bench.add(Closing())
    other.engine.open.clear()
    other.submit(1)
    await until_running(other.engine)
    bench.dispatcher.remove(other.channel)
    bench.submit(2)
    assert not other.engine.closed.is_set()
    other.engine.open.set()
    await until_closed(other.engine)
    await bench.until(lambda: 1 in other.results and 2 in bench.results)
    assert other.results == {1: [2]}


async def test_a_model_whose_closing_fails_does_not_end_the_thread(bench: Bench) -> None:
    class Failing(Closing):
        def close(self) -> None:
            super().close()
            raise RuntimeError("cannot be closed")

    other = bench.add(Failing())
    bench.dispatcher.remove(other.channel)
    await until_closed(other.engine)
    bench.submit(1)
    await bench.until(lambda: 1 in bench.results)
    assert bench.results == {1: [2]}


async def test_a_model_that_is_gone_takes_nothing_any_more(bench: Bench) -> None:
    other = bench.add(Closing())
    bench.dispatcher.remove(other.channel)
    await until_closed(other.engine)
    # Whatever the way: an answer has to come, or an exception now.
    try:
        other.submit(1, is_admitted=True)
    except Exception:
        return
    bench.submit(2)
    await bench.until(lambda: 2 in bench.results)
    assert 1 in other.results


# ------------------------------------------------------------------------------ streams


async def test_streams_have_places_of_their_own_and_there_are_only_so_many(stateful: Bench) -> None:
    channel = stateful.channel
    streams = [channel.begin_stream() for _ in range(2)]
    assert {stream.slot for stream in streams} == {0, 1}
    assert all(stream.is_fresh for stream in streams)
    assert channel.streams == 2
    with pytest.raises(StreamsFullError, match="2 sequences of this model"):
        channel.begin_stream()
    channel.end_stream(streams[0])
    assert channel.streams == 1
    again = channel.begin_stream()
    assert again.slot == streams[0].slot
    assert again.is_fresh
    assert again is not streams[0]


async def test_a_model_without_state_has_no_streams(bench: Bench) -> None:
    with pytest.raises(StreamsFullError):
        bench.channel.begin_stream()


async def test_steps_reach_the_engine_with_their_streams_one_a_batch(stateful: Bench) -> None:
    assert isinstance(stateful.engine, Stateful)
    first, second = stateful.channel.begin_stream(), stateful.channel.begin_stream()
    await stateful.make_busy()
    for x, stream in ((1, first), (2, second), (3, first), (4, None)):
        stateful.submit(x, stream=stream)
    stateful.engine.open.set()
    await stateful.until(lambda: len(stateful.results) == 5)
    assert stateful.engine.batches == [[0], [1, 2, 4], [3]]
    assert stateful.engine.slots == [[None], [first.slot, second.slot, None], [first.slot]]


async def test_a_place_is_free_only_after_the_running_step_has_left_the_device(
    stateful: Bench,
) -> None:
    channel = stateful.channel
    running, other = channel.begin_stream(), channel.begin_stream()
    stateful.engine.open.clear()
    ticket = stateful.submit(1, stream=running)
    await until_running(stateful.engine)
    channel.end_stream(running)
    assert channel.cancel(ticket)  # its result is not wanted, but it still writes its state
    with pytest.raises(StreamsFullError):
        channel.begin_stream()
    stateful.engine.open.set()
    stateful.submit(2)
    await stateful.until(lambda: 2 in stateful.results)
    assert channel.begin_stream().slot == running.slot
    with pytest.raises(StreamsFullError):
        channel.begin_stream()
    assert other.slot != running.slot


async def test_a_place_is_kept_while_steps_of_its_stream_are_queued(stateful: Bench) -> None:
    channel = stateful.channel
    stream, _ = channel.begin_stream(), channel.begin_stream()
    await stateful.make_busy()
    steps = [stateful.submit(x, stream=stream) for x in (1, 2)]
    channel.end_stream(stream)
    assert channel.cancel(steps[0])
    assert channel.streams == 2
    stateful.engine.open.set()
    await stateful.until(lambda: 2 in stateful.results)  # what was taken runs to its end
    assert channel.streams == 1


async def test_a_place_is_free_when_the_last_queued_step_was_cancelled(stateful: Bench) -> None:
    channel = stateful.channel
    stream = channel.begin_stream()
    await stateful.make_busy()
    step = stateful.submit(1, stream=stream)
    assert channel.cancel(step)
    channel.end_stream(stream)
    assert channel.streams == 0


async def test_a_step_that_fails_alone_keeps_its_stream(stateful: Bench) -> None:
    assert isinstance(stateful.engine, Stateful)
    streams = [stateful.channel.begin_stream() for _ in range(2)]
    stateful.submit(1, stream=streams[0])
    stateful.submit(666, stream=streams[1])
    await stateful.until(lambda: len(stateful.results) == 2)
    assert stateful.engine.slots == [[0, 1], [0], [1]]
    stateful.submit(3, stream=streams[1])
    await stateful.until(lambda: 3 in stateful.results)
    assert stateful.results == {1: [2], 666: stateful.engine.error, 3: [6]}


# ------------------------------------------------------------------------------ overlapping


async def queue_many(bench: Bench, *batches: Sequence[float]) -> None:
    """Each a batch of its own behind one that waits, all offered in one turn of the loop."""
    await bench.make_busy()
    for batch in batches:
        for x in batch:
            bench.submit(x)


async def test_a_second_batch_is_launched_behind_the_first_only_when_it_is_full(
    overlapping: Bench,
) -> None:
    assert isinstance(overlapping.engine, Overlapping)
    await queue_many(overlapping, (1, 2, 3, 4), (5, 6, 7, 8), (9, 10))
    overlapping.engine.open.set()
    await overlapping.until(lambda: len(overlapping.results) == 11)
    assert overlapping.engine.events == [
        ("launched", 0),
        ("fetched", 0),
        ("launched", 1),
        ("launched", 5),
        ("fetched", 1),
        ("fetched", 5),
        ("launched", 9),
        ("fetched", 9),
    ]
    assert overlapping.order == list(range(11))


async def test_what_launches_together_fails_apart(overlapping: Bench) -> None:
    await queue_many(overlapping, (1, 666, 3, 4), (5, 6, 7, 8))
    overlapping.engine.open.set()
    await overlapping.until(lambda: len(overlapping.results) == 9)
    error = overlapping.results.pop(666)
    assert error is overlapping.engine.error
    assert overlapping.results == {x: [2 * x] for x in (0, 1, 3, 4, 5, 6, 7, 8)}
    assert overlapping.engine.batches[1:3] == [[1, 666, 3, 4], [5, 6, 7, 8]]
    assert overlapping.order == [0, 1, 666, 3, 4, 5, 6, 7, 8]


async def test_a_stream_is_not_in_two_launched_batches(overlapping: Bench) -> None:
    class Both(Overlapping):
        max_streams = 1

    served = overlapping.add(Both(), max_batch=1)
    stream = served.channel.begin_stream()
    await overlapping.make_busy()
    for x in (1, 2):
        served.submit(x, stream=stream)
    served.submit(3)
    overlapping.engine.open.set()
    await overlapping.until(lambda: len(served.results) == 3)
    assert isinstance(served.engine, Overlapping)
    events = served.engine.events
    assert events.index(("fetched", 1)) < events.index(("launched", 2))
    assert events.index(("launched", 3)) < events.index(("fetched", 1))


async def test_a_model_that_always_has_full_batches_does_not_starve_another(
    overlapping: Bench,
) -> None:
    turns = threading.Semaphore(1)

    class Endless(Served):
        """A batch ends only when there is one more than those that were launched."""

        next_x = 1

        def refill(self) -> None:
            for _ in range(4):
                self.submit(self.next_x)
                self.next_x += 1

        def on_batch(self, batch: FinishedBatch[Work]) -> None:
            super().on_batch(batch)
            if not other.results and self.next_x < 100:
                self.refill()
            turns.release()

    other = overlapping.add(Doubling())
    busy = Endless(overlapping, Overlapping())
    assert isinstance(busy.engine, Overlapping)
    busy.engine.turns = turns
    overlapping.served.append(busy)
    await overlapping.make_busy()
    for _ in range(3):
        busy.refill()
    other.submit(-1)
    overlapping.engine.open.set()
    await overlapping.until(lambda: bool(other.results))
    assert busy.next_x < 100, "the other model ran first, as long as there was anything of it"


async def test_closing_drops_what_is_queued_although_full_batches_wait(overlapping: Bench) -> None:
    assert isinstance(overlapping.engine, Overlapping)
    await queue_many(overlapping, (1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12))
    overlapping.engine.turns = threading.Semaphore(1)
    overlapping.engine.open.set()
    await overlapping.until(lambda: 0 in overlapping.results)
    await until_running(overlapping.engine)
    assert not overlapping.dispatcher.close(timeout_s=0.0)
    overlapping.engine.turns.release(10)
    assert overlapping.dispatcher.close(timeout_s=BOUND_S)
    assert overlapping.engine.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


async def test_a_device_that_breaks_fails_what_was_launched_too(overlapping: Bench) -> None:
    overlapping.engine.error = OSError("gone")
    overlapping.engine.is_broken = True
    for key in (1, 2, 3):
        overlapping.submit(666 - key * 1000, 666)
        await overlapping.until(lambda key=key: 666 - key * 1000 in overlapping.results)
    await overlapping.until(lambda: bool(overlapping.broken))
    ran = len(overlapping.engine.batches)
    overlapping.submit(1)
    await overlapping.until(lambda: 1 in overlapping.results)
    assert isinstance(overlapping.results[1], BrokenError)
    assert len(overlapping.engine.batches) == ran


# ------------------------------------------------------------------------------ run by the loop


@contextlib.asynccontextmanager
async def quick_bench(engine: Doubling, **options: Any) -> AsyncIterator[Bench]:
    """A bench whose thread has gone to sleep: it answered a ping."""
    bench = Bench(engine, **options)
    bench.dispatcher.ping()
    async with asyncio.timeout(BOUND_S):
        while not bench.dispatcher.beats:
            await asyncio.sleep(0)
        with bench.dispatcher.lock:  # which it gives back as it falls asleep
            pass
    try:
        yield bench
    finally:
        bench.close()


LOOP = threading.main_thread().name


async def test_what_is_quicker_run_than_handed_over_is_run_by_the_loop() -> None:
    engine = Quick()
    async with quick_bench(engine) as bench:
        bench.submit(1)
        bench.submit(2, 3)
        await bench.until(lambda: len(bench.results) == 2)
        assert bench.results == {1: [2], 2: [4, 6]}
        assert engine.batches == [[1, 2, 3]]
        assert engine.threads == [LOOP]
        beats = bench.dispatcher.beats
        bench.submit(4)
        await bench.until(lambda: 4 in bench.results)
        assert bench.dispatcher.beats > beats  # the watchdog sees that it gets on


async def test_more_than_that_is_run_by_the_thread() -> None:
    engine = Quick()
    async with quick_bench(engine) as bench:
        for x in (1, 2, 3, 4):
            bench.submit(x)
        await bench.until(lambda: len(bench.results) == 4)
        assert engine.threads == ["inference"]


async def test_while_the_thread_works_the_loop_runs_nothing() -> None:
    engine = Quick()
    async with quick_bench(engine) as bench:
        slow = bench.add(Doubling())
        slow.engine.open.clear()
        slow.submit(5)
        await until_running(slow.engine)
        bench.submit(1)
        await asyncio.sleep(0)
        assert engine.batches == []
        slow.engine.open.set()
        await bench.until(lambda: 1 in bench.results)
        assert engine.threads == ["inference"]


async def test_while_the_loop_runs_a_batch_the_thread_cannot_take_another() -> None:
    engine = Quick()
    was_free: list[bool] = []
    async with quick_bench(engine) as bench:
        engine.while_running = lambda: was_free.append(bench.dispatcher.lock.acquire(False))
        bench.submit(1)
        await bench.until(lambda: 1 in bench.results)
    assert was_free == [False]


async def test_a_poisoned_request_fails_alone_in_the_loop_too() -> None:
    engine = Quick()
    engine.error = SystemExit("poisoned")
    async with quick_bench(engine) as bench:
        for x in (1, 666, 3):
            bench.submit(x)
        await bench.until(lambda: len(bench.results) == 3)
        assert (bench.results[1], bench.results[3]) == ([2], [6])
        assert isinstance(bench.results[666], SystemExit)
        assert engine.threads == [LOOP] * 4


async def test_what_does_not_fit_one_quick_batch_follows_it() -> None:
    engine = Quick()
    async with quick_bench(engine) as bench:
        for x in (1, 2):
            bench.submit(x, key=x)  # which cannot run together
        other = bench.add(Doubling())
        other.submit(5)
        await bench.until(lambda: len(bench.results) == 2 and 5 in other.results)
        assert engine.threads[0] == LOOP


async def test_a_batch_that_was_taken_ahead_is_not_forgotten() -> None:
    class OneByOne(Quick):
        good_batch = best_batch = 1

    engine = OneByOne()
    async with quick_bench(engine) as bench:
        for x in (1, 2, 3):
            bench.submit(x)
        await bench.until(lambda: len(bench.results) == 3)
        assert engine.batches == [[1], [2], [3]]


async def test_a_broken_device_is_found_by_the_loop_too() -> None:
    engine = Quick()
    async with quick_bench(engine) as bench:
        engine.is_broken = True
        for x in (1, 2, 3):
            bench.submit(x)
            await bench.until(lambda x=x: x in bench.results)
        await bench.until(lambda: bool(bench.broken))
        assert engine.threads == [LOOP] * 3
        bench.submit(4)
        await bench.until(lambda: 4 in bench.results)
        assert isinstance(bench.results[4], BrokenError)


async def test_a_dispatcher_may_be_told_to_leave_everything_to_its_thread() -> None:
    engine = Quick()
    async with quick_bench(engine, thread_only=True) as bench:
        bench.submit(1)
        await bench.until(lambda: 1 in bench.results)
        assert engine.threads == ["inference"]


async def test_the_steps_of_a_stream_follow_one_another_in_the_loop() -> None:
    engine = QuickStateful()
    async with quick_bench(engine) as bench:
        stream = bench.channel.begin_stream()
        for x in (1, 2, 3):
            bench.submit(x, stream=stream)
        bench.channel.end_stream(stream)
        await bench.until(lambda: len(bench.results) == 3)
        assert engine.batches == [[1], [2], [3]]
        assert bench.channel.streams == 0


async def test_a_model_that_was_thought_to_be_quick_and_is_not_goes_to_the_thread() -> None:
    engine, clock = Quick(), Clock()

    async with quick_bench(engine, clock=clock) as bench:

        async def run(x: float, *, duration_s: float) -> None:
            def take_time() -> None:
                clock.now += duration_s

            engine.while_running = take_time
            bench.submit(x)
            await bench.until(lambda: x in bench.results)

        for x in range(2):
            await run(x, duration_s=0.1)
        for x in range(2, 200):  # once in a while is no harm, and forgotten
            await run(x, duration_s=0.0001)
        for x in range(200, 203):
            assert engine.threads[-1] == LOOP
            await run(x, duration_s=0.1)
        await run(203, duration_s=0.0001)
        assert engine.threads[-1] == "inference"


async def polls_until_asleep(clock: Clock, *, at_most: int) -> int:
    """How often the running loop looks for events before it waits for one; after `at_most` turns
    a day is over.
    """
    loop: Any = asyncio.get_running_loop()
    select = loop._selector.select
    polls = 0
    asleep = asyncio.Event()

    def selecting(timeout: float | None = None) -> Any:
        nonlocal polls
        if timeout != 0:
            loop.call_soon(asleep.set)
        else:
            polls += 1
            clock.now += 86400 * (polls == at_most)
        return select(0)

    loop._selector.select = selecting
    try:
        async with asyncio.timeout(BOUND_S):
            await asleep.wait()
    finally:
        del loop._selector.select
    return polls


async def test_where_requests_follow_soon_the_loop_polls_for_a_while() -> None:
    engine, clock = Quick(), Clock()
    async with quick_bench(engine, clock=clock, busy_poll_s=0.1) as bench:

        async def ask(x: float) -> None:
            bench.submit(x)
            await bench.until(lambda: x in bench.results)

        await ask(1)
        assert await polls_until_asleep(clock, at_most=100) < 10  # nothing says that more will come
        await ask(2)
        clock.now += 0.05
        await ask(3)
        assert 100 <= await polls_until_asleep(clock, at_most=100) < 110
        await ask(4)  # a day later
        assert await polls_until_asleep(clock, at_most=100) < 10


async def test_the_loop_does_not_poll_while_the_thread_works() -> None:
    engine, clock = Quick(), Clock()
    async with quick_bench(engine, clock=clock, busy_poll_s=0.1) as bench:
        for x in (1, 2):
            bench.submit(x)
            await bench.until(lambda x=x: x in bench.results)
        slow = bench.add(Doubling())
        slow.engine.open.clear()
        slow.submit(5)
        await until_running(slow.engine)
        assert await polls_until_asleep(clock, at_most=100) < 10
