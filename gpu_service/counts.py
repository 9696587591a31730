"""Numbers and distributions that are counted for each request. Pure; used by one thread."""

from collections.abc import Sequence


class Number:
    """A number that goes up, or up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """One more."""
        self.value += 1

    def dec(self) -> None:
        """One less."""
        self.value -= 1


class Distribution:
    """Observations, counted by size."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        # Not by `bisect`: compiled, this compares numbers of C instead of Python's.
        first, last = 0, len(self._bounds)
        while first < last:
            middle = (first + last) >> 1
            if self._bounds[middle] < value:
                first = middle + 1
            else:
                last = middle
        self._counts[first] += 1
        self._sum += value

    def cumulated(self) -> tuple[list[tuple[str, float]], float]:
        """How many were at most each bound, by its text, and the sum of all."""
        buckets = []
        total = 0
        names = [str(bound) for bound in self._bounds] + ["+Inf"]
        for name, count in zip(names, self._counts, strict=True):
            total += count
            buckets.append((name, float(total)))
        return buckets, self._sum
