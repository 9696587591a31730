"""A worker process, from its start until it has drained.

Owns the process: signals, descriptor limit, systemd's notifications and watchdog, exit code.
What it serves is `server`'s and `service`'s concern.
"""

import asyncio
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from gpu_service import control, logs
from gpu_service.admission import Admission
from gpu_service.batches import Limits
from gpu_service.bundle import BundleError
from gpu_service.connection import InFlight
from gpu_service.device import Engine, StartupError
from gpu_service.dispatch import Dispatcher
from gpu_service.notify import Notifier
from gpu_service.registry import Registry, in_thread
from gpu_service.server import InferenceServer, is_compiled
from gpu_service.settings import Settings, cpus_of
from gpu_service.sockets import open_listeners
from gpu_service.telemetry import Telemetry

T = TypeVar("T")

_ENGINE_STOP_TIMEOUT_S = 2.0
_TELEMETRY_STOP_TIMEOUT_S = 2.0

# How long the inference thread may have to wait for the GIL when the device has answered.
# Measured on 2 cores with 64 connections (2026-11-24): 3e-5 s gives 13,060 answers a second,
# 1e-4 11,800, 5e-6 12,490 and Python's own 5e-3 10,280.
_SWITCH_INTERVAL_S = 3e-5

# glibc's mallopt. The thresholds are those that it comes to by itself once a block of 32 MiB was
# freed: https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20
_TRIM_BYTES = 2 * _MMAP_BYTES

# Descriptors that are not connections: the listener, epoll, stderr, libraries, HTTP requests.
_SPARE_DESCRIPTORS = 64


def run(settings: Settings, *, open_engine: Callable[[Settings, Path], Engine]) -> int:
    """Serve until SIGTERM or SIGINT, or until the device fails; the exit code of the process.

    `open_engine` is called with the folder of a bundle, on a thread for loading. Failures to
    start are logged, and are 1, as a device that fails for good: a service manager restarts it.
    """
    logs.configure()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    keep_freed_memory()
    dispatcher: Dispatcher[InFlight] = Dispatcher(
        on_thread=lambda: _pin(settings.cpus),
        thread_only=bool(settings.cpus),  # which the event loop is not kept to
        busy_poll_s=settings.busy_poll_us / 1e6,
    )
    try:
        listeners = open_listeners(settings.host, settings.port, settings.unix_socket)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_live(settings, open_engine, dispatcher, listeners))
    except (StartupError, BundleError) as error:
        logs.error("start_failed", reason=str(error))
        code = 1
    except Exception as error:
        logs.error("start_failed", reason=f"{type(error).__name__}: {error}", cause=error)
        code = 1
    if not dispatcher.close(timeout_s=_ENGINE_STOP_TIMEOUT_S):
        # Left to itself, the interpreter would wait for, or crash on, what hangs in there.
        logs.warning("engine_hangs", action="left behind")
        sys.stderr.flush()
        os._exit(code)
    return code


