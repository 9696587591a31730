"""The one inference thread, and the way of requests to it and back.

Owns that thread and, under its lock, one queue for each model in front of the device. The thread
alone runs the engines, but for what is quicker run than handed over: while it is idle, the event
loop runs that itself. Everything else here is called on the event loop, which is woken once per
finished batch. Thread and loop survive every exception of an engine.

One process serves one device: several devices are several workers, which do not share a GIL.
"""

import asyncio
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, Generic, TypeVar

from gpu_service import logs
from gpu_service.batches import Events, Limits, Work
from gpu_service.batching import DONE, NORMAL_PRIORITY, RUNNING, Queue, State, Ticket
from gpu_service.device import BatchOutput, BrokenError, Engine, Stream, StreamsFullError
from gpu_service.finished import FinishedBatch, Outcome

# So many batches in a row of which nothing succeeded make the device suspect.
_SUSPICIOUS_BATCHES = 3

# What the event loop runs itself takes less than a millisecond, by the warm-up. Where more
# than one in a hundred takes so long, the warm-up was wrong, and all connections wait for it.
_SLOW_HERE_S = 0.01
_PATIENCE = 3.0
_PATIENCE_REGAINED = 0.01

# Where batches are quick, the event loop takes the next one while one runs: the device would have
# to wait for it. Where they are slow, that gains nothing, and more urgent requests would wait for
# a batch more.
_TAKEN_AHEAD_BELOW_S = 0.02

_sched_yield: Final = os.sched_yield

W = TypeVar("W", bound=Work)
A = TypeVar("A")


class Channel(Generic[W]):
    """The way to one model on the device. Made by `Dispatcher.add`; used on the event loop."""

    def __init__(
        self, dispatcher: "Dispatcher[W]", engine: Engine, *, limits: Limits, events: Events[W]
    ) -> None:
        self.engine = engine
        self._dispatcher = dispatcher
        self._lock = dispatcher.lock
        self._events = events
        self._timers: dict[Ticket[W], asyncio.TimerHandle] = {}
        self._patience = 0.0 if dispatcher.thread_only else _PATIENCE
        # Guarded by the lock:
        self.queue: Queue[W] = Queue(
            max_batch=limits.max_batch,
            max_queue=limits.max_queue,
            max_delay_s=limits.max_delay_s,
            clock=dispatcher.clock,
        )
        if engine.good_batch:
            self.queue.aim_at(engine.good_batch, best=engine.best_batch, sizes=engine.sizes)
        self.is_closing = False
        self._free_slots = list(reversed(range(engine.max_streams)))
        self._leaving: set[Stream] = set()
        # Of who runs the engine:
        self.in_vain = 0  # batches in a row of which nothing succeeded

    def submit(
        self,
        work: W,
        *,
        samples: int,
        priority: int = NORMAL_PRIORITY,
        timeout_s: float = math.inf,
        key: Hashable = None,
        is_admitted: bool = False,
    ) -> Ticket[W]:
        """Queue one request, as `Queue.offer` does.

        Raises RequestTooLargeError or QueueFullError, and RuntimeError once it was removed.
        """
        with self._lock:
            if self.is_closing:
                raise RuntimeError("the model was removed: nobody would run this")
            ticket = self.queue.offer(
                work,
                samples=samples,
                priority=priority,
                timeout_s=timeout_s,
                key=key,
                stream=work.stream,
                is_admitted=is_admitted,
            )
        if timeout_s != math.inf:
            loop = asyncio.get_running_loop()
            self._timers[ticket] = loop.call_later(timeout_s, self._expire, ticket)
        self._dispatcher.wake()
        return ticket

    def cancel(self, ticket: Ticket[W]) -> bool:
        """Drop a request: it is not run if it did not start, and not delivered in any case.

        False if it had been delivered or cancelled, or reported as expired, before.
        """
        is_unreported = ticket in self._timers
        self._stop_timer(ticket)
        with self._lock:
            is_so = self.queue.cancel(ticket)
            self._free_places([ticket.stream])
            return is_so or (ticket.state is State.EXPIRED and is_unreported)

    def begin_stream(self) -> Stream:
        """A place for the state of one more sequence; StreamsFullError if there is none."""
        with self._lock:
            if not self._free_slots:
                raise StreamsFullError(self.engine.max_streams, whose="this model")
            return Stream(self._free_slots.pop())

    def end_stream(self, stream: Stream) -> None:
        """Give its place back, as soon as nothing of it is queued or runs."""
        with self._lock:
            self._leaving.add(stream)
            self._free_places([stream])

    @property
    def streams(self) -> int:
        """How many sequences hold state."""
        return self.engine.max_streams - len(self._free_slots)

    @property
    def queued_samples(self) -> int:
        """How many samples wait for the device."""
        return self.queue.samples

    def is_quick(self) -> bool:
        """Whether all that is queued is quicker run by the event loop than handed over."""
        return self._patience > 0 and self.queue.samples <= self.engine.quick_batch

    def ran_here(self, duration_s: float) -> None:
        """Learn how long the event loop was kept by a batch of this model."""
        if duration_s <= _SLOW_HERE_S:
            self._patience = min(_PATIENCE, self._patience + _PATIENCE_REGAINED)
            return
        self._patience -= 1
        if self._patience <= 0:
            logs.info("not_quick", model=self.engine.model.name, duration_s=round(duration_s, 6))

    def left(self, tickets: Sequence[Ticket[W]]) -> None:
        """A batch has left the device. Called with the lock held."""
        self.queue.left(tickets)
        self._free_places([ticket.stream for ticket in tickets])

    def deliver(self, ran: "_Batch[W]") -> None:
        """Report a batch that has run. Called on the event loop."""
        batch = ran.finished()
        with self._lock:
            self._dispatcher.take_ahead()
            duration_s = batch.input_s + batch.infer_s + batch.output_s if batch.infer_s else 0.0
            self.queue.finished(samples=batch.samples, duration_s=duration_s)
            wanted: list[Outcome[W]] = []
            for outcome in batch.outcomes:
                if outcome.ticket.state is RUNNING:
                    outcome.ticket.move(DONE)
                    wanted.append(outcome)
        if self._timers:
            for outcome in wanted:
                self._stop_timer(outcome.ticket)
        batch.outcomes = wanted
        self._events.on_batch(batch)
        self._dispatcher.stay_awake()

    def _expire(self, ticket: Ticket[W]) -> None:
        del self._timers[ticket]
        with self._lock:
            is_so = self.queue.expire(ticket)
            self._free_places([ticket.stream])
        if is_so:
            self._events.on_expired(ticket)

    def _stop_timer(self, ticket: Ticket[W]) -> None:
        # Without a timer it would be held, with its inputs, until its time is up.
        if self._timers and (timer := self._timers.pop(ticket, None)) is not None:
            timer.cancel()

    def _free_places(self, streams: Sequence[Hashable]) -> None:
        if not self._leaving:
            return
        for stream in streams:
            if stream in self._leaving and not self.queue.has(stream):
                assert isinstance(stream, Stream)
                self._leaving.discard(stream)
                self._free_slots.append(stream.slot)


