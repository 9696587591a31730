import pytest

from gpu_service.batching import Queue, QueueFullError, RequestTooLargeError, State, Ticket


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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
    queue.aim_at(2)
    for name, samples in (("a", 1), ("b", 1), ("c", 1), ("d", 5)):
        queue.offer(name, samples=samples)
    assert payloads(queue.take()) == ["a", "b"]
    assert payloads(queue.take()) == ["c"]
    assert payloads(queue.take()) == ["d"]


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
