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
import math
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import msgspec
from websockets.datastructures import Headers
from websockets.exceptions import NegotiationError
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gpu_service import __version__, logs, routes
from gpu_service.admission import Admission, Client, Refusal, Visitor
from gpu_service.batching import PRIORITIES
from gpu_service.connection import InFlight
from gpu_service.device import BrokenError
from gpu_service.messages import Cancel, ErrorCode, Failure, ProtocolError, SessionInfo
from gpu_service.metrics import Metrics, ModelFigures, Reason
from gpu_service.protocol import SUBPROTOCOL, decode_message, encode_failure, encode_session
from gpu_service.registry import Registry
from gpu_service.service import Service
from gpu_service.session import Limits, Session
from gpu_service.settings import Settings
from gpu_service.telemetry import Telemetry

_websockets_logger = logging.getLogger("websockets.server")

_SERVER_HEADER = f"gpu-service/{__version__}"

# A burst of connects, such as all clients of a worker that was restarted, waits in the kernel.
_BACKLOG = 4096

_RETRY_AFTER_S = "1"

_HEADERS_OF: dict[int, list[tuple[str, str]]] = {
    http.HTTPStatus.UNAUTHORIZED: [("WWW-Authenticate", "Bearer")],
    http.HTTPStatus.METHOD_NOT_ALLOWED: [("Allow", "GET, HEAD")],
    http.HTTPStatus.TOO_MANY_REQUESTS: [("Retry-After", _RETRY_AFTER_S)],
    http.HTTPStatus.SERVICE_UNAVAILABLE: [("Retry-After", _RETRY_AFTER_S)],
}

# Lines about connections, of each kind: a flood of them must not fill the disk.
_LOGGED_CONNECTIONS = 50
_LOGGED_PER_S = 10.0


_FULL = Refusal(503, ErrorCode.UNAVAILABLE, "too many connections")


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


def is_compiled() -> bool:
    """Whether what each request goes through runs as C (see `provision.compiled`)."""
    return not str(sys.modules[Session.__module__].__file__).endswith(".py")


