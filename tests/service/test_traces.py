"""Requests over real sockets, as an OpenTelemetry collector sees them."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from websockets.asyncio.client import connect

from tests.collector import Collector, attributes
from tests.service.conftest import Process
from tests.service.fakes import frame

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


async def test_a_request_of_a_client_that_traces_is_a_span_of_its_trace(
    spawn: Callable[..., Process], collector: Collector
) -> None:
    options = ["--otlp-endpoint", collector.url, "--otlp-sample", "0", "--worker", "w1"]
    process = await asyncio.to_thread(spawn, *options)
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "X-Request-ID": "from-nginx"}
    url = await asyncio.to_thread(lambda: process.url)
    async with connect(url, compression=None, proxy=None, additional_headers=headers) as traced:
        await traced.send(frame(1, id="a"))
        await traced.recv()
    async with connect(url, compression=None, proxy=None) as not_traced:
        await not_traced.send(frame(1, id="b"))
        await not_traced.recv()
    spans = await asyncio.to_thread(collector.spans)
    assert sorted(span.name for span in spans if span.kind != Span.SPAN_KIND_SERVER) == [
        "infer",
        "input",
        "output",
        "queue",
    ]
    (server,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    assert server.name == "infer double"
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert server.end_time_unix_nano > server.start_time_unix_nano
    assert attributes(server)["gpu_service.request.id"] == "from-nginx"
    process.terminate()
    assert await asyncio.to_thread(process.wait) == 0
    assert collector.taken() == []
