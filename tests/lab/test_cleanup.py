"""What is left of a lab: nothing after `down`, and nothing in the way after a SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import lab
from lab import network
from lab.cgroup import Cgroup
from lab.errors import LabNotUp
from lab.lab import status
from lab.paths import LabPaths, read_json
from lab.process import Process
from lab.state import HostPhase

pytestmark = pytest.mark.lab
Run = Callable[..., CompletedProcess[str]]
NAME = "labkill"
CHECKOUT = Path(lab.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def machine_ready(can_host_lab: None, cli: Run) -> None:
    cli(NAME, "setup")  # Not what is tested here, and slow the first time.
    cli(NAME, "down")


@pytest.fixture
def name(machine_ready: None, cli: Run) -> Iterator[str]:
    yield NAME
    cli(NAME, "down")


def kill(process: Process) -> None:
    """SIGKILL, and wait for the end."""
    assert process.send(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while process.alive():
        assert time.monotonic() < deadline


def ssh(paths: LabPaths) -> tuple[str, ...]:
    """To gw1, without the shared connection: its process would stay a while."""
    return ("ssh", "-F", str(paths.ssh_config), "-S", "none", "gw1")


def leftovers() -> dict[str, list[str]]:
    """Everything on the machine that carries the lab's name, by kind."""
    paths = LabPaths.of(NAME)
    processes = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # A supervisor or relay has the name as an argument, systemd-nspawn the folder as a part.
        if NAME.encode() in words or any(str(paths.directory).encode() in word for word in words):
            processes.append(b" ".join(words).decode())
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        "processes": processes,
        "cgroups": [str(path) for path in Cgroup(NAME).directories if path.exists()],
        "pids": [str(pid) for pid in Cgroup(NAME).pids()],
        "namespaces": network.existing(NAME),
        "mounts": [line for line in mounts if f"-{NAME}." in line or str(paths.directory) in line],
        "files": [str(paths.directory)] if paths.directory.exists() else [],
    }


NOTHING: dict[str, list[str]] = {
    kind: [] for kind in ("processes", "cgroups", "pids", "namespaces", "mounts", "files")
}


def test_down_leaves_nothing(name: str, cli: Run) -> None:
    cli(name, "up", "gw1", "gpu1")
    there = leftovers()
    assert len(there["processes"]) == 5, "a relay, two supervisors, two containers"
    # Seen only by their supervisors: nothing for anyone to unmount.
    assert [line for line in there["mounts"] if "overlay" in line] == []
    cli(name, "down")
    assert leftovers() == NOTHING
    with pytest.raises(LabNotUp):
        lab.inventory(name)
    assert "there is no lab" in cli(name, "down").stdout


def test_down_ends_no_process_that_only_looks_like_the_labs(name: str, cli: Run) -> None:
    """A recorded pid that another process has by now."""
    cli(name, "up", "gw1")
    paths = LabPaths.of(name)
    relay = read_json(paths.relay)
    assert relay is not None
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            relay["process"] |= {"pid": bystander.pid}
            paths.relay.write_text(json.dumps(relay))
            cli(name, "down")
            assert bystander.poll() is None
        finally:
            bystander.kill()
    assert leftovers() == NOTHING


MOMENTS: dict[str, Callable[[LabPaths], bool]] = {
    "lab begun": lambda paths: paths.state.exists(),
    "network made": lambda paths: network.exists(NAME),
    "host prepared": lambda paths: paths.host("gw1").directory.exists(),
    "relay starting": lambda paths: bool(Cgroup(NAME).pids()),
    "relay listening": lambda paths: paths.relay.exists(),
    "host booting": lambda paths: paths.host("gw1").state.exists(),
    "container started": lambda paths: bool(Cgroup(NAME, "gw1").pids()),
}


@pytest.mark.parametrize(
    ("moment", "then"),
    [
        *((moment, "up") for moment in MOMENTS),
        # `up` sweeps first, as `down` does, so the two ends suffice.
        ("lab begun", "down"),
        ("container started", "down"),
    ],
)
def test_up_killed_half_way(name: str, cli: Run, shell: Run, moment: str, then: str) -> None:
    paths = LabPaths.of(name)
    command = [sys.executable, "-m", "lab", "--name", name, "up", "gw1"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL) as up:
        deadline = time.monotonic() + 60
        while not MOMENTS[moment](paths):
            assert up.poll() is None, f"`up` ended before: {moment}"
            assert time.monotonic() < deadline, f"never came: {moment}"
        up.send_signal(signal.SIGKILL)
    with pytest.raises(LabNotUp):
        lab.inventory(name)
    if then == "up":
        assert "removing what an interrupted run left behind" in cli(name, "up", "gw1").stdout
        shell(*ssh(paths), "systemctl", "is-system-running")
        assert len(leftovers()["processes"]) == 3
        cli(name, "down")
    else:
        cli(name, "down")
    assert leftovers() == NOTHING


def test_a_killed_supervisor_takes_its_host_along_and_up_repairs(
    name: str, cli: Run, shell: Run
) -> None:
    cli(name, "up", "gw1")
    paths = LabPaths.of(name)
    found = read_json(paths.host("gw1").state)
    assert found is not None
    kill(Process(**found["supervisor"]))
    after = status(name)
    assert after is not None
    assert after.hosts[0].phase is HostPhase.OFF
    cli(name, "up", "gw1")
    shell(*ssh(paths), "true")


def test_a_killed_relay_is_started_again_and_the_hosts_stay_up(
    name: str, cli: Run, shell: Run
) -> None:
    cli(name, "up", "gw1")
    paths = LabPaths.of(name)
    boot = (*ssh(paths), "cat", "/proc/sys/kernel/random/boot_id")
    before = shell(*boot).stdout
    relay = read_json(paths.relay)
    assert relay is not None
    kill(Process(**relay["process"]))
    assert (
        "repair it with: python -m lab --name labkill up" in cli(name, "status", check=False).stdout
    )
    with pytest.raises(LabNotUp):
        lab.inventory(name)
    cli(name, "up", "gw1")
    assert shell(*boot).stdout == before


def test_two_commands_do_not_change_one_lab_at_the_same_time(name: str, cli: Run) -> None:
    command = [sys.executable, "-m", "lab", "--name", name, "up", "gw1"]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 60
        while not LabPaths.of(name).state.exists():
            assert time.monotonic() < deadline
        second = cli(name, "up", "gw1", check=False)
        assert second.returncode == 1
        assert f"another command (pid {first.pid}) is changing the lab" in second.stderr
        assert first.wait(timeout=60) == 0
