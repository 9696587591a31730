"""The deploy against real hosts, in the order of a host's life: bare, deployed, changed, broken,
interrupted, rebooted. Each test leaves the hosts deployed for the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.numpy
from packaging.utils import parse_wheel_filename

from gpu_service import bundle
from tests.deploy.conftest import CHECKOUT, LAB, Deployment, lab_command

UNITS = ("gpu-worker@9005.service", "gpu-worker@9006.service")


def wait_for(condition: Callable[[], bool], *, what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.1)  # between two looks; the condition decides


def main_pids(deployment: Deployment) -> dict[str, str]:
    return {
        unit: deployment.on("gpu1", "systemctl", "show", unit, "-p", "MainPID", "--value").strip()
        for unit in UNITS
    }


def nginx_workers(deployment: Deployment) -> set[str]:
    return set(deployment.on("gw1", "pgrep", "-f", "nginx: worker").split())


def test_first_run_turns_bare_hosts_into_a_gateway_with_workers(deployment: Deployment) -> None:
    first = deployment.run()
    assert first.returncode == 0, first.output
    assert "verified: gpu1:9005 serves digits" in first.output
    assert "verified: gpu1:9006 serves digits" in first.output
    assert "answers a WebSocket handshake with 101" in first.output
    assert any("nginx" in name for name in first.changed["gw1"])
    assert any("Virtual environment" in name for name in first.changed["gpu1"])


def test_second_run_changes_nothing_and_dry_says_so(deployment: Deployment) -> None:
    pids = main_pids(deployment), nginx_workers(deployment)
    second = deployment.run()
    assert second.returncode == 0, second.output
    assert second.changed == {}
    dry = subprocess.run(
        [argument for argument in deployment.command("--dry", "--json") if argument != "-y"],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert dry.returncode == 0, dry.stderr
    assert not [op for op in json.loads(dry.stdout)["plan"] if op["hosts_with_change"]]
    assert (main_pids(deployment), nginx_workers(deployment)) == pids


def test_hosts_are_as_declared(deployment: Deployment) -> None:
    """Step one of the runbook, as its reader runs it."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/hosts", "--inventory", "inventory.py"],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout.splitlines()[-1]


def test_workers_run_the_compiled_service(deployment: Deployment) -> None:
    metrics = deployment.on("gpu1", "curl", "-s", "http://10.77.0.21:9005/metrics")
    (build,) = [line for line in metrics.splitlines() if "gpu_service_build_info{" in line]
    assert 'compiled="yes"' in build


