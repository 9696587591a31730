"""Listening sockets that systemd holds: nothing is refused while a worker restarts, and a host
comes to them, and back, by a deploy.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import shutil
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.deploy.conftest import Deployment, lab_command
from tests.deploy.test_deploy import (
    UNITS,
    drift,
    main_pids,
    ready_through,
    spoil_expected_outputs,
    wait_for,
)
from tests.deploy.test_load import TOLERANCE, Load

SOCKETS = tuple(unit.replace(".service", ".socket") for unit in UNITS)
ONE_WORKER = {"worker_ports": [9005]}
CONNECTORS = 8
PREDICTIONS = 10_000
BOUND_S = 120

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Connects:
    """Clients that do nothing but connect to a gateway, one handshake after the other."""

    def __init__(self, url: str) -> None:
        address = urllib.parse.urlsplit(url)
        self._address = (address.hostname, address.port)
        self.heads: collections.Counter[str] = collections.Counter()  # status and Retry-After
        self.begun = 0

    async def _connect(self) -> None:
        self.begun += 1
        reader, writer = await asyncio.open_connection(*self._address)
        writer.write(HANDSHAKE)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = head.split()[1]
        retry = "retry-after:" in head.lower()
        self.heads[f"{status}, come back" if retry else status] += 1
        writer.close()

    async def until(self, more: int) -> None:
        """Wait until so many more were answered."""
        wanted = self.heads.total() + more
        async with asyncio.timeout(BOUND_S):
            while self.heads.total() < wanted:
                await asyncio.sleep(0.01)  # between two looks; the condition decides

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def connect_on() -> None:
            while not stopped.is_set():
                await self._connect()

        stopped = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTORS):
                group.create_task(connect_on())
            yield
            stopped.set()


def state_of(deployment: Deployment, unit: str) -> tuple[str, str]:
    """Whether it is active, and whether it comes back after a boot."""
    active = deployment.on("gpu1", "systemctl", "is-active", unit, check=False).strip()
    enabled = deployment.on("gpu1", "systemctl", "is-enabled", unit, check=False).strip()
    return active, enabled


KEPT, NOT_KEPT = ("active", "enabled"), ("inactive", "disabled")


def listeners(deployment: Deployment, port: int) -> str:
    return deployment.on("gpu1", "ss", "-ltnpH", f"sport = :{port}")


async def test_connects_wait_while_the_only_worker_restarts(deployment: Deployment) -> None:
    result = await asyncio.to_thread(deployment.run, **ONE_WORKER)
    assert result.returncode == 0, result.output
    assert state_of(deployment, SOCKETS[0]) == KEPT
    before = deployment.on("gpu1", "systemctl", "show", UNITS[0], "-p", "MainPID", "--value")
    connects = Connects(deployment.gateway_url)
    async with connects.running():
        await connects.until(200)
        begun = connects.begun
        for _ in range(3):
            await asyncio.to_thread(deployment.on, "gpu1", "systemctl", "restart", UNITS[0])
            await connects.until(200)
        assert connects.begun > begun + 600
    after = deployment.on("gpu1", "systemctl", "show", UNITS[0], "-p", "MainPID", "--value")
    print(connects.heads)
    assert after != before
    # A handshake that came in just when the worker was told to stop is told when to come back.
    assert set(connects.heads) <= {"101", "503, come back"}
    assert connects.heads["101"] >= 800
    assert connects.heads["503, come back"] <= 3 * CONNECTORS


async def test_a_restart_of_the_only_worker_costs_no_answer(deployment: Deployment) -> None:
    load = Load(deployment.gateway_url, deployment.model)
    running = asyncio.create_task(load.run(PREDICTIONS))
    async with asyncio.timeout(BOUND_S):
        await load.under_way.wait()
    await asyncio.to_thread(deployment.on, "gpu1", "systemctl", "restart", UNITS[0])
    await running
    assert load.answered == PREDICTIONS
    assert load.wrong == 0
    assert load.worst <= TOLERANCE


def test_two_workers_hand_over_to_each_other_without_sockets(deployment: Deployment) -> None:
    result = deployment.run()
    assert result.returncode == 0, result.output
    assert [state_of(deployment, socket) for socket in SOCKETS] == [NOT_KEPT, NOT_KEPT]
    assert "systemd" not in listeners(deployment, 9005)
    assert deployment.run().changed == {}


def test_sockets_are_taken_over_from_running_workers_one_after_the_other(
    deployment: Deployment,
) -> None:
    before = main_pids(deployment)
    result = deployment.run(socket_activation="on")
    assert result.returncode == 0, result.output
    assert set(result.changed) == {"gpu1"}
    assert [state_of(deployment, socket) for socket in SOCKETS] == [KEPT, KEPT]
    after = main_pids(deployment)
    for port, unit in zip((9005, 9006), UNITS, strict=True):
        assert after[unit] != before[unit]
        assert '"systemd"' in listeners(deployment, port)
        assert f"pid={after[unit]}," in listeners(deployment, port)
    stamp = "ActiveEnterTimestampMonotonic"
    first = deployment.on("gpu1", "systemctl", "show", UNITS[0], "-p", stamp, "--value")
    second = deployment.on("gpu1", "systemctl", "show", SOCKETS[1], "-p", stamp, "--value")
    assert int(second) > int(first), "the second was touched before the first was ready"
    assert deployment.run(socket_activation="on").changed == {}


def test_the_socket_admits_whom_the_service_admits(deployment: Deployment) -> None:
    for name in ("IPAddressAllow", "IPAddressDeny"):
        values = {
            " ".join(sorted(found.split()))
            for unit in (UNITS[0], SOCKETS[0])
            if (found := deployment.on("gpu1", "systemctl", "show", unit, "-p", name, "--value"))
        }
        assert len(values) == 1, values
    assert "10.77.0.11" in deployment.on("gpu1", "systemctl", "cat", SOCKETS[0])


def test_a_socket_that_was_closed_by_hand_is_drift_and_is_repaired(deployment: Deployment) -> None:
    deployment.on("gpu1", "systemctl", "stop", SOCKETS[0])
    told = drift(deployment, socket_activation="on")
    assert told.returncode == 2, told.stderr
    assert "Workers run what was declared" in told.stdout
    repaired = deployment.run(socket_activation="on")
    assert repaired.returncode == 0, repaired.output
    assert state_of(deployment, SOCKETS[0]) == KEPT
    assert '"systemd"' in listeners(deployment, 9005)


def test_another_address_reopens_the_sockets(deployment: Deployment) -> None:
    elsewhere = {"socket_activation": "on", "worker_listen": "10.77.0.21"}
    result = deployment.run(**elsewhere)
    assert result.returncode == 0, result.output
    assert "10.77.0.21:9005" in listeners(deployment, 9005)
    assert deployment.run(**elsewhere).changed == {}
    assert deployment.run(socket_activation="on").returncode == 0
    assert "0.0.0.0:9005" in listeners(deployment, 9005)


def test_sockets_are_there_after_a_reboot(deployment: Deployment) -> None:
    lab_command("reboot", "gpu1")
    wait_for(
        lambda: all(state_of(deployment, unit)[0] == "active" for unit in UNITS),
        what="the workers are ready after the reboot",
    )
    assert [state_of(deployment, socket) for socket in SOCKETS] == [KEPT, KEPT]
    assert '"systemd"' in listeners(deployment, 9006)
    wait_for(lambda: ready_through(deployment), what="the gateway reaches them")


def test_rollback_takes_the_sockets_back_and_forward(deployment: Deployment) -> None:
    assert deployment.run(socket_activation="off").returncode == 0
    back = deployment.run(deploy="rollback.py", rollback="workers")
    assert back.returncode == 0, back.output
    assert [state_of(deployment, socket) for socket in SOCKETS] == [KEPT, KEPT]
    forward = deployment.run(deploy="rollback.py", rollback="workers")
    assert forward.returncode == 0, forward.output
    assert [state_of(deployment, socket) for socket in SOCKETS] == [NOT_KEPT, NOT_KEPT]
    assert ready_through(deployment)


def test_a_worker_that_does_not_become_ready_gets_its_own_socket_back(
    deployment: Deployment,
) -> None:
    """What ran before may know nothing of sockets that are handed over."""
    shutil.copytree(deployment.model, broken := deployment.model.parent / "broken")
    try:
        spoil_expected_outputs(broken)
        result = dataclasses.replace(deployment, model=broken).run(socket_activation="on")
    finally:
        shutil.rmtree(broken)
    assert result.returncode != 0
    assert "gpu-worker@9005.service serves again what it served before" in result.output
    assert state_of(deployment, SOCKETS[0])[0] == "inactive"
    assert "systemd" not in listeners(deployment, 9005)
    assert deployment.run().returncode == 0


def test_a_retired_worker_leaves_no_socket(deployment: Deployment) -> None:
    kept = {"socket_activation": "on"}
    assert deployment.run(worker_ports=[9005, 9006, 9007], **kept).returncode == 0
    assert state_of(deployment, "gpu-worker@9007.socket") == KEPT
    assert deployment.run(**kept).returncode == 0
    assert state_of(deployment, "gpu-worker@9007.socket") == NOT_KEPT
    assert listeners(deployment, 9007) == ""
    assert deployment.run(**kept).changed == {}
    back = deployment.run()
    assert back.returncode == 0, back.output
    assert [state_of(deployment, socket) for socket in SOCKETS] == [NOT_KEPT, NOT_KEPT]
