"""nginx's counters in the format of Prometheus, and how many of its processes wait for their end.

    nginx_exporter.py STATUS_PORT ADDRESS PORT

Asks nginx's stub_status on STATUS_PORT of this host at each scrape, and looks for nginx's processes
in /proc. Serves /metrics on ADDRESS:PORT. One process, one scrape at a time, nothing kept between
two. Names are those of nginx-prometheus-exporter, so what was made for it fits; which of nginx's
processes are left over from former configurations, stub_status does not tell.

Runs on the gateway with the Python that its package manager brings: 3.6 or newer, nothing else.
"""

import http.client
import http.server
import pathlib
import re
import socket
import sys
import time

STATUS = re.compile(
    r"Active connections: (?P<active>\d+)\s+"
    r"server accepts handled requests\s+"
    r"(?P<accepted>\d+) (?P<handled>\d+) (?P<requests>\d+)\s+"
    r"Reading: (?P<reading>\d+) Writing: (?P<writing>\d+) Waiting: (?P<waiting>\d+)"
)
# Metric -> type, what it says, name in STATUS.
METRICS = {
    "nginx_connections_accepted": ("counter", "Connections accepted.", "accepted"),
    "nginx_connections_handled": ("counter", "Connections not dropped for a limit.", "handled"),
    "nginx_connections_active": ("gauge", "Open connections of clients.", "active"),
    "nginx_connections_reading": ("gauge", "Connections sending a request.", "reading"),
    "nginx_connections_writing": ("gauge", "Connections answered, WebSockets too.", "writing"),
    "nginx_connections_waiting": ("gauge", "Idle connections of clients.", "waiting"),
    "nginx_http_requests_total": ("counter", "Requests; a WebSocket is one.", "requests"),
}
CURRENT, OLD = "current", "old"
TIMEOUT_S = 5


def ask_status(port):
    """What stub_status says, or None where nothing that looks like it answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        text = connection.getresponse().read(4096).decode("ascii", "replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    found = STATUS.match(text)
    return found.groupdict() if found else None


def generation(title):
    """Which generation a process of nginx belongs to, by the title that it gave itself."""
    if not title.startswith("nginx: worker process"):
        return None
    return OLD if "is shutting down" in title else CURRENT


def worker_processes(proc="/proc"):
    """How many of nginx's worker processes there are, by generation."""
    counts = {CURRENT: 0, OLD: 0}
    for process in pathlib.Path(proc).iterdir():
        if not process.name.isdigit():
            continue
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended
        found = generation(title.replace(b"\0", b" ").decode("ascii", "replace"))
        if found:
            counts[found] += 1
    return counts


def exposition(status, processes, took_s):
    """The metrics as text. Pure."""
    lines = []

    def metric(name, kind, about, *samples):
        lines.append(f"# HELP {name} {about}")
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{labels} {value}" for labels, value in samples)

    metric("nginx_up", "gauge", "1 where nginx tells its counters.", ("", int(status is not None)))
    if status is not None:
        for name, (kind, about, key) in METRICS.items():
            metric(name, kind, about, ("", status[key]))
    metric(
        "nginx_worker_processes",
        "gauge",
        "Worker processes: those that accept, and old ones that wait for their last socket.",
        *((f'{{generation="{name}"}}', count) for name, count in sorted(processes.items())),
    )
    metric(
        "nginx_exporter_scrape_seconds",
        "gauge",
        "What it took to ask nginx.",
        ("", f"{took_s:.6f}"),
    )
    return "\n".join(lines) + "\n"


def handler(status_port):
    """The handler class of an exporter that asks nginx on `status_port`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = TIMEOUT_S

        def do_GET(self):
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "the metrics are at /metrics")
                return
            began = time.monotonic()
            status, processes = ask_status(status_port), worker_processes()
            body = exposition(status, processes, time.monotonic() - began).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """A scrape every few seconds is nothing to tell."""

    return Handler


class Server(http.server.HTTPServer):
    """On IPv4 or IPv6, as the address says."""

    def __init__(self, address, port, handler_class):
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, port), handler_class)


def main(arguments):
    """Serve until the process is told to end."""
    status_port, address, port = int(arguments[0]), arguments[1], int(arguments[2])
    Server(address, port, handler(status_port)).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
