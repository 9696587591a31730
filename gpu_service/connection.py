"""What one connection has asked for: its requests that are not answered, and its sequences.

Takes each message, checks it and queues it, or refuses it; `service` answers what was queued.
Owns the requests of its caller by id until their last reply, and which sequences it has begun. On
the event loop; no sockets.
"""

import math
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from gpu_service.batching import QueueFullError, RequestTooLargeError, State, Ticket
from gpu_service.device import Stream, StreamsFullError, Tensors
from gpu_service.finished import FinishedBatch
from gpu_service.messages import Cancel, ErrorCode, Failure, ProtocolError, Request
from gpu_service.metrics import Reason
from gpu_service.parameters import (
    SequenceId,
    invalid,
    most_responses_of,
    priority_of,
    sequence_of,
    timeout_of,
)
from gpu_service.protocol import decode_anew, decode_known, quote
from gpu_service.registry import Served

if TYPE_CHECKING:
    from gpu_service.service import Service

# A sequence of another connection has to end first; nobody knows when.
_STREAMS_FULL_RETRY_MS = 1000

# Final: compiled, a variable of C's and no look-up.
_now: Final = time.perf_counter
_MALFORMED: Final = Reason.MALFORMED
_MISMATCH: Final = Reason.MISMATCH


class Caller(Protocol):
    """Where requests come from and replies go to: one connection."""

    @property
    def request_id(self) -> str:
        """The connection's name in logs."""

    @property
    def is_clogged(self) -> bool:
        """Whether replies wait because they are not read; `Connection.unclog` says when not."""

    @property
    def trace_parent(self) -> str | None:
        """What the handshake's `traceparent` said."""

    def answer(self, pieces: list[Any], *, binary: bool, final: bool) -> None:
        """Take one reply (binary, else UTF-8 text); `final`: it ends what it answers.

        `pieces` are buffers of bytes that follow one another, read before this returns; the list
        is the callee's.
        """

    def no_answer(self) -> None:
        """The message that was just received gets no answer of its own."""


class Sequence:
    """One sequence of a connection, and the model that keeps its state."""

    __slots__ = ("answering", "served", "stream")

    def __init__(self, served: "Served[InFlight]", stream: Stream) -> None:
        self.served = served
        self.stream = stream
        self.answering: InFlight | None = None  # what asked for many responses, until the last


class Responses:
    """Where a request is that may have many responses."""

    __slots__ = ("index", "is_counted", "most", "owns_stream", "sequence")

    def __init__(self, most: int) -> None:
        self.most = most
        self.index = 0  # of the next one
        self.is_counted = False  # its model is told of it as of a sequence
        self.owns_stream = False  # whose place is given back with the last response
        self.sequence: Sequence | None = None  # which takes no other step meanwhile


class InFlight:
    """A request that was taken and is not answered to the end."""

    __slots__ = (
        "arrived_at",
        "batch",
        "binary",
        "connection",
        "id",
        "inputs",
        "is_ended",
        "is_whole",
        "request",
        "responses",
        "served",
        "stream",
        "ticket",
    )

    def __init__(
        self,
        request: Request,
        served: "Served[InFlight]",
        connection: "Connection",
        arrived_at: float,
    ) -> None:
        self.request = request
        # Again, because here they are found at once.
        self.id = request.id
        self.binary = request.binary
        self.is_whole = request.outputs is None  # all outputs are wanted
        self.inputs: Tensors = request.inputs
        self.served = served
        self.connection = connection
        self.arrived_at = arrived_at
        self.stream: Stream | None = None
        self.responses: Responses | None = None  # None: there is one
        self.is_ended = False  # answered to the end, or never to be answered
        self.batch: FinishedBatch[InFlight] | None = None  # that it, or its last step, ran in
        self.ticket: Ticket[InFlight] | None = None  # None while its caller is clogged

    def release(self) -> None:
        """Let go of what refers back to it: a cycle would keep its inputs until the next GC."""
        self.ticket = None
        self.batch = None


