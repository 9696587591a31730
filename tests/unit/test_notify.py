import os
import socket
import uuid
from pathlib import Path

import pytest

from gpu_service.notify import Notifier


def test_assignments_arrive_in_one_datagram(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).send("READY=1", "STATUS=well")
        assert manager.recv(1000) == b"READY=1\nSTATUS=well"


def test_abstract_addresses_start_with_an_at_sign() -> None:
    name = f"gpu-service-test-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        manager.settimeout(10)
        Notifier({"NOTIFY_SOCKET": "@" + name}).send("READY=1")
        assert manager.recv(1000) == b"READY=1"


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    notifier.send("READY=1")
    assert notifier.watchdog_s is None


def test_a_manager_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).send("READY=1")


@pytest.mark.parametrize(
    ("environ", "expected_s"),
    [
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_for_the_process_it_names(
    environ: dict[str, str], expected_s: float | None
) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x"} | environ).watchdog_s == expected_s
