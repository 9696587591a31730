"""Two services with models of their own behind two gateways, one of which is a worker host as well
and reaches its workers by Unix sockets. Leaves the hosts as the other files expect them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.conftest import CHECKOUT, Deployment

NAME = "figures.example"
GATEWAY, BOTH = "10.77.0.11", "10.77.0.21"


@pytest.fixture(scope="module")
def figures(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: the same network under another name, which its answers carry."""
    folder = tmp_path_factory.mktemp("models") / "figures" / "1"
    shutil.copytree(deployment.model, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"name": "figures", "version": "1"})
    )
    return folder


@pytest.fixture(scope="module")
def several(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """The same hosts, of which gpu1 is a gateway, too."""
    inventory = tmp_path_factory.mktemp("inventory") / "inventory.py"
    text = (CHECKOUT / "inventory.py").read_text()
    inventory.write_text(text.replace('gateways = _lab_hosts("gw")', 'gateways = _lab_hosts("g")'))
    deployment.on("gpu1", "sh", "-c", f"echo {GATEWAY} {NAME} >>/etc/hosts")
    yield dataclasses.replace(deployment, inventory=str(inventory))
    deployment.on("gpu1", "sh", "-c", "systemctl disable --quiet --now nginx")
    plain = deployment.run()
    assert plain.returncode == 0, plain.output
    left = deployment.on("gpu1", "sh", "-c", "ls -d /run/gpu-workers /etc/tmpfiles.d/gpu-w*; true")
    assert left == ""
    state = deployment.on("gpu1", "systemctl", "is-active", "gpu-worker@9105", check=False)
    assert state.strip() == "inactive"


def declared(several: Deployment, figures: Path, **options: object) -> dict[str, object]:
    services = {
        "digits": {"model": str(several.model), "path": "/digits", "worker_ports": [9005]},
        "figures": {
            "model": str(figures),
            "server_names": [NAME],
            "worker_ports": "per-gpu",  # one where there is no GPU
            "first_worker_port": 9105,
            "service_options": options,
        },
    }
    return {"services": services, "unix_sockets": True, "nginx_user": "nginx"}


def answers(several: Deployment, service: str, port: int, *urls: str) -> list[dict[str, object]]:
    """What the bundle of a worker says of predictions through these addresses, asked from gpu1."""
    script = (
        'set -a; . "/etc/gpu-service/worker-$1.env"; shift; '
        '"$GPU_WORKER_PYTHON" -P -m gpu_service verify --bundle "$GPU_SERVICE_BUNDLE" "$@"; true'
    )
    output = several.on("gpu1", "sh", "-c", script, service, str(port), *urls)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def status(several: Deployment, url: str, *arguments: str) -> str:
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *arguments, url]
    return several.on("gpu1", *command, check=False)


def test_each_service_is_served_by_its_own_model_where_it_was_declared(
    several: Deployment, figures: Path
) -> None:
    data = declared(several, figures)
    result = several.run(**data)
    assert result.returncode == 0, result.output
    for place in ("port 8009/digits", f"port 8009@{NAME}"):
        assert result.output.count(f"verified: {place} answers a WebSocket handshake") == 2
    by_path = answers(
        several, "digits", 9005, f"ws://{GATEWAY}:8009/digits", f"ws://{BOTH}:8009/digits"
    )
    assert [(a["ok"], a["model"], a["worker"]) for a in by_path] == [
        (True, "digits", "gpu1:9005"),
        (True, "digits", "gpu1:9005"),
    ], by_path
    by_name = answers(several, "figures", 9105, f"ws://{NAME}:8009")
    assert [(a["ok"], a["model"], a["worker"]) for a in by_name] == [
        (True, "figures", "gpu1:9105")
    ], by_name
    gateway = f"http://{GATEWAY}:8009"
    assert status(several, f"{gateway}/digits/v2/models/digits") == "200"
    assert status(several, f"{gateway}/digits/v2/models/figures") == "404"
    assert status(several, f"http://{NAME}:8009/v2/models/figures") == "200"
    assert status(several, f"{gateway}/v2/health/ready") == "404"
    for hidden in ("/digits/metrics", "/digits/metrics/", "/digits//metrics", "/digits/%6detrics"):
        assert status(several, f"{gateway}{hidden}") == "404", hidden
    again = several.run(**data)
    assert again.returncode == 0, again.output
    assert again.changed == {}


def test_nginx_reaches_workers_of_its_own_host_by_sockets_that_others_may_not_open(
    several: Deployment,
) -> None:
    log = several.on("gpu1", "cat", "/var/log/nginx/access.log")
    assert "upstream=unix:/run/gpu-workers/9005.sock" in log
    assert "unix:" not in several.on("gw1", "cat", "/etc/nginx/nginx.conf")
    socket = ("--unix-socket", "/run/gpu-workers/9005.sock")
    assert status(several, "http://localhost/v2", *socket) == "200"
    for user, code in (("nginx", "200"), ("nobody", "000")):
        command = ["runuser", "-u", user, "--", "curl", "-s", "-o", "/dev/null"]
        url = "http://localhost/v2"
        found = several.on("gpu1", *command, "-w", "%{http_code}", *socket, url, check=False)
        assert found == code, user


def test_hosts_are_as_declared(several: Deployment, figures: Path, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.py"
    text = Path(several.inventory).read_text()
    data = declared(several, figures)
    inventory.write_text(
        text.replace(
            "# Every setting of every host is checked",
            f"for _, _data in [*gateways, *workers]:\n    _data.update({data!r})\n"
            "# Every setting of every host is checked",
        )
    )
    which = "service or socket or metrics or managed or model"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "tests/hosts", "-k", which),
            *("--inventory", str(inventory)),
        ],
        cwd=CHECKOUT,
        env=several.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_change_of_one_service_restarts_no_other(several: Deployment, figures: Path) -> None:
    def pid(port: int) -> str:
        unit = f"gpu-worker@{port}"
        return several.on("gpu1", "systemctl", "show", unit, "-p", "MainPID", "--value").strip()

    before = pid(9005), pid(9105)
    result = several.run(**declared(several, figures, max_batch=16))
    assert result.returncode == 0, result.output
    assert set(result.changed) == {"gpu1"}
    assert pid(9005) == before[0]
    assert pid(9105) != before[1]
