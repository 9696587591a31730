"""Models that come and go while clients are served, over real sockets."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

from gpu_service import protocol
from gpu_service.device import Engine, StartupError
from gpu_service.messages import ErrorCode, Failure, Request, Response, Scalar, SessionInfo
from gpu_service.registry import LoadError
from tests.service.conftest import Worker, get
from tests.service.fakes import BOUND_S, WAIT, CountEngine, FakeEngine, SumEngine, frame, x_of

StartWorker = Callable[..., Awaitable[Worker]]


class Models:
    """What `worker` opens at some paths: the engine there, made when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.folders: dict[str, FakeEngine] = {"unused": worker.engine}
        worker.registry._open_engine = self.open_engine
        worker.registry._locate = lambda path: (path, self.folders[path.name].model.digest)

    def open_engine(self, path: Path) -> Engine:
        return self.folders[path.name]

    async def load(self, engine: FakeEngine, folder: str) -> FakeEngine:
        self.folders[folder] = engine
        await self.worker.registry.load(Path(folder))
        return engine

    async def unload(self, engine: FakeEngine) -> None:
        await self.worker.registry.unload(engine.model.name, engine.model.version)

    async def reload(self) -> None:
        await self.worker.registry.reload()


@pytest.fixture
async def models(worker: Worker) -> Models:
    return Models(worker)


async def start(start_worker: StartWorker, engine: FakeEngine, **settings: object) -> Models:
    return Models(await start_worker(engine, **settings))


async def reply(connection: ClientConnection) -> Response | Failure:
    async with asyncio.timeout(BOUND_S):
        received = protocol.decode_reply(await connection.recv())
    assert isinstance(received, Response | Failure)
    return received


async def until_closed(engine: FakeEngine) -> None:
    assert await asyncio.to_thread(engine.is_closed.wait, BOUND_S)


def request(
    x: float,
    *,
    name: str | None = None,
    version: str | None = None,
    id: str | None = None,  # noqa: A002
    **parameters: Scalar,
) -> bytes:
    return protocol.encode_request(
        Request(
            inputs=x_of(x), id=id, model_name=name, model_version=version, parameters=parameters
        )
    )


async def ask(connection: ClientConnection, message: bytes) -> tuple[str, str, float] | str:
    """Name, version and value of an answer, or the code of an error."""
    await connection.send(message)
    return brief(await reply(connection))


def brief(received: Response | Failure) -> tuple[str, str, float] | str:
    if isinstance(received, Failure):
        return received.code
    return received.model_name, received.model_version, float(received.outputs["y"][0, 0])


async def test_requests_reach_the_model_that_they_name(models: Models) -> None:
    await models.load(CountEngine(), "count")
    await models.load(FakeEngine(version="8"), "double-8")
    async with models.worker.connect() as connection:
        assert await ask(connection, request(1)) == ("double", "8", 2)
        assert await ask(connection, request(1, name="double")) == ("double", "8", 2)
        assert await ask(connection, request(1, version="7")) == ("double", "7", 2)
        assert await ask(connection, request(1, name="count")) == ("count", "1", 2)
        assert await ask(connection, request(5, name="count", version="1")) == ("count", "1", 6)
        assert await ask(connection, request(1, name="sum")) == ErrorCode.NOT_FOUND
        assert await ask(connection, request(1, name="count", version="7")) == "NOT_FOUND"


async def test_what_is_served_is_told_everywhere(models: Models) -> None:
    await models.load(CountEngine(), "count")
    await models.load(FakeEngine(version="8"), "double-8")
    port = models.worker.port
    server = json.loads((await asyncio.to_thread(get, port, "/v2"))[2])
    assert [(each["name"], each["version"]) for each in server["models"]] == [
        ("double", "8"),
        ("double", "7"),
        ("count", "1"),
    ]
    double = json.loads((await asyncio.to_thread(get, port, "/v2/models/double"))[2])
    assert double["versions"] == ["8", "7"]
    asked = [Subprotocol(protocol.SUBPROTOCOL)]
    async with models.worker.connect(subprotocols=asked) as connection:
        greeting = protocol.decode_reply(await connection.recv())
        assert isinstance(greeting, SessionInfo)
        assert [each["version"] for each in greeting.models] == ["8", "7", "1"]
        await ask(connection, request(1, name="count"))
    name = 'gpu_service_model_requests_total{model="count",version="1"}'
    assert await models.worker.metric(name) == 1