def test_worker_ports_are_closed_to_everybody_else(deployment: Deployment) -> None:
    """From the lab's controller, an address on the same network that is no gateway."""
    probe = "import socket; socket.create_connection(('10.77.0.21', 9005), timeout=3)"
    command = ["--name", LAB, "run", sys.executable, "-c", probe]
    outside = subprocess.run(
        [sys.executable, "-m", "lab", *command], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert outside.returncode != 0, "an address that is no gateway reached a worker"
    inside = deployment.on(
        "gw1", "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://10.77.0.21:9005/v2"
    )
    assert inside == "200"


def test_an_operator_who_is_not_root_deploys_by_sudo(deployment: Deployment) -> None:
    for host in deployment.hosts:
        deployment.on(
            host,
            "sh",
            "-c",
            "id ops 2>/dev/null || useradd --create-home ops; "
            "echo 'ops ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/ops; "
            "cp -r /root/.ssh /home/ops/ && chown -R ops: /home/ops/.ssh",
        )
    as_ops = {"ssh_user": "ops", "_sudo": True}
    idle = deployment.run(**as_ops)
    assert idle.returncode == 0, idle.output
    assert idle.changed == {}
    changed = deployment.run(**as_ops, keepalive_timeout_s=64)
    assert changed.returncode == 0, changed.output
    assert set(changed.changed) == {"gw1"}
    assert deployment.run().returncode == 0


def test_rotated_logs_are_written_anew_without_touching_nginx(deployment: Deployment) -> None:
    master = deployment.on("gw1", "cat", "/run/nginx.pid")
    assert ready_through(deployment)
    deployment.on("gw1", "logrotate", "--force", "/etc/logrotate.d/nginx")
    assert ready_through(deployment)
    wait_for(
        lambda: "/v2/health/ready" in deployment.on("gw1", "cat", "/var/log/nginx/access.log"),
        what="the new log is written to",
    )
    assert "/v2/health/ready" in deployment.on("gw1", "cat", "/var/log/nginx/access.log.1")
    assert deployment.on("gw1", "cat", "/run/nginx.pid") == master


def drift(deployment: Deployment, **data: object) -> subprocess.CompletedProcess[str]:
    pairs = deployment.command(**data)[3:]
    return subprocess.run(
        [sys.executable, "-m", "provision.drift", "inventory.py", *pairs],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_drift_tells_what_differs_and_touches_nothing(deployment: Deployment) -> None:
    before = deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf")
    none = drift(deployment)
    assert (none.returncode, none.stdout) == (0, "nothing differs from what is declared\n")
    some = drift(deployment, keepalive_timeout_s=66)
    assert some.returncode == 2, some.stderr
    assert "gw1:\n  Gateway | nginx runs this configuration" in some.stdout
    assert "gw1 | -    keepalive_timeout 65;" in some.stdout
    assert "gw1 | +    keepalive_timeout 66;" in some.stdout
    assert "gpu1" not in some.stdout
    bad = drift(deployment, keepalive_timeout_s="soon")
    assert bad.returncode == 1
    assert "keepalive_timeout_s" in bad.stderr
    assert deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf") == before


def test_a_gateway_setting_reloads_nginx_and_leaves_the_workers_alone(
    deployment: Deployment,
) -> None:
    pids = main_pids(deployment)
    master = deployment.on("gw1", "cat", "/run/nginx.pid")
    changed = deployment.run(keepalive_timeout_s=66)
    assert changed.returncode == 0, changed.output
    assert set(changed.changed) == {"gw1"}
    assert "keepalive_timeout 66;" in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")
    assert deployment.on("gw1", "cat", "/run/nginx.pid") == master, "a restart, not a reload"
    assert main_pids(deployment) == pids
    assert deployment.run().returncode == 0


@pytest.fixture
def broken_include(deployment: Deployment) -> Iterator[str]:
    """A file that nobody manages makes every configuration of this host invalid."""
    path = "/etc/nginx/conf.d/broken.conf"
    deployment.on("gw1", "sh", "-c", f"echo 'not_a_directive;' > {path}")
    yield path
    deployment.on("gw1", "rm", "-f", path)


def test_a_configuration_that_nginx_refuses_never_goes_live(
    deployment: Deployment, broken_include: str
) -> None:
    before = deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf")
    result = deployment.run(keepalive_timeout_s=67)
    assert result.returncode != 0
    assert "refused by nginx -t" in result.output
    assert "not_a_directive" in result.output
    assert deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf") == before
    assert ready_through(deployment)
    deployment.on("gw1", "rm", "-f", broken_include)
    assert deployment.run().returncode == 0


# A name server on the gateway's own loopback, out of reach of other networks: all is at 127.0.0.1.
NAME_SERVER = r"""
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.53", 53))
while True:
    asked, client = server.recvfrom(512)
    end = asked.index(0, 12) + 5
    found = asked[end - 4 : end - 2] == bytes([0, 1])
    head = asked[:2] + bytes([0x81, 0x80, 0, 1, 0, found, 0, 0, 0, 0]) + asked[12:end]
    answer = bytes([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1])
    server.sendto(head + (answer if found else b""), client)
"""

NAME_SERVER_STARTS = """
set -eu
for file in resolv nsswitch; do cp /etc/$file.conf /root/$file.kept; done
systemd-run --quiet --unit=test-names python3 -c "$1"
echo 'nameserver 127.0.0.53' >/etc/resolv.conf
echo 'hosts: files dns' >/etc/nsswitch.conf
for _ in $(seq 50); do getent hosts only.lab.test >/dev/null && break; sleep 0.1; done
getent hosts only.lab.test
echo "$2" >/etc/nginx/conf.d/named.conf
"""


@pytest.fixture
def named_upstream(deployment: Deployment) -> Iterator[None]:
    """A server of somebody else whose upstream has a name that only DNS knows."""
    conf = "server { listen 127.0.0.1:8011; location / { proxy_pass http://only.lab.test:8012; } }"
    deployment.on("gw1", "sh", "-c", NAME_SERVER_STARTS, "sh", NAME_SERVER, conf)
    yield
    deployment.on(
        "gw1",
        *("sh", "-c"),
        "rm -f /etc/nginx/conf.d/named.conf; systemctl stop test-names; "
        "for file in resolv nsswitch; do cat /root/$file.kept >/etc/$file.conf; done; "
        "rm /root/*.kept",
    )
    assert deployment.run().returncode == 0


@pytest.mark.usefixtures("named_upstream")
def test_a_name_that_only_dns_knows_is_known_where_a_configuration_is_tried(
    deployment: Deployment,
) -> None:
    result = deployment.run(keepalive_timeout_s=67)
    assert result.returncode == 0, result.output
    assert "keepalive_timeout 67;" in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")


def test_a_port_that_is_taken_is_told_before_anything_is_touched(deployment: Deployment) -> None:
    """`nginx -t` has nothing against it; the reload would, in silence."""
    before = deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf")
    workers = nginx_workers(deployment)
    result = deployment.run(listen_port=22)
    assert result.returncode != 0
    assert "port 22 is taken on this host, by sshd" in result.output
    assert deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf") == before
    assert nginx_workers(deployment) == workers, "nginx was reloaded"
    # firewalld opened the port before nginx was tried with it, and closed none.
    ports = deployment.on("gw1", "firewall-cmd", "--list-ports").split()
    assert {"22/tcp", "8009/tcp"} <= set(ports)
    assert deployment.run().changed == {"gw1": ["Gateway | No other public port is open"]}
    assert deployment.on("gw1", "firewall-cmd", "--list-ports").split() == ["8009/tcp"]


def test_a_configuration_that_does_not_come_to_life_is_taken_back(
    deployment: Deployment,
) -> None:
    """A zone's key cannot change at a reload, which is all that shows it."""
    foreign = "/etc/nginx/conf.d/zone.conf"
    key = "limit_conn_zone {} zone=foreign:1m;".format

    def write(text: str) -> None:
        deployment.on("gw1", "sh", "-c", f"echo '{text}' > {foreign}")

    write(key("$remote_addr"))
    try:
        assert deployment.run(keepalive_timeout_s=64).returncode == 0
        before = deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf")
        write(key("$binary_remote_addr"))
        result = deployment.run(keepalive_timeout_s=63)
    finally:
        deployment.on("gw1", "rm", "-f", foreign)
    assert result.returncode != 0
    assert "nginx did not take the configuration over" in result.output
    assert 'limit_conn_zone "foreign" uses the' in result.output
    assert "the previous configuration is back, and clients are served" in result.output
    assert deployment.on("gw1", "sha256sum", "/etc/nginx/nginx.conf") == before
    again = deployment.run()
    assert again.returncode == 0, again.output
    assert ready_through(deployment)


def ready_through(deployment: Deployment) -> bool:
    url = deployment.gateway_url.replace("ws:", "http:") + "/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_drift_is_repaired(deployment: Deployment) -> None:
    deployment.on("gpu1", "systemctl", "stop", UNITS[0])
    deployment.on("gpu1", "chmod", "600", "/etc/gpu-service/worker-9006.env")
    deployment.on("gw1", "rm", "/usr/share/nginx/gateway/50x.html")
    deployment.on("gw1", "systemctl", "disable", "--now", "nginx")
    repaired = deployment.run()
    assert repaired.returncode == 0, repaired.output
    assert set(repaired.changed) == {"gw1", "gpu1"}
    assert deployment.run().changed == {}


def test_a_new_setting_restarts_workers_one_after_the_other(deployment: Deployment) -> None:
    before = main_pids(deployment)
    started = {"service_options": {"max_batch": 32}}
    result = deployment.run(**started)
    assert result.returncode == 0, result.output
    after = main_pids(deployment)
    assert all(after[unit] != before[unit] for unit in UNITS)
    # The second was told to stop only after the first was ready.
    stamp = "ActiveEnterTimestampMonotonic"
    ready = deployment.on("gpu1", "systemctl", "show", UNITS[0], "-p", stamp, "--value")
    stamp = "InactiveEnterTimestampMonotonic"
    stopped = deployment.on("gpu1", "systemctl", "show", UNITS[1], "-p", stamp, "--value")
    assert int(stopped) > int(ready)


def test_a_worker_that_does_not_become_ready_goes_back_and_stops_the_rollout(
    deployment: Deployment,
) -> None:
    """The model is intact, but does not answer as it did when it was trained."""
    before = main_pids(deployment)
    shutil.copytree(deployment.model, broken := deployment.model.parent / "broken")
    try:
        spoil_expected_outputs(broken)
        result = dataclasses.replace(deployment, model=broken).run()
    finally:
        shutil.rmtree(broken)
    assert result.returncode != 0
    assert "gpu-worker@9005.service failed to become ready" in result.output
    assert "gpu-worker@9005.service serves again what it served before" in result.output
    assert "gw1" in result.output
    assert main_pids(deployment)[UNITS[1]] == before[UNITS[1]], "the second was touched"
    assert ready_through(deployment)
    again = deployment.run()
    assert again.returncode == 0, again.output


def spoil_expected_outputs(folder: Path) -> None:
    """Another version, intact by its digests, whose golden answers are not the model's."""
    samples = safetensors.numpy.load_file(folder / bundle.SAMPLES)
    samples["expected.logits"] = samples["expected.logits"][::-1].copy()
    safetensors.numpy.save_file(samples, folder / bundle.SAMPLES)
    content = (folder / bundle.SAMPLES).read_bytes()
    manifest = json.loads((folder / bundle.MANIFEST).read_text())
    manifest["version"] = "broken"
    manifest["files"][bundle.SAMPLES] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest))
    bundle.verify(folder)


