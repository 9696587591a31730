import copy
import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_service.batching import Queue, QueueFullError, RequestTooLargeError, State, Ticket
from tests.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(
    clock: Clock, *, max_batch: int = 8, max_queue: int = 20, delay_s: float = 0
) -> Queue[str]:
    return Queue(max_batch=max_batch, max_queue=max_queue, max_delay_s=delay_s, clock=clock)


def payloads(tickets: list[Ticket[str]]) -> list[str]:
    return [ticket.payload for ticket in tickets]


def test_an_idle_device_gets_what_is_there_at_once(clock: Clock) -> None:
    queue = make(clock)
    assert queue.due_in_s() is None
    assert queue.take() == []
    queue.offer("a", samples=1)
    assert queue.due_in_s() == 0
    assert payloads(queue.take()) == ["a"]
    assert queue.samples == 0


def test_requests_gather_while_the_device_is_busy(clock: Clock) -> None:
    queue = make(clock)
    for name in "abc":
        queue.offer(name, samples=2)
    assert payloads(queue.take()) == ["a", "b", "c"]


def test_a_batch_is_never_larger_than_allowed_and_nothing_overtakes(clock: Clock) -> None:
    queue = make(clock, max_batch=8)
    for name, samples in (("a", 3), ("b", 4), ("c", 5), ("d", 1)):
        queue.offer(name, samples=samples)
    # "d" would have fitted beside "a" and "b", but "c" came first.
    assert payloads(queue.take()) == ["a", "b"]
    assert payloads(queue.take()) == ["c", "d"]


def test_a_request_larger_than_a_batch_is_refused_with_the_limit(clock: Clock) -> None:
    queue = make(clock, max_batch=8)
    with pytest.raises(RequestTooLargeError, match=r"9 samples .* at most 8"):
        queue.offer("a", samples=9)
    assert queue.samples == 0


def test_the_queue_is_bounded_in_samples(clock: Clock) -> None:
    queue = make(clock, max_batch=8, max_queue=10)
    queue.offer("a", samples=8)
    queue.offer("b", samples=2)
    with pytest.raises(QueueFullError, match="queue of 10"):
        queue.offer("c", samples=1)
    queue.take()
    queue.offer("c", samples=8)
    assert queue.samples == 10


def test_what_runs_does_not_count_as_queued(clock: Clock) -> None:
    queue = make(clock, max_batch=8, max_queue=8)
    queue.offer("a", samples=8)
    queue.take()
    queue.offer("b", samples=8)
    assert queue.samples == 8


def test_the_retry_hint_follows_the_speed_of_the_device(clock: Clock) -> None:
    queue = make(clock, max_batch=8, max_queue=16)
    for name in "ab":
        queue.offer(name, samples=8)
    queue.finished(samples=8, duration_s=0.8)
    with pytest.raises(QueueFullError) as caught:
        queue.offer("c", samples=1)
    assert caught.value.retry_after_s == pytest.approx(16 * 0.1)
    queue.finished(samples=8, duration_s=1.6)
    with pytest.raises(QueueFullError) as caught:
        queue.offer("c", samples=1)
    assert 16 * 0.1 < caught.value.retry_after_s < 16 * 0.2


@pytest.mark.parametrize(("duration_s", "expected_s"), [(1e-9, 0.05), (1e9, 5.0)])
def test_the_retry_hint_is_bounded(clock: Clock, duration_s: float, expected_s: float) -> None:
    queue = make(clock, max_queue=8)
    queue.offer("a", samples=8)
    queue.finished(samples=1, duration_s=duration_s)
    with pytest.raises(QueueFullError) as caught:
        queue.offer("b", samples=1)
    assert caught.value.retry_after_s == expected_s


