"""Which requests run together, and when: the queue in front of one device.

Pure policy with an injected clock: no threads, no sockets, no tensors. Whoever shares a Queue
between threads guards it (see `dispatch`, which owns the only one in a server).
"""

import enum
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# Bounds of the hint that goes with a refusal. The lower one keeps a fast model's clients from
# hammering, the upper one keeps an estimate made during a stall from sending them away.
_MIN_RETRY_S = 0.05
_MAX_RETRY_S = 5.0

# Priorities of requests: more is sooner.
PRIORITIES = range(10)
NORMAL_PRIORITY = 5

# Whoever has waited for so long is not overtaken any more, by whatever priority.
_MAX_OVERTAKEN_S: Final = 1.0

# The weight of the newest batch in the moving average of seconds a sample.
_SMOOTHING = 0.2


class State(enum.IntEnum):  # whose hash is a number's, and quick
    """Where a ticket is on its way."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    DONE = enum.auto()
    CANCELLED = enum.auto()
    EXPIRED = enum.auto()


_ALLOWED: Final[dict[State, tuple[State, ...]]] = {
    State.QUEUED: (State.RUNNING, State.CANCELLED, State.EXPIRED),
    State.RUNNING: (State.DONE, State.CANCELLED),
    State.DONE: (),
    State.CANCELLED: (),
    State.EXPIRED: (),
}

# Again, because each look into an enumeration is one into its metaclass first.
QUEUED: Final = State.QUEUED
RUNNING: Final = State.RUNNING
DONE: Final = State.DONE


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
    """One request's place: in the queue, on the device, or past both.

    Only requests of one `key` run together. Those of one `stream` run one after another.
    """

    __slots__ = (
        "after",
        "before",
        "eligible_at",
        "expires_at",
        "key",
        "payload",
        "priority",
        "queued_at",
        "samples",
        "started_at",
        "state",
        "stream",
    )

    def __init__(
        self,
        payload: T,
        *,
        samples: int,
        queued_at: float,
        priority: int = NORMAL_PRIORITY,
        expires_at: float = math.inf,
        key: Hashable = None,
        stream: Hashable = None,
    ) -> None:
        self.payload = payload
        self.samples = samples
        self.queued_at = queued_at
        self.eligible_at = queued_at  # since when nothing but others keeps it waiting
        self.priority = priority
        self.expires_at = expires_at
        self.key = key
        self.stream = stream
        self.started_at = 0.0
        self.state = QUEUED
        self.before: Ticket[T] | None = None  # its neighbours in a lane
        self.after: Ticket[T] | None = None

    def move(self, to: State) -> None:
        """Change the state; ValueError naming both ends for a move that makes no sense."""
        if to not in _ALLOWED[self.state]:
            raise ValueError(f"a ticket cannot go from {self.state.name} to {to.name}")
        self.state = to


class _Lane(Generic[T]):
    """Tickets of one priority, first in, first out.

    Linked, so that a cancelled one goes at once, with the memory that it holds, wherever it is;
    and compiled, that is a fraction of what an OrderedDict takes.
    """

    __slots__ = ("first", "last", "priority")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.first: Ticket[T] | None = None
        self.last: Ticket[T] | None = None

    def add(self, ticket: Ticket[T]) -> None:
        last, self.last = self.last, ticket
        ticket.before = last
        if last is None:
            self.first = ticket
        else:
            last.after = ticket

    def remove(self, ticket: Ticket[T]) -> None:
        before, after = ticket.before, ticket.after
        ticket.before = ticket.after = None  # no cycle stays
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before


class _Group(Generic[T]):
    """Tickets of one key, by priority."""

    __slots__ = ("lanes", "samples")

    def __init__(self) -> None:
        # None is empty. There is one most often, so looking through them is quickest.
        self.lanes: list[_Lane[T]] = []
        self.samples = 0

    def add(self, ticket: Ticket[T]) -> None:
        lane = self._lane(ticket.priority)
        if lane is None:
            lane = _Lane(ticket.priority)
            self.lanes.append(lane)
        lane.add(ticket)
        self.samples += ticket.samples

    def remove(self, ticket: Ticket[T]) -> None:
        lane = self._lane(ticket.priority)
        assert lane is not None, "it is not in here"
        lane.remove(ticket)
        if lane.first is None:
            self.lanes.remove(lane)
        self.samples -= ticket.samples

    def _lane(self, priority: int) -> _Lane[T] | None:
        for lane in self.lanes:
            if lane.priority == priority:
                return lane
        return None


class Queue(Generic[T]):
    """By priority, and first in, first out among equals.

    Nobody starves: who has waited for a second is the next, in the order of arrival. And within
    a batch nothing is skipped: a large request that comes next but does not fit any more waits
    for the next batch, and all behind it do. What has another key than the first of a batch
    waits for its own batch: it cannot run in this one.

    Requests of one stream run in their order, one a batch: the next becomes eligible when the
    one before has left the device, or the queue.

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
        self._good_batch = max_batch
        self._best_batch = max_batch
        self._halves: list[int] = []  # what a half is rounded down to, by its samples
        self._out = 0  # samples that were taken and have not come back
        self._crowd = 0  # samples that could run or were out when a batch last came back
        self._groups: dict[Hashable, _Group[T]] = {}
        # Of each stream with a ticket that is eligible or runs: those that come after it.
        self._followers: dict[Hashable, OrderedDict[Ticket[T], None]] = {}
        self._samples = 0
        self._seconds_per_sample = 0.0

    @property
    def samples(self) -> int:
        """How many samples are queued."""
        return self._samples

    def aim_at(self, good: int, *, best: int, sizes: Sequence[int] = ()) -> None:
        """Gather half of what is under way: at least `good` samples, because smaller batches are
        slow on this device, and at most `best`, because larger ones gain nothing.

        The other half is the next batch, which the device finds ready while this one's answers
        are on their way. Where only batches of `sizes` run without padding, the half is rounded
        down to one. A single request may still have `max_batch`.
        """
        self._good_batch = min(good, self._max_batch)
        self._best_batch = min(best, self._max_batch)
        self._halves = _halves(self._good_batch, self._best_batch, sizes)

    def offer(
        self,
        payload: T,
        *,
        samples: int,
        priority: int = NORMAL_PRIORITY,
        timeout_s: float = math.inf,
        key: Hashable = None,
        stream: Hashable = None,
        is_admitted: bool = False,
    ) -> Ticket[T]:
        """Queue one request of `samples` samples, which expires unless it starts in `timeout_s`.

        What `is_admitted` continues one that was taken, for which there is always room. Raises
        RequestTooLargeError or QueueFullError.
        """
        if samples > self._max_batch:
            raise RequestTooLargeError(samples=samples, max_batch=self._max_batch)
        if self._samples + samples > self._max_queue and not is_admitted:
            raise QueueFullError(
                samples=samples, max_queue=self._max_queue, retry_after_s=self._retry_after_s()
            )
        now = self._clock()
        ticket = Ticket(
            payload,
            samples=samples,
            queued_at=now,
            priority=priority,
            expires_at=now + timeout_s,
            key=key,
            stream=stream,
        )
        self._samples += samples
        if stream is not None:
            followers = self._followers.get(stream)
            if followers is not None:
                followers[ticket] = None
                return ticket
            self._followers[stream] = OrderedDict()
        self._make_eligible(ticket)
        return ticket

    def cancel(self, ticket: Ticket[T]) -> bool:
        """Forget a ticket. False if it is past that: done, expired, or cancelled before.

        A queued one costs nothing any more; a running one runs on, but its result is not to
        be delivered.
        """
        if ticket.state is State.QUEUED:
            self._drop(ticket)
        elif ticket.state is not State.RUNNING:
            return False
        ticket.move(State.CANCELLED)
        return True

    def expire(self, ticket: Ticket[T]) -> bool:
        """Drop a ticket whose time is up; False if it started, or ended otherwise, before."""
        if ticket.state is State.QUEUED:
            self._drop(ticket)
            ticket.move(State.EXPIRED)
        return ticket.state is State.EXPIRED

    def has(self, stream: Hashable) -> bool:
        """Whether anything of `stream` is queued or runs."""
        return stream in self._followers

    def due_in_s(self) -> float | None:
        """Seconds until an idle device should take a batch: 0 is now, None is not foreseeable."""
        if self.has_full_batch():
            return 0.0
        since = self.waiting_since()
        if since is None:
            return None
        return max(0.0, since + self._max_delay_s - self._clock())

    def has_full_batch(self) -> bool:
        """Whether there is a batch to which waiting would add nothing."""
        aim = self._aim()
        return any(group.samples >= aim for group in self._groups.values())

    def waiting_since(self) -> float | None:
        """Since when something could run; None where nothing can."""
        since: float | None = None
        for group in self._groups.values():
            for lane in group.lanes:
                head = lane.first
                if head is not None and (since is None or head.eligible_at < since):
                    since = head.eligible_at
        return since

    def take(self) -> list[Ticket[T]]:
        """The next batch, of at most `max_batch` samples; empty if none is due.

        What has expired is dropped on the way.
        """
        due_in_s = self.due_in_s()
        if due_in_s is None or due_in_s > 0:
            return []
        now = self._clock()
        batch: list[Ticket[T]] = []
        groups = self._candidates(batch)
        room = self._aim()
        while (ticket := _first(groups, now)) is not None:
            if ticket.expires_at <= now:
                self._drop(ticket)
                ticket.move(State.EXPIRED)
                # What follows it may have begun a group anew.
                groups = self._candidates(batch)
                continue
            if ticket.samples > room and batch:
                break
            if not batch:
                groups = [self._groups[ticket.key]]
            self._remove(ticket, groups[0])
            room -= ticket.samples
            self._out += ticket.samples
            ticket.started_at = now
            ticket.move(RUNNING)
            batch.append(ticket)
        return batch

    def _candidates(self, batch: list[Ticket[T]]) -> list[_Group[T]]:
        """Whose tickets may join the batch: all for an empty one, else those of its key."""
        if not batch:
            return list(self._groups.values())
        group = self._groups.get(batch[0].key)
        return [] if group is None else [group]

    def _aim(self) -> int:
        """How many samples the next batch is to have."""
        good, best = self._good_batch, self._best_batch
        if good >= best:
            return good
        # As it was when a batch came back, for in between those are missing whose answers are on
        # their way. What has different keys can't be one batch.
        crowd = max(self._crowd, self._under_way())
        half = crowd // (2 * max(1, len(self._groups)))
        if not good < half < best:
            return good if half <= good else best
        return self._halves[half]

    def _under_way(self) -> int:
        return self._out + sum([group.samples for group in self._groups.values()])

    def left(self, tickets: Iterable[Ticket[T]]) -> None:
        """These have left the device, however they ended: what comes after them may run."""
        for ticket in tickets:
            if ticket.stream is not None:
                self._follow(ticket.stream)

    @property
    def batch_s(self) -> float:
        """What a full batch takes, about; 0 as long as that is not known."""
        return self._seconds_per_sample * self._aim()

    def finished(self, *, samples: int, duration_s: float) -> None:
        """A batch of so many samples has come back; learn how fast the device is.

        0 for a duration that says nothing, as that of a failure.
        """
        self._crowd = self._under_way()
        self._out -= samples
        if not duration_s:
            return
        pace = duration_s / samples
        old = self._seconds_per_sample
        self._seconds_per_sample = old + _SMOOTHING * (pace - old) if old else pace

    def _retry_after_s(self) -> float:
        return min(max(self._samples * self._seconds_per_sample, _MIN_RETRY_S), _MAX_RETRY_S)

    def _make_eligible(self, ticket: Ticket[T]) -> None:
        group = self._groups.get(ticket.key)
        if group is None:
            group = self._groups[ticket.key] = _Group()
        group.add(ticket)

    def _remove(self, ticket: Ticket[T], group: _Group[T]) -> None:
        """Take an eligible ticket out of its group."""
        group.remove(ticket)
        if not group.lanes and ticket.key is not None:
            del self._groups[ticket.key]
        self._samples -= ticket.samples

    def _drop(self, ticket: Ticket[T]) -> None:
        """Take a queued ticket out that is not going to run."""
        if ticket.stream is None:
            self._remove(ticket, self._groups[ticket.key])
        elif ticket in self._followers[ticket.stream]:
            del self._followers[ticket.stream][ticket]
            self._samples -= ticket.samples
        else:
            self._remove(ticket, self._groups[ticket.key])
            self._follow(ticket.stream)

    def _follow(self, stream: Hashable) -> None:
        followers = self._followers[stream]
        if not followers:
            del self._followers[stream]
            return
        ticket, _ = followers.popitem(last=False)
        ticket.eligible_at = self._clock()
        self._make_eligible(ticket)


def _halves(good: int, best: int, sizes: Sequence[int]) -> list[int]:
    """For halves of 0 to `best` - 1 samples the largest one of `sizes` that is in them, of at
    least `good`; the half itself where there is none.
    """
    unpadded = frozenset(sizes)
    found: list[int] = []
    largest = 0
    for half in range(best):
        if half >= good and half in unpadded:
            largest = half
        found.append(largest or half)
    return found


def _first(groups: list[_Group[T]], now: float) -> Ticket[T] | None:
    """The head that is next: the most urgent, unless another has waited for too long."""
    first: Ticket[T] | None = None
    for group in groups:
        for lane in group.lanes:
            head = lane.first
            if head is not None and (first is None or _precedes(head, first, now)):
                first = head
    return first


def _precedes(one: Ticket[T], other: Ticket[T], now: float) -> bool:
    starving = now - one.eligible_at >= _MAX_OVERTAKEN_S
    if starving or now - other.eligible_at >= _MAX_OVERTAKEN_S:
        return one.eligible_at < other.eligible_at
    return (-one.priority, one.eligible_at) < (-other.priority, other.eligible_at)