def test_rollback_brings_back_what_ran_before_the_last_change(deployment: Deployment) -> None:
    changed = deployment.run(keepalive_timeout_s=63, service_options={"max_batch": 48})
    assert changed.returncode == 0, changed.output
    back = deployment.run(deploy="rollback.py")
    assert back.returncode == 0, back.output
    assert "keepalive_timeout 65;" in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")
    for port in (9005, 9006):
        settings = deployment.on("gpu1", "cat", f"/etc/gpu-service/worker-{port}.env")
        assert "MAX_BATCH" not in settings
    assert ready_through(deployment)
    # What is declared is what ran before: the deploy only notes that nginx runs it.
    again = deployment.run()
    assert again.returncode == 0, again.output
    assert "gpu1" not in again.changed
    one_side = deployment.run(deploy="rollback.py", rollback="workers")
    assert one_side.returncode == 0, one_side.output
    assert "MAX_BATCH=48" in deployment.on("gpu1", "cat", "/etc/gpu-service/worker-9005.env")
    assert "gw1" not in one_side.changed
    assert deployment.run().returncode == 0


def test_a_rollback_to_another_port_opens_it_and_is_verified_there(
    deployment: Deployment,
) -> None:
    moved = deployment.run(listen_port=8019)
    assert moved.returncode == 0, moved.output
    assert deployment.on("gw1", "firewall-cmd", "--list-ports").split() == ["8019/tcp"]
    back = deployment.run(deploy="rollback.py", rollback="gateways", listen_port=8019)
    assert back.returncode == 0, back.output
    assert "verified: port 8009 answers a WebSocket handshake with 101" in back.output
    assert ready_through(deployment)
    assert deployment.run().returncode == 0
    assert deployment.on("gw1", "firewall-cmd", "--list-ports").split() == ["8009/tcp"]


