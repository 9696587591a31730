"""A client's connection, and the next one when it breaks.

Owns one WebSocket at a time, and the table of all calls that wait for an answer. One task reads,
and beside it one writes, in the order of the calls, no more at once than the server reads.
"""

import asyncio
import collections
import contextlib
import http.client
import logging
import os
import random
import re
import ssl
import uuid
from collections.abc import Iterator
from typing import Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.client import process_exception
from websockets.exceptions import (
    ConnectionClosed,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from gpu_service import client_tls
from gpu_service.client_calls import (
    Call,
    ClientError,
    DeadlineExceededError,
    InferenceError,
    InferResult,
    UnreachableError,
)
from gpu_service.messages import ErrorCode, Failure, ProtocolError, SessionInfo
from gpu_service.protocol import SUBPROTOCOL, decode_reply, encode_cancel, encode_cancel_sequence

# Full jitter: the clients of a worker that restarts come back spread out, not all at once.
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 5.0

# A request that was under way each of so many times when the connection broke may well be
# what breaks it: it must not take down one worker after the other.
MAX_SENDS = 10

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_MAX_REPLY_BYTES = 256 << 20

# A server that speaks our sub-protocol tells its limits first; an older one does not.
_GREETING_TIMEOUT_S = 1.0
_MAX_IN_FLIGHT = 64

_TOKEN = re.compile(r"[\x21-\x7e]+")

# websockets logs the headers of its handshake, and so a token, when debugging.
_logger = logging.getLogger("gpu_service.client.websocket")
_logger.setLevel(logging.INFO)


class Follower(Protocol):
    """What has to know when the connection changes."""

    def opened(self) -> None:
        """There is a new connection."""

    def lost(self) -> None:
        """The connection has ended."""

    def fail(self, error: ClientError) -> None:
        """There will be no answers any more."""


class Link:
    """One connection: what its server said of itself, and what it has not answered.

    A server does not read more requests than it may have unanswered. One less is sent, so that
    it still reads what is cancelled.
    """

    def __init__(self, socket: ClientConnection, *, trouble: str) -> None:
        self.session: SessionInfo | None = None
        self._socket = socket
        self._trouble = trouble  # why there is this link and not the one before
        self._outbox: collections.deque[Call] = collections.deque()
        self._unanswered: dict[str, bool] = {}  # by id, and whether it was cancelled
        self._changed = asyncio.Event()
        self._greeted = asyncio.Event()
        if socket.subprotocol is None:
            self._greeted.set()
        self._cancelling: set[asyncio.Task[None]] = set()
        self._cancels = 0  # that a server which does not know them may object to
        self._most_unanswered = _MAX_IN_FLIGHT - 1
        self._most_bytes: int | None = None

    def put(self, call: Call) -> None:
        """Send it when its turn comes."""
        self._outbox.append(call)
        self._changed.set()

    def has(self, call: Call) -> bool:
        """Whether the server has it, and has not answered it to the end."""
        return call.link is self and call.id in self._unanswered

    def greet(self, session: SessionInfo) -> None:
        """The server has said what it is."""
        self.session = session
        most = self._limit("max_in_flight_per_connection") or _MAX_IN_FLIGHT
        self._most_unanswered = max(1, most - 1)
        self._most_bytes = self._limit("max_message_bytes")
        self._greeted.set()

    def answered(self, request_id: str) -> None:
        """The last reply to a request has come."""
        self._unanswered.pop(request_id, None)
        self._changed.set()

    def cancel(self, call: Call) -> None:
        """Send word, once, that it is not wanted any more, if the server has it."""
        if self.has(call) and not self._unanswered[call.id]:
            self._unanswered[call.id] = True
            self._send_aside(encode_cancel(call.id))

    def cancel_sequence(self, sequence_id: str) -> None:
        """Send word that a sequence is to end."""
        self._send_aside(encode_cancel_sequence(sequence_id))

    def is_about_a_cancel(self, failure: Failure) -> bool:
        """Whether an error that names no request may be a server's that knows no cancelling.

        Each cancel explains one of them. A server that greets does not answer any.
        """
        if self.session is not None or failure.code != ErrorCode.INVALID_ARGUMENT:
            return False
        self._cancels -= 1
        return self._cancels >= 0

    async def receive(self) -> str | bytes:
        """The next message; raises ConnectionClosed."""
        return await self._socket.recv()

    async def write(self) -> None:
        """Send what there is to send, until the connection is closed."""
        with contextlib.suppress(ConnectionClosed):  # who reads finds out, too
            await self._until_greeted()
            while True:
                while not self._outbox or len(self._unanswered) >= self._most_unanswered:
                    self._changed.clear()
                    await self._changed.wait()
                call = self._outbox.popleft()
                if call.is_over:
                    continue
                problem = self._problem(call)
                if problem is not None:
                    call.fail(problem)
                    continue
                call.link = self
                call.sends += 1
                self._unanswered[call.id] = False
                await self._socket.send(call.frame)

    async def close(self) -> None:
        """End it."""
        for task in self._cancelling:
            task.cancel()
        await self._socket.close()

    async def _until_greeted(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GREETING_TIMEOUT_S):
                await self._greeted.wait()

    def _send_aside(self, payload: bytes) -> None:
        task = asyncio.create_task(self._send_cancel(payload))
        self._cancelling.add(task)  # the loop itself would not keep it
        task.add_done_callback(self._cancelling.discard)

    async def _send_cancel(self, payload: bytes) -> None:
        self._cancels += 1
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(payload, text=True)

    def _problem(self, call: Call) -> ClientError | None:
        if call.sends >= MAX_SENDS:
            return ClientError(f"given up after sending it {MAX_SENDS} times: {self._trouble}")
        if self._most_bytes is not None and len(call.frame) > self._most_bytes:
            return too_large(len(call.frame), self._most_bytes)
        return None

    def _limit(self, name: str) -> int | None:
        limit = None if self.session is None else self.session.limits.get(name)
        return limit if isinstance(limit, int) and limit > 0 else None


class Connector:
    """Keeps a connection to `url`, and sends again what is unanswered when there is a new one.

    `token` is sent as `Authorization: Bearer …` in each handshake, and is never shown. `tls` is
    for wss:// alone; the default trusts whom the system trusts.
    """

    def __init__(
        self, url: str, *, token: str | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        if token is not None and not is_token(token):
            raise ValueError(
                "the token is empty, or has a space, a line break, or a character that is not "
                "ASCII; strip what surrounds it in its file"
            )
        if tls is not None and not is_secure(url):
            raise ValueError(f"{url} is no wss:// address, so it has no use for tls")
        self.url = url
        self.broken: ClientError | None = UnreachableError(f"{url}: the client is not open")
        self.link: Link | None = None
        self.reconnects = 0
        self.followers: set[Follower] = set()
        self._tls = tls or (True if is_secure(url) else None)
        self._headers = None if token is None else {"Authorization": f"Bearer {token}"}
        self._calls: dict[str, Call] = {}
        self._trouble = "not connected yet"
        self._attempts = 0  # to connect, since a reply was last received
        self._prefix = uuid.uuid4().hex[:8]
        self._count = 0
        self._runner: asyncio.Task[None] | None = None
        self._stirred = asyncio.Event()  # what is waited for has changed

    async def open(self) -> None:
        """Connect, once. Raises UnreachableError."""
        try:
            self.link = await self._connect()
        except (OSError, WebSocketException) as error:
            raise UnreachableError(self._explained(error)) from None
        self.broken = None
        self._runner = asyncio.create_task(self._run(self.link))

    async def close(self) -> None:
        """End the connection. Whatever still waits fails."""
        self.broken = ClientError(f"{self.url}: the client was closed")
        self._fail_all(self.broken)
        assert self._runner is not None
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner
        if self.link is not None:
            await self.link.close()

    # ------------------------------------------------------------------ calls

    def new_id(self) -> str:
        """An id for a request, or a sequence."""
        self._count += 1
        return f"{self._prefix}-{self._count}"

    @contextlib.contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """Meanwhile, `call` is sent; at the end, it is taken back if it is not answered."""
        self.put(call)
        try:
            yield
        finally:
            call.future.cancel()  # nor is it to be sent if it was not yet
            self.forget(call)
            if self.link is not None:
                self.link.cancel(call)

    def put(self, call: Call) -> None:
        """Send it, on this connection or the next."""
        self._calls[call.id] = call
        self._stirred.set()
        if self.link is not None:
            self.link.put(call)

    def forget(self, call: Call) -> None:
        """Nobody waits for it any more."""
        self._calls.pop(call.id, None)
        self._stirred.set()

    def has_room(self, call: Call) -> None:
        """Its caller keeps up again: go on with what was held back for its sake."""
        if call.is_deferred:
            call.is_deferred = False
            self.put(call)
        self._stirred.set()

    def cancel_sequence(self, sequence_id: str) -> None:
        """Have the server end a sequence, if it has it."""
        if self.link is not None:
            self.link.cancel_sequence(sequence_id)

    def too_late(self, call: Call, deadline_s: float) -> ClientError:
        """The error of a call whose answer did not come in time."""
        if self.link is None:
            return UnreachableError(f"no answer within {deadline_s:g} s; {self._trouble}")
        refused = f"; refused {call.refusals} times before that" if call.refusals else ""
        return DeadlineExceededError(f"{self.url}: no answer within {deadline_s:g} s{refused}")

    # ------------------------------------------------------------------ the connection

    async def _connect(self) -> Link:
        socket = await connect(
            self.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=self._headers,
            logger=None if self._headers is None else _logger,
            compression=None,  # tensors do not shrink
            ssl=self._tls,
            proxy=None,  # workers are inside; a proxy for the world outside cannot reach them
            open_timeout=_OPEN_TIMEOUT_S,
            close_timeout=_CLOSE_TIMEOUT_S,
            max_size=_MAX_REPLY_BYTES,
        )
        return Link(socket, trouble=self._trouble)

    async def _run(self, link: Link) -> None:
        try:
            while True:
                await self._serve(link)
                link = await self._reconnect()
                self.reconnects += 1
                self.link = link
                self._on_open(link)
        except (OSError, WebSocketException) as error:  # what waiting does not mend
            self.broken = UnreachableError(self._explained(error))
        except Exception as error:  # a bug: rather all calls fail than hang
            self.broken = ClientError(f"internal error of the client: {error!r}")
            self.broken.__cause__ = error
        self._fail_all(self.broken)

    async def _serve(self, link: Link) -> None:
        """Send what there is to send, and take replies until the connection is closed."""
        # Beside the reading, because a server stops reading one whose replies pile up.
        writing = asyncio.create_task(link.write())
        try:
            while True:
                call = self._on_message(link, await link.receive())
                if call is not None and call.is_full:
                    await self._until_wanted()
        except ConnectionClosed as error:
            self.link = None
            self._on_closed(link, error)
        finally:
            writing.cancel()

    async def _until_wanted(self) -> None:
        """Wait while callers with more responses than they keep up with are the only ones."""
        while True:
            waiting = [call for call in self._calls.values() if not (call.is_over or call.paused)]
            if not all(call.is_full for call in waiting) or not waiting:
                return
            self._stirred.clear()
            await self._stirred.wait()

    async def _reconnect(self) -> Link:
        """The next connection, however long it takes; raises what will not pass by waiting."""
        while True:
            most_s = min(_BACKOFF_MOST_S, _BACKOFF_FIRST_S * 2**self._attempts)
            self._attempts += 1
            await asyncio.sleep(random.uniform(0, most_s))  # noqa: S311 - spreads load, no secret
            try:
                return await self._connect()
            except (OSError, WebSocketException) as error:
                if not _may_pass(error):
                    raise
                self._trouble = self._explained(error)

    def _on_open(self, link: Link) -> None:
        for call in self._calls.values():
            if call.is_full:
                call.is_deferred = True
            elif call.is_resent and not call.paused and not call.is_over:
                link.put(call)
        for follower in list(self.followers):
            follower.opened()

    # ------------------------------------------------------------------ what comes back

    def _on_message(self, link: Link, message: str | bytes) -> Call | None:
        """Hand a reply to its call, which is returned."""
        try:
            reply = decode_reply(message)
        except ProtocolError as error:
            reply = Failure(id=error.request_id, code=ErrorCode.INTERNAL, message=error.message)
        if isinstance(reply, SessionInfo):
            link.greet(reply)
            return None
        self._attempts = 0
        call = None if reply.id is None else self._calls.get(reply.id)
        if call is not None and not link.has(call):
            call = None
        if isinstance(reply, Failure):
            self._on_failure(link, reply, call)
            return call
        if reply.id is not None and reply.final:
            link.answered(reply.id)
        if call is not None:
            call.take(InferResult.of(reply))
            if call.is_over:  # perhaps before the last reply: it takes no more
                link.cancel(call)
        return call

    def _on_failure(self, link: Link, failure: Failure, call: Call | None) -> None:
        retry_after_s = None if failure.retry_after_ms is None else failure.retry_after_ms / 1000
        error = InferenceError(failure.code, failure.message, retry_after_s=retry_after_s)
        if failure.id is not None:
            link.answered(failure.id)
            if call is not None:
                call.fail(error)
        elif not link.is_about_a_cancel(failure):
            # Of whichever request: none of them can be sure of its answer any more.
            self._fail_all(error)

    def _on_closed(self, link: Link, error: ConnectionClosed) -> None:
        self._trouble = f"{self.url}: connection lost: {error}"
        sent = [call for call in self._calls.values() if link.has(call) and not call.is_over]
        if error.rcvd is not None and error.rcvd.code == CloseCode.MESSAGE_TOO_BIG and sent:
            # Sent again, it would be refused again. Which one it was is not said: the largest.
            largest = max(sent, key=lambda call: len(call.frame))
            largest.fail(too_large(len(largest.frame)))
        for call in sent:
            call.lost()
        for follower in list(self.followers):
            follower.lost()

    def _fail_all(self, error: ClientError) -> None:
        for follower in list(self.followers):
            follower.fail(error)
        for call in list(self._calls.values()):
            call.fail(error)

    def _explained(self, error: Exception) -> str:
        return explained(self.url, error, has_token=self._headers is not None)


def is_secure(url: str) -> bool:
    """Whether it is an address with TLS."""
    return url.lower().startswith("wss:")


def is_token(text: str) -> bool:
    """Whether a header can carry it as a token."""
    return _TOKEN.fullmatch(text) is not None


def too_large(size: int, most: int | None = None) -> InferenceError:
    """The error of a message of `size` bytes, where the server takes `most` (if known)."""
    bound = "" if most is None else f", which is {most}"
    return InferenceError(
        ErrorCode.INVALID_ARGUMENT,
        f"a message of {size} bytes is more than the server takes{bound}: send fewer samples in "
        "one request, or raise its setting max_message_bytes",
    )


def _may_pass(error: Exception) -> bool:
    if isinstance(error, InvalidStatus):
        too_many = http.client.TOO_MANY_REQUESTS
        return error.response.status_code == too_many or process_exception(error) is None
    return process_exception(error) is None


def explained(url: str, error: Exception, *, has_token: bool = False) -> str:
    match error:
        case InvalidURI():
            return f"{url} is not a WebSocket address; expected ws://HOST:PORT or wss://HOST:PORT"
        case InvalidStatus():
            status = error.response.status_code
            meaning = _meaning(status, has_token=has_token, secure=is_secure(url))
            return f"{url}: HTTP {status}{meaning}"
        case TimeoutError():
            return f"{url}: no answer to the connection attempt"
        case ssl.SSLError():  # an OSError, whose number is OpenSSL's
            return f"{url}: {client_tls.explained(error)}"
        case ConnectionResetError() if is_secure(url) and not error.errno:
            # asyncio's, amid the TLS handshake: that of a worker's plain port, for one.
            return f"{url}: {client_tls.NO_TLS}"
        case OSError():
            # asyncio's own text ("Connect call failed") hides the reason.
            reason = os.strerror(error.errno) if error.errno else str(error)
            return f"{url}: cannot connect: {reason}"
        case _:
            return f"{url}: does not speak WebSocket as expected: {error}"


def _meaning(status: int, *, has_token: bool, secure: bool) -> str:
    match status:
        case http.client.BAD_REQUEST if secure:
            return (
                ": it may ask for a certificate of the client: `tls=…` in a program, "
                "--certificate and --key for a command"
            )
        case http.client.UPGRADE_REQUIRED if not secure:
            return ": it serves by TLS only: wss:// and its TLS port"
        case http.client.UNAUTHORIZED if has_token:
            return ": it does not know this token; check it, or have it added to the tokens file"
        case http.client.UNAUTHORIZED:
            return (
                ": it asks for a token: `token=…` in a program, --token-file or GPU_SERVICE_TOKEN "
                "for a command"
            )
        case http.client.FORBIDDEN:
            return ": it does not allow this; a proxy on the way may add an Origin header"
        case http.client.TOO_MANY_REQUESTS:
            return (
                ": too many connections of this client; share one client among tasks and threads, "
                "or close what is not used"
            )
        case 502 | 503 | 504:
            return ": the gateway has no worker to pass this on to, or the worker is full"
        case _:
            return " in place of a WebSocket; check the address"
