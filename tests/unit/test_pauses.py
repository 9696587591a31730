"""How long the client waits after a refusal."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.client_calls import pause_s

times_s = st.floats(0, 1e4)


@given(st.none() | times_s, st.integers(0, 10_000), times_s)
def test_never_earlier_than_told_and_never_past_the_deadline(
    told_s: float | None, refusals: int, remaining_s: float
) -> None:
    wait_s = pause_s(told_s, refusals=refusals, remaining_s=remaining_s)
    least_s = 0.1 if told_s is None else told_s
    if wait_s is None:
        assert least_s >= remaining_s
    else:
        assert least_s <= wait_s < remaining_s


@pytest.mark.parametrize("refusals", [0, 3, 1000])
def test_those_refused_together_come_back_spread_out(refusals: int) -> None:
    pauses_s = [pause_s(1.0, refusals=refusals, remaining_s=math.inf) for _ in range(1000)]
    most_s = 1.0 + min(5.0, 2.0**refusals)
    assert all(wait_s is not None and 1.0 <= wait_s <= most_s for wait_s in pauses_s)
    assert len(set(pauses_s)) > 900
