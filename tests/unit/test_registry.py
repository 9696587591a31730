import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpu_service.batches import FinishedBatch, Limits
from gpu_service.batching import Ticket
from gpu_service.bundle import BundleError
from gpu_service.device import Engine, StartupError
from gpu_service.dispatch import Dispatcher
from gpu_service.messages import ErrorCode, ProtocolError, Request
from gpu_service.registry import LoadError, Registry, Served, in_thread
from tests.service.fakes import BOUND_S, FakeEngine, Gate


class Shelf:
    """Folders and what is in them, a registry that opens them, and its dispatcher."""

    def __init__(self) -> None:
        self.folders: dict[Path, tuple[str, str]] = {}  # name and version
        self.failure: BaseException | None = None
        self.gate = Gate()
        self.gate.open()
        self.opened: list[FakeEngine] = []
        self.dispatcher: Dispatcher[Any] = Dispatcher()
        self.dispatcher.start()
        self.registry: Registry[Any] = Registry(
            dispatcher=self.dispatcher,
            open_engine=self.open_engine,
            limits=Limits(max_batch=4, max_queue=16),
            drain_timeout_s=BOUND_S,
            locate=self.locate,
        )
        self.registry.report_to(self)

    def put(self, folder: str, name: str, version: str) -> Path:
        self.folders[Path(folder)] = (name, version)
        return Path(folder)

    def locate(self, path: Path) -> tuple[Path, str]:
        if path not in self.folders:
            raise BundleError(f"{path}: no bundle here")
        name, version = self.folders[path]
        return path, f"{name} {version}"

    def open_engine(self, path: Path) -> Engine:
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        name, version = self.folders[path]
        engine = FakeEngine()
        engine.model = msgspec.structs.replace(
            engine.model, name=name, version=version, digest=f"{name} {version}"
        )
        self.opened.append(engine)
        return engine

    async def load(self, folder: str, name: str, version: str) -> Served[Any]:
        info = await self.registry.load(self.put(folder, name, version))
        return self.find(info.name, info.version)

    def find(self, name: str | None = None, version: str | None = None) -> Served[Any]:
        return self.registry.find(Request(inputs={}, model_name=name, model_version=version))

    def served(self) -> list[tuple[str, str]]:
        return [(each.info.name, each.info.version) for each in self.registry.all()]

    def on_batch(self, batch: FinishedBatch[Any]) -> None:
        """Nothing is asked here."""

    def on_expired(self, ticket: Ticket[Any]) -> None:
        """Nothing is asked here."""


@pytest.fixture
async def shelf() -> AsyncIterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.gate.open()
    await shelf.registry.close()
    assert shelf.dispatcher.close(timeout_s=BOUND_S)


async def until_closed(served: Served[Any]) -> None:
    engine = served.channel.engine
    assert isinstance(engine, FakeEngine)
    assert await asyncio.to_thread(engine.is_closed.wait, BOUND_S)


def said(shelf: Shelf, *wanted: str | None) -> str:
    with pytest.raises(ProtocolError) as caught:
        shelf.find(*wanted)
    assert caught.value.code is ErrorCode.NOT_FOUND
    return caught.value.message


async def test_nothing_is_found_where_nothing_is_loaded(shelf: Shelf) -> None:
    assert "no model is loaded" in said(shelf)
    assert "served is none" in said(shelf, "m")
    assert "served is none" in said(shelf, None, "1")


async def test_models_are_found_by_name_and_version(shelf: Shelf) -> None:
    m1 = await shelf.load("a", "m", "1")
    n1 = await shelf.load("b", "n", "1")
    m2 = await shelf.load("c", "m", "2")
    assert [shelf.find(*wanted) for wanted in (("m", "1"), ("m", "2"), ("n", "1"))] == [m1, m2, n1]
    assert shelf.find("m") is m2  # the one loaded last
    assert shelf.find("n") is n1
    assert shelf.find() is m2  # the name that came first
    assert shelf.find(None, "1") is m1
    assert shelf.served() == [("m", "2"), ("m", "1"), ("n", "1")]