class InferenceServer:
    """Serves the models of a registry on one socket. Made and used on the event loop.

    `worker` is the name that clients see, `device` what is known of what the models run on.
    `admission` (default: as the settings say) judges who may connect.
    """

    def __init__(
        self,
        *,
        registry: Registry[InFlight],
        device: Mapping[str, str],
        settings: Settings,
        worker: str,
        admission: Admission | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._settings = settings
        self._admission = admission or Admission.of(settings)
        self._state = State.STARTING
        self.broken = asyncio.Event()  # set when the device was found to fail for good
        self._sessions: set[Session] = set()  # those that are WebSockets
        self._metrics = Metrics(max_batch=settings.max_batch)
        self._registry = registry
        self._metrics.describe(
            build={
                "version": __version__,
                "python": platform.python_version(),
                "compiled": "yes" if is_compiled() else "no",
                **device,
            },
            models=self._model_figures,
            traces_dropped=lambda: 0 if telemetry is None else telemetry.dropped,
        )
        self._service = Service(
            registry=registry,
            metrics=self._metrics,
            worker=worker,
            max_streams_per_connection=settings.max_streams_per_connection,
            telemetry=telemetry,
        )
        limits = {
            "max_batch": settings.max_batch,
            "max_connections_per_client": settings.max_connections_per_client,
            "max_fragments": settings.max_fragments,
            "max_in_flight_per_connection": settings.max_in_flight_per_connection,
            "max_message_bytes": settings.max_message_bytes,
            "max_requests_per_s_per_client": settings.max_requests_per_s_per_client,
            "max_streams": settings.max_streams,
            "max_streams_per_connection": settings.max_streams_per_connection,
            "priorities": [PRIORITIES[0], PRIORITIES[-1]],
        }
        self._greeting = SessionInfo(id="", worker=worker, limits=limits)
        self._routes = routes.Routes(
            models=lambda: [served.info for served in registry.all()],
            server={
                "name": "gpu-service",
                "version": __version__,
                "extensions": ["binary_tensor_data"],
                "worker": worker,
                "deployment": settings.deployment,
                "limits": limits,
            },
            is_ready=lambda: self._state is State.READY and not self.broken.is_set(),
            metrics=self._metrics.exposition,
        )
        self._limits = Limits(
            max_in_flight=settings.max_in_flight_per_connection,
            max_message_bytes=settings.max_message_bytes,
            max_fragments=settings.max_fragments,
            ping_interval_s=settings.ping_interval_s,
            ping_timeout_s=settings.ping_timeout_s,
        )
        self._listening: list[asyncio.Server] = []
        self._connections: set[Session] = set()  # whatever they are or become
        self._fewer_connections = asyncio.Event()
        self._log_limits = {
            event: logs.RateLimit(most=_LOGGED_CONNECTIONS, per_s=_LOGGED_PER_S)
            for event in ("connection_opened", "connection_closed", "connection_refused")
        }

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    async def start(self, *listeners: socket.socket) -> None:
        """Listen on the bound sockets, which the server owns from here on."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            is_unix = listener.family == socket.AF_UNIX
            create = loop.create_unix_server if is_unix else loop.create_server
            self._listening.append(await create(self._session, sock=listener, backlog=_BACKLOG))
        self._move(State.READY)
        self._metrics.ready.value = 1

    async def drain(self) -> None:
        """Stop for good, without losing a request that was taken.

        In order: not ready any more, no new connections, answers to what is in flight, close
        with 1012. What takes longer than `drain_timeout_s` is cut off.
        """
        assert self._listening, "start() comes first"
        self._move(State.DRAINING)
        self._metrics.ready.value = 0
        for listening in self._listening:
            listening.close()
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

    def _model_figures(self) -> list[ModelFigures]:
        return [
            ModelFigures(
                name=served.info.name,
                version=served.info.version,
                digest=served.info.digest,
                requests_ok=served.requests_ok,
                queued_samples=served.channel.queued_samples,
                sequences=served.sequences,
            )
            for served in self._registry.all()
        ]

    def _move(self, to: State) -> None:
        if to not in _ALLOWED[self._state]:
            raise RuntimeError(f"a server cannot go from {self._state.name} to {to.name}")
        self._state = to

    def on_broken(self, error: BrokenError) -> None:
        """The device was found to fail for good: new requests go elsewhere."""
        logs.error("device_broken", reason=str(error), cause=error.__cause__)
        self._metrics.ready.value = 0
        self.broken.set()

    def _session(self) -> asyncio.Protocol:
        core = _Core(
            # Without extensions, so without compression: tensors do not shrink, and it would
            # cost 50 KiB a connection.
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            max_size=self._settings.max_message_bytes,
            logger=_websockets_logger,
        )
        made = Session(host=self, service=self._service, core=core, limits=self._limits)
        return cast(asyncio.Protocol, made)  # which it is by its methods

    # ------------------------------------------------------------------ session.Host

    def connected(self, session: Session) -> None:
        """A TCP connection is there."""
        self._connections.add(session)
        waiting = len(self._connections) - len(self._sessions)
        if waiting > self._settings.max_connections + _BACKLOG:
            session.abort()

    def opened(self, session: Session) -> Client | None:
        """It has become a WebSocket. Returns what counts its requests, None for nothing."""
        assert session.visitor is not None
        self._sessions.add(session)
        self._metrics.connections.inc()
        self._metrics.connections_opened.inc()
        self._log("connection_opened", session.visitor)
        return self._admission.clients.enter(session.visitor.client)

    def lost(self, session: Session) -> None:
        """The TCP connection is gone."""
        self._connections.discard(session)
        self._fewer_connections.set()
        if session in self._sessions:
            assert session.visitor is not None
            self._sessions.discard(session)
            self._metrics.connections.dec()
            self._admission.clients.leave(session.visitor.client)
            self._log("connection_closed", session.visitor, session.summary)

    def greeting(self, session: Session) -> bytes | None:
        """The text that begins a session whose client asked for the sub-protocol."""
        models = tuple(
            {"name": served.info.name, "version": served.info.version}
            for served in self._registry.all()
        )
        return encode_session(
            msgspec.structs.replace(self._greeting, id=session.request_id, models=models)
        )

    def over_rate(self, message: str | bytes, wait_s: float) -> bytes | None:
        """The refusal of a request that came too soon; None for what is not one."""
        try:
            decoded = decode_message(message)
        except ProtocolError as error:
            request_id = error.request_id
        else:
            if isinstance(decoded, Cancel):
                return None
            request_id = decoded.id
        self._metrics.ended(ErrorCode.RESOURCE_EXHAUSTED, Reason.RATE_LIMITED)
        most = self._settings.max_requests_per_s_per_client
        failure = Failure(
            id=request_id,
            code=ErrorCode.RESOURCE_EXHAUSTED,
            message=f"more than {most:g} requests a second of one client",
            retry_after_ms=math.ceil(wait_s * 1000),
        )
        return encode_failure(failure, binary=not isinstance(message, str))

    def respond(self, request: HttpRequest, core: ServerProtocol, session: Session) -> HttpResponse:
        """The answer to a handshake or to a plain HTTP request; gives sessions their visitor."""
        response = self._http(request, session) or core.accept(request)
        response.headers["Server"] = _SERVER_HEADER
        return response

    def _http(self, request: HttpRequest, session: Session) -> HttpResponse | None:
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
        visitor = self._admission.visitor(request.headers, session.peer)
        refused = self._refusal(request, visitor)
        # A gateway tries the next worker after a 503. A browser shows no 503 to its page.
        session.is_surplus = refused is _FULL and visitor.is_browser
        if refused is None:
            session.visitor = visitor
            return None
        self._metrics.connections_refused.inc()
        self._log(
            "connection_refused",
            visitor,
            lambda: {"status": refused.status, "why": refused.message},
        )
        if session.is_surplus:
            return None
        return _http_response(routes.refusal(refused.status, refused.code, refused.message))

    def _refusal(self, request: HttpRequest, visitor: Visitor) -> Refusal | None:
        if self._state is not State.READY:
            return Refusal(503, ErrorCode.UNAVAILABLE, "the worker restarts")
        refused = self._admission.judge(visitor, target=request.path, headers=request.headers)
        if refused is None and len(self._sessions) >= self._settings.max_connections:
            return _FULL
        return refused

    def _log(
        self, event: str, visitor: Visitor, more: Callable[[], Mapping[str, object]] = dict
    ) -> None:
        if (kept_back := self._log_limits[event].admit()) is None:
            return
        fields = {
            "request_id": visitor.request_id,
            "address": visitor.address,
            "client": visitor.name,
            **more(),
        }
        if kept_back:
            fields["lines_kept_back"] = kept_back
        logs.info(event, **fields)


class _Core(ServerProtocol):
    """websockets' protocol. What it would be given to choose with, it would refer back to."""

    def select_subprotocol(self, subprotocols: Sequence[Subprotocol]) -> Subprotocol | None:
        """Optional for clients, but who asks for another version must not be misunderstood.

        A browser whose token is all that it offers would drop a connection that takes none.
        """
        if not subprotocols or SUBPROTOCOL in subprotocols:
            return Subprotocol(SUBPROTOCOL) if subprotocols else None
        raise NegotiationError(f"this server speaks {SUBPROTOCOL}")


def _http_response(answer: routes.Answer, *, with_body: bool = True) -> HttpResponse:
    headers = Headers(
        [
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Connection", "close"),
            ("Content-Length", str(len(answer.body))),
            ("Content-Type", answer.content_type),
            *_HEADERS_OF.get(answer.status, ()),
        ]
    )
    phrase = http.HTTPStatus(answer.status).phrase
    return HttpResponse(answer.status, phrase, headers, answer.body if with_body else b"")
