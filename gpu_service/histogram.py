"""Durations, counted in buckets whose width grows with the value: any number in bounded memory.

Pure; no state beyond one histogram's own counts. The same idea as HdrHistogram: within a power
of two, 128 buckets of equal width, so that what is read is at most 1/128 more than what was
recorded, from a microsecond to an hour.
"""

import math
from collections.abc import Iterator
from typing import Self

_SUB_BITS = 7  # 2**7 buckets for each power of two
_EXACT_BELOW = 2 << _SUB_BITS

MOST_NS = 2**44 - 1  # 4.9 hours; whatever takes longer counts as that
MAX_BUCKETS = ((44 - _SUB_BITS - 1) << _SUB_BITS) + _EXACT_BELOW

RELATIVE_ERROR = 1 / (1 << _SUB_BITS)


def _index(value_ns: int) -> int:
    if value_ns < _EXACT_BELOW:
        return value_ns
    shift = value_ns.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (value_ns >> shift)


def _greatest_in(index: int) -> int:
    if index < _EXACT_BELOW:
        return index
    shift = (index >> _SUB_BITS) - 1
    return ((index - (shift << _SUB_BITS) + 1) << shift) - 1


class Histogram:
    """Whole nanoseconds, from 0. At most MAX_BUCKETS numbers are kept, however many come."""

    __slots__ = ("_counts", "count", "max_ns", "sum_ns")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.max_ns = 0  # exact, up to MOST_NS
        self.sum_ns = 0

    def record(self, value_ns: int) -> None:
        """Count one duration; ValueError for a negative one."""
        if value_ns < 0:
            raise ValueError(f"a duration cannot be {value_ns} ns")
        if value_ns > MOST_NS:
            value_ns = MOST_NS
        index = _index(value_ns)
        self._counts[index] = self._counts.get(index, 0) + 1
        self.count += 1
        self.sum_ns += value_ns
        if value_ns > self.max_ns:
            self.max_ns = value_ns

    def add(self, other: "Histogram") -> Self:
        """Count all that `other` counted, too."""
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + count
        self.count += other.count
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        return self

    @property
    def mean_ns(self) -> float:
        """The mean of all; 0 if there are none."""
        return self.sum_ns / self.count if self.count else 0.0

    def quantile_ns(self, fraction: float) -> int:
        """What `fraction` (0 to 1) of all do not exceed; 0 if there are none.

        The smallest such that was recorded, or up to RELATIVE_ERROR more, never less.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"{fraction} is not between 0 and 1")
        rank = max(1, math.ceil(fraction * self.count))
        seen = 0
        for greatest_ns, count in self.buckets():
            seen += count
            if seen >= rank:
                return greatest_ns
        return self.max_ns

    def buckets(self) -> Iterator[tuple[int, int]]:
        """Each bucket that is not empty: the most that is in it, in ns, and how many are."""
        for index in sorted(self._counts):
            yield min(_greatest_in(index), self.max_ns), self._counts[index]
