"""A lab with a gateway and a worker host: reached as an operator reaches it, from a plain shell."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import lab
from lab import host as hosts
from lab import names
from lab.lab import HostStatus, status
from lab.paths import LabPaths
from lab.state import HostPhase

pytestmark = pytest.mark.lab
Run = Callable[..., CompletedProcess[str]]


def boot_id(on: Run, host: str) -> str:
    return on(host, "cat", "/proc/sys/kernel/random/boot_id").stdout


@pytest.mark.parametrize("host", ["gw1", "gpu1"])
def test_each_host_is_reached_over_ssh_and_is_healthy(on: Run, host: str) -> None:
    assert on(host, "hostname").stdout.strip() == host
    assert on(host, "systemctl", "is-system-running").stdout.strip() == "running"


def test_a_host_looks_like_the_el_family(on: Run) -> None:
    release = on("gw1", "cat", "/etc/os-release").stdout
    assert 'ID_LIKE="rhel centos fedora"' in release
    assert 'VERSION_ID="9"' in release
    assert on("gw1", "rpm", "-q", "firewalld", "python3", "logrotate").returncode == 0
    for absent in ("apt", "apt-get", "dpkg", "dpkg-query", "getenforce"):
        assert on("gw1", "command", "-v", absent, check=False).returncode != 0


def test_pyinfra_takes_a_host_for_the_el_family(
    running_lab: str, on: Run, shell: Run, tmp_path: Path
) -> None:
    inventory = tmp_path / "inventory.py"
    inventory.write_text(
        "import lab\n"
        f"hosts = [(name, dict(data)) for name, data in lab.inventory({running_lab!r}).items()]\n"
    )
    pyinfra = (str(Path(sys.executable).with_name("pyinfra")), "-y", str(inventory))
    # The generic operation picks the package manager by what the host has.
    shell(*pyinfra, "--limit", "gw1", "server.packages", "python3.11")
    assert on("gw1", "rpm", "-q", "python3.11").returncode == 0
    shell(*pyinfra, "--limit", "gw1", "yum.packages", "python3.11", "present=false")
    assert on("gw1", "rpm", "-q", "python3.11", check=False).returncode == 1
    shown = shell(*pyinfra, "fact", "server.LinuxDistribution")
    assert shown.stderr.count('"ID_LIKE": "rhel centos fedora"') == 2, shown.stderr


def test_nginx_installs_with_yum_in_the_el_layout(on: Run) -> None:
    on("gw1", "yum", "install", "-y", "nginx")
    assert on("gw1", "nginx", "-v").stderr.startswith("nginx version: nginx/1.")
    assert on("gw1", "rpm", "-V", "nginx").stdout == ""
    assert on("gw1", "nginx", "-t").returncode == 0
    enabled = on("gw1", "systemctl", "is-enabled", "nginx", check=False).stdout.strip()
    assert enabled == "disabled", "EL starts nothing of itself that it installs"
    on("gw1", "systemctl", "start", "nginx")
    assert "Welcome to nginx" in on("gw1", "curl", "-s", "http://localhost/").stdout
    on("gw1", "systemctl", "reload", "nginx")
    workers = on("gw1", "ps", "-o", "user=", "-C", "nginx").stdout.split()
    assert set(workers) == {"root", "nginx"}
    assert on("gw1", "logrotate", "--debug", "/etc/logrotate.d/nginx").returncode == 0
    on("gw1", "systemctl", "stop", "nginx")


def test_a_virtual_environment_can_be_made(on: Run) -> None:
    on("gpu1", "python3.11", "-m", "venv", "/opt/probe")
    assert on("gpu1", "/opt/probe/bin/pip", "--version").stdout.startswith("pip ")


@pytest.fixture
def web_on_gw1(on: Run) -> Iterator[None]:
    """A web server on gw1's gateway port, which the firewall keeps closed."""
    unit = ("systemd-run", "--quiet", "--unit=probe", "python3", "-m", "http.server", "8009")
    on("gw1", *unit)
    try:
        on("gw1", *FETCH, "--retry-connrefused", "http://localhost:8009/")
        yield
    finally:
        on("gw1", "systemctl", "stop", "probe")
        on("gw1", "firewall-cmd", "--quiet", "--reload")