def test_a_cancelled_request_leaves_the_queue_at_once(clock: Clock) -> None:
    queue = make(clock)
    tickets = [queue.offer(name, samples=2) for name in "abc"]
    assert queue.cancel(tickets[1])
    assert tickets[1].state is State.CANCELLED
    assert queue.samples == 4
    assert payloads(queue.take()) == ["a", "c"]


def test_a_running_request_can_be_cancelled_once(clock: Clock) -> None:
    queue = make(clock)
    ticket = queue.offer("a", samples=2)
    queue.take()
    assert queue.cancel(ticket)
    assert not queue.cancel(ticket)
    assert queue.samples == 0


def test_a_finished_request_cannot_be_cancelled(clock: Clock) -> None:
    queue = make(clock)
    ticket = queue.offer("a", samples=1)
    queue.take()
    ticket.move(State.DONE)
    assert not queue.cancel(ticket)
    assert ticket.state is State.DONE


def test_a_delay_waits_for_company_but_not_longer(clock: Clock) -> None:
    queue = make(clock, delay_s=0.25)
    queue.offer("a", samples=1)
    assert queue.take() == []
    assert queue.due_in_s() == pytest.approx(0.25)
    clock.now += 0.2
    queue.offer("b", samples=1)
    assert queue.due_in_s() == pytest.approx(0.05)
    clock.now += 0.05
    assert payloads(queue.take()) == ["a", "b"]


def test_a_full_batch_does_not_wait_for_the_delay(clock: Clock) -> None:
    queue = make(clock, max_batch=8, delay_s=10)
    queue.offer("a", samples=5)
    queue.offer("b", samples=3)
    assert queue.due_in_s() == 0
    assert payloads(queue.take()) == ["a", "b"]


def test_tickets_know_when_they_waited(clock: Clock) -> None:
    queue = make(clock)
    queue.offer("a", samples=1)
    clock.now += 3
    (ticket,) = queue.take()
    assert ticket.started_at - ticket.queued_at == 3


def test_the_more_urgent_runs_first_and_equals_in_their_order(clock: Clock) -> None:
    queue = make(clock)
    for name, priority in (("a", 5), ("b", 0), ("c", 9), ("d", 5), ("e", 9)):
        queue.offer(name, samples=1, priority=priority)
        clock.now += 0.01
    assert payloads(queue.take()) == ["c", "e", "a", "d", "b"]


def test_who_has_waited_for_a_second_is_not_overtaken_any_more(clock: Clock) -> None:
    queue = make(clock, max_batch=2, max_queue=100)
    queue.offer("low", samples=1, priority=0)
    rounds = 0
    while True:
        for name in ("x", "y"):
            queue.offer(name, samples=1, priority=9)
        taken = payloads(queue.take())
        rounds += 1
        if "low" in taken:
            break
        assert clock.now <= 101
        clock.now += 0.25
    assert taken == ["low", "x"]
    assert rounds == 5


def test_of_several_that_waited_too_long_the_oldest_is_first(clock: Clock) -> None:
    queue = make(clock)
    for name, priority in (("a", 0), ("b", 3), ("c", 9)):
        queue.offer(name, samples=1, priority=priority)
        clock.now += 1.5
    queue.offer("d", samples=1, priority=9)
    assert payloads(queue.take()) == ["a", "b", "c", "d"]


def test_what_has_expired_is_dropped_and_costs_no_room(clock: Clock) -> None:
    queue = make(clock, max_batch=2)
    late = [queue.offer(name, samples=1, timeout_s=1) for name in "ab"]
    queue.offer("c", samples=1, timeout_s=1.5)
    queue.offer("d", samples=1)
    clock.now += 1
    assert payloads(queue.take()) == ["c", "d"]
    assert [ticket.state for ticket in late] == [State.EXPIRED, State.EXPIRED]
    assert queue.samples == 0
    assert queue.expire(late[0])  # it may be told so, still
    assert not queue.cancel(late[0])


