"""What a worker counts, in the format of Prometheus.

Owns the registry (its own, so that tests and libraries do not share it) and the numbers, which
are plain: the event loop alone changes them, for each request, so that they need no locks.
"""

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gpu_service.counts import Distribution, Number
from gpu_service.messages import ErrorCode

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

OK = "OK"  # beside the error codes of the protocol


class Reason(enum.StrEnum):
    """Why requests failed; finer than the codes that clients see."""

    MALFORMED = "malformed"  # the message, or a tensor in itself
    DUPLICATE_ID = "duplicate_id"
    NOT_FOUND = "not_found"
    MISMATCH = "mismatch"  # inputs, outputs or parameters that are not the model's
    TOO_LARGE = "too_large"  # more samples than a batch may have
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"  # this client's own
    STREAMS_FULL = "streams_full"  # no room for the state of one more sequence
    EXPIRED = "expired"
    CANCELLED = "cancelled"  # by a message
    DISCONNECTED = "disconnected"  # the client went away before its answer was ready
    MODEL = "model"  # raised by the model or its device
    DEVICE_BROKEN = "device_broken"
    NOT_JSON = "not_json"  # NaN in an answer to a text request
    INTERNAL = "internal"  # a bug


_SECONDS = (
    *(0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted of one version of a model that is served."""

    name: str
    version: str
    digest: str
    requests_ok: int
    queued_samples: int
    sequences: int


class _Collector(Collector):
    """Asks `collect` at each scrape."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        return self._collect()


class Metrics:
    """The metrics of one worker. `max_batch` bounds the buckets of the batch size."""

    def __init__(self, *, max_batch: int) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._ended = {code: Number() for code in (OK, *ErrorCode)}
        self.ok = self._ended[OK]
        self._failed = {reason: Number() for reason in Reason}
        self._stages = {
            stage: Distribution(_SECONDS)
            for stage in ("queue", "input", "infer", "output", "total")
        }
        self.queue_s = self._stages["queue"]
        self.input_s = self._stages["input"]
        self.infer_s = self._stages["infer"]
        self.output_s = self._stages["output"]
        self.total_s = self._stages["total"]
        self.batch_samples = Distribution(
            [float(1 << power) for power in range(max_batch.bit_length() + 1)]
        )
        self.connections = Number()
        self.connections_opened = Number()
        self.connections_refused = Number()
        self.in_flight = Number()
        self.ready = Number()
        self._models: Callable[[], Sequence[ModelFigures]] = list
        self._traces_dropped: Callable[[], int] = int
        self._registry.register(_Collector(self._collect))

    def ended(self, code: str, reason: Reason | None = None) -> None:
        """Count one request that ended: OK, or the code of its error and the reason for it."""
        self._ended[code].value += 1
        if reason is not None:
            self._failed[reason].value += 1

    def describe(
        self,
        *,
        build: Mapping[str, str],
        models: Callable[[], Sequence[ModelFigures]],
        traces_dropped: Callable[[], int] = int,
    ) -> None:
        """Say once what runs here; `models`, those that are served, is asked at each scrape."""
        Info("gpu_service_build", "What runs here.", registry=self._registry).info(dict(build))
        self._models = models
        self._traces_dropped = traces_dropped

    def exposition(self) -> bytes:
        """All metrics as text, of type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def _collect(self) -> Iterator[Metric]:
        models = self._models()
        yield from _of_models(models)
        requests = CounterMetricFamily(
            "gpu_service_requests",
            "Requests by how they ended: OK, or the code of their error.",
            labels=["code"],
        )
        for code, number in self._ended.items():
            requests.add_metric([str(code)], number.value)
        yield requests
        failures = CounterMetricFamily(
            "gpu_service_failures", "Requests that failed, by reason.", labels=["reason"]
        )
        for reason, number in self._failed.items():
            failures.add_metric([str(reason)], number.value)
        yield failures
        stages = HistogramMetricFamily(
            "gpu_service_stage_seconds",
            "Where time goes: queue and total are of each request (total: from the message "
            "received to its answer handed to the socket), input, infer and output of each batch.",
            labels=["stage"],
        )
        for stage, distribution in self._stages.items():
            stages.add_metric([stage], *distribution.cumulated())
        yield stages
        batches = HistogramMetricFamily(
            "gpu_service_batch_samples", "Samples that ran together in one batch."
        )
        batches.add_metric([], *self.batch_samples.cumulated())
        yield batches
        yield CounterMetricFamily(
            "gpu_service_connections_opened",
            "WebSocket connections that were opened.",
            value=self.connections_opened.value,
        )
        yield CounterMetricFamily(
            "gpu_service_connections_refused",
            "Handshakes refused: full, draining, token, origin, or a client's own limit.",
            value=self.connections_refused.value,
        )
        yield CounterMetricFamily(
            "gpu_service_traces_dropped",
            "Requests that were to be traced and are not: the collector was slow or away.",
            value=self._traces_dropped(),
        )
        for name, about, value in (
            ("connections", "Open WebSocket connections.", self.connections.value),
            ("in_flight_requests", "Requests received and not answered.", self.in_flight.value),
            ("ready", "1 while new requests are taken, else 0.", self.ready.value),
            (
                "queued_samples",
                "Samples waiting for the device.",
                sum(model.queued_samples for model in models),
            ),
        ):
            yield GaugeMetricFamily(f"gpu_service_{name}", about, value=value)


def _of_models(models: Sequence[ModelFigures]) -> Iterator[Metric]:
    labels = ["model", "version"]
    served = InfoMetricFamily("gpu_service_model", "The models served.")
    requests = CounterMetricFamily(
        "gpu_service_model_requests", "Requests that a version of a model answered.", labels=labels
    )
    queued = GaugeMetricFamily(
        "gpu_service_model_queued_samples", "Samples waiting for it.", labels=labels
    )
    sequences = GaugeMetricFamily(
        "gpu_service_model_sequences", "Sequences whose state it keeps.", labels=labels
    )
    for model in models:
        of = [model.name, model.version]
        served.add_metric(
            [], {"name": model.name, "version": model.version, "digest": model.digest}
        )
        requests.add_metric(of, model.requests_ok)
        queued.add_metric(of, model.queued_samples)
        sequences.add_metric(of, model.sequences)
    yield from (served, requests, queued, sequences)
