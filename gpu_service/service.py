"""What a worker does with a message, whatever carried it: decode, check, queue, answer.

No sockets here. Owns every request from its arrival until its last reply is encoded, and which
sequences a connection has begun. All of it runs on the event loop; results come from the
inference thread through the dispatcher.
"""

import math
import time
from typing import Protocol

from gpu_service import logs
from gpu_service.batching import (
    NORMAL_PRIORITY,
    PRIORITIES,
    QueueFullError,
    RequestTooLargeError,
    State,
    Ticket,
)
from gpu_service.dispatch import BrokenError, FinishedBatch, Stream, StreamsFullError, Tensors
from gpu_service.metrics import OK, Metrics, Reason
from gpu_service.protocol import (
    MAX_ID_CHARS,
    Cancel,
    ErrorCode,
    Failure,
    ProtocolError,
    ReplyForm,
    Request,
    Response,
    decode_message,
    encode_failure,
    encode_response,
    quote,
)
from gpu_service.registry import Registry, Served
from gpu_service.telemetry import Stages, Telemetry

# Whoever is told that this worker's device is broken should come back to another one.
_BROKEN_RETRY_MS = 1000

# A sequence of another connection has to end first; nobody knows when.
_STREAMS_FULL_RETRY_MS = 1000

# Longer ones are cut: timers do not take any number.
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000

_MOST_RESPONSES = 1_000_000

# Of failed requests, with their tracebacks: a poisoned client must not fill the disk.
_LOGGED_FAILURES = 10
_LOGGED_PER_S = 10.0

SequenceId = str | int


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

    def answer(self, payload: bytes, *, binary: bool, final: bool) -> None:
        """Take one reply (binary, else UTF-8 text); `final`: it ends what it answers."""

    def no_answer(self) -> None:
        """The message that was just received gets no answer of its own."""


class Sequence:
    """One sequence of a connection, and the model that keeps its state."""

    __slots__ = ("answering", "served", "stream")

    def __init__(self, served: "Served[InFlight]", stream: Stream) -> None:
        self.served = served
        self.stream = stream
        self.answering: InFlight | None = None  # what asked for many responses, until the last


