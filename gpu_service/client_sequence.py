"""A sequence as its caller sees it: steps in order, over as many connections as it takes.

Owns the steps that are not answered, and the inputs of those that are: the server keeps the state
for one connection only, so that after a lost one all of them are replayed. No sockets here, and no
task: everything happens when a caller, a reply, the connection or a timer says so.
"""

import asyncio
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
from numpy.typing import NDArray

from gpu_service.client_calls import (
    Call,
    ClientError,
    InferenceError,
    InferResult,
    SequenceLostError,
    is_refusal,
    pause_s,
)
from gpu_service.client_link import MAX_SENDS, Connector
from gpu_service.messages import ErrorCode, Request, Scalar
from gpu_service.protocol import decode_request, encode_request

REPLAY_BYTES = 16 << 20

# Steps sent before the ones before are answered: the server finds the next one at hand.
_MOST_UNDER_WAY = 8

# After a refusal, one step at a time; so many successes later, one more at a time.
_CALM_STEPS = 16


class _Step(Call):
    """One step, which is sent once in each life of its sequence at the server.

    `request` has its inputs, its parameters, and neither an id nor what concerns the sequence.
    """

    is_resent = False  # its sequence does that

    def __init__(
        self,
        sequence: "Sequence",
        request: Request,
        *,
        size: int,
        is_last: bool = False,
        replay_index: int | None = None,
        ends_at: float = math.inf,
    ) -> None:
        super().__init__("", b"")
        self.request = request
        self.size = size
        self.is_last = is_last
        self.replay_index = replay_index  # in the record; None: it is not answered yet
        self.ends_at = ends_at
        self.place = -1  # in the order of sending
        self._sequence = sequence

    def take(self, result: InferResult) -> None:
        """Its result has come."""
        self._sequence.settle(self, result)

    def fail(self, error: ClientError) -> None:
        """It was refused, or has failed."""
        self._sequence.settle(self, error)