def test_a_queue_of_nothing_but_expired_requests_is_empty(clock: Clock) -> None:
    queue = make(clock)
    queue.offer("a", samples=1, timeout_s=1)
    clock.now += 2
    assert queue.take() == []
    assert queue.due_in_s() is None


def test_what_has_started_in_time_does_not_expire(clock: Clock) -> None:
    queue = make(clock)
    ticket = queue.offer("a", samples=1, timeout_s=1)
    queue.take()
    clock.now += 2
    assert not queue.expire(ticket)
    assert ticket.state is State.RUNNING


def test_batches_are_of_the_size_aimed_at_but_a_large_request_still_runs(clock: Clock) -> None:
    queue = make(clock, max_batch=8)
    queue.aim_at(2, best=2)
    for name, samples in (("a", 1), ("b", 1), ("c", 1), ("d", 5)):
        queue.offer(name, samples=samples)
    assert payloads(queue.take()) == ["a", "b"]
    assert payloads(queue.take()) == ["c"]
    assert payloads(queue.take()) == ["d"]


def go_round(queue: Queue[str], *, clients: int, batches: int = 12) -> list[int]:
    """Sizes of batches, one running and the next one taken meanwhile, where each of so many clients
    waits for its answer and asks again.
    """
    sizes = []
    for number in range(clients):
        queue.offer(str(number), samples=1)
    running = queue.take()
    while len(sizes) < batches:
        sizes.append(len(running))
        ahead = queue.take() if queue.has_full_batch() else []
        queue.finished(samples=len(running), duration_s=0.001)
        for ticket in running:
            queue.offer(ticket.payload, samples=1)
        running = ahead or queue.take()
    return sizes


@pytest.mark.parametrize(
    ("clients", "size"),
    [
        (3, 2),  # good enough, whatever less is there
        (4, 2),
        (10, 5),
        (16, 8),
        (40, 8),  # which is the best
    ],
)
def test_one_half_runs_while_the_other_is_answered(clock: Clock, clients: int, size: int) -> None:
    queue = make(clock, max_batch=16, max_queue=100)
    queue.aim_at(2, best=8)
    sizes = go_round(queue, clients=clients)
    assert max(sizes[4:]) == size
    assert sum(sizes[4:]) >= 8 * size * 3 // 4


def test_half_is_rounded_to_what_it_would_be_padded_to(clock: Clock) -> None:
    queue = make(clock, max_batch=16, max_queue=100)
    queue.aim_at(2, best=16, sizes=[1, 2, 4, 8, 16])
    assert set(go_round(queue, clients=15)[4:]) == {4}
    assert queue.samples > 0


def test_half_is_of_what_can_run_together(clock: Clock) -> None:
    queue = make(clock, max_batch=8, max_queue=40)
    queue.aim_at(1, best=8)
    for number in range(6):
        queue.offer(f"k{number}", samples=1, key="k")
        queue.offer(f"l{number}", samples=1, key="l")
    assert payloads(queue.take()) == ["k0", "k1", "k2"]


def test_what_waits_for_its_stream_is_no_part_of_a_half(clock: Clock) -> None:
    queue = make(clock, max_batch=8, max_queue=40)
    queue.aim_at(1, best=8)
    for stream in "stuv":
        for number in range(5):
            queue.offer(f"{stream}{number}", samples=1, stream=stream)
    assert payloads(queue.take()) == ["s0", "t0"]


@pytest.mark.parametrize(
    ("way", "to"),
    [
        ([], State.DONE),
        ([State.RUNNING], State.QUEUED),
        ([State.RUNNING, State.DONE], State.CANCELLED),
        ([State.CANCELLED], State.RUNNING),
    ],
)
def test_an_impossible_move_names_both_ends(way: list[State], to: State) -> None:
    ticket = Ticket("a", samples=1, queued_at=0)
    for state in way:
        ticket.move(state)
    with pytest.raises(ValueError, match=f"from {ticket.state.name} to {to.name}"):
        ticket.move(to)


