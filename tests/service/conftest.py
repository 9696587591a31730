import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from gpu_service.batches import Limits
from gpu_service.connection import InFlight
from gpu_service.device import Engine, StartupError
from gpu_service.dispatch import Dispatcher
from gpu_service.registry import Registry
from gpu_service.server import InferenceServer, State
from gpu_service.settings import Settings
from gpu_service.sockets import bind
from tests.service.fakes import BOUND_S, FakeEngine

ROOT = Path(__file__).parents[2]


class Worker:
    """A server in this process, on a port that the system chose."""

    def __init__(self, engine: FakeEngine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings

    async def start(self) -> None:
        self.dispatcher: Dispatcher[InFlight] = Dispatcher()
        self.registry: Registry[InFlight] = Registry(
            dispatcher=self.dispatcher,
            open_engine=self.open_engine,
            limits=Limits(
                max_batch=self.settings.max_batch,
                max_queue=self.settings.max_queue,
                max_delay_s=self.settings.max_delay_ms / 1000,
            ),
            drain_timeout_s=self.settings.drain_timeout_s,
            locate=lambda path: (path, path.name),
        )
        self.server = InferenceServer(
            registry=self.registry,
            device=self.engine.description,
            settings=self.settings,
            worker="test-worker",
        )
        self.dispatcher.start(on_broken=self.server.on_broken)
        self.registry.add(self.engine, source=self.settings.bundle[0])
        listener = bind("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        await self.server.start(listener)

    def open_engine(self, path: Path) -> Engine:
        """Replaced where models come and go."""
        raise StartupError(f"{path}: there is no such model")

    async def stop(self) -> None:
        self.engine.gate.open()
        if self.server.state is State.READY:
            await self.server.drain()
        await self.registry.close()
        assert self.dispatcher.close(timeout_s=BOUND_S)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def connect(self, **options: Any) -> connect:
        return connect(self.url, compression=None, proxy=None, **options)

    async def metric(self, name: str) -> float:
        return await asyncio.to_thread(metric, self.port, name)

    async def until_metric(self, name: str, value: float) -> None:
        async with asyncio.timeout(BOUND_S):
            while await self.metric(name) != value:
                pass


@pytest.fixture
async def start_worker() -> AsyncIterator[Callable[..., Awaitable[Worker]]]:
    workers = []

    async def start(engine: FakeEngine | None = None, **settings: Any) -> Worker:
        worker = Worker(engine or FakeEngine(), Settings(bundle=(Path("unused"),), **settings))
        workers.append(worker)
        await worker.start()
        return worker

    yield start
    for worker in workers:
        await worker.stop()


@pytest.fixture
async def worker(start_worker: Callable[..., Awaitable[Worker]]) -> Worker:
    return await start_worker()


@pytest.fixture
async def socket_(worker: Worker) -> AsyncIterator[ClientConnection]:
    async with worker.connect() as connection:
        yield connection


def get(port: int, path: str) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=BOUND_S) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def metric(port: int, name: str) -> float:
    text = get(port, "/metrics")[2].decode()
    match = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert match, f"no metric {name}"
    return float(match[1])


class Process:
    """A server in a process of its own. Every line that it logs is kept."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, **environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._arrived:
                try:
                    self.lines.append(json.loads(line))
                except ValueError:
                    self.lines.append({"event": "not JSON", "text": line})
                self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()

    def until(self, event: str, *, count: int = 1) -> dict[str, Any]:
        """The `count`th line of an event, as soon as it is there."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if line["event"] == event]

        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(found()) >= count, BOUND_S)
            assert arrived, f"no {event} among {self.lines}"
            return found()[count - 1]

    @property
    def port(self) -> int:
        port: int = self.until("ready")["port"]
        return port

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self.process.wait(BOUND_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(BOUND_S)
        self._reader.join(BOUND_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., Process]]:
    """Starts a server process: the fake one, or with `module` another."""
    processes = []

    def start(*arguments: str, module: str = "tests.service.fakes", **environ: str) -> Process:
        process = Process([module, *arguments], environ)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd holds: the datagram socket at the address in NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(BOUND_S)
        yield receiver


@contextlib.contextmanager
def not_blocking(receiver: socket.socket) -> Iterator[None]:
    receiver.setblocking(False)
    yield
    receiver.settimeout(BOUND_S)