class Sequence:
    """One sequence: `step` after `step`, and `finish` for the last one, if that is known.

    Used as `async with client.sequence() as sequence:`; leaving ends it at the server. Any number
    of steps may be awaited at once: they run in the order of the calls, and several are sent
    ahead. What is refused is waited for, as `Client.infer` does, and nothing overtakes it.

    A step that raises has not happened: neither one that the server answers with an error, nor
    one whose deadline was over or whose task was cancelled (unless its answer came at that very
    moment: `steps` tells). The sequence goes on without it.

    After a lost connection, and where a step that is under way is taken back, the steps so far
    are replayed from their inputs, `replay_bytes` of them at most. With more, SequenceLostError.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        model: str | None,
        version: str | None,
        replay_bytes: int,
        deadline_s: float,
        retry_refused: bool,
    ) -> None:
        self._connector = connector
        self._model = model
        self._version = version
        self._replay_bytes = replay_bytes
        self._deadline_s = deadline_s
        self._retry_refused = retry_refused
        self._over: ClientError | None = ClientError(
            "the sequence is not open; use it as `async with client.sequence() as sequence:`"
        )
        self._is_opened = False
        self._pending: list[_Step] = []  # what callers wait for, in order
        self._is_finishing = False
        # What counts: the inputs of the steps that have succeeded, or None where they are too many.
        self._record: list[tuple[Request, int]] | None = []
        self._record_bytes = 0
        self._steps = 0
        # This life of it at the server:
        self._server_id: str | None = None  # where the first step was sent
        self._is_begun = False  # it has succeeded
        self._replayed = 0  # steps of the record that were sent
        self._under_way: dict[_Step, None] = {}
        self._places = 0
        self._wrong_from: float = math.inf  # what was sent from there on does not count
        self._is_astray = False  # its state is not what the steps so far make
        self._losses = 0  # of its state, since a step last succeeded for the first time
        # Refusals:
        self._refusal: InferenceError | None = None
        self._refusals = 0  # in a row
        self._timer: asyncio.TimerHandle | None = None
        self._calm = _CALM_STEPS * _MOST_UNDER_WAY  # successes since the last one

    async def __aenter__(self) -> Self:
        """Open it. The server hears of it with the first step."""
        if self._is_opened:
            raise ClientError("a sequence is entered once; make another with client.sequence()")
        if self._connector.broken is not None:
            raise self._connector.broken
        self._is_opened = True
        self._over = None
        self._connector.followers.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it, at the server, too. Steps that still wait fail."""
        self._end(ClientError("the sequence was left"))

    @property
    def steps(self) -> int:
        """How many steps have succeeded."""
        return self._steps

    async def step(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """The outputs of the next step for inputs [1, …] by name, which are copied.

        Errors are those of `Client.infer`, after which the step has not happened, and
        SequenceLostError, after which no step will be taken any more.
        """
        return await self._step(inputs, parameters, deadline_s, is_last=False)

    async def finish(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        parameters: Mapping[str, Scalar] | None = None,
        deadline_s: float | None = None,
    ) -> InferResult:
        """As `step`, and the last one: the server gives its place to another sequence."""
        return await self._step(inputs, parameters, deadline_s, is_last=True)

    async def _step(
        self,
        inputs: Mapping[str, NDArray[Any]],
        parameters: Mapping[str, Scalar] | None,
        deadline_s: float | None,
        *,
        is_last: bool,
    ) -> InferResult:
        if self._over is not None:
            raise self._over
        if self._is_finishing:
            raise ClientError("the sequence has its last step already; begin another one")
        # The caller may use its arrays again at once, but these are needed for long.
        frame = encode_request(
            Request(
                inputs=inputs,
                model_name=self._model,
                model_version=self._version,
                parameters=parameters or {},
            )
        )
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        step = _Step(
            self,
            decode_request(frame),
            size=len(frame),
            is_last=is_last,
            ends_at=asyncio.get_running_loop().time() + deadline_s,
        )
        self._pending.append(step)
        self._is_finishing = is_last
        self._advance()
        try:
            async with asyncio.timeout_at(step.ends_at):
                return await step.future
        except TimeoutError:
            if step.future.done() and not step.future.cancelled():
                return step.future.result()  # it came at that very moment
            raise self._connector.too_late(step, deadline_s) from None
        finally:
            if step in self._pending:
                self._withdraw(step)

    # ------------------------------------------------------------------ link.Follower

    def opened(self) -> None:
        """There is a new connection."""
        self._advance()

    def lost(self) -> None:
        """The connection has ended, and with it the state at the server."""
        self._losses += bool(self._under_way)
        self._clear()
        self._server_id = None
        self._is_astray = True

    def fail(self, error: ClientError) -> None:
        """There will be no answers any more."""
        self._end(error)

    # ------------------------------------------------------------------ sending

    def _advance(self) -> None:
        """Send what may be sent now."""
        if self._over is not None or self._connector.link is None or self._timer is not None:
            return
        while self._pending:
            if self._under_way and (self._is_astray or self._refusal or not self._is_begun):
                return
            if self._is_astray and not self._begin_anew():
                return
            if self._refusal is not None and not self._may_go_on(self._refusal):
                return
            step = self._next()
            if step is None or not self._has_room_for(step):
                return
            self._send(step)

    def _next(self) -> _Step | None:
        if self._record is not None and self._replayed < len(self._record):
            request, size = self._record[self._replayed]
            return _Step(self, request, size=size, replay_index=self._replayed)
        return next((step for step in self._pending if step not in self._under_way), None)

    def _has_room_for(self, step: _Step) -> bool:
        if not self._under_way:
            return True
        most = min(_MOST_UNDER_WAY, 1 + self._calm // _CALM_STEPS)
        if len(self._under_way) >= most:
            return False
        # What overtakes a refused step spoils the state: never more than could be replayed.
        new = sum(each.size for each in (*self._under_way, step) if each.replay_index is None)
        return self._record_bytes + new <= self._replay_bytes

    def _send(self, step: _Step) -> None:
        parameters = dict(step.request.parameters)
        if self._server_id is None or not self._is_begun:
            # A new name each time, so that no reply, and no cancel, is about another life.
            self._end_at_server()
            self._server_id = self._connector.new_id()
            parameters["sequence_start"] = True
        parameters["sequence_id"] = self._server_id
        if step.is_last:
            parameters["sequence_end"] = True
        step.id = self._connector.new_id()
        step.frame = encode_request(
            msgspec.structs.replace(step.request, id=step.id, parameters=parameters)
        )
        if step.replay_index is not None:
            self._replayed = step.replay_index + 1
        step.place = self._places
        self._places += 1
        self._under_way[step] = None
        self._connector.put(step)

    def _begin_anew(self) -> bool:
        """Begin another life at the server, with a replay; False if that cannot be."""
        self._end_at_server()
        self._is_astray = False
        self._is_begun = False
        self._wrong_from = math.inf
        self._replayed = 0
        if self._steps and self._record is None:
            self._lose(
                f"its {self._steps} steps so far are more than replay_bytes "
                f"({self._replay_bytes}) can hold; begin a new one, or allow more"
            )
            return False
        # One more than a step is sent, so that one which breaks connections is given up alone.
        if self._losses > MAX_SENDS and self._steps:
            self._lose(f"so it was {self._losses} times without a step between; begin a new one")
            return False
        return True

    def _may_go_on(self, refusal: InferenceError) -> bool:
        """Wait until what was refused may be sent again; True if its step has failed instead."""
        loop = asyncio.get_running_loop()
        step = self._pending[0]
        remaining_s = step.ends_at - loop.time()
        wait_s = pause_s(refusal.retry_after_s, refusals=self._refusals, remaining_s=remaining_s)
        self._wrong_from = math.inf
        if wait_s is None:
            self._refusal = None
            self._answer(step, refusal)
            return True
        self._refusals += 1
        step.refusals += 1
        self._timer = loop.call_later(wait_s, self._resume)
        return False

    def _resume(self) -> None:
        self._timer = None
        self._refusal = None
        self._advance()

    # ------------------------------------------------------------------ what comes back

    def settle(self, step: _Step, outcome: InferResult | ClientError) -> None:
        """A step that was sent has been answered."""
        if step not in self._under_way:
            return
        del self._under_way[step]
        self._connector.forget(step)
        step.sends = 0
        if step.place >= self._wrong_from:
            # Of a state that is not its own. It is sent again, unless it was taken back.
            self._is_astray |= isinstance(outcome, InferResult)
        elif isinstance(outcome, InferResult):
            self._succeeded(step, outcome)
        else:
            self._failed(step, outcome)
        self._advance()

    def _succeeded(self, step: _Step, result: InferResult) -> None:
        self._is_begun = True
        self._refusals = 0
        self._calm += 1
        if step.replay_index is not None:
            return
        self._losses = 0
        self._steps += 1
        self._keep(step)
        self._answer(step, result)
        if step.is_last:
            self._server_id = None
            self._end(ClientError("the sequence has had its last step; begin another one"))

    def _failed(self, step: _Step, error: ClientError) -> None:
        is_replay = step.replay_index is not None
        code = error.code if isinstance(error, InferenceError) else None
        if code == ErrorCode.CANCELLED and self._is_astray:
            return  # with all of this life
        if code == ErrorCode.NOT_FOUND and self._is_begun:
            # The version of its model was unloaded, with all state; or a last step failed, which
            # ends the sequence all the same.
            self._losses += 1
            self._wrong_from = step.place
            self._is_astray = True
            return
        if is_refusal(error) and (self._retry_refused or is_replay):
            assert isinstance(error, InferenceError)
            self._wrong_from = step.place
            self._refusal = error
            self._calm = 0
            if step.replay_index is not None:
                self._replayed = step.replay_index
            return
        if step.replay_index is not None:
            self._lose(f"the replay of its step {step.replay_index + 1} failed: {error}")
            return
        self._answer(step, error)

    def _keep(self, step: _Step) -> None:
        """Keep the inputs of a step for a replay, as long as all of them fit."""
        self._record_bytes += step.size
        if self._record_bytes > self._replay_bytes:
            self._record = None
        if self._record is not None:
            # What was urgent once is not so in a replay.
            parameters = dict(step.request.parameters)
            parameters.pop("timeout_ms", None)
            request = msgspec.structs.replace(step.request, parameters=parameters)
            self._record.append((request, step.size))
            self._replayed = len(self._record)

    def _answer(self, step: _Step, outcome: InferResult | ClientError) -> None:
        self._pending.remove(step)
        if step.is_last:
            self._is_finishing = False
        if isinstance(outcome, InferResult):
            Call.take(step, outcome)
        else:
            Call.fail(step, outcome)

    # ------------------------------------------------------------------ how it ends

    def _withdraw(self, step: _Step) -> None:
        """Its caller waits no more: it shall not have happened."""
        self._pending.remove(step)
        if step.is_last:
            self._is_finishing = False
        if step not in self._under_way:
            return
        link = self._connector.link
        if link is None or not link.has(step):
            # Not sent yet, and now it never is. What was to come behind it is sent as it is.
            del self._under_way[step]
            self._connector.forget(step)
            self._advance()
            return
        self._wrong_from = min(self._wrong_from, step.place)
        self._is_astray = True
        self._end_at_server()

    def _lose(self, why: str) -> None:
        self._end(
            SequenceLostError(
                f"{self._connector.url}: the state of the sequence is gone, and {why}"
            )
        )

    def _end(self, error: ClientError) -> None:
        if self._over is not None:
            return
        self._over = error
        self._connector.followers.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._end_at_server()
        self._clear()
        for step in list(self._pending):
            self._answer(step, error)
        self._record = None

    def _clear(self) -> None:
        """Nothing is under way any more."""
        for step in self._under_way:
            self._connector.forget(step)
            if step.replay_index is not None:
                step.future.cancel()  # nor is it to be sent if it was not yet
        self._under_way.clear()

    def _end_at_server(self) -> None:
        if self._server_id is not None:
            self._connector.cancel_sequence(self._server_id)
            self._server_id = None