class Connection:
    """What one caller has asked for: its requests that are not answered, and its sequences."""

    def __init__(self, service: "Service", caller: Caller) -> None:
        self.caller = caller
        self._service = service
        self._works: dict[InFlight, None] = {}
        self._ids: dict[str, InFlight] = {}
        self._sequences: dict[SequenceId, Sequence] = {}
        self._clogged: list[InFlight] = []  # wait until replies are read

    def receive(self, message: str | bytes) -> None:
        """Take one message. Never raises: whatever is wrong with it is answered."""
        arrived_at = _now()
        service = self._service
        request_id: str | None = None
        reason = _MALFORMED
        service.in_flight.inc()
        try:
            request = decode_known(message) if isinstance(message, bytes) else None
            if request is None:
                decoded = decode_anew(message)
                if isinstance(decoded, Cancel):
                    service.in_flight.dec()
                    self.caller.no_answer()
                    self._cancel_as_wished(decoded)
                    return
                request = decoded
            request_id = request.id
            if request_id is not None and request_id in self._ids:
                reason = Reason.DUPLICATE_ID
                raise ProtocolError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"id {request_id!r} is in flight on this connection already",
                    request_id=request_id,
                )
            reason = _MISMATCH
            served = self._served(request)
            work = InFlight(request, served, self, arrived_at)
            if request.parameters or served.keeps_state:
                self._submit_with_parameters(work)
            else:
                fit = served.fit
                work.ticket = served.channel.submit(
                    work, samples=fit.samples_in(request), key=fit.key(work.inputs)
                )
            self._works[work] = None
            if request_id is not None:
                self._ids[request_id] = work
            return
        except ProtocolError as error:
            if error.code is ErrorCode.NOT_FOUND:
                reason = Reason.NOT_FOUND
            failure = Failure(id=error.request_id, code=error.code, message=error.message)
        except RequestTooLargeError as error:
            reason = Reason.TOO_LARGE
            failure = Failure(id=request_id, code=ErrorCode.INVALID_ARGUMENT, message=str(error))
        except QueueFullError as error:
            reason = Reason.QUEUE_FULL
            failure = Failure(
                id=request_id,
                code=ErrorCode.UNAVAILABLE,
                message=str(error),
                retry_after_ms=math.ceil(error.retry_after_s * 1000),
            )
        except StreamsFullError as error:
            reason = Reason.STREAMS_FULL
            failure = Failure(
                id=request_id,
                code=ErrorCode.RESOURCE_EXHAUSTED,
                message=str(error),
                retry_after_ms=_STREAMS_FULL_RETRY_MS,
            )
        except Exception as error:
            reason = Reason.INTERNAL
            failure = service.internal(error, request_id, self.caller)
        binary = not isinstance(message, str)
        service.answer_failure(failure, reason, self.caller, binary=binary)

    def close(self) -> None:
        """Its caller has gone: nothing is answered any more, its sequences end."""
        for work in list(self._works):
            self._cancel(work)
            self.forget(work)
            work.release()
            self._service.in_flight.dec()
            self._service.metrics.ended(ErrorCode.CANCELLED, Reason.DISCONNECTED)
        for sequence_id in list(self._sequences):
            self._end(sequence_id)

    def unclog(self) -> None:
        """Replies are read again: compute more of them."""
        clogged, self._clogged = self._clogged, []
        for work in clogged:
            self.step(work)

    def step(self, work: InFlight) -> None:
        """Have the next of many responses computed, unless they are not read."""
        if work.served.is_gone:
            message = f"version {work.served.info.version!r} of its model was unloaded"
            self._service.drop(work, ErrorCode.NOT_FOUND, Reason.NOT_FOUND, message)
            return
        if self.caller.is_clogged:
            work.ticket = None
            self._clogged.append(work)
            return
        work.ticket = work.served.channel.submit(
            work,
            samples=1,
            priority=priority_of(work.request),
            key=work.served.fit.key(work.inputs),
            is_admitted=True,
        )

    def forget(self, work: InFlight) -> None:
        """A request is answered, or never will be."""
        work.is_ended = True
        self._works.pop(work, None)
        if work.id is not None:
            self._ids.pop(work.id, None)
        if work.responses is not None:
            self._end_responses(work, work.responses)

    def _end_responses(self, work: InFlight, responses: Responses) -> None:
        if responses.owns_stream and work.stream is not None:
            work.served.channel.end_stream(work.stream)
            work.stream = None
        if responses.is_counted:
            responses.is_counted = False
            work.served.sequence_ended()
        if responses.sequence is not None:
            responses.sequence.answering = None

    # ------------------------------------------------------------------ with parameters

    def _served(self, request: Request) -> "Served[InFlight]":
        """The model that a request is for; that of its sequence outlives its being unloaded."""
        parameters = request.parameters
        if parameters and not parameters.get("sequence_start"):
            sequence = self._sequences.get(parameters.get("sequence_id", ""))  # type: ignore[arg-type]
            if sequence is not None:
                return sequence.served
        return self._service.registry.find(request)

    def _submit_with_parameters(self, work: InFlight) -> None:
        request = work.request
        priority, timeout_s = priority_of(request), timeout_of(request)
        most = most_responses_of(request)
        sequence_id, starts, ends = sequence_of(request)
        if sequence_id is not None and not starts:
            self._continue(work, sequence_id)
        served = work.served
        samples = served.fit.samples_in(request)
        if samples != 1 and (sequence_id is not None or most is not None):
            raise invalid(request, f"a step of a sequence has one sample; got {samples}")
        if most is not None and most > 1 and not served.info.feedback:
            raise invalid(
                request, f"model {served.info.name!r} gives one response to a request, not many"
            )
        if sequence_id is not None and starts:
            self._begin(work, sequence_id)
        try:
            if most is not None:
                self._begin_responses(work, most, sequence_id)
            work.ticket = served.channel.submit(
                work,
                samples=samples,
                priority=priority,
                timeout_s=timeout_s,
                key=served.fit.key(request.inputs),
            )
        except BaseException:
            if starts and sequence_id is not None:
                self._end(sequence_id)
            self.forget(work)
            raise
        if ends and sequence_id is not None:
            self._end_after(work, sequence_id)

    def _begin_responses(self, work: InFlight, most: int, sequence_id: SequenceId | None) -> None:
        served = work.served
        work.responses = responses = Responses(most)
        served.sequence_began()
        responses.is_counted = True
        if sequence_id is not None:
            responses.sequence = self._sequences[sequence_id]
            responses.sequence.answering = work
        elif served.info.state:
            self._check_room()
            work.stream = served.channel.begin_stream()
            responses.owns_stream = True

    def _end_after(self, work: InFlight, sequence_id: SequenceId) -> None:
        """End a sequence with its last request, which is under way."""
        if work.responses is None:
            self._end(sequence_id)  # its place is kept for as long as anything of it runs
            return
        sequence = self._sequences.pop(sequence_id)
        sequence.served.sequence_ended()
        work.responses.owns_stream = True

    def _check_room(self) -> None:
        """Raises StreamsFullError if this connection has all the sequences that it may."""
        most = self._service.max_streams_per_connection
        lasting = [work.responses for work in self._works if work.responses is not None]
        if len(self._sequences) + sum(each.owns_stream for each in lasting) >= most:
            raise StreamsFullError(most, whose="this connection")

    def _begin(self, work: InFlight, sequence_id: SequenceId) -> None:
        request, served = work.request, work.served
        if not served.info.state:
            raise invalid(request, f"model {served.info.name!r} keeps no state for sequences")
        if sequence_id in self._sequences:
            raise invalid(request, f"sequence {sequence_id!r} has begun already")
        self._check_room()
        sequence = Sequence(served, served.channel.begin_stream())
        self._sequences[sequence_id] = sequence
        served.sequence_began()
        work.stream = sequence.stream

    def _continue(self, work: InFlight, sequence_id: SequenceId) -> None:
        """Make `work` the next step of a sequence that has begun."""
        request = work.request
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise ProtocolError(
                ErrorCode.NOT_FOUND,
                f"no sequence {quote(str(sequence_id))} on this connection; the first step has "
                "sequence_start",
                request_id=request.id,
            )
        if sequence.answering is not None:
            raise invalid(
                request,
                f"sequence {sequence_id!r} has not given the last of its many responses yet; "
                "wait for the one that is final",
            )
        info = sequence.served.info
        if request.model_name not in (None, info.name) or (
            request.model_version not in (None, info.version)
        ):
            raise invalid(
                request, f"sequence {sequence_id!r} is of model {info.name!r} {info.version!r}"
            )
        if sequence.served.is_gone:
            self._end(sequence_id)
            raise ProtocolError(
                ErrorCode.NOT_FOUND,
                f"sequence {sequence_id!r} has ended: version {info.version!r} of its model was "
                "unloaded; begin it anew",
                request_id=request.id,
            )
        work.served = sequence.served
        work.stream = sequence.stream

    def _end(self, sequence_id: SequenceId) -> None:
        sequence = self._sequences.pop(sequence_id)
        sequence.served.channel.end_stream(sequence.stream)
        sequence.served.sequence_ended()

    # ------------------------------------------------------------------ cancelling

    def _cancel_as_wished(self, wish: Cancel) -> None:
        # One that is not there was answered already, or never was: both are harmless.
        works: list[InFlight] = []
        if wish.id is not None and (work := self._ids.get(wish.id)) is not None:
            works = [work]
        if wish.sequence_id is not None:
            # Those of one that has ended with its last step, too.
            works = [work for work in self._works if _is_step_of(work, wish.sequence_id)]
            if wish.sequence_id in self._sequences:
                self._end(wish.sequence_id)
        for work in works:
            if self._cancel(work):
                self._service.drop(
                    work, ErrorCode.CANCELLED, Reason.CANCELLED, "as its client wished"
                )

    def _cancel(self, work: InFlight) -> bool:
        if work.ticket is None:
            self._clogged.remove(work)
            return True
        # One of many responses may be about to be sent: what is dropped is the rest of them.
        is_between = work.responses is not None and work.ticket.state is State.DONE
        return is_between or work.served.channel.cancel(work.ticket)


def _is_step_of(work: InFlight, sequence_id: SequenceId) -> bool:
    own = work.request.parameters.get("sequence_id")
    return own == sequence_id and type(own) is type(sequence_id)
