"""Requests as OpenTelemetry spans, and the way of those to the collector.

The only module that imports OpenTelemetry; used on `telemetry`'s thread alone.
"""

import logging
from collections.abc import Iterator, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from gpu_service import __version__, logs
from gpu_service.messages import ErrorCode
from gpu_service.telemetry import Ended, Stages, TraceParent

# For one message, retries included.
_EXPORT_TIMEOUT_S = 5.0

_EXPORTER_LOGGER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"

# What is the service's failure and not the request's, as OpenTelemetry's conventions for RPC
# servers have it. https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
_FAILURES = frozenset({ErrorCode.DEADLINE_EXCEEDED, ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE})


class Collector:
    """Where spans are sent: OTLP/HTTP at the base address `endpoint`."""

    def __init__(self, endpoint: str) -> None:
        logging.getLogger(_EXPORTER_LOGGER).addFilter(_FewLines())
        base = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=_EXPORT_TIMEOUT_S)

    def take(self, spans: Sequence[ReadableSpan]) -> bool:
        """Send `spans` in one message; whether the collector has them. The failure is logged."""
        return self._exporter.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """From any thread: a retry that waits ends, and what comes after is not sent."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _FewLines(logging.Filter):
    """A collector that is down is worth a line a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = logs.RateLimit(most=1, per_s=60)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._limit.admit() is not None


class _Kept(SpanProcessor):
    """Keeps the spans that end."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


class Spans:
    """Makes spans of requests: one of the server, and below it one a stage."""

    def __init__(self, worker: str) -> None:
        resource = Resource.create(
            {
                "service.name": "gpu-service",
                "service.version": __version__,
                "service.instance.id": worker,
            }
        )
        # Which requests are traced was decided when they ended.
        provider = TracerProvider(resource=resource, sampler=ALWAYS_ON, shutdown_on_exit=False)
        self._kept = _Kept()
        provider.add_span_processor(self._kept)
        self._tracer = provider.get_tracer("gpu_service", __version__)

    def of(self, batch: Sequence[Ended]) -> list[ReadableSpan]:
        """The spans of requests that have ended."""
        for request in batch:
            self._add(request)
        made, self._kept.spans = self._kept.spans, []
        return made

    def _add(self, request: Ended) -> None:
        server = self._tracer.start_span(
            f"{request.name} {request.model}",
            context=_context_of(request.parent),
            kind=SpanKind.SERVER,
            attributes=_attributes(request),
            start_time=request.arrived_ns,
        )
        if request.error_code in _FAILURES:
            server.set_status(StatusCode.ERROR)
        below = trace.set_span_in_context(server, Context())
        end_ns = request.arrived_ns
        for name, start_ns, end_ns in _intervals(request):
            self._tracer.start_span(name, context=below, start_time=start_ns).end(end_ns)
        server.end(end_ns)


def _context_of(parent: TraceParent | None) -> Context:
    if parent is None:
        return Context()
    remote = SpanContext(
        trace_id=parent.trace_id,
        span_id=parent.span_id,
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return trace.set_span_in_context(NonRecordingSpan(remote), Context())


def _attributes(request: Ended) -> dict[str, str | int]:
    """Names of OpenTelemetry's conventions where there is one, else below `gpu_service.`."""
    found: dict[str, str | int | None] = {
        "rpc.system.name": "open_inference",
        "rpc.method": request.name,
        "network.protocol.name": "websocket",
        "rpc.response.status_code": request.error_code or "OK",
        "error.type": request.error_code,
        "gpu_service.request.id": request.request_id,
        "gpu_service.model.name": request.model,
        "gpu_service.model.version": request.version,
        "gpu_service.request.samples": request.samples,
        "gpu_service.batch.samples": request.batch,
    }
    return {name: value for name, value in found.items() if value is not None}


def _intervals(request: Ended) -> Iterator[tuple[str, int, int]]:
    """Name, start and end (Unix time in nanoseconds) of each stage that was reached."""
    start_ns = request.arrived_ns
    for field in Stages.__struct_fields__:
        seconds = getattr(request.stages, field)
        if seconds is None:
            continue
        end_ns = start_ns + round(seconds * 1e9)
        yield field.removesuffix("_s"), start_ns, end_ns
        start_ns = end_ns