# ------------------------------------------------------------------------------ keys


def test_only_what_has_the_same_key_runs_together(clock: Clock) -> None:
    queue = make(clock)
    for name, key in (("a", 1), ("b", 2), ("c", 1), ("d", None), ("e", 2)):
        queue.offer(name, samples=1, key=key)
        clock.now += 0.01
    assert [payloads(queue.take()) for _ in range(4)] == [["a", "c"], ["b", "e"], ["d"], []]
    assert queue.samples == 0


def test_the_more_urgent_key_is_first(clock: Clock) -> None:
    queue = make(clock)
    for name, key, priority in (("a", 1, 5), ("b", 2, 5), ("c", 2, 9), ("d", 1, 0)):
        queue.offer(name, samples=1, key=key, priority=priority)
        clock.now += 0.01
    assert payloads(queue.take()) == ["c", "b"]
    assert payloads(queue.take()) == ["a", "d"]


def test_a_busy_key_does_not_starve_another(clock: Clock) -> None:
    queue = make(clock, max_batch=2, max_queue=100)
    queue.offer("rare", samples=1, key="rare", priority=0)
    rounds = 0
    while True:
        for name in ("x", "y"):
            queue.offer(name, samples=1, key="busy", priority=9)
        taken = payloads(queue.take())
        rounds += 1
        if "rare" in taken:
            break
        assert clock.now <= 101
        clock.now += 0.25
    assert taken == ["rare"]
    assert rounds == 5


def test_a_full_batch_is_one_of_a_single_key(clock: Clock) -> None:
    queue = make(clock, max_batch=4, delay_s=10)
    for name, key in (("a", 1), ("b", 2), ("c", 1), ("d", 2)):
        queue.offer(name, samples=1, key=key)
    assert not queue.has_full_batch()
    assert queue.take() == []
    for name in ("e", "f"):
        queue.offer(name, samples=1, key=1)
    assert queue.has_full_batch()
    assert payloads(queue.take()) == ["a", "c", "e", "f"]
    assert not queue.has_full_batch()


def test_a_large_request_holds_up_those_of_its_own_key_only(clock: Clock) -> None:
    queue = make(clock, max_batch=8)
    for name, samples, key in (("a", 3, 1), ("b", 6, 1), ("c", 1, 1), ("d", 1, 2)):
        queue.offer(name, samples=samples, key=key)
        clock.now += 0.01
    assert [payloads(queue.take()) for _ in range(3)] == [["a"], ["b", "c"], ["d"]]


def test_nothing_is_kept_of_keys_that_are_gone(clock: Clock) -> None:
    queue = make(clock, max_queue=1000)
    for key in range(100):
        queue.cancel(queue.offer("a", samples=1, key=key))
        queue.offer("b", samples=1, key=key)
        queue.take()
        queue.offer("c", samples=1, key=key, timeout_s=1)
        clock.now += 2
        queue.take()
    assert not queue._groups


# ------------------------------------------------------------------------------ streams


def test_steps_of_a_stream_run_one_a_batch_and_in_order(clock: Clock) -> None:
    queue = make(clock)
    for name in "abc":
        queue.offer(name, samples=1, stream="s")
    queue.offer("x", samples=1)
    batch = queue.take()
    assert payloads(batch) == ["a", "x"]
    assert queue.take() == []  # not before the device is done with "a"
    assert queue.due_in_s() is None
    queue.left(batch)
    assert payloads(queue.take()) == ["b"]
    assert queue.samples == 1


def test_steps_of_several_streams_run_together(clock: Clock) -> None:
    queue = make(clock)
    for name, stream in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")):
        queue.offer(name, samples=1, stream=stream)
    batch = queue.take()
    assert payloads(batch) == ["a1", "b1"]
    queue.left(batch)
    assert payloads(queue.take()) == ["a2", "b2"]


