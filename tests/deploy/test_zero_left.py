"""What deploys made is taken away, and the hosts are as they were found: compared with a listing of
bare hosts, before the first deploy. Metrics of nginx on the way.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lab
from tests.deploy.conftest import CHECKOUT, LAB, Deployment, Run

HOSTS = f"{LAB}z"
METRICS = {"status_port": 8008, "metrics_port": 9113}
ENV_FILE = "/etc/gpu-service/worker-9005.env"
JOURNAL = "/var/lib/gpu-gateway/record/journal"


@dataclass(frozen=True)
class Bare(Deployment):
    """Hosts that nobody deployed to, and what they are like."""

    found: dict[str, frozenset[str]]

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "GATEWAY_LAB": HOSTS}


def lab_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "lab", "--name", HOSTS, *arguments]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=600)


@pytest.fixture(scope="module")
def deployment(trained: Path) -> Iterator[Bare]:
    """Two hosts of this file's own: other files do things to theirs that no deploy does."""
    command = [sys.executable, "-m", "provision.wheelhouse", "build", "--if-missing"]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=900)
    lab_command("down")
    lab_command("up")
    try:
        hosts = lab.inventory(HOSTS)
        fresh = Bare(hosts=hosts, gateway_url="", model=trained, found={})
        yield dataclasses.replace(fresh, found={host: fresh.listing(host) for host in hosts})
    finally:
        lab_command("down")


def uninstall(deployment: Bare, *arguments: str, **data: object) -> Run:
    return deployment.run(*arguments, deploy="uninstall.py", **data)


def test_prometheus_reads_nginx_s_counters_on_the_gateway(deployment: Bare) -> None:
    deployed = deployment.run(**METRICS, timeout_s=600)
    assert deployed.returncode == 0, deployed.output
    text = deployment.on("gw1", "curl", "-s", "http://127.0.0.1:9113/metrics")
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert found["nginx_up"] == "1"
    assert int(found["nginx_connections_accepted"]) > 0
    assert int(found['nginx_worker_processes{generation="current"}']) >= 1
    assert deployment.on("gw1", "ss", "-ltnH", "sport = :9113").split()[3] == "127.0.0.1:9113"
    user = deployment.on("gw1", "systemctl", "show", "gateway-metrics", "-p", "DynamicUser")
    assert user.strip() == "DynamicUser=yes"
    assert deployment.run(**METRICS).changed == {}


def test_it_says_what_it_would_do_and_does_nothing(deployment: Bare) -> None:
    dry = subprocess.run(
        [*deployment.command("--dry", deploy="uninstall.py")],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = dry.stdout + dry.stderr
    assert dry.returncode == 0, said
    for line in (
        "stops gpu-worker@9005.service",
        "stops nginx.service",
        "closes 8009/tcp",
        "restores /etc/nginx/nginx.conf",
        "uninstalls nginx",
        "removes /opt/gpu-service",
        "removes user gpu-service",
        "/var/log/nginx stays: logs are kept",
    ):
        assert line in said
    idle = deployment.run(**METRICS)
    assert idle.changed == {}, "the trial changed something"


def test_what_somebody_changed_is_named_and_left_also_by_a_run_that_was_cut(
    deployment: Bare,
) -> None:
    deployment.on("gw1", "firewall-cmd", "--quiet", "--permanent", "--add-port=9999/tcp")
    deployment.on("gpu1", "sh", "-c", f"echo '# mine' >>{ENV_FILE}")
    cut = subprocess.Popen(
        deployment.command("-y", deploy="uninstall.py"),
        cwd=CHECKOUT,
        env=deployment.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert cut.stdout is not None
    for line in cut.stdout:
        if "Starting" in line and "Files are as they were found" in line:
            cut.send_signal(signal.SIGKILL)
            break
    cut.wait(timeout=60)
    cut.stdout.close()
    assert cut.returncode == -signal.SIGKILL
    finished = uninstall(deployment, keep="nothing")
    assert finished.returncode == 0, finished.output
    assert f"{ENV_FILE} stays: somebody changed it since the last deploy" in finished.output
    assert "# mine" in deployment.on("gpu1", "cat", ENV_FILE)
    assert "record stays" in finished.output
    assert deployment.on("gpu1", "test", "-e", JOURNAL) == ""
    assert "9999/tcp" in deployment.on("gw1", "firewall-cmd", "--permanent", "--list-ports")


def test_nothing_is_left_of_it(deployment: Bare) -> None:
    deployment.on("gw1", "firewall-cmd", "--quiet", "--permanent", "--remove-port=9999/tcp")
    deployment.on("gpu1", "rm", ENV_FILE)
    last = uninstall(deployment, keep="nothing")
    assert last.returncode == 0, last.output
    for host, before in deployment.found.items():
        left = before ^ deployment.listing(host)
        assert not left, "\n".join([host, *sorted(left)])
    again = uninstall(deployment, keep="nothing")
    assert again.returncode == 0, again.output
    assert again.changed == {}


def test_nothing_is_left_of_a_deploy_that_ended_before_it_configured_nginx(
    deployment: Bare,
) -> None:
    """For example where certbot has to come from a repository that is not there."""
    cut = deployment.run(
        tls_acme=True,
        acme_terms_agreed=True,
        server_name="gw.example.com",
        acme_package="no-such-package",
        timeout_s=600,
    )
    assert cut.returncode != 0
    assert "nginx" in deployment.on("gw1", "rpm", "-qa", "nginx")
    gone = uninstall(deployment, keep="nothing")
    assert gone.returncode == 0, gone.output
    for host, before in deployment.found.items():
        left = before ^ deployment.listing(host)
        assert not left, "\n".join([host, *sorted(left)])


@pytest.mark.parametrize("keep", ["models;logs", "everything"])
def test_what_cannot_be_kept_is_refused(deployment: Bare, keep: str) -> None:
    refused = uninstall(deployment, keep=keep)
    assert refused.returncode != 0
    assert "it may be logs, models" in refused.output
    assert "Traceback" not in refused.output
