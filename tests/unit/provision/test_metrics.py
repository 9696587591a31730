"""Metrics from outside: the exporter of nginx's counters, who may ask, and that rules and dashboard
name metrics that exist.

The exporter on a real gateway is in tests/deploy/test_zero_left.py.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpu_service.metrics import Metrics, ModelFigures
from provision import metrics, preflight, workers
from provision.rendering import FILES
from provision.settings import GatewaySettings
from tests.unit.provision import fleets
from tests.unit.provision.fleets import fleet, worker
from tests.unit.provision.test_operations import run
from tests.unit.provision.test_settings import problems

STATUS = (
    "Active connections: 291 \nserver accepts handled requests\n 16630948 16630946 31070465 \n"
    "Reading: 6 Writing: 179 Waiting: 106 \n"
)
PROMETHEUS = FILES / "prometheus"


def load_exporter() -> ModuleType:
    """The program as the gateway runs it: a file, no module of a package."""
    spec = importlib.util.spec_from_file_location("nginx_exporter", FILES / "nginx_exporter.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXPORTER = load_exporter()


def serving(server: HTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nginx() -> Iterator[str]:
    """Answers as stub_status does."""

    class Status(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(STATUS.encode())

        def log_message(self, *_: object) -> None: ...

    yield from serving(HTTPServer(("127.0.0.1", 0), Status))


@pytest.fixture
def exporter(nginx: str) -> Iterator[str]:
    port = int(nginx.rpartition(":")[2])
    yield from serving(EXPORTER.Server("127.0.0.1", 0, EXPORTER.handler(port)))


def scraped(text: str) -> dict[str, float]:
    """Name -> value, as the text has it (the parser adds `_total` to counters)."""
    assert list(text_string_to_metric_families(text)), "no exposition"
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    pairs = (line.rpartition(" ") for line in lines)
    return {name.partition("{")[0]: float(value) for name, _, value in pairs}


def test_what_nginx_says_is_what_prometheus_gets(exporter: str) -> None:
    with urllib.request.urlopen(f"{exporter}/metrics", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        found = scraped(answer.read().decode())
    assert found["nginx_up"] == 1
    assert found["nginx_connections_active"] == 291
    assert found["nginx_connections_accepted"] == 16630948
    assert found["nginx_connections_handled"] == 16630946
    assert found["nginx_connections_writing"] == 179
    assert found["nginx_http_requests_total"] == 31070465
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(exporter, timeout=5)


def test_an_nginx_that_does_not_answer_is_down_and_nothing_else() -> None:
    found = scraped(EXPORTER.exposition(None, {"current": 0, "old": 0}, 0.01))
    assert found["nginx_up"] == 0
    assert not any(name.startswith("nginx_connections") for name in found)


def test_processes_of_former_configurations_are_counted_apart(tmp_path: Path) -> None:
    titles = {
        "1": "systemd",
        "10": "nginx: master process /usr/sbin/nginx",
        "11": "nginx: worker process",
        "12": "nginx: worker process is shutting down",
        "13": "nginx: worker process is shutting down",
        "14": "nginx: cache manager process",
    }
    for pid, title in titles.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(title.encode() + b"\0\0")
    (tmp_path / "15").mkdir()  # it ended between two looks
    (tmp_path / "meminfo").touch()
    assert EXPORTER.worker_processes(tmp_path) == {"current": 1, "old": 2}


def gateway(**data: Any) -> GatewaySettings:
    return fleet(fleets.gateway(**data), worker()).gateways["gw1"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"metrics_port": 9113}, "set status_port, too"),
        ({"metrics_from": ["10.0.0.5"]}, "set metrics_port"),
        ({"metrics_port": 8009, "status_port": 8008}, "gw1 metrics_port"),
        ({"metrics_port": 9113, "status_port": 8008, "metrics_from": ["prometheus"]}, "prometheus"),
    ],
)
def test_settings_that_cannot_work_are_refused(data: dict[str, Any], words: str) -> None:
    assert words in "\n".join(problems(fleets.gateway(**data), worker()))


def test_the_exporter_listens_on_loopback_until_somebody_may_ask() -> None:
    alone = gateway(status_port=8008, metrics_port=9113)
    unit = metrics.files(alone)[1].content
    assert isinstance(unit, bytes)
    assert b"nginx_exporter.py 8008 127.0.0.1 9113;" in unit
    assert b"\nIPAddressAllow=localhost\n" in unit
    asked = gateway(status_port=8008, metrics_port=9113, metrics_from=["10.0.0.5"])
    unit = metrics.files(asked)[1].content
    assert isinstance(unit, bytes)
    assert b"nginx_exporter.py 8008 0.0.0.0 9113;" in unit
    assert b"\nIPAddressAllow=localhost 10.0.0.5\n" in unit


def test_an_exporter_that_is_not_wanted_any_more_goes() -> None:
    assert run(metrics.gone, {}) == []
    commands = run(metrics.gone, {"readlink": metrics.UNIT_FILE})
    assert commands[0] == f"systemctl disable --quiet --now {metrics.UNIT}"
    assert metrics.UNIT_FILE in commands[1]


def test_a_prometheus_may_ask_the_workers_too() -> None:
    made = fleet(fleets.gateway(), worker(metrics_from=["10.0.0.5"]))
    admitted = workers.admitted(made.workers["gpu1"], made)
    assert admitted == {9005: ["10.0.0.11", "10.0.0.5"], 9006: ["10.0.0.11", "10.0.0.5"]}


def test_the_targets_are_all_that_can_be_asked() -> None:
    asked = fleets.gateway(status_port=8008, metrics_port=9113)
    found = metrics.targets(fleet(asked, fleets.gateway("gw2", "10.0.0.12"), worker()))
    assert [(t["labels"]["job"], t["targets"][0]) for t in found] == [
        ("gateway", "10.0.0.11:9113"),
        ("worker", "10.0.0.21:9005"),
        ("worker", "10.0.0.21:9006"),
    ]


def test_ports_that_follow_from_gpus_are_all_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = fleet(fleets.gateway(), worker(worker_ports="per-gpu")).with_gpus({"gpu1": 2})
    monkeypatch.setattr(preflight, "load", lambda *_: (known, {}))
    assert metrics.main([]) == 0
    said = capsys.readouterr()
    assert "10.0.0.21:9005" in said.out
    assert "10.0.0.21:9006" in said.out
    assert said.err == ""


def existing() -> set[str]:
    """Names of all samples that gateways and workers tell, and what Prometheus adds."""
    service = Metrics(max_batch=4)
    figures = ModelFigures(
        name="m", version="1", digest="d", requests_ok=0, queued_samples=0, sequences=0
    )
    service.describe(build={}, models=lambda: [figures])
    status = EXPORTER.STATUS.match(STATUS).groupdict()
    texts = [
        service.exposition().decode(),
        EXPORTER.exposition(status, {"current": 1, "old": 0}, 0.01),
    ]
    return {"up"}.union(*map(scraped, texts))


def named(text: str) -> set[str]:
    return set(re.findall(r"\b(?:gpu_service|nginx|process)_[a-z_]+\b(?=[{\[ )])", text))


def test_alerts_and_dashboard_name_metrics_that_exist() -> None:
    rules = "\n".join(
        line
        for line in (PROMETHEUS / "alerts.yml").read_text().splitlines()
        if "summary:" not in line and "description:" not in line
    )
    dashboard = json.loads((PROMETHEUS / "dashboard.json").read_text())
    queries = "\n".join(
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    )
    assert len(named(rules)) > 8
    assert len(named(queries)) > 15
    assert named(rules) | named(queries) <= existing()


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="no promtool here (Debian: apt-get install prometheus)"
)
def test_prometheus_itself_accepts_rules_and_configuration(tmp_path: Path) -> None:
    for file in PROMETHEUS.glob("*.yml"):
        shutil.copy(file, tmp_path)
    made = fleet(fleets.gateway(status_port=8008, metrics_port=9113), worker())
    (tmp_path / "targets.json").write_text(json.dumps(metrics.targets(made)))
    cases = Path(__file__).with_name("alerts_test.yml")
    for command, folder in (
        (["check", "config", "prometheus.yml"], tmp_path),
        (["test", "rules", str(cases)], tmp_path),
    ):
        result = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
