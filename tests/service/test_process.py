"""The life of a worker's process: signals, systemd, failures to start."""

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from gpu_service import protocol
from gpu_service.messages import Response
from tests.service.conftest import Process, get, metric, not_blocking
from tests.service.fakes import BOUND_S, HANG, WAIT, frame

Spawn = Callable[..., Process]


async def until_in_flight(port: int, count: int) -> None:
    async with asyncio.timeout(BOUND_S):
        while await asyncio.to_thread(metric, port, "gpu_service_in_flight_requests") != count:
            pass


async def refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    await writer.wait_closed()
    return False


async def test_sigterm_drains(spawn: Spawn, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    process = await asyncio.to_thread(spawn, GATE=str(gate))
    port = await asyncio.to_thread(lambda: process.port)
    options = {"compression": None, "proxy": None}
    async with connect(process.url, **options) as busy, connect(process.url, **options) as idle:
        await busy.send(frame(WAIT, id="slow"))
        await until_in_flight(port, 1)
        # Open before the signal, asked after it: a probe that comes at the worst moment.
        probe_reader, probe_writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await asyncio.to_thread(get, port, "/v2/health/ready"))[0] == 200

        process.terminate()
        await asyncio.to_thread(process.until, "draining")
        probe_writer.write(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await probe_reader.read()).startswith(b"HTTP/1.1 503 ")
        probe_writer.close()
        await probe_writer.wait_closed()

        with pytest.raises(ConnectionClosed) as idle_closed:
            await idle.recv()
        assert idle_closed.value.rcvd is not None
        assert idle_closed.value.rcvd.code == 1012
        async with asyncio.timeout(BOUND_S):
            while not await refused(port):
                pass
        # Came too late: not answered, so that the client sends it elsewhere.
        await busy.send(frame(1, id="late"))
        assert process.process.poll() is None

        gate.touch()
        reply = protocol.decode_reply(await busy.recv())
        assert isinstance(reply, Response)
        assert reply.id == "slow"
        with pytest.raises(ConnectionClosed) as busy_closed:
            await busy.recv()
        assert busy_closed.value.rcvd is not None
        assert busy_closed.value.rcvd.code == 1012
    assert await asyncio.to_thread(process.wait) == 0
    assert await asyncio.to_thread(process.until, "stopped")


async def test_a_drain_that_takes_too_long_is_cut_off(spawn: Spawn) -> None:
    process = await asyncio.to_thread(spawn, "--drain-timeout-s", "0.2")
    port = await asyncio.to_thread(lambda: process.port)
    async with connect(process.url, compression=None, proxy=None) as connection:
        await connection.send(frame(HANG))
        await until_in_flight(port, 1)
        process.terminate()
        with pytest.raises(ConnectionClosed):
            await connection.recv()
    assert await asyncio.to_thread(process.wait) == 0
    assert (await asyncio.to_thread(process.until, "drain_timed_out"))["connections_cut_off"] == 1
    await asyncio.to_thread(process.until, "engine_hangs")


def test_systemd_hears_ready_alive_and_stopping(
    spawn: Spawn, manager: socket.socket, tmp_path: Path
) -> None:
    process = spawn(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
    assert manager.recv(1000).startswith(b"READY=1\nSTATUS=serving double 7 on 127.0.0.1:")
    assert [manager.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    process.terminate()
    while (said := manager.recv(1000)) == b"WATCHDOG=1":
        pass
    assert said.startswith(b"STOPPING=1")
    assert process.wait() == 0


async def test_the_watchdog_is_not_fed_while_the_engine_hangs(
    spawn: Spawn, manager: socket.socket, tmp_path: Path
) -> None:
    process = await asyncio.to_thread(
        spawn, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000"
    )
    await asyncio.to_thread(lambda: process.port)
    async with connect(process.url, compression=None, proxy=None) as connection:
        await connection.send(frame(HANG))
        await asyncio.to_thread(process.until, "engine_hangs")
        with not_blocking(manager), pytest.raises(BlockingIOError):
            while True:
                manager.recv(1000)
        # The event loop is well, and says so; nothing reaches systemd all the same.
        await asyncio.to_thread(process.until, "engine_hangs", count=3)
        assert (await asyncio.to_thread(get, process.port, "/v2/health/live"))[0] == 200
        with not_blocking(manager), pytest.raises(BlockingIOError):
            manager.recv(1000)
        process.process.kill()


def test_the_log_is_json_and_tells_the_port(spawn: Spawn) -> None:
    process = spawn("--worker", "w1")
    ready = process.until("ready")
    assert ready["worker"] == "w1"
    assert ready["port"] > 0
    assert json.loads(get(ready["port"], "/v2")[2])["worker"] == "w1"
    assert ready["frozen_objects"] > 1000  # which no collection looks at


def test_a_taken_port_is_a_clear_failure(spawn: Spawn) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = spawn("--port", str(taken.getsockname()[1]))
        assert process.wait() == 1
        reason = process.until("start_failed")["reason"]
    assert reason.startswith("cannot listen on 127.0.0.1:")
    assert "Address already in use" in reason


def test_a_host_that_is_not_one_is_a_clear_failure(spawn: Spawn) -> None:
    process = spawn("--host", "no-such-host.invalid")
    assert process.wait() == 1
    assert "cannot listen on no-such-host.invalid:0" in process.until("start_failed")["reason"]
