"""One client's connection: reads requests, writes replies, bounds both.

An asyncio.Protocol around websockets' sans-I/O core; owns the transport, the one timer that is
due next, and everything that its client has not been answered yet. All on the event loop, no
tasks. The core judges all that is not a plain whole message, ping or pong: those are taken
directly, so that most connections have none between the handshake and the close.

What is bounded: messages taken and not answered, answered meaning that the reply left the
transport's buffer below its limit. A client that does not read its replies is therefore not
read either, until the keepalive closes it.
"""

import asyncio
import os
import random
import struct
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, Protocol, cast

import msgspec
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response as HttpResponse
from websockets.protocol import CONNECTING, OPEN, SERVER
from websockets.protocol import Protocol as Core
from websockets.server import ServerProtocol

from gpu_service.admission import Client, Visitor
from gpu_service.connection import Caller

try:
    from websockets.speedups import apply_mask
except ImportError:  # websockets was built without its C extension
    from websockets.utils import apply_mask

# Answers that may wait in this process for a slow reader before it is not read any more.
_WRITE_LIMIT_BYTES = 65536

# Final below: compiled, they are C's own, and no look-up in a dictionary.
_unmask: Final[Callable[[bytes, bytes], bytes]] = apply_mask

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0

# Frames of one client between two looks at all the others: each may cost as much as an answer.
_FRAMES_PER_TURN: Final = 256

# As nginx bounds it by default: the core would keep 128 lines of 8 KiB.
_MOST_REQUEST_BYTES = 32768

# A frame's first two bytes (RFC 6455, 5.2): final, no extension; masked, as from a client.
_WHOLE_TEXT: Final = 0x81
_WHOLE_BINARY: Final = 0x82
_PING: Final = 0x89
_PONG: Final = 0x8A
_MASKED: Final = 0x80
_LENGTH: Final = 0x7F
_LENGTH_IN_2: Final = 126
_LENGTH_IN_8: Final = 127
_LONGEST_HEAD: Final = 14

_PING_BYTES: Final = 4
_PING_HEAD = bytes((_PING, _PING_BYTES))

_END_OF_REQUEST = b"\r\n\r\n"

_HEAD_2: Final = struct.Struct(">BBH")
_HEAD_8: Final = struct.Struct(">BBQ")

# Up to here a copy is cheaper than a second piece to write; and many pieces are copied in any case.
_JOINED_BYTES: Final = 16384
_FEW_PIECES: Final = 2


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one connection may do."""

    max_in_flight: int
    max_message_bytes: int
    max_fragments: int
    ping_interval_s: float
    ping_timeout_s: float


class Requests(Protocol):
    """What a client has asked for; see `connection.Connection`."""

    def receive(self, message: str | bytes) -> None:
        """Take one message."""

    def unclog(self) -> None:
        """Replies are read again."""

    def close(self) -> None:
        """The client has gone."""


class _Nothing:
    """What a client that has gone asks for. A `Requests`."""

    def receive(self, message: str | bytes) -> None:
        """Not called."""

    def unclog(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Closed."""


_NOTHING = _Nothing()


class Service(Protocol):
    """What answers requests; see `service.Service`."""

    def connect(self, caller: Caller) -> Requests:
        """The requests of one connection."""


class Host(Protocol):
    """The server, as its connections see it."""

    def respond(
        self, request: HttpRequest, core: ServerProtocol, session: "Session"
    ) -> HttpResponse:
        """The answer to a handshake or to a plain HTTP request; gives sessions their visitor."""

    def connected(self, session: "Session") -> None:
        """A TCP connection is there."""

    def opened(self, session: "Session") -> Client | None:
        """It has become a WebSocket. Returns what counts its requests, None for nothing."""

    def greeting(self, session: "Session") -> bytes | None:
        """The text that begins a session whose client asked for the sub-protocol."""

    def over_rate(self, message: str | bytes, wait_s: float) -> bytes | None:
        """The refusal of a request that came too soon; None for what is not one."""

    def lost(self, session: "Session") -> None:
        """The TCP connection is gone."""