class InFlight:
    """A request that was taken and is not answered to the end."""

    __slots__ = (
        "arrived_at",
        "batch",
        "connection",
        "index",
        "inputs",
        "is_ended",
        "is_lasting",
        "is_many",
        "most_responses",
        "owns_stream",
        "request",
        "sequence",
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
        self.inputs: Tensors = request.inputs
        self.served = served
        self.connection = connection
        self.arrived_at = arrived_at
        self.stream: Stream | None = None
        self.owns_stream = False  # its place is given back with the last response
        self.is_ended = False  # answered to the end, or never to be answered
        self.is_lasting = False  # its model is told of it as of a sequence
        self.sequence: Sequence | None = None  # of which it is the only one that may be answered
        self.is_many = False  # it asked for many responses, be it for one at most
        self.most_responses = 1
        self.index = 0  # of the next response
        self.batch: FinishedBatch[InFlight] | None = None  # that it, or its last step, ran in
        self.ticket: Ticket[InFlight] | None = None  # None while its caller is clogged


class Service:
    """Serves the models of a registry. `worker` is the name by which clients know this process."""

    def __init__(
        self,
        *,
        registry: Registry[InFlight],
        metrics: Metrics,
        worker: str,
        max_streams_per_connection: int = 64,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.registry = registry
        self.metrics = metrics
        self.max_streams_per_connection = max_streams_per_connection
        self._telemetry = telemetry
        self._parameters = {"worker": worker}
        self._log_limit = logs.RateLimit(most=_LOGGED_FAILURES, per_s=_LOGGED_PER_S)
        registry.report_to(self)

    def connect(self, caller: Caller) -> "Connection":
        """The requests of one connection."""
        return Connection(self, caller)

    # ------------------------------------------------------------------ dispatch.Events

    def on_batch(self, batch: FinishedBatch[InFlight]) -> None:
        """Answer everything that ran together."""
        metrics = self.metrics
        metrics.batch_samples.observe(batch.samples)
        metrics.input_s.observe(batch.input_s)
        metrics.infer_s.observe(batch.infer_s)
        metrics.output_s.observe(batch.output_s)
        for outcome in batch.outcomes:
            ticket = outcome.ticket
            work = ticket.payload
            if work.is_ended:  # by a message that was read when another of these was answered
                continue
            metrics.queue_s.observe(ticket.started_at - ticket.queued_at)
            result = outcome.result
            work.batch = batch
            if isinstance(result, BaseException):
                self._failed(work, result)
            elif not work.is_many:
                self._succeeded(work, result)
            else:
                self._go_on(work, result)

    def on_expired(self, ticket: Ticket[InFlight]) -> None:
        """The time of a request was up before it could start."""
        message = "its timeout_ms was over before it could start"
        self.drop(ticket.payload, ErrorCode.DEADLINE_EXCEEDED, Reason.EXPIRED, message)

    # ------------------------------------------------------------------ how requests end

    def drop(self, work: InFlight, code: ErrorCode, reason: Reason, message: str) -> None:
        """Answer a request that was dropped."""
        self.refuse(work, Failure(id=work.request.id, code=code, message=message), reason)

    def refuse(self, work: InFlight, failure: Failure, reason: Reason) -> None:
        """End a request that was taken with an error."""
        work.connection.forget(work)
        if self._telemetry is not None:
            self._trace(work, error_code=failure.code)
        self.answer_failure(failure, reason, work.connection.caller, binary=work.request.binary)

    def answer_failure(
        self, failure: Failure, reason: Reason, caller: Caller, *, binary: bool
    ) -> None:
        """End a message with an error."""
        caller.answer(encode_failure(failure, binary=binary), binary=binary, final=True)
        self.metrics.in_flight.dec()
        self.metrics.ended(failure.code, reason)

    def internal(self, error: BaseException, request_id: str | None, caller: Caller) -> Failure:
        """What a client is told of a failure that is not its own, whose cause is logged."""
        # The cause is for the operator: it may tell a stranger more than they should know.
        if (kept_back := self._log_limit.admit()) is not None:
            more = {"failures_not_logged": kept_back} if kept_back else {}
            logs.error(
                "request_failed", cause=error, id=request_id, request_id=caller.request_id, **more
            )
        return Failure(
            id=request_id,
            code=ErrorCode.INTERNAL,
            message="this request failed on the server; its log has the cause",
        )

    def _succeeded(self, work: InFlight, outputs: Tensors) -> None:
        payload = self._encoded(work, outputs)
        if payload is None:
            return
        connection = work.connection
        connection.forget(work)
        connection.caller.answer(payload, binary=work.request.binary, final=True)
        self._count(work)

    def _go_on(self, work: InFlight, outputs: Tensors) -> None:
        """Send one of many responses, and have the next one computed."""
        info = work.served.info
        final = work.index + 1 == work.most_responses or (
            info.done is not None and bool(outputs[info.done].all())
        )
        payload = self._encoded(work, outputs, final=final)
        if payload is None:
            return
        work.index += 1
        if final:
            work.connection.forget(work)
        work.connection.caller.answer(payload, binary=work.request.binary, final=final)
        if final:
            self._count(work)
            return
        fed = {to: outputs[name] for name, to in info.feedback.items()}
        work.inputs = {**work.inputs, **fed}
        work.connection.step(work)

    def _encoded(
        self, work: InFlight, outputs: Tensors, *, final: bool | None = None
    ) -> bytes | None:
        """The reply; None if it cannot be encoded, which has been answered then."""
        request = work.request
        info = work.served.info
        if request.outputs is not None:
            outputs = {name: outputs[name] for name in request.outputs}
        if request.binary and final is None:
            return self._form_of(work.served).encode(request.id, outputs)
        response = Response(
            id=request.id,
            model_name=info.name,
            model_version=info.version,
            outputs=outputs,
            parameters=self._parameters,
            index=None if final is None else work.index,
            final=final is not False,
        )
        try:
            return encode_response(response, binary=request.binary)
        except ProtocolError as error:  # NaN, say, where the request came as text
            failure = Failure(id=request.id, code=error.code, message=error.message)
            self.refuse(work, failure, Reason.NOT_JSON)
            return None

    def _form_of(self, served: Served[InFlight]) -> ReplyForm:
        if served.replies is None:
            info = served.info
            served.replies = ReplyForm(
                model_name=info.name, model_version=info.version, parameters=self._parameters
            )
        return served.replies

    def _failed(self, work: InFlight, error: BaseException) -> None:
        if isinstance(error, BrokenError):
            failure = Failure(
                id=work.request.id,
                code=ErrorCode.UNAVAILABLE,
                message="this worker's device fails; it restarts",
                retry_after_ms=_BROKEN_RETRY_MS,
            )
            self.refuse(work, failure, Reason.DEVICE_BROKEN)
        else:
            failure = self.internal(error, work.request.id, work.connection.caller)
            self.refuse(work, failure, Reason.MODEL)

    def _count(self, work: InFlight) -> None:
        metrics = self.metrics
        metrics.in_flight.dec()
        metrics.ended(OK)
        metrics.total_s.observe(time.perf_counter() - work.arrived_at)
        work.served.requests_ok += 1
        if self._telemetry is not None:
            self._trace(work)

    def _trace(self, work: InFlight, *, error_code: str | None = None) -> None:
        assert self._telemetry is not None
        request, batch, ticket = work.request, work.batch, work.ticket
        age_s = time.perf_counter() - work.arrived_at
        stages = Stages()
        if ticket is not None and batch is None:
            stages = Stages(queue_s=age_s)
        elif batch is not None and ticket is not None:
            stages = Stages(
                queue_s=ticket.started_at - ticket.queued_at,
                input_s=batch.input_s,
                infer_s=batch.infer_s,
                output_s=batch.output_s,
            )
        caller = work.connection.caller
        trace_parent = request.parameters.get("traceparent", caller.trace_parent)
        self._telemetry.record(
            trace_parent if isinstance(trace_parent, str) else None,
            request_id=caller.request_id,
            model=work.served.info.name,
            version=work.served.info.version,
            samples=ticket.samples if ticket is not None else 0,
            batch=batch.samples if batch is not None else None,
            arrived_ns=time.time_ns() - int(age_s * 1e9),
            stages=stages,
            error_code=error_code,
        )


class Connection:
    """What one caller has asked for: its requests that are not answered, and its sequences."""

    def __init__(self, service: Service, caller: Caller) -> None:
        self.caller = caller
        self._service = service
        self._works: dict[InFlight, None] = {}
        self._ids: dict[str, InFlight] = {}
        self._sequences: dict[SequenceId, Sequence] = {}
        self._clogged: list[InFlight] = []  # wait until replies are read

    def receive(self, message: str | bytes) -> None:
        """Take one message. Never raises: whatever is wrong with it is answered."""
        arrived_at = time.perf_counter()
        service = self._service
        request_id = None
        reason = Reason.MALFORMED
        service.metrics.in_flight.inc()
        try:
            request = decode_message(message)
            if isinstance(request, Cancel):
                service.metrics.in_flight.dec()
                self.caller.no_answer()
                self._cancel_as_wished(request)
                return
            request_id = request.id
            if request_id is not None and request_id in self._ids:
                reason = Reason.DUPLICATE_ID
                raise ProtocolError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"id {request_id!r} is in flight on this connection already",
                    request_id=request_id,
                )
            reason = Reason.MISMATCH
            served = self._served(request)
            work = InFlight(request, served, self, arrived_at)
            if request.parameters or served.info.state:
                self._submit_with_parameters(work)
            else:
                fit = served.fit
                work.ticket = served.channel.submit(
                    work, samples=fit.samples_in(request), key=fit.key(request.inputs)
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
            self._service.metrics.in_flight.dec()
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
            priority=_priority(work.request),
            key=work.served.fit.key(work.inputs),
            is_admitted=True,
        )

    def forget(self, work: InFlight) -> None:
        """A request is answered, or never will be."""
        work.is_ended = True
        self._works.pop(work, None)
        if work.request.id is not None:
            self._ids.pop(work.request.id, None)
        if work.is_many:
            self._end_responses(work)

    def _end_responses(self, work: InFlight) -> None:
        if work.owns_stream and work.stream is not None:
            work.served.channel.end_stream(work.stream)
            work.stream = None
        if work.is_lasting:
            work.is_lasting = False
            work.served.sequence_ended()
        if work.sequence is not None:
            work.sequence.answering = None

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
        priority, timeout_s = _priority(request), _timeout_s(request)
        work.is_many = "max_responses" in request.parameters
        work.most_responses = _most_responses(request)
        sequence_id, starts, ends = _sequence_of(request)
        if sequence_id is not None and not starts:
            self._continue(work, sequence_id)
        served = work.served
        samples = served.fit.samples_in(request)
        if samples != 1 and (sequence_id is not None or work.is_many):
            raise _invalid(request, f"a step of a sequence has one sample; got {samples}")
        if work.most_responses > 1 and not served.info.feedback:
            raise _invalid(
                request, f"model {served.info.name!r} gives one response to a request, not many"
            )
        if sequence_id is not None and starts:
            self._begin(work, sequence_id)
        try:
            if work.is_many:
                self._begin_responses(work, sequence_id)
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

    def _begin_responses(self, work: InFlight, sequence_id: SequenceId | None) -> None:
        served = work.served
        served.sequence_began()
        work.is_lasting = True
        if sequence_id is not None:
            work.sequence = self._sequences[sequence_id]
            work.sequence.answering = work
        elif served.info.state:
            work.stream = served.channel.begin_stream()
            work.owns_stream = True

    def _end_after(self, work: InFlight, sequence_id: SequenceId) -> None:
        """End a sequence with its last request, which is under way."""
        if not work.is_many:
            self._end(sequence_id)  # its place is kept for as long as anything of it runs
            return
        sequence = self._sequences.pop(sequence_id)
        sequence.served.sequence_ended()
        work.owns_stream = True

    def _begin(self, work: InFlight, sequence_id: SequenceId) -> None:
        request, served = work.request, work.served
        if not served.info.state:
            raise _invalid(request, f"model {served.info.name!r} keeps no state for sequences")
        if sequence_id in self._sequences:
            raise _invalid(request, f"sequence {sequence_id!r} has begun already")
        most = self._service.max_streams_per_connection
        if len(self._sequences) >= most:
            raise StreamsFullError(most, whose="this connection")
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
            raise _invalid(
                request,
                f"sequence {sequence_id!r} has not given the last of its many responses yet; "
                "wait for the one that is final",
            )
        info = sequence.served.info
        if request.model_name not in (None, info.name) or (
            request.model_version not in (None, info.version)
        ):
            raise _invalid(
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
        is_between = work.is_many and work.ticket.state is State.DONE
        return is_between or work.served.channel.cancel(work.ticket)


def _is_step_of(work: InFlight, sequence_id: SequenceId) -> bool:
    own = work.request.parameters.get("sequence_id")
    return own == sequence_id and type(own) is type(sequence_id)


def _invalid(request: Request, message: str) -> ProtocolError:
    return ProtocolError(ErrorCode.INVALID_ARGUMENT, message, request_id=request.id)


def _priority(request: Request) -> int:
    priority = request.parameters.get("priority", NORMAL_PRIORITY)
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
        raise _invalid(
            request,
            f"parameter 'priority' must be a whole number from {PRIORITIES[0]} to "
            f"{PRIORITIES[-1]}; {NORMAL_PRIORITY} is normal, more is sooner",
        )
    return priority


def _timeout_s(request: Request) -> float:
    timeout_ms = request.parameters.get("timeout_ms", math.inf)
    if isinstance(timeout_ms, bool | str) or not timeout_ms > 0:
        raise _invalid(request, "parameter 'timeout_ms' must be a number greater than 0")
    return min(timeout_ms, _LONGEST_TIMEOUT_MS) / 1000 if timeout_ms != math.inf else math.inf


def _most_responses(request: Request) -> int:
    most = request.parameters.get("max_responses", 1)
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= _MOST_RESPONSES:
        raise _invalid(
            request,
            f"parameter 'max_responses' must be a whole number from 1 to {_MOST_RESPONSES}",
        )
    return most


def _sequence_of(request: Request) -> tuple[SequenceId | None, bool, bool]:
    """Which sequence `request` is a step of, and whether it is its first and its last one."""
    parameters = request.parameters
    sequence_id = parameters.get("sequence_id")
    if isinstance(sequence_id, bool | float) or sequence_id == "":
        raise _invalid(request, "parameter 'sequence_id' must be a text or a whole number")
    if isinstance(sequence_id, str) and len(sequence_id) > MAX_ID_CHARS:
        raise _invalid(
            request, f"'sequence_id' has {len(sequence_id)} characters, at most {MAX_ID_CHARS}"
        )
    flags = [parameters.get(name, False) for name in ("sequence_start", "sequence_end")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise _invalid(request, "'sequence_start' and 'sequence_end' must be true or false")
    if sequence_id is None and any(flags):
        raise _invalid(request, "'sequence_start' and 'sequence_end' need a 'sequence_id'")
    return sequence_id, bool(flags[0]), bool(flags[1])
