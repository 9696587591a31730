"""The client for programs without asyncio: any thread calls, and waits for its own answer.

Owns one daemon thread, whose private event loop runs one `client.Client`. So there is one
implementation of reconnecting, resending, refusals and deadlines, and of keepalive and flow
control, which a second one on blocking sockets would have to rebuild. Callers share nothing
but the lock that says whether the client is open.
"""

import asyncio
import concurrent.futures
import contextlib
import enum
import os
import ssl
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from numpy.typing import NDArray

from gpu_service.client import Client, ClientError, InferResult, Sequence
from gpu_service.client_sequence import REPLAY_BYTES
from gpu_service.messages import Scalar, SessionInfo

T = TypeVar("T")

_CLOSE_TIMEOUT_S = 10.0  # longer than `Client` takes to close


class State(enum.Enum):
    """Where a client is in its life."""

    NEW = enum.auto()
    OPENING = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


_ALLOWED = {
    State.NEW: {State.OPENING, State.CLOSED},
    State.OPENING: {State.OPEN, State.CLOSED},
    State.OPEN: {State.CLOSED},
    State.CLOSED: {State.CLOSED},
}


class BlockingClient:
    """Calls a worker or a gateway, from any number of threads at once.

    Behaves as `client.Client`, whose options these are; errors are the same classes.
    `close()` may come from any thread: calls that still wait fail then. A Ctrl-C ends the call
    that it interrupts and no other.

    Does not survive a fork: the child has no thread that could answer. It gets an error at its
    first call, and nothing that it does disturbs the parent's client.
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
        self._url = url
        self._client = Client(
            url, deadline_s=deadline_s, retry_refused=retry_refused, token=token, tls=tls
        )
        # Guards the state, and what is handed to the loop by it. A finalizer may come amid that.
        self._lock = threading.RLock()
        self._state = State.NEW
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._living: asyncio.Task[None] | None = None  # ends when it is cancelled, once
        # A daemon: who forgets to close must still be able to leave.
        self._thread = threading.Thread(target=self._main, name="gpu-service-client", daemon=True)
        self._process = os.getpid()

    def __enter__(self) -> Self:
        """Connect. Raises UnreachableError."""
        self._check_process()
        with self._lock:
            self._move(State.OPENING)
        self._thread.start()
        try:
            self._opened.result()
        except asyncio.CancelledError:
            raise ClientError(f"{self._url}: {_NOT_OPEN[State.CLOSED]}") from None
        except BaseException:  # there is no server, or Ctrl-C
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close. Calls still waiting in other threads fail."""
        self.close()

    def close(self) -> None:
        """End the connection and its thread. A second time, it does nothing."""
        if os.getpid() != self._process:
            return  # a forked child; its parent goes on
        with self._lock:
            self._move(State.CLOSED)
            living, self._living = self._living, None
            if self._loop is not None and living is not None:
                with contextlib.suppress(RuntimeError):  # opening failed: the loop has ended
                    self._loop.call_soon_threadsafe(living.cancel)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_CLOSE_TIMEOUT_S)

    @property
    def reconnects(self) -> int:
        """How often a lost connection was replaced."""
        return self._client.reconnects

    @property
    def session(self) -> SessionInfo | None:
        """What the server said first on the present connection; None until it has."""
        return self._client.session

    def infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        model: str | None = None,
        version: str | None = None,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """Outputs for inputs [n, …] by name; see `client.Client.infer`.

        Blocks the calling thread, `deadline_s` at most (default: the client's).
        """
        return self.run(
            self._client.infer(
                inputs, model=model, version=version, parameters=parameters, deadline_s=deadline_s
            )
        )

    def stream_infer(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        max_responses: int,
        model: str | None = None,
        version: str | None = None,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
        resend: bool = True,
    ) -> Generator[InferResult, None, None]:
        """Responses to one request, as they come; see `client.Client.stream_infer`.

        Blocks the thread that iterates, for each response `deadline_s` at most. Leaving the loop
        early cancels the request.
        """
        responses = self._client.stream_infer(
            inputs,
            max_responses=max_responses,
            model=model,
            version=version,
            parameters=parameters,
            deadline_s=deadline_s,
            resend=resend,
        )
        while (result := self.run(_next(responses))) is not None:
            try:
                yield result
            except BaseException:  # GeneratorExit, mostly
                # Without waiting: a garbage collector may do this in any thread.
                self._post(responses.aclose())
                raise

    def sequence(
        self,
        *,
        model: str | None = None,
        version: str | None = None,
        replay_bytes: int = REPLAY_BYTES,
        deadline_s: float | None = None,
    ) -> "BlockingSequence":
        """A sequence of steps; see `client.Client.sequence`."""
        sequence = self._client.sequence(
            model=model, version=version, replay_bytes=replay_bytes, deadline_s=deadline_s
        )
        return BlockingSequence(self, sequence)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the asyncio client in the client's thread, and wait for its end."""
        future = self._hand_over(call)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientError(f"{self._url}: {_NOT_OPEN[State.CLOSED]}") from None
        except BaseException:  # Ctrl-C, or what another signal's handler raises
            future.cancel()
            raise

    def _hand_over(self, call: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        try:
            self._check_process()
            with self._lock:
                if self._state is not State.OPEN or self._loop is None:
                    raise ClientError(f"{self._url}: {_NOT_OPEN[self._state]}")
                # Under the lock: what is handed over before the loop is told to stop is answered.
                return asyncio.run_coroutine_threadsafe(call, self._loop)
        except BaseException:
            call.close()
            raise

    def _post(self, call: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(ClientError):  # closed: what it is about went with that
            self._hand_over(call)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ClientError(
                f"{self._url}: this client was made before a fork and works in the parent "
                "process alone; make one in each process"
            )

    def _move(self, to: State) -> None:
        if to not in _ALLOWED[self._state]:
            raise RuntimeError(f"a client cannot go from {self._state.name} to {to.name}")
        self._state = to

    # ------------------------------------------------------------------ the client's thread

    def _main(self) -> None:
        ended: BaseException = asyncio.CancelledError()
        try:
            asyncio.run(self._live())
        except BaseException as error:
            ended = error
        if not self._opened.done():  # else nobody waits to hear of it
            self._opened.set_exception(ended)

    async def _live(self) -> None:
        with self._lock:
            if self._state is State.CLOSED:
                return
            self._loop = asyncio.get_running_loop()
            self._living = asyncio.current_task()
        async with self._client:
            with self._lock:
                if self._state is State.OPENING:
                    self._move(State.OPEN)
            self._opened.set_result(None)
            await asyncio.Event().wait()  # until close() cancels this


class BlockingSequence:
    """A `client.Sequence` for threads: `with client.sequence() as sequence:`.

    Steps of several threads run in the order of their calls, and are sent ahead of the answers.
    """

    def __init__(self, client: BlockingClient, sequence: Sequence) -> None:
        self._client = client
        self._sequence = sequence

    def __enter__(self) -> Self:
        """Open it. The server hears of it with the first step."""
        self._client.run(self._sequence.__aenter__())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it, at the server, too. Steps that still wait fail."""
        with contextlib.suppress(ClientError):  # closed: the sequence went with it
            self._client.run(self._sequence.__aexit__(kind, error, traceback))

    @property
    def steps(self) -> int:
        """How many steps have succeeded."""
        return self._sequence.steps

    def step(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """The outputs of the next step; see `client.Sequence.step`."""
        return self._client.run(
            self._sequence.step(inputs, parameters=parameters, deadline_s=deadline_s)
        )

    def finish(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """As `step`, and the last one; see `client.Sequence.finish`."""
        return self._client.run(
            self._sequence.finish(inputs, parameters=parameters, deadline_s=deadline_s)
        )


async def _next(responses: AsyncGenerator[InferResult, None]) -> InferResult | None:
    return await anext(responses, None)


_NOT_OPEN = {
    State.NEW: "the client is not open; use it as `with BlockingClient(…) as client:`",
    State.OPENING: "the client is not open yet",
    State.CLOSED: "the client was closed",
}