FETCH = ("curl", "-sf", "-o", "/dev/null", "--noproxy", "'*'", "--retry", "5", "--max-time", "5")


def test_the_firewall_runs_and_lets_in_only_ssh(on: Run, web_on_gw1: None) -> None:
    assert on("gw1", "firewall-cmd", "--state").stdout.strip() == "running"
    assert on("gw1", "firewall-cmd", "--get-default-zone").stdout.strip() == "public"
    refused = on("gpu1", *FETCH, "http://10.77.0.11:8009/", check=False)
    assert refused.returncode == 7  # Could not connect.
    on("gw1", "firewall-cmd", "--quiet", "--add-port=8009/tcp")
    on("gpu1", *FETCH, "http://10.77.0.11:8009/")


def test_the_gateway_port_is_relayed_to_the_operators_machine(
    on: Run, running_lab: str, cli: Run, web_on_gw1: None
) -> None:
    at = cli(running_lab, "gateway").stdout.strip()
    assert at == f"{lab.inventory(running_lab)['gw1']['ssh_hostname']}:8009"
    on("gw1", "firewall-cmd", "--quiet", "--add-port=8009/tcp")
    with urllib.request.urlopen(f"http://{at}/", timeout=20) as answer:
        assert answer.status == 200


def test_hosts_reach_each_other_and_nothing_else(on: Run, running_lab: str, shell: Run) -> None:
    on("gpu1", "bash", "-c", "'exec 3<>/dev/tcp/10.77.0.11/22; head -c 4 <&3'")
    for host in ("gw1", "gpu1"):
        routes = json.loads(on(host, "ip", "-json", "route").stdout)
        assert [route["dst"] for route in routes] == ["10.77.0.0/24"]
        away = on(host, "ip", "route", "get", "192.0.2.1", check=False)
        assert "unreachable" in away.stderr
    # And the machine's own network knows nothing of the hosts'.
    assert "10.77.0." not in shell("ip", "address").stdout + shell("ip", "route").stdout


def test_run_starts_a_command_on_the_hosts_network(running_lab: str, cli: Run) -> None:
    shown = cli(running_lab, "run", "ip", "-json", "-4", "address", "show", "hosts").stdout
    assert json.loads(shown)[0]["addr_info"][0]["local"] == "10.77.0.1"


def test_what_a_host_sets_for_its_network_stays_its_own(on: Run) -> None:
    key = Path("/proc/sys/net/core/somaxconn")
    before = key.read_text()
    on("gw1", "sysctl", "-w", "net.core.somaxconn=1234")
    assert on("gw1", "cat", str(key)).stdout.strip() == "1234"
    assert key.read_text() == before


def test_large_upload_arrives_whole(on: Run, running_lab: str, tmp_path: Path, shell: Run) -> None:
    data = random.Random(0).randbytes(32 << 20)
    source = tmp_path / "upload"
    source.write_bytes(data)
    shell("scp", "-q", "-F", str(LabPaths.of(running_lab).ssh_config), str(source), "gpu1:/root/up")
    there = on("gpu1", "sha256sum", "/root/up").stdout.split()[0]
    assert there == hashlib.sha256(data).hexdigest()


def test_systemd_reloading_itself_leaves_the_host_running(on: Run, running_lab: str) -> None:
    """systemd reports READY again after that, as it did after the boot."""
    before = boot_id(on, "gpu1")
    on("gpu1", "systemctl", "daemon-reload")
    on("gpu1", "systemctl", "daemon-reexec")
    assert boot_id(on, "gpu1") == before
    found = status(running_lab)
    assert found is not None
    assert {host.phase for host in found.hosts} == {HostPhase.RUNNING}