async def _live(
    settings: Settings,
    open_engine: Callable[[Settings, Path], Engine],
    dispatcher: Dispatcher[InFlight],
    listeners: Sequence[socket.socket],
) -> int:
    """Serve until told to stop, or until the device fails for good: 0 and 1 as exit codes.

    Raises what opening the models of the settings raises.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    admission = Admission.of(settings)  # before anything that takes time
    engines = await _until(stop, in_thread(lambda: _open_all(settings, open_engine)))
    if engines is None:
        logs.info("stopped", was="loading")
        sys.stderr.flush()
        # Not by returning: the interpreter may crash on the thread that is loading.
        os._exit(0)
    _keep_for_good()
    registry: Registry[InFlight] = Registry(
        dispatcher=dispatcher,
        open_engine=lambda path: open_engine(settings, path),
        limits=Limits(
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_delay_s=settings.max_delay_ms / 1000,
        ),
        drain_timeout_s=settings.drain_timeout_s,
    )
    host, port = listeners[0].getsockname()[:2]
    worker = settings.worker or f"{socket.gethostname()}:{port}"
    telemetry = Telemetry.of(settings, worker=worker)
    server = InferenceServer(
        registry=registry,
        device=engines[0].description,
        settings=settings,
        worker=worker,
        admission=admission,
        telemetry=telemetry,
    )
    dispatcher.start(on_broken=server.on_broken)
    for engine, source in zip(engines, settings.bundle, strict=True):
        registry.add(engine, source=source)
    _raise_descriptor_limit(settings.max_connections)
    notifier = Notifier()
    async with control.listening(settings.control, registry):
        await server.start(*listeners)
        watchdog = asyncio.create_task(_feed_watchdog(notifier, dispatcher))
        models = ", ".join(f"{engine.model.name} {engine.model.version}" for engine in engines)
        logs.info(
            "ready",
            host=host,
            port=port,
            worker=worker,
            model=models,
            pid=os.getpid(),
            compiled=is_compiled(),
            frozen_objects=gc.get_freeze_count(),
        )
        _notify(notifier, "READY=1", f"STATUS=serving {models} on {host}:{port}")
        await _until(stop, server.broken.wait())
        logs.info("draining")
        _notify(notifier, "STOPPING=1", "STATUS=draining")
    await server.drain()
    await registry.close()
    watchdog.cancel()
    if telemetry is not None:
        await asyncio.to_thread(telemetry.close, timeout_s=_TELEMETRY_STOP_TIMEOUT_S)
    logs.info("stopped")
    return 1 if server.broken.is_set() else 0


def _open_all(settings: Settings, open_engine: Callable[[Settings, Path], Engine]) -> list[Engine]:
    engines: dict[tuple[str, str], tuple[Path, Engine]] = {}
    for path in settings.bundle:
        engine = open_engine(settings, path)
        name = engine.model.name, engine.model.version
        if name in engines:
            raise StartupError(
                f"{engines[name][0]} and {path} are the same version of one model, "
                f"{name[0]} {name[1]}; name one of them in --bundle"
            )
        engines[name] = path, engine
    return [engine for _, engine in engines.values()]


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if `stop` comes first."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return working.result()
    working.cancel()
    return None


def keep_freed_memory() -> None:
    """Have blocks of up to 32 MiB come out of memory that stays with the process, up to 64 MiB of
    it unused, unless the environment chooses for glibc.

    A forward frees what its layers took. Given back to the kernel each time, it has to be zeroed
    and mapped again: 774 page faults a forward of the example model with 64 samples, and a quarter
    of its time (2026-11-30, 2 cores of an AMD EPYC; 8 faults with this).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _chooses_malloc(os.environ):  # musl has none
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def _chooses_malloc(environ: Mapping[str, str]) -> bool:
    return (
        "MALLOC_TRIM_THRESHOLD_" in environ
        or "MALLOC_MMAP_THRESHOLD_" in environ
        or "glibc.malloc." in environ.get("GLIBC_TUNABLES", "")
    )


def _keep_for_good() -> None:
    """Have the collector leave alone what there is by now: torch's modules and the models.

    It would look at all of it whenever connections have added a quarter as much: 55 ms in which
    nobody is answered (`gc.collect`, 2026-11-29, with the example model).
    """
    gc.collect()
    gc.freeze()


def _pin(cpus: str) -> None:
    """Keep the calling thread, and those that it will start, to some CPUs."""
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus_of(cpus))
    except OSError as error:
        logs.warning("cpus_not_set", cpus=cpus, reason=str(error))


async def _feed_watchdog(notifier: Notifier, dispatcher: Dispatcher[InFlight]) -> None:
    """Tell systemd that all is well, as long as the inference thread gets on.

    An idle one proves it by answering a ping, a busy one by finishing a batch.
    """
    if notifier.watchdog_s is None:
        return
    while True:
        beats = dispatcher.beats
        dispatcher.ping()
        await asyncio.sleep(notifier.watchdog_s / 2)
        if dispatcher.beats != beats:
            _notify(notifier, "WATCHDOG=1")
        else:
            logs.error("engine_hangs", no_progress_for_s=notifier.watchdog_s / 2)


def _notify(notifier: Notifier, *assignments: str) -> None:
    try:
        notifier.send(*assignments)
    except OSError as error:
        logs.warning("notify_failed", reason=str(error))


def _raise_descriptor_limit(max_connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < max_connections + _SPARE_DESCRIPTORS:
        logs.warning(
            "descriptor_limit_low",
            limit=hard,
            max_connections=max_connections,
            action=f"raise LimitNOFILE to {max_connections + _SPARE_DESCRIPTORS}",
        )