async def test_what_is_not_there_is_named_with_what_is(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    await shelf.load("b", "n", "3")
    assert said(shelf, "o") == "no model 'o' here; served is 'm', 'n'"
    assert said(shelf, "m", "9") == "no version '9' of model 'm' here; served is '1'"
    assert said(shelf, None, "3") == "no version '3' of model 'm' here; served is '1'"
    assert "…" in said(shelf, "x" * 1000)
    assert "…" in said(shelf, "m", "x" * 1000)


async def test_what_is_served_already_is_not_opened_again(shelf: Shelf) -> None:
    served = await shelf.load("a", "m", "1")
    assert await shelf.load("a", "m", "1") is served
    assert len(shelf.opened) == 1


async def test_a_version_that_is_loaded_again_is_the_one_that_is_meant(shelf: Shelf) -> None:
    first = await shelf.load("a", "m", "1")
    await shelf.load("b", "m", "2")
    assert await shelf.load("a", "m", "1") is first  # back to what was there before
    assert shelf.find("m") is first
    assert shelf.find() is first
    assert len(shelf.opened) == 2


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (StartupError("self-test of model m"), ErrorCode.INVALID_ARGUMENT, "self-test of model m"),
        (BundleError("b: damaged"), ErrorCode.INVALID_ARGUMENT, "b: damaged"),
        (MemoryError("of the device"), ErrorCode.INTERNAL, "b: MemoryError: of the device"),
        (SystemExit(3), ErrorCode.INTERNAL, "SystemExit"),
    ],
)
async def test_one_that_cannot_be_opened_changes_nothing(
    shelf: Shelf, failure: BaseException, code: ErrorCode, says: str
) -> None:
    served = await shelf.load("a", "m", "1")
    shelf.failure = failure
    try:
        await shelf.registry.load(shelf.put("b", "m", "2"))
    except BaseException as error:
        assert isinstance(error, LoadError), error
        assert error.code is code
        assert says in str(error)
    else:
        raise AssertionError("it was loaded")
    assert shelf.served() == [("m", "1")]
    assert shelf.find() is served
    shelf.failure = None
    assert (await shelf.load("b", "m", "2")).info.version == "2"


async def test_a_folder_without_a_bundle_is_told(shelf: Shelf) -> None:
    with pytest.raises(LoadError, match="nowhere: no bundle here") as caught:
        await shelf.registry.load(Path("nowhere"))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


async def test_what_is_served_serves_while_another_is_opened(shelf: Shelf) -> None:
    served = await shelf.load("a", "m", "1")
    shelf.gate = Gate()
    loading = asyncio.create_task(shelf.load("b", "m", "2"))
    await asyncio.sleep(0)
    assert shelf.find() is served
    shelf.gate.open()
    assert (await loading) is shelf.find()


async def test_the_same_version_anew_takes_the_place_of_the_old_one(shelf: Shelf) -> None:
    old = await shelf.load("a", "m", "1")
    shelf.folders[Path("a2")] = ("m", "1")
    shelf.locate = lambda path: (path, "another digest")  # type: ignore[method-assign]
    shelf.registry._locate = shelf.locate
    await shelf.registry.load(Path("a2"))
    assert shelf.served() == [("m", "1")]
    assert shelf.find() is not old
    await until_closed(old)


# ------------------------------------------------------------------------------ unloading


async def test_a_version_is_unloaded_and_closed(shelf: Shelf) -> None:
    m1, m2 = await shelf.load("a", "m", "1"), await shelf.load("b", "m", "2")
    assert await shelf.registry.unload("m", "2") == [m2.info]
    assert shelf.find("m") is m1
    assert shelf.find() is m1
    await until_closed(m2)
    assert m2.is_gone
    assert not m1.is_gone


