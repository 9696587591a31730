"""The last of this folder: what deploys made is taken away, and the hosts are as they were found.

It ends with bare hosts. What `uninstall.py` finds was changed by all that the other files did.
"""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.deploy.conftest import CHECKOUT, Deployment, Run

METRICS = {"status_port": 8008, "metrics_port": 9113}
ENV_FILE = "/etc/gpu-service/worker-9005.env"
JOURNAL = "/var/lib/gpu-gateway/record/journal"

# What tests did as operators, beside the deploys.
_OTHER_TESTS = """
userdel -r ops; rm -f /etc/sudoers.d/ops /etc/nginx/default.d/foreign.conf
find /etc/pki/gpu-gateway -type f ! -name 'self-signed.*' -delete
true
"""


def uninstall(deployment: Deployment, *arguments: str, **data: object) -> Run:
    return deployment.run(*arguments, deploy="uninstall.py", **data)


def test_prometheus_reads_nginx_s_counters_on_the_gateway(deployment: Deployment) -> None:
    deployed = deployment.run(**METRICS, timeout_s=600)  # the first, where this file runs alone
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


def test_it_says_what_it_would_do_and_does_nothing(deployment: Deployment) -> None:
    deployment.on("gw1", "sh", "-c", _OTHER_TESTS)
    deployment.on("gpu1", "sh", "-c", _OTHER_TESTS)
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
    deployment: Deployment,
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


def test_nothing_is_left_of_it(deployment: Deployment) -> None:
    deployment.on("gw1", "firewall-cmd", "--quiet", "--permanent", "--remove-port=9999/tcp")
    deployment.on("gpu1", "rm", ENV_FILE)
    last = uninstall(deployment, keep="nothing")
    assert last.returncode == 0, last.output
    for host, before in deployment.found.items():
        assert sorted(before ^ deployment.listing(host)) == [], host
    again = uninstall(deployment, keep="nothing")
    assert again.returncode == 0, again.output
    assert again.changed == {}


@pytest.mark.parametrize("keep", ["models;logs", "everything"])
def test_what_cannot_be_kept_is_refused(deployment: Deployment, keep: str) -> None:
    refused = uninstall(deployment, keep=keep)
    assert refused.returncode != 0
    assert "it may be logs, models" in refused.output
    assert "Traceback" not in refused.output
