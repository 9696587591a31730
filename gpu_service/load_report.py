"""What a load run measured, and how it is shown: a table, JSON, one line of progress.

Pure; no I/O and no clock. Owns the counts of one run, in memory that does not grow with it.
"""

import collections
from collections.abc import Mapping, Sequence

import msgspec

from gpu_service.histogram import Histogram

DEFAULT_DURATION_S = 10.0

_MS = 1e6  # ns
_S = 1e9  # ns

# Measured over so many stretches of time at most; when there are more, each two become one.
_MOST_INTERVALS = 240
_FIRST_INTERVAL_NS = 100_000_000

_MOST_NAMES = 1000  # of workers, of codes: what a server says must not fill the memory
_OTHERS = "(others)"

_BAR = 20
_BUSY = 0.9  # of a core: from there on, it may be the generator that is measured


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. Ends after `requests` or `duration_s`, whichever comes first.

    With `rate` (requests a second), they are sent when it is time, whether or not earlier ones
    have been answered; without, each connection sends its next one when it has its answer.
    """

    url: str
    connections: int
    requests: int | None = None
    duration_s: float | None = None
    rate: float | None = None
    model: str | None = None  # None: the default one of the server

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            msgspec.structs.force_setattr(self, "duration_s", DEFAULT_DURATION_S)


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of all, in ms; 0 where there is nothing."""

    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float
    mean: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of the run, from `from_s` after its start; latencies in ms."""

    from_s: float
    to_s: float
    answered: int
    failed: int
    p50: float
    p99: float
    max: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Latencies are of answered requests alone; `errors` counts the others by code."""

    url: str
    connections: int
    rate: float | None
    duration_s: float
    answered: int
    failed: int
    requests_per_s: float
    latency_from: str
    latency_ms: Latency
    sent_late_ms: Latency | None  # behind the plan; None where each waits for the one before
    errors: Mapping[str, int]
    examples: Mapping[str, str]  # one message of each code
    workers: Mapping[str, int]
    reconnects: int
    event_loop: str
    generator_cores: float  # of CPU time that this program used
    percentiles: Sequence[tuple[float, float]]  # fraction, and ms that it does not exceed
    over_time: Sequence[Point]


class _Interval:
    __slots__ = ("failed", "latency")

    def __init__(self) -> None:
        self.latency = Histogram()
        self.failed = 0

    def add(self, other: "_Interval") -> None:
        self.latency.add(other.latency)
        self.failed += other.failed


class Tally:
    """Counts one run, whose times are ns of one clock, of which `started_ns` is the start."""

    def __init__(self, started_ns: int) -> None:
        self.started_ns = started_ns
        self.ended_ns = started_ns  # when the last one was answered, or failed
        self.late = Histogram()
        self.recent = Histogram()  # taken away by whoever shows progress
        self.answered_count = 0
        self.failed_count = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self.workers: collections.Counter[str] = collections.Counter()
        self.reconnects = 0
        self.cpu_ns = 0
        self._width_ns = _FIRST_INTERVAL_NS
        self._intervals = [_Interval()]

    def answered(self, *, worker: str, due_ns: int, sent_ns: int, now_ns: int) -> None:
        """Count an answer that came now, of a request that was due and sent at these times."""
        latency_ns = now_ns - due_ns
        self._at(now_ns).latency.record(latency_ns)
        self.recent.record(latency_ns)
        self.late.record(sent_ns - due_ns)
        self.answered_count += 1
        self.workers[_bounded(worker, self.workers)] += 1

    def failed(self, code: str, message: str, *, now_ns: int) -> None:
        """Count a request that has no answer."""
        self._at(now_ns).failed += 1
        self.failed_count += 1
        code = _bounded(code, self.errors)
        self.errors[code] += 1
        self.examples.setdefault(code, message)

    def latency(self) -> Histogram:
        """Of all that were answered."""
        whole = Histogram()
        for interval in self._intervals:
            whole.add(interval.latency)
        return whole

    def over_time(self) -> list[Point]:
        """The run, stretch by stretch."""
        return [
            Point(
                from_s=number * self._width_ns / _S,
                to_s=(number + 1) * self._width_ns / _S,
                answered=interval.latency.count,
                failed=interval.failed,
                p50=interval.latency.quantile_ns(0.5) / _MS,
                p99=interval.latency.quantile_ns(0.99) / _MS,
                max=interval.latency.max_ns / _MS,
            )
            for number, interval in enumerate(self._intervals)
        ]

    def _at(self, now_ns: int) -> _Interval:
        self.ended_ns = max(self.ended_ns, now_ns)
        elapsed_ns = now_ns - self.started_ns
        while elapsed_ns // self._width_ns >= _MOST_INTERVALS:
            self._halve()
        number = elapsed_ns // self._width_ns
        while len(self._intervals) <= number:
            self._intervals.append(_Interval())
        return self._intervals[number]

    def _halve(self) -> None:
        for kept, other in zip(self._intervals[::2], self._intervals[1::2], strict=False):
            kept.add(other)
        del self._intervals[1::2]
        self._width_ns *= 2


