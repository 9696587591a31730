"""An asyncio client that outlives its connections: it reconnects and resends what is unanswered.

Owns what a caller sees: predictions, many responses to one request, and sequences (see
`client_sequence`). The connection is `client_link`'s. Belongs to the event loop that it was
entered on; `blocking` has the same for threads. Needs numpy and websockets, never torch.
"""

import asyncio
import contextlib
import http.client
import math
import os
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from numpy.typing import NDArray

from gpu_service.client_calls import (
    Call,
    ClientError,
    ConnectionLostError,
    DeadlineExceededError,
    InferenceError,
    InferResult,
    Responses,
    SequenceLostError,
    UnreachableError,
    is_refusal,
    pause_s,
)
from gpu_service.client_link import Connector, explained, is_token
from gpu_service.client_sequence import REPLAY_BYTES, Sequence
from gpu_service.messages import ErrorCode, Request, Scalar, SessionInfo
from gpu_service.protocol import encode_request

__all__ = [
    "Client",
    "ClientError",
    "ConnectionLostError",
    "DeadlineExceededError",
    "InferResult",
    "InferenceError",
    "Sequence",
    "SequenceLostError",
    "UnreachableError",
    "fetch_json",
    "read_token",
]


class Client:
    """Calls a worker or a gateway; any number of calls may be under way at once.

    Entering it connects, once: an address where nothing answers is an error there and then.
    A server that goes away later is waited for, and every unanswered call sent again, so that
    a restart costs a caller time and nothing else. Predictions have no side effects, so
    running one twice is harmless.

    A server that has too much to do, or where this client has used up its share, refuses
    requests and says when to come back. With `retry_refused` they are sent again then, within
    their deadline; else the refusal is raised.

    `token` says who connects, where a server wants to know (see `read_token`). `tls` is what
    `client_tls.context` makes, or an `ssl.SSLContext` of one's own, for wss:// with a CA file or a
    certificate of the client. ValueError for what cannot be one, and for `tls` without wss://.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 30.0,
        retry_refused: bool = True,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._deadline_s = deadline_s
        self._retry_refused = retry_refused
        self._connector = Connector(url, token=token, tls=tls)

    async def __aenter__(self) -> Self:
        """Connect. Raises UnreachableError."""
        await self._connector.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close. Calls still waiting fail."""
        await self._connector.close()

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""
        return self._connector.reconnects

    @property
    def session(self) -> SessionInfo | None:
        """What the server said first on the present connection; None until it has."""
        link = self._connector.link
        return None if link is None else link.session

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
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        call = Call(*self._request(inputs, model, version, parameters or {}))
        with self._connector.calling(call), self._deadline_of(call, deadline_s):
            async with asyncio.timeout(deadline_s) as timeout:
                while True:
                    try:
                        return await call.future
                    except InferenceError as error:
                        await self._come_back(call, error, timeout.when())

    async def stream_infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        max_responses: int,
        model: str | None = None,
        version: str | None = None,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
        resend: bool = True,
    ) -> AsyncGenerator[InferResult, None]:
        """Responses to one request for inputs [1, …], `max_responses` at most, as they come.

        Arguments and errors are those of `infer`, but `deadline_s` bounds the wait for each
        response by itself. Ending the iteration (`aclose`, which leaving a loop early amounts
        to) cancels the request.

        After a lost connection the request is sent again, and the responses that came before
        are skipped: right for a model that answers equal inputs equally. One that draws at
        random begins another text then. With `resend=False`, ConnectionLostError is raised
        instead, unless nothing had come.

        At most 64 responses wait for a slow consumer. Beyond, the connection is not read as
        long as no other call needs it, and up to 1024 wait where one does; then ClientError.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        parameters = {**(parameters or {}), "max_responses": max_responses}
        call = Responses(*self._request(inputs, model, version, parameters), resend=resend)
        with self._connector.calling(call):
            result = None
            while result is None or not result.final:
                result = await self._next(call, deadline_s)
                yield result

    def sequence(
        self,
        *,
        model: str | None = None,
        version: str | None = None,
        replay_bytes: int = REPLAY_BYTES,
        deadline_s: float | None = None,
    ) -> Sequence:
        """A sequence of steps, whose state a model keeps at the server; see `Sequence`.

        `deadline_s` bounds each step (default: the client's).
        """
        return Sequence(
            self._connector,
            model=model,
            version=version,
            replay_bytes=replay_bytes,
            deadline_s=self._deadline_s if deadline_s is None else deadline_s,
            retry_refused=self._retry_refused,
        )

    def _request(
        self,
        inputs: Mapping[str, NDArray[Any]],
        model: str | None,
        version: str | None,
        parameters: Mapping[str, Scalar],
    ) -> tuple[str, bytes]:
        """The id and the frame of a new request."""
        if self._connector.broken is not None:
            raise self._connector.broken
        request = Request(
            inputs=inputs,
            id=self._connector.new_id(),
            model_name=model,
            model_version=version,
            parameters=parameters,
        )
        assert request.id is not None
        return request.id, encode_request(request)

    async def _next(self, call: Responses, deadline_s: float) -> InferResult:
        with self._deadline_of(call, deadline_s):
            async with asyncio.timeout(deadline_s) as timeout:
                while True:
                    try:
                        result = await call.next()
                    except InferenceError as error:
                        if not call.may_repeat:
                            raise
                        await self._come_back(call, error, timeout.when())
                        continue
                    if not call.is_full:
                        self._connector.has_room(call)
                    return result

    @contextlib.contextmanager
    def _deadline_of(self, call: Call, deadline_s: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise self._connector.too_late(call, deadline_s) from None

    async def _come_back(self, call: Call, error: InferenceError, ends_at: float | None) -> None:
        """Send a refused call again when it is time; raises `error` where that cannot be."""
        if not self._retry_refused or not is_refusal(error) or self._connector.broken is not None:
            raise error
        loop = asyncio.get_running_loop()
        remaining_s = math.inf if ends_at is None else ends_at - loop.time()
        wait_s = pause_s(error.retry_after_s, refusals=call.refusals, remaining_s=remaining_s)
        if wait_s is None:
            raise error
        call.renew()
        call.paused = True
        # Only what ends all calls, such as close(), completes it meanwhile.
        await asyncio.wait([call.future], timeout=wait_s)
        call.paused = False
        self._connector.put(call)


def read_token(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The token in the file `path`, else in GPU_SERVICE_TOKEN of the environment, if any.

    Raises ClientError for a file that cannot be read, and for what is no token.
    """
    source = "GPU_SERVICE_TOKEN" if path is None else f"token file {path}"
    try:
        text = environ.get(source, "") if path is None else path.read_text("utf-8")
    except OSError as error:
        raise ClientError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeError:
        text = ""
    token = text.strip()
    if path is None and not token:
        return None
    if not is_token(token):
        raise ClientError(f"{source} must hold one token, and nothing else")
    return token


async def fetch_json(
    url: str, path: str, *, timeout_s: float, tls: ssl.SSLContext | None = None
) -> Any:
    """What the HTTP side of the server at WebSocket address `url` says at `path`.

    That is below the path of `url`, where a gateway has a service; or, since a server takes
    WebSockets at any path, further up.

    Raises UnreachableError, and InferenceError for an answer that is an error.
    """
    return await asyncio.to_thread(_fetch_json, url, path, timeout_s, tls)


def _fetch_json(url: str, path: str, timeout_s: float, tls: ssl.SSLContext | None) -> Any:
    refused: ClientError | None = None
    for target in _targets(urllib.parse.urlsplit(url).path, path):
        status, body = _get(url, target, timeout_s, tls)
        try:
            return _content(url, target, status, body)
        except ClientError as error:
            refused = refused or error
    assert refused is not None, "there is always one target"
    raise refused


def _targets(base: str, path: str) -> Iterator[str]:
    """Where `path` may be, below `base` first, then further up."""
    base = urllib.parse.quote(base, safe="/%:@!$&'()*+,;=~").rstrip("/")
    while base:
        yield f"{base}{path}"
        base = base.rpartition("/")[0].rstrip("/")
    yield path


def _get(url: str, target: str, timeout_s: float, tls: ssl.SSLContext | None) -> tuple[int, bytes]:
    """The status and the body of what the server says to a request. Raises UnreachableError."""
    connection = _http(urllib.parse.urlsplit(url), timeout_s, tls)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(explained(url, error)) from None
    finally:
        connection.close()


def _content(url: str, target: str, status: int, body: bytes) -> Any:
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise UnreachableError(f"{url}: {target} is not JSON; is this a gpu_service?") from None
    if status != http.client.OK:
        raise InferenceError(ErrorCode.NOT_FOUND, f"{url}: {target}: HTTP {status}")
    return content


def _http(
    address: urllib.parse.SplitResult, timeout_s: float, tls: ssl.SSLContext | None
) -> http.client.HTTPConnection:
    host, port = address.hostname or "", address.port
    if address.scheme == "wss":
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=tls)
    return http.client.HTTPConnection(host, port, timeout=timeout_s)
