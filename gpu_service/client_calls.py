"""What callers of a client wait for: requests that are not answered to the end.

Owns the answers that have come and were not taken yet, and the policy of coming back after a
refusal. No sockets here: `client_link` sends calls and hands replies to them. All of it runs on
one event loop.
"""

import asyncio
import collections
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from gpu_service.messages import ErrorCode, Response

if TYPE_CHECKING:
    from gpu_service.client_link import Link

# How long a refused request waits when the server does not say it.
_RETRY_AFTER_S = 0.1
_SPREAD_MOST_S = 5.0

# Of many responses, so many may wait for a consumer before the connection is not read any more,
# and so many where other calls need it to be read.
FULL_RESPONSES = 64
MOST_RESPONSES = 1024


class ClientError(Exception):
    """A call that has no result. The message is for people."""


class UnreachableError(ClientError):
    """There is no server at the address, or none that takes connections."""


class DeadlineExceededError(ClientError):
    """Connected, but the answer did not come in time."""


class ConnectionLostError(ClientError):
    """The connection broke amid many responses, and going on was not wished, or not possible."""


class SequenceLostError(ClientError):
    """The state of a sequence is gone, and its steps cannot be replayed: begin a new one."""


class InferenceError(ClientError):
    """The server answered with an error. `code` is one of `messages.ErrorCode`, or a newer one."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """Outputs [n, …] by name (read-only arrays), and who computed them.

    `index` counts the responses to one request from 0; after the `final` one there is no more.
    """

    outputs: Mapping[str, NDArray[Any]]
    model_name: str
    model_version: str
    worker: str
    index: int = 0
    final: bool = True

    @classmethod
    def of(cls, response: Response) -> "InferResult":
        """What a caller gets of a reply."""
        return cls(
            outputs=response.outputs,
            model_name=response.model_name,
            model_version=response.model_version,
            worker=str(response.parameters.get("worker", "")),
            index=response.index or 0,
            final=response.final,
        )


class Call:
    """One request that waits for its answer. Made on the event loop."""

    # Whether it is sent again on the next connection by itself.
    is_resent = True

    def __init__(self, request_id: str, frame: bytes) -> None:
        self.id = request_id
        self.frame = frame
        self.future: asyncio.Future[InferResult] = asyncio.get_running_loop().create_future()
        self.link: Link | None = None  # that it was last sent on
        self.sends = 0  # since the server last answered it, be it with a refusal
        self.refusals = 0
        self.paused = False  # it was refused, and is not to be sent before it is time
        self.is_deferred = False  # it is to be sent again once it is not full

    @property
    def is_over(self) -> bool:
        """Whether nothing more is expected for it."""
        return self.future.done()

    @property
    def is_full(self) -> bool:
        """Whether more responses to it have come than its caller keeps up with."""
        return False

    def take(self, result: InferResult) -> None:
        """A response to it has come."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: ClientError) -> None:
        """It has no answer, or no more of them."""
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # its caller may be gone: that is no news then

    def lost(self) -> None:
        """The connection that it was sent on has ended."""

    def renew(self) -> None:
        """Wait anew: it was refused."""
        self.sends = 0
        self.refusals += 1
        self.future = asyncio.get_running_loop().create_future()


class Responses(Call):
    """One request with many responses, which wait here until they are taken.

    After a lost connection all of them come again, and those that came before are skipped.
    """

    def __init__(self, request_id: str, frame: bytes, *, resend: bool) -> None:
        super().__init__(request_id, frame)
        self._resend = resend
        self._came = 0
        self._version = ""
        self._waiting: collections.deque[InferResult] = collections.deque()
        self._stirred = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether more have come than its caller keeps up with."""
        return len(self._waiting) >= FULL_RESPONSES

    @property
    def may_repeat(self) -> bool:
        """Whether it may be sent again, from its beginning."""
        return self._resend or not self._came

    async def next(self) -> InferResult:
        """The next response, as soon as it is there; raises what ends them instead."""
        while not self._waiting:
            if self.future.done():
                return self.future.result()
            self._stirred.clear()
            await self._stirred.wait()
        return self._waiting.popleft()

    def take(self, result: InferResult) -> None:
        """A response to it has come, perhaps once more."""
        if self.is_over or result.index < self._came:
            return
        problem = self._problem(result)
        if problem is not None:
            self.fail(problem)
            return
        self._came += 1
        self._version = result.model_version
        self.sends = 0
        self._waiting.append(result)
        self._stirred.set()
        if result.final:
            self.future.set_result(result)

    def fail(self, error: ClientError) -> None:
        """There are no more responses; those that came are still taken."""
        super().fail(error)
        self._stirred.set()

    def lost(self) -> None:
        """The connection that it was sent on has ended."""
        if not self.may_repeat:
            self.fail(
                ConnectionLostError(
                    f"the connection was lost after {self._came} responses, and with resend=False "
                    "they are not asked for again; ask anew for all of them"
                )
            )

    def _problem(self, result: InferResult) -> ClientError | None:
        if result.index > self._came:
            message = f"response {result.index} came in place of {self._came}"
            return InferenceError(ErrorCode.INTERNAL, message)
        if self._came and result.model_version != self._version:
            return ConnectionLostError(
                f"after {self._came} responses of version {self._version!r} of the model the "
                f"connection was lost, and version {result.model_version!r} answers now; ask anew"
            )
        if len(self._waiting) >= MOST_RESPONSES:
            return ClientError(
                f"{MOST_RESPONSES} responses wait to be taken while other calls of this client "
                "need its connection; take them sooner, or use a client of its own for this"
            )
        return None


def is_refusal(error: ClientError) -> bool:
    """Whether what the server said means: not now."""
    # A code that this version lacks, too, where the server says when to come back.
    return isinstance(error, InferenceError) and (
        error.code in (ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED)
        or error.retry_after_s is not None
    )


def pause_s(retry_after_s: float | None, *, refusals: int, remaining_s: float) -> float | None:
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
