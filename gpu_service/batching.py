"""Which requests run together, and when: the queue in front of one device.

Pure policy with an injected clock: no threads, no sockets, no tensors. Whoever shares a Queue
between threads guards it (see `dispatch`, which owns the only one in a server).
"""

import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Bounds of the hint that goes with a refusal. The lower one keeps a fast model's clients from
# hammering, the upper one keeps an estimate made during a stall from sending them away.
_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 5.0

# The weight of the newest batch in the moving average of seconds a sample.
_SMOOTHING = 0.2


class State(enum.Enum):
    """Where a ticket is on its way."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()


_ALLOWED = {
    State.QUEUED: {State.RUNNING, State.CANCELLED},
    State.RUNNING: {State.DONE, State.CANCELLED},
    State.DONE: set[State](),
    State.CANCELLED: set[State](),
}


class QueueFullError(Exception):
    """The queue holds all the samples it may; `retry_after_s` estimates when it has room."""

    def __init__(self, *, samples: int, max_queue: int, retry_after_s: float) -> None:
        super().__init__(
            f"overloaded: {samples} more samples do not fit the queue of {max_queue}; "
            f"retry in {retry_after_s:.2f} s"
        )
        self.retry_after_s = retry_after_s


class RequestTooLargeError(Exception):
    """A single request has more samples than a batch may have, so it can never run."""

    def __init__(self, *, samples: int, max_batch: int) -> None:
        super().__init__(
            f"{samples} samples in one request; at most {max_batch} are allowed: split it"
        )


class Ticket(Generic[T]):
    """One request's place: in the queue, on the device, or past both."""

    __slots__ = ("payload", "queued_at", "samples", "started_at", "state")

    def __init__(self, payload: T, *, samples: int, queued_at: float) -> None:
        self.payload = payload
        self.samples = samples
        self.queued_at = queued_at
        self.started_at = 0.0
        self.state = State.QUEUED

    def move(self, to: State) -> None:
        """Change the state; ValueError naming both ends for a move that makes no sense."""
        if to not in _ALLOWED[self.state]:
            raise ValueError(f"a ticket cannot go from {self.state.name} to {to.name}")
        self.state = to


class Queue(Generic[T]):
    """First in, first out; nothing overtakes, so no request starves.

    Meant to be asked by a device whenever it is idle: requests gather while it is busy, and
    none waits while it is idle, unless `max_delay_s` says so. All times are of `clock`.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_queue: int,
        max_delay_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._max_delay_s = max_delay_s
        self._clock = clock
        # Not a deque: a cancelled ticket goes at once, with the memory that it holds.
        self._tickets: OrderedDict[Ticket[T], None] = OrderedDict()
        self._samples = 0
        self._seconds_per_sample = 0.0

    @property
    def samples(self) -> int:
        """How many samples are queued."""
        return self._samples

    def offer(self, payload: T, *, samples: int) -> Ticket[T]:
        """Queue one request of `samples` samples.

        Raises RequestTooLargeError or QueueFullError.
        """
        if samples > self._max_batch:
            raise RequestTooLargeError(samples=samples, max_batch=self._max_batch)
        if self._samples + samples > self._max_queue:
            raise QueueFullError(
                samples=samples, max_queue=self._max_queue, retry_after_s=self._retry_after_s()
            )
        ticket = Ticket(payload, samples=samples, queued_at=self._clock())
        self._tickets[ticket] = None
        self._samples += samples
        return ticket

    def cancel(self, ticket: Ticket[T]) -> bool:
        """Forget a ticket. False if it is past that: done, or cancelled before.

        A queued one costs nothing any more; a running one runs on, but its result is not to
        be delivered.
        """
        if ticket.state in (State.DONE, State.CANCELLED):
            return False
        if ticket.state is State.QUEUED:
            del self._tickets[ticket]
            self._samples -= ticket.samples
        ticket.move(State.CANCELLED)
        return True

    def due_in_s(self) -> float | None:
        """Seconds until an idle device should take a batch: 0 is now, None is not foreseeable."""
        if not self._tickets:
            return None
        if self._samples >= self._max_batch:
            return 0.0
        oldest = next(iter(self._tickets))
        return max(0.0, oldest.queued_at + self._max_delay_s - self._clock())

    def take(self) -> list[Ticket[T]]:
        """The next batch, oldest first, of at most `max_batch` samples; empty if none is due."""
        due_in_s = self.due_in_s()
        if due_in_s is None or due_in_s > 0:
            return []
        now = self._clock()
        batch: list[Ticket[T]] = []
        room = self._max_batch
        while self._tickets:
            ticket = next(iter(self._tickets))
            if ticket.samples > room:
                break
            del self._tickets[ticket]
            self._samples -= ticket.samples
            room -= ticket.samples
            ticket.started_at = now
            ticket.move(State.RUNNING)
            batch.append(ticket)
        return batch

    def finished(self, *, samples: int, duration_s: float) -> None:
        """Learn how fast the device is, for the hint that goes with a refusal."""
        pace = duration_s / samples
        old = self._seconds_per_sample
        self._seconds_per_sample = old + _SMOOTHING * (pace - old) if old else pace

    def _retry_after_s(self) -> float:
        return min(max(self._samples * self._seconds_per_sample, _MIN_RETRY_S), _MAX_RETRY_S)