class Session:
    """Serves one connection: an `asyncio.Protocol` by its methods, and a `connection.Caller`."""

    # There may be tens of thousands; and beyond 30 attributes Python looks them up slowly.
    __slots__ = (
        "_bytes_received",
        "_bytes_sent",
        "_client",
        "_core",
        "_draining",
        "_fragments",
        "_held",
        "_host",
        "_is_closing",
        "_is_lost",
        "_is_open",
        "_is_talking",
        "_limits",
        "_loop",
        "_made_at",
        "_max_in_flight",
        "_max_message_bytes",
        "_message",
        "_message_is_text",
        "_messages",
        "_owed",
        "_ping",
        "_reading_paused",
        "_request_bytes",
        "_request_tail",
        "_requests",
        "_timer",
        "_transport",
        "_unanswered",
        "_unread",
        "_writing_paused",
        "is_surplus",
        "visitor",
    )

    def __init__(
        self, *, host: Host, service: Service, core: ServerProtocol, limits: Limits
    ) -> None:
        self._host = host
        # Until it is a WebSocket, and from when something has to be judged.
        self._core: Core | None = core
        self._limits = limits
        self._max_in_flight = limits.max_in_flight
        self._max_message_bytes = limits.max_message_bytes
        self._requests: Requests = service.connect(self)
        self.visitor: Visitor | None = None  # who it serves, once admitted
        self.is_surplus = False  # one more than there may be: closed as soon as it is open
        self._client: Client | None = None  # what its requests are counted by, if they are
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = False
        self._is_talking = False  # the core's state is OPEN; here it is found at once
        self._is_lost = False
        self._draining = False
        # Reading.
        self._unread = b""  # came, but was not looked at: less than a frame's head, or paused
        self._owed = 0  # bytes of a frame whose beginning the core has
        self._request_tail = b""  # of what there is of the HTTP request
        self._request_bytes = 0  # of it so far
        self._is_closing = False
        self._message: bytearray | None = None  # the fragments so far of a message
        self._message_is_text = False
        self._fragments = 0  # frames so far of that message
        self._reading_paused = False
        self._ping: bytes | None = None  # the payload of a ping that is not answered
        # Writing.
        self._writing_paused = False
        self._unanswered = 0  # messages taken whose reply is not written yet
        self._held = 0  # those of them whose reply waits in the transport
        # For the log.
        self._made_at = time.monotonic()
        self._messages = 0
        self._bytes_received = 0
        self._bytes_sent = 0

    @property
    def peer(self) -> str:
        """The address at the other end of the TCP connection; "" for a Unix socket."""
        peer = self._transport.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else ""

    def summary(self) -> dict[str, str | int | float]:
        """What there is to say of a session that has ended."""
        core = self._judge()
        # The first one that was sent, and who sent it. Without any, the connection was lost.
        by_server = core.close_sent is not None and not core.close_rcvd_then_sent
        close = core.close_sent if by_server else core.close_rcvd
        return {
            "code": int(CloseCode.ABNORMAL_CLOSURE if close is None else close.code),
            "reason": "" if close is None else close.reason,
            "closed_by": "nobody" if close is None else "server" if by_server else "client",
            "duration_s": round(time.monotonic() - self._made_at, 3),
            "requests": self._messages,
            "bytes_received": self._bytes_received,
            "bytes_sent": self._bytes_sent,
        }

    def drain(self) -> None:
        """Take no more, answer what was taken, close with 1012.

        Messages that arrive meanwhile are dropped unanswered: after a 1012 a client sends
        what was not answered again, to the worker that its next connection reaches.
        """
        self._draining = True
        self._settle()

    def close(self, code: CloseCode, reason: str) -> None:
        """Begin the closing handshake; without an answer the connection is cut off."""
        if self._is_talking:
            self._judge().send_close(code, reason)
            self._flush()

    def abort(self) -> None:
        """Cut the connection off."""
        self._transport.abort()

    # ------------------------------------------------------------------ connection.Caller

    @property
    def request_id(self) -> str:
        """The session's name in logs and traces; "" before it was admitted."""
        return "" if self.visitor is None else self.visitor.request_id

    @property
    def trace_parent(self) -> str | None:
        """What the handshake's `traceparent` said."""
        return None if self.visitor is None else self.visitor.trace_parent

    @property
    def is_clogged(self) -> bool:
        """Whether replies wait because the client does not read them."""
        return self._writing_paused

    def answer(self, pieces: list[Any], *, binary: bool, final: bool) -> None:
        """Write a reply."""
        if self._is_talking:
            self._write(pieces, _WHOLE_BINARY if binary else _WHOLE_TEXT)
        if not final:
            return
        if self._writing_paused:
            self._held += 1
        else:
            self.no_answer()

    def no_answer(self) -> None:
        """One message less waits for an answer."""
        self._unanswered -= 1
        if self._reading_paused or self._draining:
            self._settle()

    # ------------------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        self._transport.set_write_buffer_limits(high=_WRITE_LIMIT_BYTES)
        self._set_timer(_OPEN_TIMEOUT_S, self._transport.abort)
        self._host.connected(self)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._bytes_received += len(data)
        self._unread = self._unread + data if self._unread else data
        self._advance()

    def eof_received(self) -> None:
        """Called by the event loop; the transport is closed after it."""
        self._is_talking = False
        if self._core is not None:
            self._core.receive_eof()
            self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._is_lost = True
        self._is_talking = False
        if self._core is not None:
            self._core.receive_eof()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # it refers back to this object
        self._requests.close()
        self._unread = b""
        self._host.lost(self)
        # What is closed goes at once, and not when the collector looks at old objects, which it
        # does when there are a quarter more of them.
        self._requests = _NOTHING
        self._drop_core()

    def pause_writing(self) -> None:
        """Called by the event loop: the client does not read as fast as it asks."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Called by the event loop."""
        self._writing_paused = False
        self._unanswered -= self._held
        self._held = 0
        self._requests.unclog()
        self._settle()

    # ------------------------------------------------------------------ reading

    def _advance(self) -> None:
        """Look at what came, frame by frame, until it is at an end or too much is unanswered."""
        data, at = self._unread, 0
        size = len(data)
        self._unread = b""
        for _ in range(_FRAMES_PER_TURN):
            if at == size:
                return
            if not self._is_talking:
                if self._judge().state is not CONNECTING:
                    self._feed(data[at:])
                    return
                end = at + self._rest_of_request(data[at:])
                self._request_bytes += end - at
                if self._request_bytes > _MOST_REQUEST_BYTES and not self._judge().eof_sent:
                    self._refuse_request()
                    return
                self._feed(data[at:end])
                at = end
                continue
            if self._unanswered >= self._max_in_flight:
                self._pause_reading()
                self._unread = data[at:]
                return
            if self._owed:
                end = min(at + self._owed, size)
                self._owed -= end - at
                self._feed(data[at:end])
                at = end
                continue
            first, head, length = _frame_head(data, at)
            if head == 0:
                self._unread = data[at:]
                return
            start, end = at + head, at + head + length
            is_whole = end <= size and data[at + 1] & _MASKED
            if is_whole and first == _PONG and length < _LENGTH_IN_2:
                self._on_pong(_unmask(data[start:end], data[start - 4 : start]))
                at = end
            elif is_whole and first == _PING and length < _LENGTH_IN_2:
                self._on_ping(_unmask(data[start:end], data[start - 4 : start]))
                at = end
            elif (
                is_whole
                and first in (_WHOLE_BINARY, _WHOLE_TEXT)
                and length <= self._max_message_bytes
                and self._message is None
            ):
                payload = _unmask(data[start:end], data[start - 4 : start])
                self._take(payload, is_text=first == _WHOLE_TEXT)
                at = end
            else:
                self._owed = max(0, end - size)
                self._feed(data[at:end])
                at = min(end, size)
        if at < size:
            self._unread = data[at:]
            self._pause_reading()
            self._loop.call_soon(self._settle)

    def _rest_of_request(self, data: bytes) -> int:
        """How many bytes of `data` belong to the HTTP request: frames may follow at once."""
        seen = self._request_tail + data
        end = seen.find(_END_OF_REQUEST)
        self._request_tail = seen[-len(_END_OF_REQUEST) + 1 :]
        if end < 0:
            return len(data)
        return end + len(_END_OF_REQUEST) - (len(seen) - len(data))

    def _refuse_request(self) -> None:
        core = self._core
        assert isinstance(core, ServerProtocol)
        core.send_response(
            core.reject(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"A request may have {_MOST_REQUEST_BYTES} bytes before its body.\n",
            )
        )
        self._flush()

    def _judge(self) -> Core:
        """The core, made anew where there is none."""
        if self._core is None:
            self._core = Core(SERVER, state=OPEN, max_size=self._max_message_bytes)
        return self._core

    def _drop_core(self) -> None:
        """Let it go, and the HTTP request with it: two thirds of what a client takes in Python."""
        core, self._core = self._core, None
        if core is None:
            return
        # The parser has the core in its frame, and so have tracebacks of what went wrong, of which
        # the request has one, too.
        core.parser.close()
        if core.handshake_exc is not None:
            core.handshake_exc.__traceback__ = None
        core.parser_exc = core.handshake_exc = None

    def _feed(self, data: bytes) -> None:
        """Have the core judge it, and do what it says."""
        core = self._judge()
        core.receive_data(data)
        self._is_talking = core.state is OPEN
        for event in core.events_received():
            if isinstance(event, Frame):
                self._on_frame(event)
            else:
                assert isinstance(event, HttpRequest)
                self._on_request(event)
        self._flush()

    def _on_request(self, request: HttpRequest) -> None:
        core = self._core
        assert isinstance(core, ServerProtocol)
        core.send_response(self._host.respond(request, core, self))
        self._flush()
        if not self._is_talking:
            return
        self._drop_core()
        if self.is_surplus:
            self.close(CloseCode.TRY_AGAIN_LATER, "too many connections")
            return
        self._is_open = True
        self._set_timer(self._first_ping_in_s(), self._send_ping)
        self._client = self._host.opened(self)
        if core.subprotocol is not None:
            self._greet()

    def _greet(self) -> None:
        greeting = self._host.greeting(self)
        if greeting is not None:
            self._write([greeting], _WHOLE_TEXT)

    def _on_frame(self, frame: Frame) -> None:
        match frame.opcode:
            case Opcode.PONG:
                self._on_pong(bytes(frame.data))
            case Opcode.PING if self._writing_paused:
                self._pause_reading()  # or pongs would pile up
            case Opcode.TEXT | Opcode.BINARY:
                self._message = bytearray(frame.data)
                self._message_is_text = frame.opcode is Opcode.TEXT
                self._fragments = 1
            case Opcode.CONT:
                assert self._message is not None
                self._fragments += 1
                if self._fragments > self._limits.max_fragments:
                    self._fail_for_fragments()
                    return
                self._message += frame.data
        if frame.fin and frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            message, self._message = self._message, None
            assert message is not None
            self._take(bytes(message), is_text=self._message_is_text)

    def _on_ping(self, payload: bytes) -> None:
        self._transport.write(bytes((_PONG, len(payload))) + payload)
        if self._writing_paused:
            self._pause_reading()  # or pongs would pile up

    def _on_pong(self, payload: bytes) -> None:
        if self._ping is not None and payload == self._ping:
            self._ping = None
            self._set_timer(self._limits.ping_interval_s, self._send_ping)

    def _fail_for_fragments(self) -> None:
        self._message = None
        most = self._limits.max_fragments
        reason = f"a message of more than {most} frames; send it in fewer"
        self._judge().fail(CloseCode.POLICY_VIOLATION, reason)
        self._flush()

    def _take(self, payload: bytes, *, is_text: bool) -> None:
        if self._draining or not self._is_talking:
            return
        message: str | bytes = payload
        if is_text:
            try:
                message = payload.decode()
            except UnicodeDecodeError as error:
                self._judge().fail(CloseCode.INVALID_DATA, f"{error.reason} at {error.start}")
                self._flush()
                return
        self._unanswered += 1
        self._messages += 1
        if self._client is not None and (wait_s := self._client.take()):
            refusal = self._host.over_rate(message, wait_s)
            if refusal is not None:
                self.answer([refusal], binary=not is_text, final=True)
                return
        self._requests.receive(message)

    def _pause_reading(self) -> None:
        if not self._reading_paused and not self._is_lost:
            self._reading_paused = True
            self._transport.pause_reading()

    def _settle(self) -> None:
        """Fewer are unanswered: go on with what waited for that."""
        if self._is_lost:
            return
        if self._draining and self._unanswered == 0 and self._is_open:
            reason = "worker restarts: reconnect, resend what was not answered"
            self.close(CloseCode.SERVICE_RESTART, reason)
        if self._reading_paused and (
            self._unanswered < self._max_in_flight and not self._writing_paused
        ):
            self._reading_paused = False
            self._transport.resume_reading()
            self._advance()

    # ------------------------------------------------------------------ writing and timers

    def _write(self, pieces: list[Any], first: int) -> None:
        length = 0
        for piece in pieces:
            length += len(piece)
        self._bytes_sent += length
        pieces.insert(0, _head(first, length))
        if length <= _JOINED_BYTES or len(pieces) > _FEW_PIECES:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    def _flush(self) -> None:
        """Send what the core has to say, and see that a connection that it ends does end."""
        core = self._core
        if core is None:
            return
        self._is_talking = core.state is OPEN and not self._is_lost
        for data in core.data_to_send():
            if self._is_lost:
                continue
            if data:
                self._transport.write(data)
            elif self._transport.can_write_eof():
                self._transport.write_eof()
        if core.close_expected() and not self._is_lost and not self._is_closing:
            self._is_closing = True
            if self._reading_paused:
                # Its answer to the close has to be seen; what else comes is dropped.
                self._reading_paused = False
                self._transport.resume_reading()
            self._set_timer(_CLOSE_TIMEOUT_S, self._transport.abort)

    def _set_timer(self, delay_s: float, due: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, due)

    def _first_ping_in_s(self) -> float:
        # Clients come together when a worker restarts; their pings shall not for ever after. Spread
        # over less than a whole interval, they would leave a part of each without any.
        spread = random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, no secret
        return spread * self._limits.ping_interval_s

    def _send_ping(self) -> None:
        # Not by the core, nor is the answer read by it: of many clients, most only do this.
        self._ping = os.urandom(_PING_BYTES)
        self._transport.write(_PING_HEAD + self._ping)
        self._set_timer(self._limits.ping_timeout_s, self._no_pong)

    def _no_pong(self) -> None:
        if self._reading_paused and not self._writing_paused:
            # It is not read because its requests wait for the device: its pong may be there.
            self._set_timer(self._limits.ping_timeout_s, self._no_pong)
            return
        self._judge().fail(CloseCode.INTERNAL_ERROR, "keepalive ping timeout")
        self._flush()


