"""The WebSocket server: handshakes, plain HTTP, and the sessions from accepted to drained.

Owns the listening socket and the sessions, on the event loop. Inference never happens here:
requests go to `service`, and from there to the inference thread. The process around it is
`worker`.
"""

import asyncio
import email.utils
import enum
import http
import logging
import platform
import socket
from collections.abc import Sequence

from websockets.datastructures import Headers
from websockets.exceptions import NegotiationError
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gpu_service import __version__, logs, routes
from gpu_service.batching import PRIORITIES
from gpu_service.dispatch import BrokenError, Dispatcher, Engine
from gpu_service.metrics import Metrics
from gpu_service.protocol import SUBPROTOCOL, ErrorCode
from gpu_service.service import InFlight, Service
from gpu_service.session import Limits, Session
from gpu_service.settings import Settings

_websockets_logger = logging.getLogger("websockets.server")

_SERVER_HEADER = f"gpu-service/{__version__}"

# A burst of connects, such as all clients of a worker that was restarted, waits in the kernel.
_BACKLOG = 4096

_RETRY_AFTER_S = "1"


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