class _Batch(Generic[W]):
    """What was taken from a queue to run together.

    `result` waits for its end, once it is on the device; `outcome` is what it came to.
    """

    __slots__ = ("channel", "outcome", "requests", "result", "samples", "streams", "tickets")

    def __init__(self, channel: Channel[W], tickets: list[Ticket[W]]) -> None:
        self.channel = channel
        self.tickets = tickets
        self.samples = sum([ticket.samples for ticket in tickets])
        self.requests = [ticket.payload.inputs for ticket in tickets]
        self.streams = [ticket.payload.stream for ticket in tickets]
        self.result: Callable[[], BatchOutput] = lambda: BatchOutput(outputs={})
        self.outcome: BatchOutput | FinishedBatch[W] = BatchOutput(outputs={})

    @property
    def failed(self) -> bool:
        """Whether nothing of it succeeded."""
        outcome = self.outcome
        return isinstance(outcome, FinishedBatch) and all(
            isinstance(each.whole, BaseException) for each in outcome.outcomes
        )

    def finished(self) -> FinishedBatch[W]:
        """What became of each request. Not asked for by the inference thread if all is well: the
        device waits for it.
        """
        outcome = self.outcome
        if isinstance(outcome, FinishedBatch):
            return outcome
        outcomes: list[Outcome[W]] = []
        outputs = outcome.outputs
        start = 0
        for ticket in self.tickets:
            outcomes.append(Outcome(ticket, outputs, start))
            start += ticket.samples
        return FinishedBatch(
            outcomes=outcomes,
            samples=self.samples,
            input_s=outcome.input_s,
            infer_s=outcome.infer_s,
            output_s=outcome.output_s,
        )