class _LastHead:
    """The head made last: most replies of a model are as long as one another."""

    __slots__ = ("first", "head", "length")

    def __init__(self) -> None:
        self.first = 0
        self.length = 0
        self.head = b""


_last: Final = _LastHead()


def _head(first: int, length: int) -> bytes:
    """The head of a frame with that first byte and length of its payload."""
    if first == _last.first and length == _last.length:
        return _last.head
    if length < _LENGTH_IN_2:
        head = bytes((first, length))
    elif length < 1 << 16:
        head = _HEAD_2.pack(first, _LENGTH_IN_2, length)
    else:
        head = _HEAD_8.pack(first, _LENGTH_IN_8, length)
    _last.first, _last.length, _last.head = first, length, head
    return head


def _frame_head(data: bytes, at: int) -> tuple[int, int, int]:
    """First byte, bytes of the head and of the payload of the frame at `at`.

    The head is 0 if it is not all there. Without a mask the frame will be refused, so all that
    is there counts as its head.
    """
    have = len(data) - at
    if have < 2:
        return 0, 0, 0
    if not data[at + 1] & _MASKED:
        return data[at], have, 0
    length = data[at + 1] & _LENGTH
    head = 6
    if length == _LENGTH_IN_2:
        head = 8
        length = data[at + 2] << 8 | data[at + 3] if have >= 4 else 0
    elif length == _LENGTH_IN_8:
        head = _LONGEST_HEAD
        length = int.from_bytes(data[at + 2 : at + 10])
    return (data[at], head, length) if have >= head else (0, 0, 0)
