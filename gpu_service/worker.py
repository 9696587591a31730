"""A worker process, from its start until it has drained.

Owns the process: signals, descriptor limit, systemd's notifications and watchdog, exit code.
What it serves is `server`'s and `service`'s concern.
"""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

import uvloop

from gpu_service import logs
from gpu_service.bundle import BundleError
from gpu_service.dispatch import Dispatcher, Engine, StartupError
from gpu_service.notify import Notifier
from gpu_service.server import InferenceServer
from gpu_service.service import InFlight
from gpu_service.settings import Settings
from gpu_service.sockets import bind

_ENGINE_STOP_TIMEOUT_S = 2.0

# How long the inference thread may have to wait for the GIL when the device has answered.
# Measured with `python -m bench.serving --against` a checkout without it (2026-11-24, 2 cores, two
# runs): 0.75 and 0.77 of the raw forward instead of 0.65 and 0.61; one idle client waits 0.1 ms
# longer.
_SWITCH_INTERVAL_S = 1e-4

# Descriptors that are not connections: the listener, epoll, stderr, libraries, HTTP requests.
_SPARE_DESCRIPTORS = 64


def run(settings: Settings, *, open_engine: Callable[[Settings], Engine]) -> int:
    """Serve until SIGTERM or SIGINT, or until the device fails; the exit code of the process.

    `open_engine` is called on the inference thread. Failures to
    start are logged, and are 1, as a device that fails for good: a service manager restarts it.
    """
    logs.configure()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        listener = bind(settings.host, settings.port)
        dispatcher: Dispatcher[InFlight] = Dispatcher(
            lambda: open_engine(settings),
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_delay_s=settings.max_delay_ms / 1000,
        )
        engine = dispatcher.open()
    except (StartupError, BundleError) as error:
        logs.error("start_failed", reason=str(error))
        return 1
    except Exception as error:
        logs.error("start_failed", reason=f"{type(error).__name__}: {error}", cause=error)
        return 1
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_live(settings, engine, dispatcher, listener))
    if not dispatcher.close(timeout_s=_ENGINE_STOP_TIMEOUT_S):
        # Left to itself, the interpreter would wait for, or crash on, what hangs in there.
        logs.warning("engine_hangs", action="left behind")
        sys.stderr.flush()
        os._exit(code)
    return code


async def _live(
    settings: Settings,
    engine: Engine,
    dispatcher: Dispatcher[InFlight],
    listener: socket.socket,
) -> int:
    """Serve until told to stop, or until the device fails for good: 0 and 1 as exit codes."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _raise_descriptor_limit(settings.max_connections)
    notifier = Notifier()
    host, port = listener.getsockname()[:2]
    worker = settings.worker or f"{socket.gethostname()}:{port}"
    server = InferenceServer(engine=engine, dispatcher=dispatcher, settings=settings, worker=worker)
    await server.start(listener)
    watchdog = asyncio.create_task(_feed_watchdog(notifier, dispatcher))
    model = f"{engine.model.name} {engine.model.version}"
    logs.info("ready", host=host, port=port, worker=worker, model=model, pid=os.getpid())
    _notify(notifier, "READY=1", f"STATUS=serving {model} on {host}:{port}")

    waiting = [asyncio.create_task(event.wait()) for event in (stop, server.broken)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()

    logs.info("draining")
    _notify(notifier, "STOPPING=1", "STATUS=draining")
    await server.drain()
    watchdog.cancel()
    logs.info("stopped")
    return 1 if server.broken.is_set() else 0


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
