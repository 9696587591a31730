"""An asyncio client that outlives its connections: it reconnects and resends what is unanswered.

Owns one WebSocket at a time, and every call that waits for its answer. Belongs to the event
loop that it was entered on; `blocking` has the same for threads. Needs numpy and websockets,
never torch.
"""

import asyncio
import contextlib
import http.client
import itertools
import math
import os
import random
import urllib.parse
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.client import process_exception
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.frames import CloseCode
from websockets.typing import Subprotocol

from gpu_service.protocol import (
    SUBPROTOCOL,
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Scalar,
    decode_reply,
    encode_cancel,
    encode_request,
)

# Full jitter: the clients of a worker that restarts come back spread out, not all at once.
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MOST_S = 5.0

# A request that was under way each of so many times when the connection broke may well be
# what breaks it: it must not take down one worker after the other.
_MAX_SENDS = 10

# How long a refused request waits when the server does not say it.
_RETRY_AFTER_S = 0.1
_SPREAD_MOST_S = 5.0

_OPEN_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 2.0
_MAX_REPLY_BYTES = 256 << 20


class ClientError(Exception):
    """A call that has no result. The message is for people."""


class UnreachableError(ClientError):
    """There is no server at the address, or none that takes connections."""


class DeadlineExceededError(ClientError):
    """Connected, but the answer did not come in time."""


