"""What a worker counts, in the format of Prometheus.

Owns the registry (its own, so that tests and libraries do not share it). Updated on the event
loop only.
"""

from collections.abc import Callable, Mapping

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

from gpu_service.protocol import ErrorCode

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

OK = "OK"  # beside the error codes of the protocol
CANCELLED = "CANCELLED"  # the client went away before its answer was ready

_SECONDS = (
    *(0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Metrics:
    """The metrics of one worker. `max_batch` bounds the buckets of the batch size."""

    def __init__(self, *, max_batch: int) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        requests = Counter(
            "gpu_service_requests",
            "Requests by how they ended: OK, CANCELLED, or the code of their error.",
            ["code"],
            registry=self._registry,
        )
        self._ended = {code: requests.labels(code) for code in (OK, CANCELLED, *ErrorCode)}
        stages = Histogram(
            "gpu_service_stage_seconds",
            "Where time goes: queue and total are of each request (total: from the message "
            "received to its answer handed to the socket), input, infer and output of each batch.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.queue_s = stages.labels("queue")
        self.input_s = stages.labels("input")
        self.infer_s = stages.labels("infer")
        self.output_s = stages.labels("output")
        self.total_s = stages.labels("total")
        self.batch_samples = Histogram(
            "gpu_service_batch_samples",
            "Samples that ran together in one batch.",
            buckets=[float(1 << power) for power in range(max_batch.bit_length() + 1)],
            registry=self._registry,
        )
        self.connections = self._gauge("connections", "Open WebSocket connections.")
        self.connections_opened = Counter(
            "gpu_service_connections_opened",
            "WebSocket connections that were opened.",
            registry=self._registry,
        )
        self.connections_refused = Counter(
            "gpu_service_connections_refused",
            "WebSocket connections refused, because there were too many or while draining.",
            registry=self._registry,
        )
        self.in_flight = self._gauge("in_flight_requests", "Requests received and not answered.")
        self.ready = self._gauge("ready", "1 while new requests are taken, else 0.")

    def ended(self, code: str) -> None:
        """Count one request that ended: OK, CANCELLED or the code of its error."""
        self._ended[code].inc()

    def describe(
        self,
        *,
        build: Mapping[str, str],
        model: Mapping[str, str],
        queued_samples: Callable[[], float],
    ) -> None:
        """Say once what runs here; `queued_samples` is asked at each scrape."""
        Info("gpu_service_build", "What runs here.", registry=self._registry).info(dict(build))
        Info("gpu_service_model", "The model served.", registry=self._registry).info(dict(model))
        queue = self._gauge("queued_samples", "Samples waiting for the device.")
        queue.set_function(queued_samples)

    def exposition(self) -> bytes:
        """All metrics as text, of type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"gpu_service_{name}", about, registry=self._registry)
