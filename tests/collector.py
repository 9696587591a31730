"""An OpenTelemetry collector for tests: OTLP/HTTP, decoded by the protocol's own definitions."""

import http.server
import queue
import threading

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

BOUND_S = 30


class Collector:
    """Takes messages at `url`; answers each when `gate` is open, with `status`."""

    def __init__(self) -> None:
        self.messages: queue.Queue[ExportTraceServiceRequest] = queue.Queue()
        self.gate = threading.Event()
        self.gate.set()
        self.status = 200
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                collector.messages.put(ExportTraceServiceRequest.FromString(body))
                collector.gate.wait()
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nobody reads it."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> "Collector":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def resource_spans(self) -> ResourceSpans:
        (found,) = self.messages.get(timeout=BOUND_S).resource_spans
        return found

    def spans(self) -> list[Span]:
        (scope,) = self.resource_spans().scope_spans
        return list(scope.spans)

    def taken(self) -> list[ExportTraceServiceRequest]:
        """All messages that came and were not asked for yet."""
        found = []
        while not self.messages.empty():
            found.append(self.messages.get())
        return found


def attributes(span: Span) -> dict[str, object]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value")
        for each in span.attributes
    }
