"""The one inference thread, and the way of requests to it and back.

Owns that thread and, under its lock, the queue in front of the device. The thread alone calls
the engine. Everything else here is called on the event loop, which is woken once per finished
batch. The thread survives every exception of the engine.
"""

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from numpy.typing import NDArray

from gpu_service import logs
from gpu_service.batching import NORMAL_PRIORITY, Queue, State, Ticket
from gpu_service.signature import ModelInfo

Tensors = Mapping[str, NDArray[Any]]

# So many batches in a row of which nothing succeeded make the device suspect.
_SUSPICIOUS_BATCHES = 3


class BrokenError(Exception):
    """The device fails, whatever it is given: nothing can be run here any more."""


class StartupError(Exception):
    """The worker cannot start; the message is for who runs it."""


class Work(Protocol):
    """What is queued: anything that holds inputs [n, …] by name."""

    @property
    def inputs(self) -> Tensors: ...


W = TypeVar("W", bound=Work)
A = TypeVar("A")


class BatchOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Outputs [n, …] by name, n being the samples of the whole batch, and where time went."""

    outputs: Tensors
    input_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0


class Engine(Protocol):
    """A model on its device. All calls come from the inference thread, one at a time."""

    @property
    def model(self) -> ModelInfo:
        """What it takes and returns; fixed."""

    @property
    def description(self) -> Mapping[str, str]:
        """What it runs on, for logs and metrics: `device` and the like; fixed."""

    @property
    def good_batch(self) -> int:
        """Samples beyond which larger batches hardly gain anything; fixed. 0: not known."""
        return 0

    def check(self) -> None:
        """Run something that is known to work; raises if it does not."""

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        """Run all requests as one batch. Their outputs follow one another in the same order."""


class Outcome(msgspec.Struct, Generic[W], frozen=True):
    """How one request ended: its own outputs [n, …] by name, or the exception it caused."""

    ticket: Ticket[W]
    result: Tensors | BaseException


class FinishedBatch(msgspec.Struct, Generic[W], frozen=True, kw_only=True):
    """What the inference thread hands over: everything that ran together."""

    outcomes: list[Outcome[W]]
    samples: int
    input_s: float
    infer_s: float
    output_s: float


class Dispatcher(Generic[W]):
    """Runs requests in batches on one engine.

    Life: `open` (blocks until the engine is ready), `start` on the event loop, `close`.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        *,
        max_batch: int,
        max_queue: int,
        max_delay_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_engine = open_engine
        self._clock = clock
        self._queue: Queue[W] = Queue(
            max_batch=max_batch, max_queue=max_queue, max_delay_s=max_delay_s, clock=clock
        )
        self._lock = threading.Lock()  # guards the queue and what follows
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._pinged = False
        self._beats = 0
        self._flush_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_batch: Callable[[FinishedBatch[W]], None] = lambda batch: None
        self._on_expired: Callable[[Ticket[W]], None] = lambda ticket: None
        self._on_broken: Callable[[BrokenError], None] = lambda error: None
        self._timers: dict[Ticket[W], asyncio.TimerHandle] = {}
        self._opened: concurrent.futures.Future[Engine] = concurrent.futures.Future()
        # A daemon: a hung device must not keep the process from ending.
        self._thread = threading.Thread(target=self._main, name="inference", daemon=True)

    # -------------------------------------------------------------------- any other thread

    def open(self) -> Engine:
        """Start the thread and wait for its engine; raises what opening it raised."""
        self._thread.start()
        return self._opened.result()

    def start(
        self,
        on_batch: Callable[[FinishedBatch[W]], None],
        *,
        on_expired: Callable[[Ticket[W]], None] | None = None,
        on_broken: Callable[[BrokenError], None] | None = None,
    ) -> None:
        """Have what happens reported on the running event loop.

        Every finished batch goes to `on_batch`, without the requests that were cancelled; each
        request whose time was up before it started to `on_expired`. `on_broken` is called once,
        when the device is found to fail whatever it is given: from then on every request ends
        with that BrokenError.
        """
        self._on_batch = on_batch
        self._on_expired = on_expired or self._on_expired
        self._on_broken = on_broken or self._on_broken
        self._loop = asyncio.get_running_loop()

    def submit(
        self,
        work: W,
        *,
        samples: int,
        priority: int = NORMAL_PRIORITY,
        timeout_s: float = math.inf,
    ) -> Ticket[W]:
        """Queue one request, as `Queue.offer` does.

        Raises RequestTooLargeError or QueueFullError.
        """
        assert self._loop is not None, "start() comes first"
        with self._lock:
            ticket = self._queue.offer(
                work, samples=samples, priority=priority, timeout_s=timeout_s
            )
        if timeout_s != math.inf:
            self._timers[ticket] = self._loop.call_later(timeout_s, self._expire, ticket)
        # An idle thread is woken only after this turn of the loop, so that requests that
        # arrive together run together instead of one of them alone first.
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        return ticket

    def cancel(self, ticket: Ticket[W]) -> bool:
        """Drop a request: it is not run if it did not start, and not delivered in any case.

        False if it had been delivered, cancelled or expired before.
        """
        self._stop_timer(ticket)
        with self._lock:
            return self._queue.cancel(ticket)

    @property
    def queued_samples(self) -> int:
        """How many samples wait for the device."""
        return self._queue.samples

    @property
    def beats(self) -> int:
        """Grows with each sign of life of the thread: a batch that ran, a ping it answered."""
        return self._beats

    def ping(self) -> None:
        """Ask an idle thread for a sign of life. A busy one gives it with its next batch."""
        with self._lock:
            self._pinged = True
            self._changed.notify()

    def close(self, *, timeout_s: float) -> bool:
        """End the thread, dropping what is queued; False if it hangs and was left behind."""
        with self._lock:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _expire(self, ticket: Ticket[W]) -> None:
        del self._timers[ticket]
        with self._lock:
            is_so = self._queue.expire(ticket)
        if is_so:
            self._on_expired(ticket)

    def _stop_timer(self, ticket: Ticket[W]) -> None:
        # Without a timer it would be held, with its inputs, until its time is up.
        if self._timers and (timer := self._timers.pop(ticket, None)) is not None:
            timer.cancel()

    def _flush(self) -> None:
        self._flush_scheduled = False
        with self._lock:
            self._changed.notify()

    def _deliver(self, batch: FinishedBatch[W]) -> None:
        with self._lock:
            wanted = [
                outcome for outcome in batch.outcomes if outcome.ticket.state is State.RUNNING
            ]
            for outcome in wanted:
                outcome.ticket.move(State.DONE)
        for outcome in wanted:
            self._stop_timer(outcome.ticket)
        self._on_batch(msgspec.structs.replace(batch, outcomes=wanted))

    # -------------------------------------------------------------------- inference thread

    def _main(self) -> None:
        try:
            engine = self._open_engine()
        except BaseException as error:
            self._opened.set_exception(error)
            return
        if engine.good_batch:
            self._queue.aim_at(engine.good_batch)
        self._opened.set_result(engine)
        in_vain = 0
        broken: BrokenError | None = None
        while (tickets := self._next()) is not None:
            if broken is not None:
                self._hand_over(_failed(tickets, broken))
                continue
            try:
                batch = _run(engine, tickets, beat=self._beat)
            except Exception as error:  # a bug here must not end all service
                logs.error("inference_thread_error", cause=error)
                batch = _failed(tickets, error)
            self._hand_over(batch)
            failed = all(isinstance(each.result, BaseException) for each in batch.outcomes)
            in_vain = in_vain + 1 if failed and batch.outcomes else 0
            if in_vain >= _SUSPICIOUS_BATCHES:
                in_vain = 0
                broken = _broken(engine)
                self._beat()
                if broken is not None:
                    self._call(self._on_broken, broken)

    def _next(self) -> list[Ticket[W]] | None:
        """The next batch, as soon as one is due; None when closing."""
        with self._lock:
            while not self._closing:
                if self._pinged:
                    self._pinged = False
                    self._beats += 1
                if tickets := self._queue.take():
                    return tickets
                self._changed.wait(self._queue.due_in_s())
            return None

    def _beat(self) -> None:
        self._beats += 1

    def _hand_over(self, batch: FinishedBatch[W]) -> None:
        with self._lock:
            if batch.infer_s:
                duration_s = batch.input_s + batch.infer_s + batch.output_s
                self._queue.finished(samples=batch.samples, duration_s=duration_s)
        self._call(self._deliver, batch)

    def _call(self, function: Callable[[A], None], argument: A) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            pass  # the loop has closed: nobody is left to be answered


