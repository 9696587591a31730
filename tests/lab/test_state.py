"""State on disk and the inventory made from it: needs neither root nor a lab."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lab
from lab import names
from lab.errors import LabError, LabNotUp
from lab.paths import LabPaths, home, read_json, write_json
from lab.process import Process
from lab.state import HostPhase, HostState, LabPhase, LabState, process_to_json


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabPaths:
    monkeypatch.setenv("GATEWAY_LAB_HOME", str(tmp_path))
    found = LabPaths.of("lab")
    found.directory.mkdir(parents=True)
    return found


def a_lab(phase: LabPhase = LabPhase.UP) -> LabState:
    return LabState(
        name="lab",
        number=0,
        run_id="0123",
        phase=phase,
        base="base-0",
        gateway_port=8009,
        hosts=(names.HostSpec(name="gpu1", octet=21), names.HostSpec(name="gw1", octet=11)),
    )


def write_running(paths: LabPaths, state: LabState, relay: Process) -> None:
    write_json(paths.state, state.to_json())
    write_json(paths.relay, {"process": process_to_json(relay), "listening": ["127.77.0.11:7722"]})


def test_inventory_leads_to_each_host_and_names_existing_pyinfra_keys(paths: LabPaths) -> None:
    write_running(paths, a_lab(), Process.of(os.getpid()))
    found = lab.inventory()
    assert list(found) == ["gw1", "gpu1"]
    assert found["gpu1"]["address"] == "10.77.0.21"
    assert (found["gpu1"]["ssh_hostname"], found["gpu1"]["ssh_port"]) == ("127.77.0.21", 7722)
    connector = pytest.importorskip("pyinfra.connectors.ssh")
    ssh_keys = {key for key in found["gw1"] if key.startswith("ssh_")}
    assert ssh_keys <= set(connector.connector_data_meta)


def test_without_a_lab_inventory_says_how_to_start_one(paths: LabPaths) -> None:
    with pytest.raises(LabNotUp, match=r"start it with: python -m lab up"):
        lab.inventory()
    with pytest.raises(LabNotUp, match=r"python -m lab --name other up"):
        lab.inventory("other")


def test_a_lab_that_is_only_starting_is_not_up(paths: LabPaths) -> None:
    write_running(paths, a_lab(LabPhase.STARTING), Process.of(os.getpid()))
    with pytest.raises(LabNotUp):
        lab.inventory()


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "of another boot"}])
def test_a_pid_used_again_is_not_the_relay(paths: LabPaths, change: dict[str, int | str]) -> None:
    other = replace(Process.of(os.getpid()), **change)  # type: ignore[arg-type]
    write_running(paths, a_lab(), other)
    with pytest.raises(LabNotUp):
        lab.inventory()


def test_a_signal_reaches_the_process_meant_and_no_other() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1
    ) as child:
        meant = Process.of(child.pid)
        assert not replace(meant, start_ticks=meant.start_ticks - 1).send(signal.SIGKILL)
        assert child.poll() is None
        assert meant.send(signal.SIGKILL)
        assert child.wait(timeout=10) == -signal.SIGKILL
    assert not meant.alive()
    assert not meant.send(signal.SIGKILL)


def test_inventory_is_importable_without_the_slow_modules() -> None:
    """An inventory file is read by each pyinfra call, whether the lab is used or not."""
    code = (
        "import sys, lab\n"
        "print(sorted({'subprocess', 'asyncio', 'socket', 'ctypes'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(lab.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_state_survives_the_disk(paths: LabPaths) -> None:
    write_json(paths.state, a_lab().to_json())
    assert LabState.read(paths) == a_lab()


def test_state_of_another_version_is_refused_with_a_way_out(paths: LabPaths) -> None:
    write_json(paths.state, {**a_lab().to_json(), "format": 0})
    with pytest.raises(LabError, match="another version of the lab; run: python -m lab down"):
        LabState.read(paths)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_spoilt_file_is_named(tmp_path: Path, text: str) -> None:
    spoilt = tmp_path / "state.json"
    spoilt.write_text(text)
    with pytest.raises(LabError, match=str(spoilt)):
        read_json(spoilt)


def test_an_unknown_host_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LabError, match=r"no host 'gw2'; it has gpu1, gw1"):
        a_lab().host("gw2")


@pytest.mark.parametrize("place", ["relative", "/with space", "/a:b", "/a,b"])
def test_a_home_that_overlayfs_could_misread_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_LAB_HOME", place)
    with pytest.raises(LabError, match="GATEWAY_LAB_HOME"):
        home()


def off() -> HostState:
    return HostState(
        supervisor=Process.of(os.getpid()), phase=HostPhase.OFF, boots=0, leader_pid=None
    )


def test_boots_are_counted_and_the_leader_is_known_only_while_running() -> None:
    running = off().moved(HostPhase.BOOTING).moved(HostPhase.RUNNING, leader_pid=7)
    assert (running.boots, running.leader_pid) == (1, 7)
    again = running.moved(HostPhase.BOOTING)
    assert (again.boots, again.leader_pid) == (2, None)


def test_an_impossible_step_names_both_ends() -> None:
    with pytest.raises(ValueError, match="from off to running"):
        off().moved(HostPhase.RUNNING)


def test_a_host_whose_supervisor_is_gone_is_off(paths: LabPaths) -> None:
    host = paths.host("gw1")
    host.directory.mkdir(parents=True)
    running = off().moved(HostPhase.BOOTING).moved(HostPhase.RUNNING, leader_pid=7)
    write_json(host.state, running.to_json())
    found = HostState.read(host)
    assert found is not None
    assert found.phase is HostPhase.RUNNING
    gone = replace(running, supervisor=replace(running.supervisor, start_ticks=1))
    write_json(host.state, gone.to_json())
    found = HostState.read(host)
    assert found is not None
    assert found.phase is HostPhase.OFF
