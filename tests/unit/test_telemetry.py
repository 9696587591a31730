"""Traces, as a collector gets them: a real one over OTLP/HTTP, which decodes what it is sent."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from gpu_service import telemetry
from gpu_service.settings import Settings
from gpu_service.telemetry import Stages, Telemetry, parse_trace_parent
from tests.collector import BOUND_S, Collector, attributes

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-00"
ARRIVED_NS = 1_790_000_000_000_000_000
STAGES = Stages(queue_s=0.001, input_s=0.0001, infer_s=0.002, output_s=0.0002)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


Start = Callable[..., Telemetry]


@pytest.fixture
def start(collector: Collector) -> Iterator[Start]:
    started: list[Telemetry] = []

    def run(**options: Any) -> Telemetry:
        arguments = {"sample": 0.0, "worker": "gpu1:9005", "interval_s": 0.01} | options
        started.append(Telemetry(endpoint=collector.url, **arguments))
        return started[-1]

    yield run
    collector.gate.set()
    for each in started:
        each.close(timeout_s=BOUND_S)


def record(to: Telemetry, trace_parent: str | None, **fields: Any) -> None:
    arguments: dict[str, Any] = {
        "request_id": "r1",
        "model": "digits",
        "version": "7",
        "samples": 2,
        "batch": 8,
        "arrived_ns": ARRIVED_NS,
        "stages": STAGES,
    }
    to.record(trace_parent, **arguments | fields)


def test_without_an_endpoint_there_is_none_and_nothing_is_imported() -> None:
    assert Telemetry.of(Settings(bundle=(Path("/"),)), worker="w") is None
    code = "import sys, gpu_service.telemetry; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_request_is_a_server_span_with_a_span_for_each_stage(
    start: Start, collector: Collector
) -> None:
    record(start(), SAMPLED)
    server, *stages = sorted(collector.spans(), key=lambda span: span.kind, reverse=True)
    assert (server.name, server.kind) == ("infer digits", Span.SPAN_KIND_SERVER)
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert server.start_time_unix_nano == ARRIVED_NS
    assert server.end_time_unix_nano == ARRIVED_NS + 3_300_000
    assert server.status.code == Status.STATUS_CODE_UNSET
    assert attributes(server) == {
        "rpc.system.name": "open_inference",
        "rpc.method": "infer",
        "rpc.response.status_code": "OK",
        "network.protocol.name": "websocket",
        "gpu_service.request.id": "r1",
        "gpu_service.model.name": "digits",
        "gpu_service.model.version": "7",
        "gpu_service.request.samples": 2,
        "gpu_service.batch.samples": 8,
    }
    assert {span.trace_id.hex() for span in stages} == {TRACE_ID}
    assert {span.parent_span_id for span in stages} == {server.span_id}
    since = [
        (s.name, s.start_time_unix_nano - ARRIVED_NS, s.end_time_unix_nano - ARRIVED_NS)
        for s in stages
    ]
    assert since == [
        ("queue", 0, 1_000_000),
        ("input", 1_000_000, 1_100_000),
        ("infer", 1_100_000, 3_100_000),
        ("output", 3_100_000, 3_300_000),
    ]


def test_the_resource_names_service_and_worker(start: Start, collector: Collector) -> None:
    record(start(), SAMPLED)
    resource = {
        each.key: each.value.string_value for each in collector.resource_spans().resource.attributes
    }
    assert resource["service.name"] == "gpu-service"
    assert resource["service.instance.id"] == "gpu1:9005"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("INTERNAL", Status.STATUS_CODE_ERROR),
        ("DEADLINE_EXCEEDED", Status.STATUS_CODE_ERROR),
        ("INVALID_ARGUMENT", Status.STATUS_CODE_UNSET),
        ("CANCELLED", Status.STATUS_CODE_UNSET),
    ],
)
def test_a_failure_is_the_services_only_where_it_is(
    start: Start, collector: Collector, code: str, status: int
) -> None:
    record(start(), SAMPLED, error_code=code, batch=None, stages=Stages(queue_s=0.5))
    queued, server = collector.spans()
    assert (queued.name, server.status.code) == ("queue", status)
    assert server.end_time_unix_nano == ARRIVED_NS + 500_000_000
    found = attributes(server)
    assert (found["error.type"], found["rpc.response.status_code"]) == (code, code)
    assert "gpu_service.batch.samples" not in found


def test_who_asked_decides_and_else_the_share(start: Start, collector: Collector) -> None:
    draws = iter([0.2, 0.3, 0.2])
    traced = start(sample=0.25, draw=lambda: next(draws))
    record(traced, NOT_SAMPLED, request_id="client says no")
    record(traced, SAMPLED, request_id="client says yes")
    record(traced, None, request_id="drawn")
    record(traced, None, request_id="not drawn")
    record(traced, "nonsense", request_id="drawn, for its trace parent is not valid")
    assert traced.close(timeout_s=BOUND_S)
    found = [
        attributes(span)["gpu_service.request.id"]
        for message in collector.taken()
        for span in message.resource_spans[0].scope_spans[0].spans
        if span.kind == Span.SPAN_KIND_SERVER
    ]
    assert found == ["client says yes", "drawn", "drawn, for its trace parent is not valid"]
    assert (traced.sent, traced.dropped) == (3, 0)


def test_a_trace_of_its_own_has_no_parent(start: Start, collector: Collector) -> None:
    record(start(sample=1.0), None)
    (server,) = (s for s in collector.spans() if s.kind == Span.SPAN_KIND_SERVER)
    assert server.parent_span_id == b""
    assert any(server.trace_id)


@pytest.mark.parametrize(
    "text",
    [
        "",
        SAMPLED.upper(),
        SAMPLED + "-more",  # version 00 ends here
        "ff" + SAMPLED[2:],
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
    ],
)
def test_an_invalid_trace_parent_is_ignored(text: str) -> None:
    assert parse_trace_parent(text) is None


def test_a_later_version_may_say_more() -> None:
    found = parse_trace_parent(f"01-{TRACE_ID}-{SPAN_ID}-03-more")
    assert found is not None
    assert (found.trace_id, found.sampled) == (int(TRACE_ID, 16), True)


def test_what_does_not_fit_is_dropped_and_counted(start: Start) -> None:
    traced = start(interval_s=BOUND_S)
    for _ in range(telemetry._MAX_QUEUE + 10):
        record(traced, SAMPLED)
    assert traced.dropped == 10
    assert traced.close(timeout_s=BOUND_S)
    assert traced.sent == telemetry._MAX_QUEUE


def test_a_client_cannot_fill_the_queue_with_a_long_id(start: Start, collector: Collector) -> None:
    record(start(), SAMPLED, request_id="x" * 100_000)
    server = collector.spans()[-1]
    assert len(str(attributes(server)["gpu_service.request.id"])) == telemetry._MAX_ID


def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end(
    start: Start, collector: Collector
) -> None:
    collector.gate.clear()
    traced = start()
    record(traced, SAMPLED)
    collector.messages.get(timeout=BOUND_S)
    record(traced, SAMPLED)
    assert not traced.close(timeout_s=0.01)
    assert traced.sent == 0


def test_what_the_collector_refuses_is_counted(start: Start, collector: Collector) -> None:
    collector.status = 400
    traced = start()
    record(traced, SAMPLED)
    assert traced.close(timeout_s=BOUND_S)
    assert (traced.sent, traced.dropped) == (0, 1)
