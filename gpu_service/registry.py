"""Which models a worker serves, and in which versions.

Owns the table that requests are matched with, and how models come and go: a new one is opened in
a thread of its own, beside what serves, and takes over when it is ready to run; one that cannot
be opened changes nothing. On the event loop, but for that thread.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from gpu_service import bundle, logs
from gpu_service.batches import Events, Limits, Work
from gpu_service.device import Engine, StartupError
from gpu_service.dispatch import Channel, Dispatcher
from gpu_service.messages import ErrorCode, ProtocolError, Request
from gpu_service.protocol import ReplyForm, quote
from gpu_service.signature import Fit, ModelInfo

W = TypeVar("W", bound=Work)
T = TypeVar("T")


class Served(Generic[W]):
    """One version of a model that is served."""

    def __init__(self, channel: Channel[W], source: Path) -> None:
        self.channel = channel
        self.source = source  # the folder that it was asked for with
        self.info = channel.engine.model
        self.keeps_state = bool(self.info.state)
        self.fit = Fit(self.info)
        self.replies: ReplyForm | None = None  # made with the first reply
        self.requests_ok = 0
        self.is_gone = False  # nothing is taken for it any more
        self._sequences = 0
        self._without_sequences = asyncio.Event()
        self._without_sequences.set()

    @property
    def sequences(self) -> int:
        """How many sequences have begun and not ended."""
        return self._sequences

    def sequence_began(self) -> None:
        """Count one."""
        self._sequences += 1
        self._without_sequences.clear()

    def sequence_ended(self) -> None:
        """Count one less."""
        self._sequences -= 1
        if not self._sequences:
            self._without_sequences.set()

    async def until_without_sequences(self) -> None:
        """Wait until the last sequence has ended."""
        await self._without_sequences.wait()


class LoadError(Exception):
    """A model could not be loaded, or unloaded; the message is for who asked for it."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Registry(Generic[W]):
    """The models of one worker. `open_engine` takes a bundle's folder, or that of all versions.

    The first one that is added is the default: what a request means that names none. Of several
    versions of one name, the one loaded last is meant where no version is named.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher[W],
        open_engine: Callable[[Path], Engine],
        limits: Limits,
        drain_timeout_s: float,
        locate: Callable[[Path], tuple[Path, str]] | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._open_engine = open_engine
        self._locate = locate or _locate
        self._limits = limits
        self._drain_timeout_s = drain_timeout_s
        self._events: Events[W] | None = None
        self._models: dict[str, dict[str, Served[W]]] = {}
        self._default: Served[W] | None = None
        self._changing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()

    def report_to(self, events: Events[W]) -> None:
        """Have what becomes of requests reported there; once, before the first model."""
        self._events = events

    # -------------------------------------------------------------------- finding

    def find(self, request: Request) -> Served[W]:
        """What `request` is for; ProtocolError, NOT_FOUND, if that is not here."""
        if request.model_name is None and request.model_version is None:
            if self._default is not None:
                return self._default
            raise self._not_found(request, "no model is loaded")
        default = self._default
        name = request.model_name or (default.info.name if default else "")
        versions = self._models.get(name)
        if not versions:
            here = ", ".join(map(repr, self._models)) or "none"
            raise self._not_found(request, f"no model {quote(name)} here; served is {here}")
        if request.model_version is None:
            return next(reversed(versions.values()))
        served = versions.get(request.model_version)
        if served is None:
            here = ", ".join(map(repr, versions))
            problem = f"no version {quote(request.model_version)} of model {name!r} here"
            raise self._not_found(request, f"{problem}; served is {here}")
        return served

    def all(self) -> list[Served[W]]:
        """Everything that is served: the default first, the version that is meant before others."""
        names = sorted(self._models, key=lambda name: not self._is_default(name))
        return [each for name in names for each in reversed(self._models[name].values())]

    def _is_default(self, name: str) -> bool:
        return self._default is not None and self._default.info.name == name

    def _not_found(self, request: Request, message: str) -> ProtocolError:
        return ProtocolError(ErrorCode.NOT_FOUND, message, request_id=request.id)

    # -------------------------------------------------------------------- coming and going

    def add(self, engine: Engine, *, source: Path) -> Served[W]:
        """Serve a model that is ready to run, in place of the same version if there is one."""
        assert self._events is not None, "report_to() comes first"
        channel = self._dispatcher.add(engine, limits=self._limits, events=self._events)
        served = Served(channel, source)
        versions = self._models.setdefault(served.info.name, {})
        replaced = versions.pop(served.info.version, None)
        versions[served.info.version] = served
        if self._default is None or self._is_default(served.info.name):
            self._default = served
        if replaced is not None:
            self._leave(replaced)
        return served

    async def load(self, path: Path) -> ModelInfo:
        """Open the bundle in `path` and serve it; other versions of it stay.

        Raises LoadError: what was served before still is.
        """
        async with self._changing:
            info = await self._load(path)
            self._prefer(self._models[info.name][info.version])
            return info

    async def unload(self, name: str, version: str | None = None) -> list[ModelInfo]:
        """Serve a model no more, or one version of it. Raises LoadError if there is none.

        What it took is answered; sequences may go on until they end, or `drain_timeout_s` is over.
        """
        async with self._changing:
            versions = self._models.get(name, {})
            chosen = [each for each in versions.values() if version in (None, each.info.version)]
            if not chosen:
                what = f"model {name!r}" if version is None else f"version {version!r} of {name!r}"
                raise LoadError(ErrorCode.NOT_FOUND, f"{what} is not loaded")
            if len(chosen) == len(self.all()):
                raise LoadError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"{name!r} is all that this worker serves; load another one first, "
                    "or stop the worker",
                )
            for served in chosen:
                self._remove(served)
            return [served.info for served in chosen]

    async def reload(self) -> list[ModelInfo]:
        """Look into each folder that a model came from again, and serve what is new there.

        The version that came from there before is unloaded when its successor serves. Raises
        LoadError for the first that cannot be opened; what was changed until then stays.
        """
        async with self._changing:
            changed = []
            for old in self.all():
                new = await self._load(old.source)
                if new.digest == old.info.digest:
                    continue
                if self._models.get(old.info.name, {}).get(old.info.version) is old:
                    self._remove(old)
                if new not in changed:
                    changed.append(new)
            return changed

    async def close(self) -> None:
        """Wait for nothing any more: the worker ends."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def _load(self, path: Path) -> ModelInfo:
        try:
            path_now, digest = self._locate(path)
            for served in self.all():
                if served.info.digest == digest:
                    return served.info
            engine = await in_thread(lambda: self._open_engine(path_now))
        except (StartupError, bundle.BundleError) as error:
            logs.warning("load_failed", path=str(path), reason=str(error))
            raise LoadError(ErrorCode.INVALID_ARGUMENT, str(error)) from None
        except Exception as error:
            logs.error("load_failed", path=str(path), cause=error)
            message = f"{path}: {type(error).__name__}: {error}"
            raise LoadError(ErrorCode.INTERNAL, message) from error
        served = self.add(engine, source=path)
        logs.info("model_serves", model=served.info.name, version=served.info.version)
        return served.info

    def _prefer(self, served: Served[W]) -> None:
        """Have its name mean this version, whenever it was loaded first."""
        versions = self._models[served.info.name]
        versions[served.info.version] = versions.pop(served.info.version)
        if self._is_default(served.info.name):
            self._default = served

    def _remove(self, served: Served[W]) -> None:
        versions = self._models[served.info.name]
        del versions[served.info.version]
        if not versions:
            del self._models[served.info.name]
        if served is self._default:
            names = [served.info.name] if versions else list(self._models)
            self._default = next(reversed(self._models[names[0]].values()))
        self._leave(served)

    def _leave(self, served: Served[W]) -> None:
        task = asyncio.create_task(self._drain(served))
        self._leaving.add(task)  # the loop itself would not keep it
        task.add_done_callback(self._leaving.discard)

    async def _drain(self, served: Served[W]) -> None:
        try:
            async with asyncio.timeout(self._drain_timeout_s):
                await served.until_without_sequences()
        except TimeoutError:
            logs.warning(
                "sequences_cut_off",
                model=served.info.name,
                version=served.info.version,
                sequences=served.sequences,
            )
        served.is_gone = True
        self._dispatcher.remove(served.channel)
        logs.info("model_unloaded", model=served.info.name, version=served.info.version)


def _locate(path: Path) -> tuple[Path, str]:
    """The folder of the bundle that `path` means now, and its digest; raises BundleError."""
    folder = bundle.find(path)
    return folder, bundle.digest(folder)


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns, from a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    opened: concurrent.futures.Future[T] = concurrent.futures.Future()
    opened.set_running_or_notify_cancel()  # whoever waits may be cancelled; this can't be

    def run() -> None:
        try:
            opened.set_result(function())
        except Exception as error:
            opened.set_exception(error)
        except BaseException as error:  # SystemExit would end the event loop, and so the worker
            failed = RuntimeError(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            opened.set_exception(failed)

    threading.Thread(target=run, name="loader", daemon=True).start()
    return await asyncio.wrap_future(opened, loop=loop)