def test_reboot_from_inside_comes_back_with_its_disk_and_a_fresh_uptime(
    on: Run, running_lab: str, cli: Run
) -> None:
    paths = LabPaths.of(running_lab)
    on("gpu1", "touch", "/root/kept", "/run/lost")
    machine_id = on("gpu1", "cat", "/etc/machine-id").stdout
    before = boot_id(on, "gpu1")
    boots = {host.name: host.boots for host in _status(running_lab)}["gpu1"]
    # The connection may break before the command has answered.
    on("gpu1", "systemctl", "reboot", check=False)
    hosts.wait_running(paths, "gpu1", boots=boots + 1, timeout_s=60)
    cli(running_lab, "up", "gpu1")
    assert boot_id(on, "gpu1") != before
    uptime_s = float(on("gpu1", "cat", "/proc/uptime").stdout.split()[0])
    machine_uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= uptime_s < min(60, machine_uptime_s)
    assert on("gpu1", "cat", "/etc/machine-id").stdout == machine_id
    assert on("gpu1", "ls", "/root/kept").returncode == 0
    assert on("gpu1", "ls", "/run/lost", check=False).returncode != 0
    on("gpu1", "systemctl", "is-active", "sshd", "firewalld")


def test_reboot_from_outside(on: Run, running_lab: str, cli: Run) -> None:
    before = boot_id(on, "gw1")
    cli(running_lab, "reboot", "gw1")
    assert boot_id(on, "gw1") != before


@pytest.mark.parametrize("how", [[], ["--hard"]])
def test_a_host_is_switched_off_and_on_again(
    on: Run, running_lab: str, how: list[str], cli: Run
) -> None:
    on("gpu1", "sh", "-c", "'echo x > /root/disk; sync'")
    cli(running_lab, "power-off", "gpu1", *how)
    phases = {host.name: host.phase for host in _status(running_lab)}
    assert phases == {"gw1": HostPhase.RUNNING, "gpu1": HostPhase.OFF}
    assert "does not run" in cli(running_lab, "reboot", "gpu1", check=False).stderr
    cli(running_lab, "power-on", "gpu1")
    assert on("gpu1", "cat", "/root/disk").stdout == "x\n"


def test_up_again_changes_nothing_and_up_with_more_adds(
    on: Run, running_lab: str, cli: Run
) -> None:
    before = {host: boot_id(on, host) for host in ("gw1", "gpu1")}
    again = cli(running_lab, "up", "gw1", "gpu1").stdout
    assert "gw1 is up already" in again
    cli(running_lab, "up", "gw1", "gpu1", "train2")
    assert on("train2", "hostname").stdout.strip() == "train2"
    assert lab.inventory(running_lab)["train2"]["address"] == "10.77.0.32"
    assert {host: boot_id(on, host) for host in ("gw1", "gpu1")} == before


def test_a_taken_port_is_reported_before_anything_boots(can_host_lab: None, cli: Run) -> None:
    name = "labport"
    number = names.choose_number(name, taken=())
    with socket.socket() as taken:
        taken.bind((f"127.77.{number}.11", names.DEFAULT_GATEWAY_PORT))
        taken.listen()
        try:
            failed = cli(name, "up", "gw1", check=False)
            assert failed.returncode == 1
            assert f"127.77.{number}.11:8009 is taken" in failed.stderr
            assert "--gateway-port" in failed.stderr
            assert "Traceback" not in failed.stderr
            cli(name, "up", "gw1", "--gateway-port", "18009")
            found = status(name)
            assert found is not None
            assert f"127.77.{number}.11:18009" in found.listening
        finally:
            cli(name, "down")


def test_an_unknown_host_is_a_plain_error(running_lab: str, cli: Run) -> None:
    failed = cli(running_lab, "ssh", "gw7", "true", check=False)
    assert failed.returncode == 1
    assert re.fullmatch(r"error: the lab .* has no host 'gw7'; it has .*\n", failed.stderr)


def _status(name: str) -> list[HostStatus]:
    found = status(name)
    assert found is not None
    return found.hosts