def test_a_port_that_is_no_longer_declared_is_retired(deployment: Deployment) -> None:
    assert deployment.run(worker_ports=[9005, 9006, 9007]).returncode == 0
    assert "active" in deployment.on("gpu1", "systemctl", "is-active", "gpu-worker@9007")
    assert "10.77.0.21:9007" in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")
    back = deployment.run()
    assert back.returncode == 0, back.output
    state = deployment.on("gpu1", "systemctl", "is-active", "gpu-worker@9007", check=False)
    assert state.strip() == "inactive"
    assert "9007" not in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")
    assert "9007" not in deployment.on("gpu1", "firewall-cmd", "--list-rich-rules")
    assert deployment.run().changed == {}


@pytest.mark.parametrize("after", ["Units of the workers", "nginx runs this", "one after"])
def test_a_run_that_is_killed_is_repaired_by_running_it_again(
    deployment: Deployment, after: str
) -> None:
    """Killed the moment an operation begins, with changes of gateway and workers under way."""
    changes = {"keepalive_timeout_s": 70, "service_options": {"max_batch": 16}}
    process = subprocess.Popen(
        deployment.command("-y", **changes),
        cwd=CHECKOUT,
        env=deployment.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Starting" in line and after in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait(timeout=60)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    repaired = deployment.run(**changes)
    assert repaired.returncode == 0, repaired.output
    assert deployment.run(**changes).changed == {}
    assert deployment.run().returncode == 0


@pytest.fixture
def package_index(tmp_path: Path) -> Iterator[str]:
    """A package index on the hosts' network, made of the wheelhouse: `NAME/WHEEL` over HTTP."""
    (lock,) = CHECKOUT.glob(".wheelhouse/cpu-*/requirements.lock")
    for wheel in lock.parent.glob("*.whl"):
        name = parse_wheel_filename(wheel.name)[0]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / wheel.name).symlink_to(wheel)
    server = [sys.executable, "-m", "http.server", "8123", "--bind", "10.77.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab", "--name", LAB, "run", *server, "--directory", str(tmp_path)],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield "http://10.77.0.1:8123/"
    process.terminate()
    process.wait(timeout=10)