class InferenceError(ClientError):
    """The server answered with an error. `code` is one of `protocol.ErrorCode`, or a newer one."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """Outputs [n, …] by name (read-only arrays), and who computed them."""

    outputs: Mapping[str, NDArray[Any]]
    model_name: str
    model_version: str
    worker: str


class _Call:
    """One request that waits for its answer."""

    __slots__ = ("connection", "frame", "future", "paused", "refusals", "sends")

    def __init__(self, frame: bytes, future: "asyncio.Future[InferResult]") -> None:
        self.frame = frame
        self.future = future
        self.connection: ClientConnection | None = None  # that it was last sent on
        self.sends = 0  # since the server last answered it, be it with a refusal
        self.refusals = 0
        self.paused = False  # it was refused, and is not to be sent before it is time


class Client:
    """Calls a worker or a gateway; any number of calls may be under way at once.

    Entering it connects, once: an address where nothing answers is an error there and then.
    A server that goes away later is waited for, and every unanswered call sent again, so that
    a restart costs a caller time and nothing else. Predictions have no side effects, so
    running one twice is harmless.

    A server that has too much to do refuses requests and says when to come back. With
    `retry_refused` they are sent again then, within their deadline; else the refusal is raised.
    """

    def __init__(self, url: str, *, deadline_s: float = 30.0, retry_refused: bool = True) -> None:
        self._url = url
        self._deadline_s = deadline_s
        self._retry_refused = retry_refused
        self._reconnects = 0
        self._calls: dict[str, _Call] = {}
        self._connection: ClientConnection | None = None
        self._trouble = "not connected yet"
        self._broken: ClientError | None = UnreachableError(f"{url}: the client is not open")
        self._attempts = 0  # to connect, since a reply was last received
        self._ids = (f"{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count(1))
        self._runner: asyncio.Task[None] | None = None
        self._cancelling: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Connect. Raises UnreachableError."""
        try:
            self._connection = await self._connect()
        except (OSError, WebSocketException) as error:
            raise UnreachableError(_explained(self._url, error)) from None
        self._broken = None
        self._runner = asyncio.create_task(self._run(self._connection))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close. Calls still waiting fail."""
        self._broken = ClientError(f"{self._url}: the client was closed")
        self._fail_all(self._broken)
        for task in self._cancelling:
            task.cancel()
        assert self._runner is not None
        self._runner.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._runner
        if self._connection is not None:
            await self._connection.close()

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""
        return self._reconnects

    async def infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        model: str | None = None,
        version: str | None = None,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """Outputs for inputs [n, …] by name, of `model` (default: the one that is served).

        `parameters` are passed on as they are. Raises InferenceError when the server refuses
        or fails, DeadlineExceededError or UnreachableError after `deadline_s` (default: the
        client's), and ProtocolError for arrays of a dtype that cannot be sent.
        """
        if self._broken is not None:
            raise self._broken
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        request_id = next(self._ids)
        frame = encode_request(
            Request(
                inputs=inputs,
                id=request_id,
                model_name=model,
                model_version=version,
                parameters=parameters or {},
            )
        )
        call = _Call(frame, asyncio.get_running_loop().create_future())
        self._calls[request_id] = call
        try:
            async with asyncio.timeout(deadline_s) as timeout:
                while True:
                    try:
                        if self._connection is not None:
                            await self._send(call, self._connection)
                        return await call.future
                    except asyncio.CancelledError:
                        self._cancel(call, request_id)
                        raise
                    except InferenceError as error:
                        await self._pause(call, error, timeout.when())
        except TimeoutError:
            raise self._too_late(call, deadline_s) from None
        finally:
            del self._calls[request_id]

    def _cancel(self, call: _Call, request_id: str) -> None:
        """Tell the server that nobody waits for this one any more, so that it need not run."""
        connection = call.connection
        if connection is None or connection is not self._connection:
            return  # it was not sent, or went with its connection
        task = asyncio.create_task(_send_cancel(connection, request_id))
        self._cancelling.add(task)  # the loop itself would not keep it
        task.add_done_callback(self._cancelling.discard)

    async def _pause(self, call: _Call, error: InferenceError, ends_at: float | None) -> None:
        """Wait until a refused call may be sent again; raises `error` where that cannot be."""
        loop = asyncio.get_running_loop()
        if not self._retry_refused or not _is_refusal(error) or self._broken is not None:
            raise error
        remaining_s = math.inf if ends_at is None else ends_at - loop.time()
        pause_s = _pause_s(error.retry_after_s, refusals=call.refusals, remaining_s=remaining_s)
        if pause_s is None:
            raise error
        call.refusals += 1
        call.sends = 0
        call.future = loop.create_future()
        call.paused = True
        # Only what ends all calls, such as close(), completes it meanwhile.
        await asyncio.wait([call.future], timeout=pause_s)
        call.paused = False

    # ------------------------------------------------------------------ the connection

    async def _connect(self) -> ClientConnection:
        return await connect(
            self._url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,  # tensors do not shrink
            proxy=None,  # workers are inside; a proxy for the world outside cannot reach them
            open_timeout=_OPEN_TIMEOUT_S,
            close_timeout=_CLOSE_TIMEOUT_S,
            max_size=_MAX_REPLY_BYTES,
        )

    async def _run(self, connection: ClientConnection) -> None:
        try:
            while True:
                self._connection = connection
                await self._read(connection)
                connection = await self._reconnect()
                self._reconnects += 1
        except (OSError, WebSocketException) as error:  # what waiting does not mend
            self._broken = UnreachableError(_explained(self._url, error))
        except Exception as error:  # a bug: rather all calls fail than hang
            self._broken = ClientError(f"internal error of the client: {error!r}")
            self._broken.__cause__ = error
        self._fail_all(self._broken)

    async def _read(self, connection: ClientConnection) -> None:
        """Resend what is unanswered, and take replies until the connection is closed."""
        # Beside the reading, because a server stops reading one whose replies pile up.
        resending = asyncio.create_task(self._resend(connection))
        try:
            while True:
                self._on_message(await connection.recv())
                self._attempts = 0
        except ConnectionClosed as error:
            self._connection = None
            self._on_closed(connection, error)
        finally:
            resending.cancel()

    async def _reconnect(self) -> ClientConnection:
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
                self._trouble = _explained(self._url, error)

    async def _resend(self, connection: ClientConnection) -> None:
        for call in list(self._calls.values()):
            if call.connection is not connection and not call.paused:
                await self._send(call, connection)

    async def _send(self, call: _Call, connection: ClientConnection) -> None:
        if call.future.done():
            return
        if call.sends >= _MAX_SENDS:
            _fail(
                call, ClientError(f"given up after sending it {_MAX_SENDS} times: {self._trouble}")
            )
            return
        call.connection = connection
        call.sends += 1
        # When it is closed already, `_run` knows, and sends everything again.
        with contextlib.suppress(ConnectionClosed):
            await connection.send(call.frame)

    # ------------------------------------------------------------------ what comes back

    def _on_message(self, message: str | bytes) -> None:
        try:
            reply = decode_reply(message)
        except ProtocolError as error:
            reply = Failure(id=error.request_id, code=ErrorCode.INTERNAL, message=error.message)
        if isinstance(reply, Failure):
            retry_after_s = None if reply.retry_after_ms is None else reply.retry_after_ms / 1000
            failure = InferenceError(reply.code, reply.message, retry_after_s=retry_after_s)
            if reply.id is None:
                # Of whichever request: none of them can be sure of its answer any more.
                self._fail_all(failure)
            elif call := self._calls.get(reply.id):
                _fail(call, failure)
            return
        call = self._calls.get(reply.id or "")
        if call is None or call.future.done():
            return  # its caller has given up waiting
        call.future.set_result(
            InferResult(
                outputs=reply.outputs,
                model_name=reply.model_name,
                model_version=reply.model_version,
                worker=str(reply.parameters.get("worker", "")),
            )
        )

    def _on_closed(self, connection: ClientConnection, error: ConnectionClosed) -> None:
        self._trouble = f"{self._url}: connection lost: {error}"
        if error.rcvd is None or error.rcvd.code != CloseCode.MESSAGE_TOO_BIG:
            return
        # Sent again, it would be refused again. Which one it was is not said: the largest.
        sent = [call for call in self._calls.values() if call.connection is connection]
        if sent:
            largest = max(sent, key=lambda call: len(call.frame))
            message = f"a message of {len(largest.frame)} bytes is more than the server takes"
            _fail(largest, InferenceError(ErrorCode.INVALID_ARGUMENT, message))

    def _fail_all(self, error: ClientError) -> None:
        for call in self._calls.values():
            _fail(call, error)

    def _too_late(self, call: _Call, deadline_s: float) -> ClientError:
        if self._connection is None:
            return UnreachableError(f"no answer within {deadline_s:g} s; {self._trouble}")
        refused = f"; refused {call.refusals} times before that" if call.refusals else ""
        return DeadlineExceededError(f"{self._url}: no answer within {deadline_s:g} s{refused}")


async def fetch_json(url: str, path: str, *, timeout_s: float) -> Any:
    """What the HTTP side of the server at WebSocket address `url` says at `path`.

    Raises UnreachableError, and InferenceError for an answer that is an error.
    """
    return await asyncio.to_thread(_fetch_json, url, path, timeout_s)


def _fetch_json(url: str, path: str, timeout_s: float) -> Any:
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "wss"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(_explained(url, error)) from None
    finally:
        connection.close()
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise UnreachableError(f"{url}: {path} is not JSON; is this a gpu_service?") from None
    if response.status != http.client.OK:
        raise InferenceError(ErrorCode.NOT_FOUND, f"{url}: {path}: HTTP {response.status}")
    return content


async def _send_cancel(connection: ClientConnection, request_id: str) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(encode_cancel(request_id), text=True)


def _fail(call: _Call, error: ClientError) -> None:
    if not call.future.done():
        call.future.set_exception(error)


def _is_refusal(error: InferenceError) -> bool:
    # A code that this version lacks, too, where the server says when to come back.
    return error.code == ErrorCode.UNAVAILABLE or error.retry_after_s is not None


def _pause_s(retry_after_s: float | None, *, refusals: int, remaining_s: float) -> float | None:
    """How long a call waits that was refused after `refusals` others; None if it has no time.

    Never less than the server said. All that it refused at that moment were told the same:
    they come back spread over a time that doubles with each refusal.
    """
    least_s = _RETRY_AFTER_S if retry_after_s is None else retry_after_s
    if least_s >= remaining_s:
        return None
    spread_s = min(_SPREAD_MOST_S, max(least_s, _RETRY_AFTER_S) * 2.0 ** min(refusals, 16))
    # Leaves time for the answer.
    most_s = min(least_s + spread_s, (least_s + remaining_s) / 2)
    return random.uniform(least_s, most_s)  # noqa: S311 - spreads load, no secret


def _may_pass(error: Exception) -> bool:
    if isinstance(error, InvalidStatus):
        too_many = http.client.TOO_MANY_REQUESTS
        return error.response.status_code == too_many or process_exception(error) is None
    return process_exception(error) is None


def _explained(url: str, error: Exception) -> str:
    match error:
        case InvalidURI():
            return f"{url} is not a WebSocket address; expected ws://HOST:PORT or wss://HOST:PORT"
        case InvalidStatus() if error.response.status_code in (502, 503, 504):
            return (
                f"{url}: HTTP {error.response.status_code}: the gateway has no worker to pass "
                "this on to, or the worker is full"
            )
        case InvalidStatus():
            return (
                f"{url}: HTTP {error.response.status_code} in place of a WebSocket; "
                "check the address"
            )
        case TimeoutError():
            return f"{url}: no answer to the connection attempt"
        case OSError():
            # asyncio's own text ("Connect call failed") hides the reason.
            reason = os.strerror(error.errno) if error.errno else str(error)
            return f"{url}: cannot connect: {reason}"
        case _:
            return f"{url}: does not speak WebSocket as expected: {error}"