async def test_all_versions_are_unloaded_and_another_is_the_default(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    await shelf.load("b", "m", "2")
    n1 = await shelf.load("c", "n", "1")
    await shelf.load("d", "o", "1")
    assert len(await shelf.registry.unload("m")) == 2
    assert shelf.find() is n1
    assert shelf.served() == [("n", "1"), ("o", "1")]


@pytest.mark.parametrize("version", ["1", None])
async def test_the_last_model_stays(shelf: Shelf, version: str | None) -> None:
    served = await shelf.load("a", "m", "1")
    with pytest.raises(LoadError, match="'m' is all that this worker serves") as caught:
        await shelf.registry.unload("m", version)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert shelf.find() is served
    assert not served.is_gone


async def test_what_is_not_loaded_cannot_be_unloaded(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    for name, version, says in (
        ("n", None, "model 'n' is not loaded"),
        ("m", "2", "version '2' of 'm' is not loaded"),
    ):
        with pytest.raises(LoadError, match=says) as caught:
            await shelf.registry.unload(name, version)
        assert caught.value.code is ErrorCode.NOT_FOUND


async def test_a_model_goes_when_its_last_sequence_has_ended(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    gone = await shelf.load("b", "n", "1")
    gone.sequence_began()
    gone.sequence_began()
    await shelf.registry.unload("n")
    assert "no model 'n'" in said(shelf, "n")
    gone.sequence_ended()
    await asyncio.sleep(0)
    assert not gone.is_gone
    gone.sequence_ended()
    await until_closed(gone)
    assert gone.is_gone


async def test_sequences_are_cut_off_in_the_end(shelf: Shelf) -> None:
    shelf.registry._drain_timeout_s = 0.0
    await shelf.load("a", "m", "1")
    gone = await shelf.load("b", "n", "1")
    gone.sequence_began()
    await shelf.registry.unload("n")
    await until_closed(gone)
    assert gone.is_gone
    assert gone.sequences == 1


# ------------------------------------------------------------------------------ reloading


async def test_a_reload_serves_what_is_new_and_lets_the_old_go(shelf: Shelf) -> None:
    m1, n1 = await shelf.load("m", "m", "1"), await shelf.load("n", "n", "1")
    assert await shelf.registry.reload() == []
    shelf.put("m", "m", "2")
    (changed,) = await shelf.registry.reload()
    assert (changed.name, changed.version) == ("m", "2")
    assert shelf.served() == [("m", "2"), ("n", "1")]
    assert shelf.find("n") is n1
    await until_closed(m1)


async def test_a_reload_of_several_versions_of_one_folder_tells_its_new_one_once(
    shelf: Shelf,
) -> None:
    await shelf.load("m", "m", "1")
    await shelf.load("m", "m", "2")
    assert shelf.served() == [("m", "2"), ("m", "1")]
    shelf.put("m", "m", "3")
    assert [info.version for info in await shelf.registry.reload()] == ["3"]
    assert shelf.served() == [("m", "3")]


async def test_a_folder_may_hold_another_model_of_the_same_version_now(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    shelf.put("a", "n", "1")
    await shelf.registry.reload()
    assert shelf.served() == [("n", "1")]
    assert shelf.find().info.name == "n"


async def test_a_reload_that_fails_leaves_what_serves(shelf: Shelf) -> None:
    m1 = await shelf.load("m", "m", "1")
    shelf.put("m", "m", "2")
    shelf.failure = StartupError("no")
    with pytest.raises(LoadError, match="no"):
        await shelf.registry.reload()
    assert shelf.find() is m1
    shelf.failure = None
    del shelf.folders[Path("m")]
    with pytest.raises(LoadError, match="no bundle here"):
        await shelf.registry.reload()
    assert shelf.find() is m1


async def test_changes_come_one_after_another(shelf: Shelf) -> None:
    await shelf.load("a", "m", "1")
    shelf.gate = Gate()
    loading = asyncio.create_task(shelf.registry.load(shelf.put("b", "m", "2")))
    unloading = asyncio.create_task(shelf.registry.unload("m", "1"))
    await asyncio.sleep(0)
    assert not unloading.done()  # alone, "1" is the last
    shelf.gate.open()
    await asyncio.gather(loading, unloading)
    assert shelf.served() == [("m", "2")]


# ------------------------------------------------------------------------------ the thread


async def test_whoever_stops_waiting_for_a_thread_leaves_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crashed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    may_end, threads = threading.Event(), []

    def work() -> int:
        threads.append(threading.current_thread())
        assert may_end.wait(BOUND_S)
        return 1

    waiting = asyncio.create_task(in_thread(work))
    async with asyncio.timeout(BOUND_S):
        while not threads:
            await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_end.set()
    await asyncio.to_thread(threads[0].join, BOUND_S)
    assert not threads[0].is_alive()
    assert crashed == []


async def test_what_a_thread_raises_is_raised_to_who_waits() -> None:
    def fail() -> None:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        await in_thread(fail)
    done: Callable[[], int] = lambda: 5  # noqa: E731
    assert await in_thread(done) == 5
