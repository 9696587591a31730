"""Traces of requests, sent to an OpenTelemetry collector over OTLP/HTTP; only when configured.

Owns a bounded queue, which the event loop fills, and one thread, which makes spans of what is in
it and sends them. The event loop never waits: what does not fit is dropped and counted. `spans`,
and with it OpenTelemetry, is imported only when there is an `otlp_endpoint`.
"""

import collections
import random
import re
import threading
from collections.abc import Callable
from typing import Self

import msgspec

from gpu_service.settings import Settings

# Requests that wait to be sent; as many as the SDK's own batching holds of spans.
_MAX_QUEUE = 2048

# Requests of one message to the collector, and the pause between two messages: the bound on what
# tracing may cost, whatever the clients ask for. 5 spans each, some 20 µs a span.
_MAX_BATCH = 512
_INTERVAL_S = 1.0

# Characters of a request's id that are kept: clients choose it.
_MAX_ID = 256

# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Stages(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of a request went, in seconds, one stage after the other from its arrival.

    None for a stage that it did not reach.
    """

    queue_s: float | None = None
    input_s: float | None = None
    infer_s: float | None = None
    output_s: float | None = None


class TraceParent(msgspec.Struct, frozen=True):
    """A `traceparent` of W3C's Trace Context: who asked, and whether they trace it."""

    trace_id: int
    span_id: int
    sampled: bool


def parse_trace_parent(text: str) -> TraceParent | None:
    """What `text` says; None where it is not valid, and is then to be ignored."""
    found = _TRACE_PARENT.fullmatch(text)
    if found is None or (text.startswith("00") and found[4]):
        return None
    trace_id, span_id = int(found[1], 16), int(found[2], 16)
    if not (trace_id and span_id):
        return None
    return TraceParent(trace_id, span_id, sampled=bool(int(found[3], 16) & 1))


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended and is to be traced."""

    parent: TraceParent | None
    name: str
    request_id: str | None
    model: str
    version: str
    samples: int
    batch: int | None
    arrived_ns: int
    stages: Stages
    error_code: str | None


class Telemetry:
    """Takes requests that have ended and sends the sampled ones. `record` is for one thread."""

    @classmethod
    def of(cls, settings: Settings, *, worker: str) -> Self | None:
        """As `settings` have it; None where they name no `otlp_endpoint`."""
        if not settings.otlp_endpoint:
            return None
        return cls(endpoint=settings.otlp_endpoint, sample=settings.otlp_sample, worker=worker)

    def __init__(
        self,
        *,
        endpoint: str,
        sample: float,
        worker: str,
        draw: Callable[[], float] = random.random,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """`endpoint`: base address of the collector; `draw`: a number in [0, 1) a request."""
        from gpu_service import spans

        self._sample = sample
        self._draw = draw
        self._interval_s = interval_s
        self._ended: collections.deque[Ended] = collections.deque()
        self._closing = threading.Event()
        self._spans = spans.Spans(worker)
        self._collector = spans.Collector(endpoint)
        self.sent = 0  # requests that the collector took
        self._refused = 0  # by the queue
        self._lost = 0  # by the collector; the thread's
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def record(
        self,
        trace_parent: str | None,
        *,
        name: str = "infer",
        request_id: str | None,
        model: str,
        version: str,
        samples: int,
        batch: int | None,
        arrived_ns: int,
        stages: Stages,
        error_code: str | None = None,
    ) -> None:
        """Take a request that has ended, once; never waits.

        It is traced where its client's `trace_parent` says so, and not where that says it is not;
        without one, or with an invalid one, `otlp_sample` decides.

        + batch: samples of the batch that it ran in; None where it did not run
        + arrived_ns: Unix time of its arrival in nanoseconds
        + error_code: what it was refused with
        """
        parent = parse_trace_parent(trace_parent) if trace_parent else None
        sampled = parent.sampled if parent is not None else self._draw() < self._sample
        if not sampled:
            return
        if len(self._ended) >= _MAX_QUEUE:
            self._refused += 1
            return
        self._ended.append(
            Ended(
                parent=parent,
                name=name,
                request_id=request_id and request_id[:_MAX_ID],
                model=model,
                version=version,
                samples=samples,
                batch=batch,
                arrived_ns=arrived_ns,
                stages=stages,
                error_code=error_code,
            )
        )

    @property
    def dropped(self) -> int:
        """Requests that were to be traced and are not: the queue was full, or the collector did
        not take them."""
        return self._refused + self._lost

    def close(self, *, timeout_s: float) -> bool:
        """Send what waits, for at most `timeout_s`; whether all of it went."""
        self._closing.set()
        self._thread.join(timeout_s)
        self._collector.close()  # ends a retry that waits
        return not self._thread.is_alive() and not self._ended

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._send()
        while self._ended:
            self._send()

    def _send(self) -> None:
        batch = [self._ended.popleft() for _ in range(min(len(self._ended), _MAX_BATCH))]
        if not batch:
            return
        if self._collector.take(self._spans.of(batch)):
            self.sent += len(batch)
        else:
            self._lost += len(batch)
