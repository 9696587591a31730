"""When a worker may go down, and when the gateways know of one that is back."""

import pytest

from provision.rolling import Rollout

FOUR = {"a:1": 1, "a:2": 1, "b:1": 1, "b:2": 1}


def rollout(**up: int) -> Rollout:
    found = Rollout()
    for worker in FOUR:
        found.note(worker, weight=up.get(worker.replace(":", ""), 1))
    return found


@pytest.mark.parametrize(
    ("up", "min_up", "allowed"),
    [
        ({}, 0.5, True),
        ({}, 1.0, True),  # all are up: one at a time, always
        ({"b1": 0}, 0.5, True),
        ({"b1": 0}, 0.6, False),
        ({"b1": 0, "b2": 0}, 0.5, False),
        ({"b1": 0, "b2": 0}, 0.25, True),
        ({"a1": 0, "b1": 0, "b2": 0}, 0.5, True),  # it is down itself
    ],
)
def test_what_stays_up_is_never_below_the_share_that_was_asked_for(
    up: dict[str, int], min_up: float, *, allowed: bool
) -> None:
    refused = rollout(**up).refusal("a:1", min_up=min_up, capacity=FOUR)
    assert (refused is None) is allowed


def test_a_refusal_names_who_is_down_and_what_would_be_left() -> None:
    refused = rollout(b1=0, b2=0).refusal("a:1", min_up=0.5, capacity=FOUR)
    assert refused is not None
    assert "without it 25% of the capacity would be up, and min_up is 50%" in refused
    assert "down are b:1, b:2" in refused


def test_one_that_nobody_looked_at_counts_as_up_unless_its_host_failed() -> None:
    found = Rollout()
    found.note("a:1", weight=1)
    assert found.refusal("a:1", min_up=1.0, capacity=FOUR) is None
    found.lose("b:1")
    found.lose("a:1")  # what was seen counts
    refused = found.refusal("a:1", min_up=0.6, capacity=FOUR)
    assert refused is not None
    assert "down are b:1:" in refused


def test_weights_count_and_backups_do_not() -> None:
    capacity = {"a:1": 3, "b:1": 1, "c:1": 1, "d:1": 0}
    found = Rollout()
    found.note("a:1", weight=3)
    found.note("b:1", weight=1)
    found.note("c:1", weight=0)  # down
    found.note("d:1", weight=0)  # a backup, which lowers nothing
    assert found.refusal("b:1", min_up=0.6, capacity=capacity) is None
    assert found.refusal("a:1", min_up=0.6, capacity=capacity) is not None
    assert found.refusal("d:1", min_up=0.6, capacity=capacity) is None


def test_one_that_restarted_counts_again_and_one_that_did_not_come_back_ends_it() -> None:
    found = rollout(b1=0)
    found.begin("the unit of b:1")
    assert found.failed_on == "the unit of b:1"
    found.end("the unit of b:1", {"b:1": 1}, now=0.0)
    assert found.failed_on is None
    assert found.refusal("a:1", min_up=0.9, capacity=FOUR) is None


def test_gateways_are_waited_for_until_nginx_tries_by_itself() -> None:
    found = rollout()
    found.begin("x")
    found.end("x", {"a:1": 1}, now=100.0)
    assert found.unseen(fail_timeout_s=5, now=101.0) == (["a:1"], 5.5)
    assert found.unseen(fail_timeout_s=5, now=106.5) == ([], 0.0)
    found.all_seen()
    assert found.unseen(fail_timeout_s=5, now=101.0) == ([], 0.0)


def test_one_that_came_up_just_before_is_waited_for_too() -> None:
    """A run that was cut may have restarted it."""
    found = Rollout()
    found.note("a:1", weight=1, up_s=3.0, now=100.0)
    found.note("a:2", weight=1, up_s=3600.0, now=100.0)
    found.note("b:1", weight=0, now=100.0)
    assert found.unseen(fail_timeout_s=5, now=100.0) == (["a:1"], 3.5)
    assert found.unseen(fail_timeout_s=5, now=103.5) == ([], 0.0)


def test_its_own_restart_counts_and_not_how_it_was_found() -> None:
    found = Rollout()
    found.begin("x")
    found.end("x", {"a:1": 1}, now=100.0)
    found.note("a:1", weight=1, up_s=3600.0, now=100.0)
    assert found.unseen(fail_timeout_s=5, now=101.0) == (["a:1"], 5.5)