class Dispatcher(Generic[W]):
    """Runs the requests of all models in batches on one device.

    Life: `start` on the event loop, `add` models, `close`. `on_thread` is what the inference
    thread does first; with `thread_only` no batch runs anywhere else, however quick it is. Where
    the device is asked again within `busy_poll_s`, the idle event loop polls for so long instead
    of going to sleep.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_thread: Callable[[], None] = lambda: None,
        thread_only: bool = False,
        busy_poll_s: float = 0.0,
    ) -> None:
        self.clock = clock
        self._on_thread = on_thread
        self.thread_only = thread_only
        self._busy_poll_s = busy_poll_s
        self._idle_since = -math.inf  # when all that had run was answered
        self._is_asked_soon = False  # the last request came while polling would have noticed it
        self._is_polling = False
        self.lock = threading.Lock()  # guards the queues and what follows
        self._changed = threading.Condition(self.lock)
        self._channels: list[Channel[W]] = []
        self._closing = False
        self._pinged = False
        self._beats = 0
        self._flush_scheduled = False
        self._is_idle = False  # the thread waits for work
        self._ahead: _Batch[W] | None = None  # taken by the event loop, to be run next
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_broken: Callable[[BrokenError], None] = lambda error: None
        self._broken: BrokenError | None = None
        # A daemon: a hung device must not keep the process from ending.
        self._inference = threading.Thread(target=self._main, name="inference", daemon=True)

    # -------------------------------------------------------------------- the event loop

    def start(self, *, on_broken: Callable[[BrokenError], None] | None = None) -> None:
        """Start the thread; what happens is reported on the running event loop.

        `on_broken` is called once, when the device is found to fail whatever it is given: from
        then on every request ends with that BrokenError.
        """
        self._on_broken = on_broken or self._on_broken
        self._loop = asyncio.get_running_loop()
        self._inference.start()

    def add(self, engine: Engine, *, limits: Limits, events: Events[W]) -> Channel[W]:
        """Serve one more model, with an engine that is ready to run."""
        channel = Channel(self, engine, limits=limits, events=events)
        with self.lock:
            self._channels.append(channel)
        return channel

    def remove(self, channel: Channel[W]) -> None:
        """Serve a model no more: what is queued still runs, then its engine is closed."""
        with self.lock:
            channel.is_closing = True
            self._changed.notify()

    def wake(self) -> None:
        """See that an idle thread looks for work.

        It is woken only after this turn of the loop, so that requests that arrive together run
        together instead of one of them alone first.
        """
        if not self._flush_scheduled:
            assert self._loop is not None, "start() comes first"
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    @property
    def beats(self) -> int:
        """Grows with each sign of life of the thread: a batch that ran, a ping it answered."""
        return self._beats

    def ping(self) -> None:
        """Ask an idle thread for a sign of life. A busy one gives it with its next batch."""
        with self.lock:
            self._pinged = True
            self._changed.notify()

    def close(self, *, timeout_s: float) -> bool:
        """End the thread, dropping what is queued; False if it hangs and was left behind."""
        with self.lock:
            self._closing = True
            self._changed.notify()
        if self._inference.ident is not None:
            self._inference.join(timeout_s)
        return not self._inference.is_alive()

    def stay_awake(self) -> None:
        """All that ran is answered. Poll for a while, if requests lately came so soon: the next
        one then finds nobody asleep.
        """
        if self._busy_poll_s:
            self._idle_since = self.clock()
            if self._is_asked_soon and not self._is_polling and self._loop is not None:
                self._is_polling = True
                self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        # Not while the thread works: it would have to wait for the GIL.
        if self._is_idle and self._loop is not None and self._idle_s() < self._busy_poll_s:
            _sched_yield()  # whoever else needs this core comes first
            self._loop.call_soon(self._poll)
        else:
            self._is_polling = False

    def _idle_s(self) -> float:
        return self.clock() - self._idle_since

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._busy_poll_s:
            self._is_asked_soon = self._idle_s() < self._busy_poll_s
        with self.lock:
            if not self._is_idle:
                self.take_ahead()
                return
            batch = self._take_quick()
            if batch is None:
                self._changed.notify()
                return
            # With the lock, so that the thread runs nothing meanwhile.
            started_at = self.clock()
            self._launch(batch)
            self._conclude(batch)
            if batch.channel.engine.max_streams:
                batch.channel.left(batch.tickets)
        batch.channel.ran_here(self.clock() - started_at)
        batch.channel.deliver(batch)
        self._suspect(batch)
        if self._is_waited_for():
            self.wake()

    def _take_quick(self) -> _Batch[W] | None:
        """All that waits for the one model, if that is quicker run than handed over."""
        if self._ahead is not None or self._closing:
            return None
        channel = next(self._due(), None)
        if channel is None or not channel.is_quick():
            return None
        tickets = channel.queue.take()
        return _Batch(channel, tickets) if tickets else None

    def _is_waited_for(self) -> bool:
        """Whether anything is queued: the event loop alone adds to it, so no lock is needed."""
        return any(channel.queue.samples for channel in self._channels)

    def take_ahead(self) -> None:
        """Take a full batch while another one runs. Called with the lock held."""
        if self._ahead is not None or self._closing or self._is_idle:
            return
        # Who has waited longest is next, or it would wait for ever behind a busier one.
        channel = next(self._due(), None)
        if channel is None or not channel.queue.has_full_batch():
            return
        if 0 < channel.queue.batch_s < _TAKEN_AHEAD_BELOW_S and (tickets := channel.queue.take()):
            self._ahead = _Batch(channel, tickets)

    # -------------------------------------------------------------------- inference thread

    def _main(self) -> None:
        self._on_thread()
        under_way: deque[_Batch[W]] = deque()
        while True:
            launched = self._stage() if under_way else self._await_work()
            if launched is not None:
                under_way.append(launched)
                is_first = launched.channel.engine.overlaps and len(under_way) == 1
                launched = None  # or this thread would free it, while the device waits
                if is_first:
                    continue
            if not under_way:
                return
            self._finish(under_way.popleft())

    def _finish(self, batch: _Batch[W]) -> None:
        channel = batch.channel
        self._conclude(batch)
        if channel.engine.max_streams:
            with self.lock:
                channel.left(batch.tickets)
        self._call(channel.deliver, batch)
        self._suspect(batch)

    def _conclude(self, batch: _Batch[W]) -> None:
        """Wait for the end of a batch that was launched."""
        try:
            batch.outcome = _outcome(batch, beat=self._beat)
        except Exception as error:  # a bug here must not end all service
            logs.error("inference_error", cause=error)
            batch.outcome = _failed(batch.tickets, error)

    def _suspect(self, batch: _Batch[W]) -> None:
        """Look whether it is the device that fails, once nothing succeeds any more."""
        channel = batch.channel
        channel.in_vain = channel.in_vain + 1 if batch.failed else 0
        if channel.in_vain < _SUSPICIOUS_BATCHES or self._broken is not None:
            return
        channel.in_vain = 0
        self._broken = _broken(channel.engine)
        self._beat()
        if self._broken is not None:
            self._call(self._on_broken, self._broken)

    def _await_work(self) -> _Batch[W] | None:
        """The next batch, launched as soon as one is due; None when closing."""
        while True:
            with self.lock:
                batch, closed = self._next()
            # Outside the lock: closing an engine may take a while.
            for channel in closed:
                _close(channel.engine)
            if batch is not None:
                return self._launch(batch)
            if not closed:
                return None

    def _next(self) -> tuple[_Batch[W] | None, list[Channel[W]]]:
        """What to run next, and the channels that have come to their end; neither if closing."""
        while not self._closing:
            if self._pinged:
                self._pinged = False
                self._beats += 1
            # First, or the engines of removed models would stay for as long as others are busy.
            if ended := self._ended():
                self._channels = [each for each in self._channels if each not in ended]
                return None, ended
            if (batch := self._pop_ahead()) is not None:
                return batch, []
            for channel in self._by_age():
                if tickets := channel.queue.take():
                    return _Batch(channel, tickets), []
            self._is_idle = True
            self._changed.wait(self._due_in_s())
            self._is_idle = False
        return None, []

    def _ended(self) -> list[Channel[W]]:
        """Channels that were removed and have nothing left to run."""
        ahead = None if self._ahead is None else self._ahead.channel
        return [
            each
            for each in self._channels
            if each.is_closing and not each.queue.samples and each is not ahead
        ]

    def _pop_ahead(self) -> _Batch[W] | None:
        batch, self._ahead = self._ahead, None
        return batch

    def _stage(self) -> _Batch[W] | None:
        """A second batch, behind the one that runs, if waiting would not make it any fuller."""
        with self.lock:
            if any(each.is_closing for each in self._channels):
                return None  # an engine is closed between batches, when nothing is under way
            if self._ahead is not None:
                batch = self._pop_ahead() if self._ahead.channel.engine.overlaps else None
            else:
                batch = self._take_full()
        return None if batch is None else self._launch(batch)

    def _take_full(self) -> _Batch[W] | None:
        # Who has waited longest is next, or it would wait for ever behind a busier one.
        channel = None if self._closing else next(self._due(), None)
        if channel is None or not channel.engine.overlaps or not channel.queue.has_full_batch():
            return None
        tickets = channel.queue.take()
        return _Batch(channel, tickets) if tickets else None

    def _due(self) -> Iterator[Channel[W]]:
        return (each for each in self._by_age() if each.queue.due_in_s() == 0)

    def _by_age(self) -> list[Channel[W]]:
        """The models' queues, the one that has waited longest first."""
        if len(self._channels) <= 1:
            return self._channels
        return sorted(
            self._channels,
            key=lambda channel: (
                math.inf if (since := channel.queue.waiting_since()) is None else since
            ),
        )

    def _due_in_s(self) -> float | None:
        dues = [channel.queue.due_in_s() for channel in self._channels]
        return min((due for due in dues if due is not None), default=None)

    def _launch(self, batch: _Batch[W]) -> _Batch[W]:
        if self._broken is not None:
            batch.result = _raiser(self._broken)
            return batch
        try:
            batch.result = batch.channel.engine.launch(batch.requests, batch.streams)
        except BaseException as error:  # whatever a model raises, SystemExit too, is its request's
            batch.result = _raiser(error)
        return batch

    def _beat(self) -> None:
        self._beats += 1

    def _call(self, function: Callable[[A], None], argument: A) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            pass  # the loop has closed: nobody is left to be answered