async def test_a_model_that_cannot_be_loaded_leaves_clients_alone(models: Models) -> None:
    def fail(path: Path) -> Engine:
        raise StartupError(f"{path}: self-test")

    models.worker.registry._open_engine = fail
    async with models.worker.connect() as connection:
        with pytest.raises(LoadError, match="self-test"):
            await models.load(FakeEngine(version="8"), "double-8")
        assert await ask(connection, request(1)) == ("double", "7", 2)


async def test_a_reload_under_load_loses_no_request_and_no_connection(models: Models) -> None:
    """Clients keep several requests under way all the time, each of which is answered once."""
    versions = 8
    changing = True
    seen: list[set[str]] = []

    async def client(number: int) -> int:
        sent = answered = 0
        versions_seen: set[str] = set()
        seen.append(versions_seen)
        async with models.worker.connect() as connection:
            while changing or answered < sent:
                while changing and sent - answered < 8:
                    await connection.send(frame(1000 * number + sent % 500, id=str(sent)))
                    sent += 1
                received = await reply(connection)
                assert isinstance(received, Response), received
                assert received.id == str(answered)
                assert received.outputs["y"][0, 0] == 2 * (1000 * number + answered % 500)
                versions_seen.add(received.model_version)
                answered += 1
        return answered

    clients = [asyncio.create_task(client(number)) for number in range(2, 6)]
    engines = [models.worker.engine]
    for version in range(100, 100 + versions):
        engine = FakeEngine(version=str(version))
        engines.append(engine)
        models.folders["unused"] = engine
        await models.reload()
        async with asyncio.timeout(BOUND_S):  # until each client was answered by it
            while not all(str(version) in each for each in seen) or len(seen) < len(clients):
                await asyncio.sleep(0)
                assert not any(task.done() for task in clients)
    changing = False
    async with asyncio.timeout(BOUND_S):
        answered = await asyncio.gather(*clients)
    for engine in engines[:-1]:
        await until_closed(engine)
    assert not engines[-1].is_closed.is_set()
    assert await models.worker.metric('gpu_service_requests_total{code="OK"}') == sum(answered)
    assert await models.worker.metric("gpu_service_in_flight_requests") == 0
    assert await models.worker.metric("gpu_service_connections_opened_total") == len(clients)


async def test_what_is_queued_for_a_model_that_goes_is_answered_by_it(models: Models) -> None:
    old = models.worker.engine
    async with models.worker.connect() as connection:
        await connection.send(frame(WAIT, id="running"))
        await models.worker.until_metric("gpu_service_in_flight_requests", 1)
        await models.worker.until_metric("gpu_service_queued_samples", 0)
        await connection.send(frame(1, id="queued"))
        await models.worker.until_metric("gpu_service_queued_samples", 1)
        models.folders["unused"] = FakeEngine(version="8")
        await models.reload()
        await connection.send(frame(2, id="new"))
        old.gate.open()
        got = [await reply(connection) for _ in range(3)]
        assert {each.id: brief(each)[1] for each in got} == {
            "running": "7",
            "queued": "7",
            "new": "8",
        }
    await until_closed(old)


# ------------------------------------------------------------------------------ sequences


def step(x: float, **more: Scalar) -> bytes:
    return frame(x, id=None, sequence_id="s", **more)


async def test_a_sequence_goes_on_with_the_version_that_it_began_with(
    start_worker: StartWorker,
) -> None:
    models = await start(start_worker, SumEngine())
    old = models.worker.engine
    async with models.worker.connect() as connection:
        assert await ask(connection, step(1, sequence_start=True)) == ("sum", "1", 1)
        models.folders["unused"] = SumEngine(version="2")
        await models.reload()
        assert await ask(connection, step(2)) == ("sum", "1", 3)
        assert await ask(connection, request(9)) == ("sum", "2", 9)
        assert not old.is_closed.is_set()
        assert await ask(connection, step(3, sequence_end=True)) == ("sum", "1", 6)
        await until_closed(old)
        assert await ask(connection, step(1, sequence_start=True)) == ("sum", "2", 1)