def test_urgency_does_not_change_the_order_within_a_stream(clock: Clock) -> None:
    queue = make(clock)
    queue.offer("first", samples=1, stream="s", priority=0)
    queue.offer("second", samples=1, stream="s", priority=9)
    queue.offer("other", samples=1, priority=5)
    batch = queue.take()
    assert payloads(batch) == ["other", "first"]
    queue.left(batch)
    assert payloads(queue.take()) == ["second"]


def test_the_steps_of_a_stream_may_have_different_keys(clock: Clock) -> None:
    queue = make(clock)
    queue.offer("a", samples=1, stream="s", key=1)
    queue.offer("b", samples=1, stream="s", key=2)
    queue.offer("x", samples=1, key=2)
    first, second = queue.take(), queue.take()
    assert (payloads(first), payloads(second)) == (["a"], ["x"])
    queue.left(second)
    assert queue.take() == []
    queue.left(first)
    assert payloads(queue.take()) == ["b"]


def test_what_waits_for_its_stream_counts_as_queued_but_not_as_due(clock: Clock) -> None:
    queue = make(clock, max_batch=2, max_queue=4)
    for name in "abcd":
        queue.offer(name, samples=1, stream="s")
    assert queue.samples == 4
    assert not queue.has_full_batch()  # one of them is all that can run
    with pytest.raises(QueueFullError):
        queue.offer("e", samples=1)
    queue.take()
    assert queue.samples == 3
    assert queue.waiting_since() is None


def test_a_step_waits_since_the_one_before_left(clock: Clock) -> None:
    queue = make(clock, max_batch=1)
    queue.offer("a", samples=1, stream="s", priority=0)
    queue.offer("b", samples=1, stream="s", priority=0)
    batch = queue.take()
    clock.now += 5
    queue.left(batch)
    queue.offer("x", samples=1, priority=9)
    assert queue.waiting_since() == clock.now
    # It has been there for five seconds, but could run only now: nobody kept it waiting.
    assert payloads(queue.take()) == ["x"]


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_the_next_step_is_eligible_when_the_one_before_is_dropped(clock: Clock, how: str) -> None:
    queue = make(clock)
    tickets = [queue.offer(name, samples=1, stream="s") for name in "abc"]
    assert getattr(queue, how)(tickets[0])
    assert queue.samples == 2
    batch = queue.take()
    assert payloads(batch) == ["b"]
    assert queue.take() == []
    queue.left(batch)
    assert payloads(queue.take()) == ["c"]


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_a_step_that_is_dropped_leaves_a_gap_in_its_stream(clock: Clock, how: str) -> None:
    queue = make(clock)
    tickets = [queue.offer(name, samples=1, stream="s") for name in "abc"]
    assert getattr(queue, how)(tickets[1])
    assert queue.samples == 2
    batch = queue.take()
    queue.left(batch)
    assert payloads(batch) + payloads(queue.take()) == ["a", "c"]


def test_a_running_step_that_is_cancelled_still_holds_its_stream(clock: Clock) -> None:
    queue = make(clock)
    ticket = queue.offer("a", samples=1, stream="s")
    queue.offer("b", samples=1, stream="s")
    batch = queue.take()
    assert queue.cancel(ticket)
    assert queue.take() == []
    queue.left(batch)
    assert payloads(queue.take()) == ["b"]


def test_a_head_that_has_expired_makes_room_for_the_next_step_in_the_same_batch(
    clock: Clock,
) -> None:
    queue = make(clock)
    queue.offer("x", samples=1, key=1, priority=9)
    queue.offer("late", samples=1, key=1, stream="s", timeout_s=0.5)
    queue.offer("next", samples=1, key=1, stream="s")
    clock.now += 0.5
    assert payloads(queue.take()) == ["x", "next"]


