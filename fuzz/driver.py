"""A session without sockets: a client's bytes go in, in pieces; the server's bytes come out.

Owns stand-ins for all that a `gpu_service.session.Session` touches. Deterministic: what is
written depends on the bytes alone, never on time, and by the session's promise never on how they
were cut or when they were read. The stand-in service answers requests with their own inputs.
"""

import asyncio
from collections.abc import Callable, Container, Iterable
from typing import Any, cast

from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from gpu_service.connection import Caller
from gpu_service.messages import (
    Cancel,
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Response,
    SessionInfo,
)
from gpu_service.protocol import (
    SUBPROTOCOL,
    decode_message,
    encode_failure,
    encode_response,
    encode_session,
)
from gpu_service.service import Service
from gpu_service.session import Limits, Session

LIMITS = Limits(
    max_in_flight=3,
    max_message_bytes=4096,
    max_fragments=8,
    ping_interval_s=1e6,
    ping_timeout_s=1e6,
)

# Requests with this parameter wait until the session takes no more.
SLOW = "slow"

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

# Turns of the loop that a session may take to look at one piece.
_MOST_TURNS = 1000


class Transport:
    """Keeps what is written. An `asyncio.Transport`, as far as sessions use one."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_paused = False
        self.is_ended = False  # by the server: nothing is written after it

    def write(self, data: bytes) -> None:
        assert not self.is_ended, "written after the end"
        self.written += data

    def writelines(self, pieces: Iterable[bytes]) -> None:
        self.write(b"".join(pieces))

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.is_ended = True

    def abort(self) -> None:
        self.is_ended = True

    def is_closing(self) -> bool:
        return self.is_ended

    def set_write_buffer_limits(self, *, high: int) -> None:
        assert high > 0

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 50000) if name == "peername" else None


class Host:
    """Shakes hands with everybody. A `session.Host`."""

    def __init__(self) -> None:
        self.connections = 0

    def respond(self, request: HttpRequest, core: ServerProtocol, session: Session) -> HttpResponse:
        response = core.accept(request)
        del response.headers["Date"]
        return response

    def connected(self, session: Session) -> None:
        self.connections += 1

    def opened(self, session: Session) -> None:
        pass

    def greeting(self, session: Session) -> bytes:
        return encode_session(SessionInfo(id="1"))

    def over_rate(self, message: str | bytes, wait_s: float) -> None:
        raise AssertionError("nobody counts requests")

    def lost(self, session: Session) -> None:
        self.connections -= 1


class Mirror:
    """Answers requests with their inputs: at once, or the slow ones by `finish`.

    A `service.Service` with one connection, and that connection.
    """

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self._caller: Caller

    def connect(self, caller: Caller) -> "Mirror":
        self._caller = caller
        return self

    def receive(self, message: str | bytes) -> None:
        binary = isinstance(message, bytes)
        try:
            request = decode_message(message)
            if isinstance(request, Cancel):
                self._caller.no_answer()
                if request.id is not None:
                    self._cancel(request.id)
                return
            if request.id is not None and self._waits(request.id):
                text = "in flight"
                raise ProtocolError(ErrorCode.INVALID_ARGUMENT, text, request_id=request.id)
        except ProtocolError as error:
            self._refuse(error.request_id, error.code, error.message, binary=binary)
            return
        if SLOW in request.parameters:
            self.waiting.append(request)
        else:
            self._answer(request)

    def finish(self) -> None:
        """Answer the one that has waited longest."""
        self._answer(self.waiting.pop(0))

    def unclog(self) -> None:
        pass

    def close(self) -> None:
        self.waiting.clear()

    def _waits(self, request_id: str | None) -> list[Request]:
        return [request for request in self.waiting if request.id == request_id]

    def _cancel(self, request_id: str) -> None:
        for request in self._waits(request_id):
            # By identity: arrays do not compare to one truth value.
            self.waiting = [other for other in self.waiting if other is not request]
            self._refuse(request_id, ErrorCode.CANCELLED, "", binary=request.binary)

    def _refuse(self, request_id: str | None, code: str, message: str, *, binary: bool) -> None:
        failure = Failure(id=request_id, code=code, message=message)
        self._caller.answer([encode_failure(failure, binary=binary)], binary=binary, final=True)

    def _answer(self, request: Request) -> None:
        response = Response(
            id=request.id, model_name="mirror", model_version="1", outputs=request.inputs
        )
        try:
            payload = encode_response(response, binary=request.binary)
        except ProtocolError as error:
            self._refuse(request.id, error.code, error.message, binary=request.binary)
            return
        self._caller.answer([payload], binary=request.binary, final=True)


def session(*, host: Any, service: Any, limits: Limits = LIMITS) -> Session:
    """A session of stand-ins; needs a running event loop."""
    core = ServerProtocol(
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        select_subprotocol=lambda _, offered: offered[0] if offered else None,
        max_size=limits.max_message_bytes,
    )
    return Session(host=host, service=cast(Service, service), core=core, limits=limits)


async def drive(
    pieces: Iterable[bytes],
    *,
    clogged: Container[int] = (),
    look: Callable[[Session], None] = lambda _: None,
) -> bytes:
    """What a session writes to a client that sends `pieces` and then ends the connection.

    During the pieces of the numbers `clogged` the client does not read, as long as the session
    goes on without. `look` is called after each piece.
    """
    host, service, transport = Host(), Mirror(), Transport()
    served = session(host=host, service=service)
    served.connection_made(cast(asyncio.Transport, transport))
    is_clogged = False

    async def settle() -> None:
        nonlocal is_clogged
        for _ in range(_MOST_TURNS):
            if not transport.is_paused:
                return
            if len(service.waiting) >= LIMITS.max_in_flight:
                service.finish()
                continue
            await asyncio.sleep(0)
            if transport.is_paused and is_clogged:
                is_clogged = False
                served.resume_writing()
        raise AssertionError("the session stopped reading for good")

    for number, piece in enumerate(pieces):
        if number in clogged and not is_clogged:
            is_clogged = True
            served.pause_writing()
        served.data_received(piece)
        look(served)
        await settle()
    if is_clogged:
        served.resume_writing()
        await settle()
    while service.waiting:
        service.finish()
    await settle()
    served.eof_received()
    served.connection_lost(None)
    assert host.connections == 0
    return bytes(transport.written)


def check_bounds(served: Session) -> None:
    """A session holds less than a frame, a message, and as many requests as it may."""
    message = served._message
    assert message is None or len(message) <= LIMITS.max_message_bytes
    assert served._fragments <= LIMITS.max_fragments + 1
    assert 0 <= served._unanswered <= LIMITS.max_in_flight
