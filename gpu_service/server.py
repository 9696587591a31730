"""The worker's listening socket and its life, from start to drained.

Owns the socket, the sessions and the signals; runs the event loop of the main thread.
Inference never happens here: requests go to `service`, and from there to the inference thread.
"""

import asyncio
import email.utils
import enum
import http
import logging
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import uvloop
from websockets.datastructures import Headers
from websockets.exceptions import NegotiationError
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gpu_service import __version__, logs, routes
from gpu_service.batching import PRIORITIES
from gpu_service.bundle import BundleError
from gpu_service.dispatch import BrokenError, Dispatcher, Engine, StartupError
from gpu_service.metrics import Metrics
from gpu_service.notify import Notifier
from gpu_service.protocol import SUBPROTOCOL, ErrorCode
from gpu_service.service import InFlight, Service
from gpu_service.session import Limits, Session
from gpu_service.settings import Settings

_websockets_logger = logging.getLogger("websockets.server")

_SERVER_HEADER = f"gpu-service/{__version__}"

# A burst of connects, such as all clients of a worker that was restarted, waits in the kernel.
_BACKLOG = 4096

_ENGINE_STOP_TIMEOUT_S = 2.0
_RETRY_AFTER_S = "1"

# How long the inference thread may have to wait for the GIL when the device has answered.
# Measured with `python -m bench.serving --against` a checkout without it (2026-11-24, 2 cores, two
# runs): 0.75 and 0.77 of the raw forward instead of 0.65 and 0.61; one idle client waits 0.1 ms
# longer.
_SWITCH_INTERVAL_S = 1e-4

# Descriptors that are not connections: the listener, epoll, stderr, libraries, HTTP requests.
_SPARE_DESCRIPTORS = 64


class State(enum.Enum):
    """Where a worker is in its life."""

    STARTING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()
    STOPPED = enum.auto()


_ALLOWED = {
    State.STARTING: {State.READY},
    State.READY: {State.DRAINING},
    State.DRAINING: {State.STOPPED},
    State.STOPPED: set[State](),
}