def _broken(engine: Engine) -> BrokenError | None:
    """Whether it is the device that fails, and not what clients send."""
    try:
        engine.check()
    except BaseException as error:
        broken = BrokenError(f"the device fails: {type(error).__name__}: {error}")
        broken.__cause__ = error
        return broken
    return None


def _run(engine: Engine, tickets: list[Ticket[W]], *, beat: Callable[[], None]) -> FinishedBatch[W]:
    """Run the tickets together; if that fails, each alone, so that only the culprit fails."""
    samples = sum(ticket.samples for ticket in tickets)
    try:
        output = _checked(engine.run([ticket.payload.inputs for ticket in tickets]), samples)
    except BaseException as error:  # whatever a model raises, SystemExit too, is its request's
        beat()
        if len(tickets) > 1:
            return _run_alone(engine, tickets, samples=samples, beat=beat)
        return _failed(tickets, error)
    beat()
    outcomes = []
    start = 0
    for ticket in tickets:
        rows = slice(start, start + ticket.samples)
        start = rows.stop
        own = {name: array[rows] for name, array in output.outputs.items()}
        outcomes.append(Outcome(ticket, own))
    return FinishedBatch(
        outcomes=outcomes,
        samples=samples,
        input_s=output.input_s,
        infer_s=output.infer_s,
        output_s=output.output_s,
    )


def _run_alone(
    engine: Engine, tickets: list[Ticket[W]], *, samples: int, beat: Callable[[], None]
) -> FinishedBatch[W]:
    parts = [
        _run(engine, [ticket], beat=beat)
        for ticket in tickets
        if ticket.state is State.RUNNING  # those cancelled meanwhile cost nothing more
    ]
    return FinishedBatch(
        outcomes=[outcome for part in parts for outcome in part.outcomes],
        samples=samples,
        input_s=sum(part.input_s for part in parts),
        infer_s=sum(part.infer_s for part in parts),
        output_s=sum(part.output_s for part in parts),
    )


def _failed(tickets: list[Ticket[W]], error: BaseException) -> FinishedBatch[W]:
    return FinishedBatch(
        outcomes=[Outcome(ticket, error) for ticket in tickets],
        samples=sum(ticket.samples for ticket in tickets),
        input_s=0.0,
        infer_s=0.0,
        output_s=0.0,
    )


def _checked(output: BatchOutput, samples: int) -> BatchOutput:
    for name, array in output.outputs.items():
        if array.shape[:1] != (samples,):
            raise ValueError(
                f"the model returned output {name!r} of shape {list(array.shape)} for a batch of "
                f"{samples} samples; its first dimension must be {samples}"
            )
    return output