@pytest.mark.parametrize(
    "names", [{"name": "sum"}, {"name": "sum", "version": "1"}, {"version": "1"}]
)
async def test_a_sequence_goes_on_although_its_steps_name_what_is_unloaded(
    start_worker: StartWorker, names: dict[str, str]
) -> None:
    models = await start(start_worker, SumEngine())
    old = models.worker.engine
    await models.load(FakeEngine(), "double")
    async with models.worker.connect() as connection:
        first = request(1, **names, sequence_id="s", sequence_start=True)
        assert await ask(connection, first) == ("sum", "1", 1)
        await models.unload(old)
        assert await ask(connection, request(2, **names, sequence_id="s")) == ("sum", "1", 3)
        assert await ask(connection, request(2, name="sum")) == ErrorCode.NOT_FOUND
        last = request(3, **names, sequence_id="s", sequence_end=True)
        assert await ask(connection, last) == ("sum", "1", 6)
    await until_closed(old)


async def test_a_sequence_that_takes_too_long_is_told_that_its_model_is_gone(
    start_worker: StartWorker,
) -> None:
    models = await start(start_worker, SumEngine(), drain_timeout_s=0)
    old = models.worker.engine
    async with models.worker.connect() as connection:
        await ask(connection, step(1, sequence_start=True))
        models.folders["unused"] = SumEngine(version="2")
        await models.reload()
        await until_closed(old)
        await connection.send(step(2))
        told = await reply(connection)
        assert isinstance(told, Failure)
        assert told.code == ErrorCode.NOT_FOUND
        assert "version '1' of its model was unloaded; begin it anew" in told.message
        assert await ask(connection, step(1, sequence_start=True)) == ("sum", "2", 1)


async def test_a_client_that_leaves_does_not_keep_its_model(start_worker: StartWorker) -> None:
    models = await start(start_worker, SumEngine())
    old = models.worker.engine
    async with models.worker.connect() as connection:
        await ask(connection, step(1, sequence_start=True))
        models.folders["unused"] = SumEngine(version="2")
        await models.reload()
        assert not old.is_closed.is_set()
    await until_closed(old)


async def test_many_responses_come_to_their_end_although_their_model_is_unloaded(
    start_worker: StartWorker,
) -> None:
    models = await start(start_worker, CountEngine())
    old = models.worker.engine
    async with models.worker.connect() as connection:
        await connection.send(request(1000, max_responses=200))
        got = [await reply(connection)]
        models.folders["unused"] = CountEngine(version="2")
        await models.reload()
        got += [await reply(connection) for _ in range(199)]
        assert [brief(each) for each in got] == [("count", "1", 1001 + n) for n in range(200)]
        await until_closed(old)
        assert await ask(connection, request(1)) == ("count", "2", 2)


async def test_responses_without_end_are_told_that_their_model_is_gone(
    start_worker: StartWorker,
) -> None:
    models = await start(start_worker, CountEngine(), drain_timeout_s=0)
    async with models.worker.connect() as connection:
        await connection.send(request(-1e6, max_responses=1_000_000))
        assert isinstance(await reply(connection), Response)
        models.folders["unused"] = CountEngine(version="2")
        await models.reload()
        received = await reply(connection)
        while isinstance(received, Response):
            assert not received.final
            received = await reply(connection)
        assert received.code == ErrorCode.NOT_FOUND
        assert "unloaded" in received.message
        assert await ask(connection, request(1)) == ("count", "2", 2)
    assert await models.worker.metric("gpu_service_in_flight_requests") == 0


async def test_the_last_model_cannot_be_unloaded(models: Models) -> None:
    async with models.worker.connect() as connection:
        with pytest.raises(LoadError, match="is all that this worker serves"):
            await models.unload(models.worker.engine)
        assert await ask(connection, request(1)) == ("double", "7", 2)


async def test_a_worker_drains_although_a_model_waits_to_go(start_worker: StartWorker) -> None:
    models = await start(start_worker, SumEngine())
    async with models.worker.connect() as connection:
        await ask(connection, step(1, sequence_start=True))
        models.folders["unused"] = SumEngine(version="2")
        await models.reload()
        draining = asyncio.create_task(models.worker.server.drain())
        async with asyncio.timeout(BOUND_S):
            await connection.wait_closed()
            await draining
        assert connection.close_code == 1012
    assert models.worker.server.state.name == "STOPPED"
