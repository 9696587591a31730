"""The worker's listening socket and its life, from start to drained.

Owns the socket, the sessions and the signals; runs the event loop of the main thread.
Inference never happens here: requests go to `service`, and from there to the inference thread.
"""

import asyncio
import email.utils
import enum
import http
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence

import uvloop
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import NegotiationError
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.typing import Subprotocol

from gpu_service import __version__, logs, routes
from gpu_service.bundle import BundleError
from gpu_service.dispatch import Dispatcher, Engine, StartupError
from gpu_service.metrics import Metrics
from gpu_service.notify import Notifier
from gpu_service.protocol import SUBPROTOCOL, ErrorCode
from gpu_service.service import InFlight, Service
from gpu_service.session import Connection, Session
from gpu_service.settings import Settings

_SERVER_HEADER = f"gpu-service/{__version__}"

# A burst of connects, such as all clients of a worker that was restarted, waits in the kernel.
_BACKLOG = 4096

# Frames that are read ahead of a connection's handler before its socket is not read any more.
_READ_AHEAD_FRAMES = 16

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0
_ENGINE_STOP_TIMEOUT_S = 2.0
_RETRY_AFTER_S = "1"

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
        self._sessions: set[Session] = set()
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
            model=engine.model, dispatcher=dispatcher, metrics=self._metrics, worker=worker
        )
        self._routes = routes.Routes(
            model=engine.model,
            server={
                "name": "gpu-service",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
                "worker": worker,
                "deployment": settings.deployment,
            },
            is_ready=lambda: self._state is State.READY,
            metrics=self._metrics.exposition,
        )
        self._listening: Server | None = None

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    async def start(self, listener: socket.socket) -> None:
        """Listen on the bound socket `listener`, which the server owns from here on."""
        settings = self._settings
        self._listening = await serve(
            self._handle,
            sock=listener,
            backlog=_BACKLOG,
            create_connection=Connection,
            process_request=self._process_request,
            select_subprotocol=_select_subprotocol,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            server_header=_SERVER_HEADER,
            # Tensors do not shrink, and it would cost 50 KiB a connection.
            compression=None,
            open_timeout=_OPEN_TIMEOUT_S,
            close_timeout=_CLOSE_TIMEOUT_S,
            ping_interval=settings.ping_interval_s,
            ping_timeout=settings.ping_timeout_s,
            max_size=settings.max_message_bytes,
            max_queue=_READ_AHEAD_FRAMES,
        )
        self._move(State.READY)
        self._metrics.ready.set(1)

    async def drain(self) -> None:
        """Stop for good, without losing a request that was taken.

        In order: not ready any more, no new connections, answers to what is in flight, close
        with 1012. What takes longer than `drain_timeout_s` is cut off.
        """
        assert self._listening is not None, "start() comes first"
        self._move(State.DRAINING)
        self._metrics.ready.set(0)
        self._listening.close(close_connections=False)
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await asyncio.gather(*(session.drain() for session in self._sessions))
                await self._listening.wait_closed()
        except TimeoutError:
            logs.warning("drain_timed_out", connections_cut_off=len(self._sessions))
            for session in self._sessions:
                session.abort()
        self._move(State.STOPPED)

    def _move(self, to: State) -> None:
        if to not in _ALLOWED[self._state]:
            raise RuntimeError(f"a server cannot go from {self._state.name} to {to.name}")
        self._state = to

    async def _handle(self, connection: ServerConnection) -> None:
        assert isinstance(connection, Connection)
        # Checked when the handshake came, too, but many may have been under way at once.
        if self._state is not State.READY:
            self._metrics.connections_refused.inc()
            await connection.close(CloseCode.SERVICE_RESTART, "worker restarts: reconnect")
            return
        if self._is_full():
            self._metrics.connections_refused.inc()
            await connection.close(CloseCode.TRY_AGAIN_LATER, "too many connections")
            return
        session = Session(
            connection,
            service=self._service,
            max_in_flight=self._settings.max_in_flight_per_connection,
        )
        self._sessions.add(session)
        self._metrics.connections.inc()
        self._metrics.connections_opened.inc()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self._metrics.connections.dec()

    def _is_full(self) -> bool:
        return len(self._sessions) >= self._settings.max_connections

    def _process_request(
        self, connection: ServerConnection, request: HttpRequest
    ) -> HttpResponse | None:
        wanted = ",".join(request.headers.get_all("Upgrade")).lower()
        answer = self._routes.answer(request.path, upgrade="websocket" in wanted)
        if answer is not None:
            if request.method not in ("GET", "HEAD"):
                answer = routes.refusal(
                    405, ErrorCode.INVALID_ARGUMENT, f"{request.method} is not allowed here"
                )
            return _http_response(answer, with_body=request.method != "HEAD")
        if "websocket" in wanted and self._is_full():
            self._metrics.connections_refused.inc()
            refusal = routes.refusal(503, ErrorCode.UNAVAILABLE, "too many connections")
            return _http_response(refusal)
        return None


def run(settings: Settings, *, open_engine: Callable[[Settings], Engine]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code of the process.

    `open_engine` is called on the inference thread. Failures to start are logged, and are 1.
    """
    logs.configure()
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
        runner.run(_live(settings, engine, dispatcher, listener))
    if not dispatcher.close(timeout_s=_ENGINE_STOP_TIMEOUT_S):
        # Left to itself, the interpreter would wait for, or crash on, what hangs in there.
        logs.warning("engine_hangs", action="left behind")
        sys.stderr.flush()
        os._exit(0)
    return 0


async def _live(
    settings: Settings,
    engine: Engine,
    dispatcher: Dispatcher[InFlight],
    listener: socket.socket,
) -> None:
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

    await stop.wait()

    logs.info("draining")
    _notify(notifier, "STOPPING=1", "STATUS=draining")
    await server.drain()
    watchdog.cancel()
    logs.info("stopped")


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


def _select_subprotocol(
    connection: ServerConnection, offered: Sequence[Subprotocol]
) -> Subprotocol | None:
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