def test_packages_come_from_an_index_where_hosts_have_one(
    deployment: Deployment, package_index: str
) -> None:
    wait_for(
        lambda: "torch" in deployment.on("gpu1", "curl", "-s", package_index, check=False),
        what="the index answers",
    )
    # An installation that failed never passes for a complete environment.
    empty = {"packages_from": "index", "index_url": f"{package_index}none/"}
    failed = deployment.run(**empty, index_trusted_host="10.77.0.1")
    assert failed.returncode != 0
    assert "No matching distribution" in failed.output
    from_index = {
        "packages_from": "index",
        "index_url": package_index,
        "index_trusted_host": "10.77.0.1",
    }
    result = deployment.run(**from_index)
    assert result.returncode == 0, result.output
    assert any("Virtual environment" in name for name in result.changed["gpu1"])
    assert deployment.run(**from_index).changed == {}
    left = deployment.on("gpu1", "find", "/opt/gpu-service/wheels", "-name", "pip.conf")
    assert left == "", "the file that may hold a token is still there"
    # The environment from the wheelhouse is still on the host: nothing is installed again.
    back = deployment.run()
    assert back.returncode == 0, back.output
    assert not any("Virtual environment" in name for name in back.changed["gpu1"])


def test_everything_is_back_after_a_reboot(deployment: Deployment) -> None:
    for host in ("gw1", "gpu1"):
        lab_command("reboot", host)
    wait_for(lambda: ready_through(deployment), what="a worker ready through the gateway")
    for unit in UNITS:
        wait_for(
            lambda unit=unit: (
                "active"
                in deployment.on(  # type: ignore[misc]
                    "gpu1", "systemctl", "is-active", unit, check=False
                ).split()
            ),
            what=f"{unit} active",
        )
    after = deployment.run()
    assert after.returncode == 0, after.output
    assert after.changed == {}