def test_it_is_known_what_there_is_of_a_stream(clock: Clock) -> None:
    queue = make(clock)
    assert not queue.has("s")
    ticket = queue.offer("a", samples=1, stream="s")
    assert queue.has("s")
    batch = queue.take()
    queue.cancel(ticket)
    assert queue.has("s")  # it runs on
    queue.left(batch)
    assert not queue.has("s")
    queue.cancel(queue.offer("b", samples=1, stream="s"))
    assert not queue.has("s")
    assert not queue._followers


def test_there_is_always_room_for_what_continues(clock: Clock) -> None:
    queue = make(clock, max_batch=4, max_queue=4)
    queue.offer("a", samples=4)
    with pytest.raises(QueueFullError):
        queue.offer("b", samples=1)
    queue.offer("b", samples=1, is_admitted=True)
    assert queue.samples == 5
    with pytest.raises(QueueFullError):
        queue.offer("c", samples=1)
    with pytest.raises(RequestTooLargeError):
        queue.offer("d", samples=5, is_admitted=True)
    assert payloads(queue.take()) == ["a"]
    assert payloads(queue.take()) == ["b"]


# ------------------------------------------------------------------------------ whatever happens


class Waiting:
    """What a plain list says of a ticket that is queued."""

    def __init__(self, ticket: Ticket[int]) -> None:
        self.ticket = ticket
        self.eligible_at: float | None = None  # None while its stream is busy