def _raiser(error: BaseException) -> Callable[[], BatchOutput]:
    def result() -> BatchOutput:
        raise error

    return result


def _close(engine: Engine) -> None:
    try:
        engine.close()
    except BaseException as error:  # others are served on
        logs.error("engine_close_failed", model=engine.model.name, cause=error)


def _broken(engine: Engine) -> BrokenError | None:
    """Whether it is the device that fails, and not what clients send."""
    try:
        engine.check()
    except BaseException as error:
        broken = BrokenError(f"the device fails: {type(error).__name__}: {error}")
        broken.__cause__ = error
        return broken
    return None


def _outcome(batch: _Batch[W], *, beat: Callable[[], None]) -> BatchOutput | FinishedBatch[W]:
    """What a batch came to; if it failed, what each alone did, so that only the culprit fails."""
    try:
        output = _checked(batch.result(), batch.samples)
    except BaseException as error:
        beat()
        if len(batch.tickets) == 1 or isinstance(error, BrokenError):
            return _failed(batch.tickets, error)
        return _run_alone(batch, beat=beat)
    beat()
    return output


def _run_alone(batch: _Batch[W], *, beat: Callable[[], None]) -> FinishedBatch[W]:
    parts = []
    for ticket in batch.tickets:
        alone = _Batch(batch.channel, [ticket])
        if ticket.state is State.RUNNING:
            try:
                alone.result = alone.channel.engine.launch(alone.requests, alone.streams)
            except BaseException as error:
                alone.result = _raiser(error)
        else:  # cancelled meanwhile: it costs nothing more
            alone.result = _raiser(asyncio.CancelledError())
        alone.outcome = _outcome(alone, beat=beat)
        parts.append(alone.finished())
    return FinishedBatch(
        outcomes=[outcome for part in parts for outcome in part.outcomes],
        samples=batch.samples,
        input_s=sum(part.input_s for part in parts),
        infer_s=sum(part.infer_s for part in parts),
        output_s=sum(part.output_s for part in parts),
    )


def _failed(tickets: list[Ticket[W]], error: BaseException) -> FinishedBatch[W]:
    return FinishedBatch(
        outcomes=[Outcome(ticket, error) for ticket in tickets],
        samples=sum(ticket.samples for ticket in tickets),
    )


def _checked(output: BatchOutput, samples: int) -> BatchOutput:
    for name, array in output.outputs.items():
        if array.shape[:1] != (samples,):
            raise ValueError(
                f"the model returned output {name!r} of shape {list(array.shape)} for a batch of "
                f"{samples} samples; its first dimension must be {samples}"
            )
    return output