def _bounded(name: str, names: Mapping[str, int]) -> str:
    return name if name in names or len(names) < _MOST_NAMES else _OTHERS


def report(plan: Plan, tally: Tally, *, event_loop: str) -> Report:
    """Everything about a run that has ended."""
    latency = tally.latency()
    duration_s = (tally.ended_ns - tally.started_ns) / _S
    return Report(
        url=plan.url,
        connections=plan.connections,
        rate=plan.rate,
        duration_s=duration_s,
        answered=tally.answered_count,
        failed=tally.failed_count,
        requests_per_s=tally.answered_count / duration_s if duration_s else 0.0,
        latency_from="when it was due" if plan.rate else "when it was sent",
        latency_ms=_summary(latency),
        sent_late_ms=_summary(tally.late) if plan.rate else None,
        errors=dict(tally.errors.most_common()),
        examples=tally.examples,
        workers=dict(sorted(tally.workers.items())),
        reconnects=tally.reconnects,
        event_loop=event_loop,
        generator_cores=tally.cpu_ns / _S / duration_s if duration_s else 0.0,
        percentiles=_curve(latency),
        over_time=tally.over_time(),
    )


def _summary(histogram: Histogram) -> Latency:
    p50, p90, p99, p99_9 = (histogram.quantile_ns(f) / _MS for f in (0.5, 0.9, 0.99, 0.999))
    return Latency(
        p50=p50,
        p90=p90,
        p99=p99,
        p99_9=p99_9,
        max=histogram.max_ns / _MS,
        mean=histogram.mean_ns / _MS,
    )


def _curve(histogram: Histogram) -> list[tuple[float, float]]:
    """Twenty points for each nine, as far as there are enough requests to speak of it."""
    curve = []
    for step in range(20 * 9):
        tail = 10.0 ** (-step / 20)
        if tail * histogram.count < 1:
            break
        curve.append((1 - tail, histogram.quantile_ns(1 - tail) / _MS))
    return curve


# ------------------------------------------------------------------------------ for people


def table(run: Report) -> str:
    """The result, some lines of text."""
    kind = f"{run.rate:g} requests/s planned" if run.rate else "each sends when it has its answer"
    lines = [
        f"{run.url}: {run.connections} connections, {run.duration_s:.1f} s, {kind}",
        "",
        f"  requests     {run.answered:,} answered, {run.failed:,} failed",
        f"  requests/s   {run.requests_per_s:,.0f}",
        _latencies("latency", run.latency_ms) + f"  (from {run.latency_from})",
    ]
    if run.sent_late_ms is not None:
        lines.append(_latencies("sent late", run.sent_late_ms))
    workers = [f"{worker or '(unnamed)'}  {count:,}" for worker, count in run.workers.items()]
    errors = [f"{code}  {count:,}: {run.examples[code]}" for code, count in run.errors.items()]
    lines += _listed("workers", workers) + _listed("errors", errors)
    lines.append(f"  reconnects   {run.reconnects:,}")
    note = ""
    if run.generator_cores >= _BUSY:
        note = ": it may be the limit, not the server; use more than one"
    lines.append(f"  generator    {run.event_loop}, {run.generator_cores:.0%} of a core{note}")
    return "\n".join(lines)


def _latencies(name: str, latency: Latency) -> str:
    values = {
        "p50": latency.p50,
        "p90": latency.p90,
        "p99": latency.p99,
        "p99.9": latency.p99_9,
        "max": latency.max,
    }
    return f"  {name:<11}  " + "  ".join(f"{key} {ms(value)}" for key, value in values.items())


def _listed(name: str, lines: Sequence[str]) -> list[str]:
    return [f"  {name if not number else '':<11}  {line}" for number, line in enumerate(lines)]


def ms(value: float) -> str:
    """A duration in ms for people: about three digits."""
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return (
        f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
    )


def progress(plan: Plan, tally: Tally, recent: Histogram, *, now_ns: int, recent_ns: int) -> str:
    """One line: how far it is, and how the last `recent_ns` were."""
    elapsed_s = (now_ns - tally.started_ns) / _S
    done = tally.answered_count + tally.failed_count
    part = max(
        done / plan.requests if plan.requests else 0.0,
        elapsed_s / plan.duration_s if plan.duration_s else 0.0,
    )
    part = min(part, 1.0)
    bar = "#" * round(part * _BAR)
    per_s = recent.count / (recent_ns / _S) if recent_ns else 0.0
    return (
        f"[{bar:.<{_BAR}}] {part:4.0%}  {elapsed_s:5.1f} s  {done:,} done  {per_s:,.0f}/s  "
        f"p50 {ms(recent.quantile_ns(0.5) / _MS)}  p99 {ms(recent.quantile_ns(0.99) / _MS)}  "
        f"{tally.failed_count:,} failed"
    )