class Reality(RuleBasedStateMachine):
    """A queue beside a list of what waits, from which the next batch is chosen by looking at all.

    Times are multiples of a quarter of a second, so that sums of them are exact.
    """

    MAX_BATCH, MAX_QUEUE, OVERTAKEN_S = 4, 10, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.waiting: list[Waiting] = []
        self.tickets: list[Ticket[int]] = []
        self.on_device: list[list[Ticket[int]]] = []
        self.taken: list[Ticket[int]] = []
        self.crowd = 0
        self.offered = 0

    @initialize(
        delay=st.sampled_from([0, 0.5]), sizes=st.sampled_from([(2, 2), (2, 3), (2, 4), (4, 4)])
    )
    def begin(self, delay: float, sizes: tuple[int, int]) -> None:
        self.delay, (self.good, self.best) = delay, sizes
        self.queue: Queue[int] = Queue(
            max_batch=self.MAX_BATCH, max_queue=self.MAX_QUEUE, max_delay_s=delay, clock=self.clock
        )
        self.queue.aim_at(self.good, best=self.best)

    # -------------------------------------------------------------------- what may happen

    @rule(
        samples=st.integers(1, 5),
        priority=st.sampled_from([0, 5, 9]),
        timeout_s=st.sampled_from([0.25, 0.75, math.inf, math.inf]),
        key=st.sampled_from([None, None, "k", "l"]),
        is_admitted=st.sampled_from([False, False, False, True]),
    )
    def offer(
        self, samples: int, priority: int, timeout_s: float, key: str | None, is_admitted: bool
    ) -> None:
        options = {"samples": samples, "priority": priority, "timeout_s": timeout_s, "key": key}
        self.offer_it(**options, is_admitted=is_admitted, stream=None)

    @rule(
        priority=st.sampled_from([0, 9]),
        timeout_s=st.sampled_from([0.25, 0.75, math.inf, math.inf]),
        key=st.sampled_from([None, "k", "l"]),
        stream=st.sampled_from(["s", "t"]),
    )
    def offer_step(self, priority: int, timeout_s: float, key: str | None, stream: str) -> None:
        options = {"priority": priority, "timeout_s": timeout_s, "key": key, "stream": stream}
        self.offer_it(**options, samples=1, is_admitted=False)

    def offer_it(self, *, samples: int, is_admitted: bool, **options: object) -> None:
        queued = sum(each.ticket.samples for each in self.waiting)
        try:
            ticket = self.queue.offer(
                self.offered,
                samples=samples,
                is_admitted=is_admitted,
                **options,  # type: ignore[arg-type]
            )
        except RequestTooLargeError:
            assert samples > self.MAX_BATCH
            return
        except QueueFullError:
            assert queued + samples > self.MAX_QUEUE
            assert not is_admitted
            return
        assert samples <= self.MAX_BATCH
        assert is_admitted or queued + samples <= self.MAX_QUEUE
        self.tickets.append(ticket)
        self.waiting.append(Waiting(ticket))
        self.offered += 1
        self.promote()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), way=st.sampled_from(["cancel", "expire"]))
    def drop(self, data: st.DataObject, way: str) -> None:
        ticket = data.draw(st.sampled_from(self.tickets[-12:]))
        before = ticket.state
        done = getattr(self.queue, way)(ticket)
        if way == "cancel":
            assert done == (before in (State.QUEUED, State.RUNNING))
            assert ticket.state is (State.CANCELLED if done else before)
        else:
            assert done == (before in (State.QUEUED, State.EXPIRED))
            assert ticket.state is (State.EXPIRED if done else before)
        self.waiting = [each for each in self.waiting if each.ticket is not ticket]
        self.promote()

    @rule(quarters=st.integers(1, 6))
    def time_passes(self, quarters: int) -> None:
        self.clock.now += quarters / 4

    @rule()
    def take(self) -> None:
        was_due = self.is_due()
        room = self.aim()
        batch = self.queue.take()
        assert was_due or not batch
        if was_due:
            self.judge(batch, room)
        assert all(ticket.started_at == self.clock.now for ticket in batch)
        assert all(ticket.state is State.RUNNING for ticket in batch)
        assert len({ticket.key for ticket in batch}) <= 1
        assert len(batch) <= 1 or sum(ticket.samples for ticket in batch) <= room
        self.taken += batch
        if batch:
            self.on_device.append(batch)

    def judge(self, batch: list[Ticket[int]], room: int) -> None:
        """Each was the next when it was taken, what had expired was dropped, and no more fitted."""
        after = self.explained(self.waiting, [], batch, room)
        assert after is not None
        self.waiting = after

    def explained(
        self,
        waiting: list[Waiting],
        taken: list[Ticket[int]],
        rest: list[Ticket[int]],
        room: int,
    ) -> list[Waiting] | None:
        """What still waits after a batch of `taken` and `rest`; None if it should be another.

        Of equals any may come first, and of those that have expired any may be dropped first: whose
        stream goes on then, is next.
        """
        next_ = self.next_(waiting, taken[0].key if taken else ...)
        expired = [each for each in next_ if each.ticket.state is State.EXPIRED]
        for one in expired:
            assert one.ticket.expires_at <= self.clock.now
            others = [copy.copy(each) for each in waiting if each is not one]
            self.promote(others, taken)
            if (after := self.explained(others, taken, rest, room)) is not None:
                return after
        if rest and any(each.ticket is rest[0] for each in next_):
            assert rest[0].expires_at > self.clock.now
            others = [each for each in waiting if each.ticket is not rest[0]]
            room -= rest[0].samples
            return self.explained(others, [*taken, rest[0]], rest[1:], room)
        is_all = not next_ or any(one.ticket.samples > room for one in next_)
        is_so = is_all and all(each.ticket.state is State.QUEUED for each in waiting)
        return waiting if is_so and not rest else None

    def next_(self, waiting: list[Waiting], key: object) -> list[Waiting]:
        """Of what is eligible, of this key unless it is `...`: what comes first, equals too."""
        eligible = [each for each in self.eligible(waiting) if key in (..., each.ticket.key)]
        return [each for each in eligible if self.rank(each) == self.rank(eligible[0])]

    @precondition(lambda self: self.on_device)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.come_back(self.on_device[data.draw(st.integers(0, len(self.on_device) - 1))])

    def come_back(self, batch: list[Ticket[int]]) -> None:
        samples = sum(ticket.samples for ticket in batch)
        self.on_device.remove(batch)
        self.queue.left(batch)
        self.promote()
        self.crowd = self.under_way() + samples
        self.queue.finished(samples=samples, duration_s=0.1)
        for ticket in batch:
            if ticket.state is State.RUNNING:
                ticket.move(State.DONE)

    def under_way(self) -> int:
        waiting = sum(each.ticket.samples for each in self.eligible())
        return waiting + sum(ticket.samples for batch in self.on_device for ticket in batch)

    def aim(self) -> int:
        """Half of what is under way, within bounds, shared by keys."""
        half = max(self.crowd, self.under_way()) // (2 * max(1, len(self.queue._groups)))
        return min(max(half, self.good), self.best)

    # -------------------------------------------------------------------- what has to follow

    def promote(
        self, waiting: list[Waiting] | None = None, taken: Sequence[Ticket[int]] = ()
    ) -> None:
        """The first of each stream that has nothing on the device is eligible from now on."""
        seen = {ticket.stream for batch in [*self.on_device, taken] for ticket in batch}
        for each in self.waiting if waiting is None else waiting:
            stream = each.ticket.stream
            if each.eligible_at is None and (stream is None or stream not in seen):
                each.eligible_at = self.clock.now
            seen.add(stream)

    def rank(self, each: Waiting) -> tuple[float, ...]:
        assert each.eligible_at is not None
        in_time = self.clock.now - each.eligible_at < self.OVERTAKEN_S
        return (in_time, -each.ticket.priority if in_time else 0, each.eligible_at)

    def eligible(self, waiting: list[Waiting] | None = None) -> list[Waiting]:
        waiting = self.waiting if waiting is None else waiting
        eligible = [each for each in waiting if each.eligible_at is not None]
        return sorted(eligible, key=self.rank)

    def is_due(self) -> bool:
        eligible = self.eligible()
        if not eligible:
            return False
        by_key: dict[object, int] = {}
        for each in eligible:
            by_key[each.ticket.key] = by_key.get(each.ticket.key, 0) + each.ticket.samples
        oldest = min(each.eligible_at for each in eligible if each.eligible_at is not None)
        return max(by_key.values()) >= self.aim() or oldest + self.delay <= self.clock.now

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.samples == sum(each.ticket.samples for each in self.waiting)
        assert all(each.ticket.state is State.QUEUED for each in self.waiting)
        assert len(self.waiting) == sum(t.state is State.QUEUED for t in self.tickets)
        assert len(self.taken) == len({id(ticket) for ticket in self.taken})

    @invariant()
    def a_stream_is_on_the_device_once(self) -> None:
        streams = [t.stream for batch in self.on_device for t in batch if t.stream is not None]
        assert len(streams) == len(set(streams))
        for stream in ("s", "t"):
            taken = [ticket.payload for ticket in self.taken if ticket.stream == stream]
            assert taken == sorted(taken)
            if hasattr(self, "queue"):
                waits = any(each.ticket.stream == stream for each in self.waiting)
                assert self.queue.has(stream) == (waits or stream in streams)

    @invariant()
    def it_says_when_it_is_due(self) -> None:
        if not hasattr(self, "queue"):
            return
        due_in_s = self.queue.due_in_s()
        assert (due_in_s == 0) == self.is_due()
        assert (due_in_s is None) == (not self.eligible())

    def teardown(self) -> None:
        """Whatever is left runs, in a bounded number of batches."""
        if not hasattr(self, "queue"):
            return
        for _ in range(2 * len(self.tickets) + 1):
            self.clock.now += self.delay
            self.take()
            for batch in list(self.on_device):
                self.come_back(batch)
        assert self.queue.samples == 0
        assert not self.waiting
        assert not self.queue._followers
        assert set(self.queue._groups) <= {None}
        assert all(ticket.state is not State.QUEUED for ticket in self.tickets)


Reality.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestWhateverHappens = Reality.TestCase