class InferenceServer:
    """Serves one engine on one socket. Made and used on the event loop.

    `worker` is the name that clients see.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        dispatcher: Dispatcher[InFlight],
        settings: Settings,
        worker: str,
    ) -> None:
        self._settings = settings
        self._state = State.STARTING
        self.broken = asyncio.Event()  # set when the device was found to fail for good
        self._sessions: set[Session] = set()  # those that are WebSockets
        self._metrics = Metrics(max_batch=settings.max_batch)
        self._metrics.describe(
            build={
                "version": __version__,
                "python": platform.python_version(),
                **engine.description,
            },
            model={
                "name": engine.model.name,
                "version": engine.model.version,
                "digest": engine.model.digest,
            },
            queued_samples=lambda: dispatcher.queued_samples,
        )
        self._service = Service(
            model=engine.model,
            dispatcher=dispatcher,
            metrics=self._metrics,
            worker=worker,
            on_broken=self._on_broken,
        )
        self._routes = routes.Routes(
            model=engine.model,
            server={
                "name": "gpu-service",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
                "worker": worker,
                "deployment": settings.deployment,
                "limits": {
                    "max_batch": settings.max_batch,
                    "max_in_flight_per_connection": settings.max_in_flight_per_connection,
                    "max_message_bytes": settings.max_message_bytes,
                    "priorities": [PRIORITIES[0], PRIORITIES[-1]],
                },
            },
            is_ready=lambda: self._state is State.READY and not self.broken.is_set(),
            metrics=self._metrics.exposition,
        )
        self._limits = Limits(
            max_in_flight=settings.max_in_flight_per_connection,
            max_message_bytes=settings.max_message_bytes,
            ping_interval_s=settings.ping_interval_s,
            ping_timeout_s=settings.ping_timeout_s,
        )
        self._listening: asyncio.Server | None = None
        self._connections: set[Session] = set()  # whatever they are or become
        self._fewer_connections = asyncio.Event()

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    async def start(self, listener: socket.socket) -> None:
        """Listen on the bound socket `listener`, which the server owns from here on."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(self._session, sock=listener, backlog=_BACKLOG)
        self._move(State.READY)
        self._metrics.ready.value = 1

    async def drain(self) -> None:
        """Stop for good, without losing a request that was taken.

        In order: not ready any more, no new connections, answers to what is in flight, close
        with 1012. What takes longer than `drain_timeout_s` is cut off.
        """
        assert self._listening is not None, "start() comes first"
        self._move(State.DRAINING)
        self._metrics.ready.value = 0
        self._listening.close()
        for session in list(self._sessions):
            session.drain()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while self._connections:
                    self._fewer_connections.clear()
                    await self._fewer_connections.wait()
        except TimeoutError:
            logs.warning("drain_timed_out", connections_cut_off=len(self._sessions))
            for session in list(self._connections):
                session.abort()
        self._move(State.STOPPED)

    def _move(self, to: State) -> None:
        if to not in _ALLOWED[self._state]:
            raise RuntimeError(f"a server cannot go from {self._state.name} to {to.name}")
        self._state = to

    def _on_broken(self, error: BrokenError) -> None:
        logs.error("device_broken", reason=str(error), cause=error.__cause__)
        self._metrics.ready.value = 0
        self.broken.set()

    def _session(self) -> Session:
        core = ServerProtocol(
            # Without extensions, so without compression: tensors do not shrink, and it would
            # cost 50 KiB a connection.
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            select_subprotocol=_select_subprotocol,
            max_size=self._settings.max_message_bytes,
            logger=_websockets_logger,
        )
        return Session(host=self, service=self._service, core=core, limits=self._limits)

    def _is_full(self) -> bool:
        return len(self._sessions) >= self._settings.max_connections

    # ------------------------------------------------------------------ session.Host

    def connected(self, session: Session) -> None:
        """A TCP connection is there."""
        self._connections.add(session)

    def opened(self, session: Session) -> None:
        """It has become a WebSocket."""
        self._sessions.add(session)
        self._metrics.connections.inc()
        self._metrics.connections_opened.inc()

    def lost(self, session: Session) -> None:
        """The TCP connection is gone."""
        self._connections.discard(session)
        self._fewer_connections.set()
        if session in self._sessions:
            self._sessions.discard(session)
            self._metrics.connections.dec()

    def respond(self, request: HttpRequest, core: ServerProtocol) -> HttpResponse:
        """The answer to a handshake or to a plain HTTP request."""
        response = self._http(request) or core.accept(request)
        response.headers["Server"] = _SERVER_HEADER
        return response

    def _http(self, request: HttpRequest) -> HttpResponse | None:
        """What there is to say instead of a handshake."""
        wants_websocket = "websocket" in ",".join(request.headers.get_all("Upgrade")).lower()
        answer = self._routes.answer(request.path, upgrade=wants_websocket)
        if answer is not None:
            if request.method not in ("GET", "HEAD"):
                answer = routes.refusal(
                    405, ErrorCode.INVALID_ARGUMENT, f"{request.method} is not allowed here"
                )
            return _http_response(answer, with_body=request.method != "HEAD")
        if not wants_websocket:
            return None
        problem = None
        if self._state is not State.READY:
            problem = "the worker restarts"
        elif self._is_full():
            problem = "too many connections"
        if problem is None:
            return None
        self._metrics.connections_refused.inc()
        return _http_response(routes.refusal(503, ErrorCode.UNAVAILABLE, problem))


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


def bind(host: str, port: int) -> socket.socket:
    """A socket bound but not listening: a taken port shows at once, clients do not come yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise StartupError(
            f"cannot listen on {host}:{port}: {error.strerror}; check --host and --port, and "
            f"with `ss -ltnp` what else listens there"
        ) from None
    return listener


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


def _select_subprotocol(core: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # Optional for clients, but who asks for another version must not be misunderstood.
    if not offered or SUBPROTOCOL in offered:
        return Subprotocol(SUBPROTOCOL) if offered else None
    raise NegotiationError(f"this server speaks {SUBPROTOCOL}")


def _http_response(answer: routes.Answer, *, with_body: bool = True) -> HttpResponse:
    headers = Headers(
        [
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Connection", "close"),
            ("Content-Length", str(len(answer.body))),
            ("Content-Type", answer.content_type),
        ]
    )
    if answer.status == http.HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = _RETRY_AFTER_S
    if answer.status == http.HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET, HEAD"
    phrase = http.HTTPStatus(answer.status).phrase
    return HttpResponse(answer.status, phrase, headers, answer.body if with_body else b"")
