import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.histogram import MAX_BUCKETS, MOST_NS, RELATIVE_ERROR, Histogram, _greatest_in
from gpu_service.histogram import _index as index_of

durations = st.integers(0, MOST_NS) | st.integers(0, 1000) | st.integers(0, 10**9)
lists = st.lists(durations, min_size=1, max_size=200)


def histogram(values: list[int]) -> Histogram:
    made = Histogram()
    for value in values:
        made.record(value)
    return made


@given(durations)
def test_a_bucket_is_narrow_and_holds_its_values(value: int) -> None:
    greatest = _greatest_in(index_of(value))
    assert value <= greatest <= value * (1 + RELATIVE_ERROR)
    assert index_of(greatest) == index_of(value)
    assert index_of(greatest + 1) == index_of(value) + 1


@given(lists, st.floats(0, 1))
def test_a_quantile_is_that_of_a_sorted_list_or_hardly_more(
    values: list[int], fraction: float
) -> None:
    exact = sorted(values)[max(1, math.ceil(fraction * len(values))) - 1]
    assert exact <= histogram(values).quantile_ns(fraction) <= exact * (1 + RELATIVE_ERROR)


@given(lists)
def test_extremes_count_and_mean_are_exact(values: list[int]) -> None:
    made = histogram(values)
    assert made.quantile_ns(1) == made.max_ns == max(values)
    assert made.count == len(values) == sum(count for _, count in made.buckets())
    assert made.mean_ns == sum(values) / len(values)


@given(lists, lists)
def test_adding_two_is_counting_all_in_one(first: list[int], second: list[int]) -> None:
    added, whole = histogram(first).add(histogram(second)), histogram(first + second)
    assert list(added.buckets()) == list(whole.buckets())
    assert (added.count, added.max_ns, added.sum_ns) == (whole.count, whole.max_ns, whole.sum_ns)


@given(lists)
def test_buckets_are_in_order(values: list[int]) -> None:
    bounds = [greatest for greatest, _ in histogram(values).buckets()]
    assert bounds == sorted(set(bounds))


def test_memory_is_bounded() -> None:
    assert index_of(MOST_NS) == MAX_BUCKETS - 1


def test_what_takes_longer_than_all_buckets_counts_as_the_last() -> None:
    made = histogram([10**18])
    assert made.max_ns == made.quantile_ns(0.5) == MOST_NS


def test_nothing_recorded_is_zero() -> None:
    assert Histogram().quantile_ns(0.99) == Histogram().max_ns == 0
    assert Histogram().mean_ns == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="a duration cannot be -1 ns"):
        Histogram().record(-1)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        Histogram().quantile_ns(1.5)
