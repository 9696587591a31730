"""The VM without one: what qemu is told, how its monitor is spoken to. Real ones: tests/selinux."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import vm
from lab.errors import LabError
from lab.monitor import Monitor
from lab.vm_image import VmImage


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> vm.VmPaths:
    monkeypatch.setenv("GATEWAY_LAB_HOME", str(tmp_path))
    return vm.VmPaths.of("test")


def test_qemu_is_bounded_and_reached_by_ssh_alone(paths: vm.VmPaths) -> None:
    command = " ".join(vm.qemu_command(paths, VmImage(directory=Path("/image")), 4022))
    assert f"-m {vm.MEMORY_MIB}" in command
    assert vm.MEMORY_MIB <= 2048
    assert "restrict=on,hostfwd=tcp:127.0.0.1:4022-:22" in command
    # The mode is what /etc/selinux/config says, or a deploy's mode would not last.
    assert "enforcing=" not in command


def test_an_accelerator_that_is_none_is_refused(
    paths: vm.VmPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vm.ACCELERATOR_VARIABLE, "warp")
    with pytest.raises(LabError, match="kvm or tcg"):
        vm.qemu_command(paths, VmImage(directory=Path("/image")), 4022)


def test_a_vm_that_is_not_up_is_said_to_be_so(paths: vm.VmPaths) -> None:
    with pytest.raises(LabError, match="python -m lab vm up"):
        vm.inventory("test")
    assert not vm.down("test")


def test_a_snapshot_has_a_plain_name(paths: vm.VmPaths) -> None:
    for tag in ("", "a b", "-x", "x;quit"):
        with pytest.raises(LabError):
            vm.check_tag(tag)


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Path]:
    """What stands for qemu's end: greets, tells an event, refuses to load."""
    path = tmp_path / "monitor"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as lines:
            print(json.dumps({"QMP": {}}), file=lines, flush=True)
            for line in lines:
                asked = json.loads(line)
                if asked["execute"] == "gone":
                    return
                print(json.dumps({"event": "RESUME"}), file=lines, flush=True)
                said = asked["arguments"].get("command-line", "")
                reply: dict[str, object] = {"return": "no such tag" if "loadvm" in said else ""}
                if asked["execute"] == "unknown":
                    reply = {"error": {"desc": "no such command"}}
                print(json.dumps(reply), file=lines, flush=True)

    thread = threading.Thread(target=answer)
    thread.start()
    yield path
    thread.join(timeout=10)
    listener.close()


def test_the_monitor_takes_answers_and_leaves_events(qemu: Path) -> None:
    with Monitor(qemu, timeout_s=10) as monitor:
        monitor.snapshot("savevm", "clean")
        with pytest.raises(LabError, match="loadvm clean: no such tag"):
            monitor.snapshot("loadvm", "clean")
        with pytest.raises(LabError, match="unknown: no such command"):
            monitor.execute("unknown")
        with pytest.raises(LabError, match="qemu ended"):
            monitor.execute("gone")


def test_no_monitor_is_an_error_that_says_where(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no qemu answers"):
        Monitor(tmp_path / "absent", timeout_s=1)
