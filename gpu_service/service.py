"""What a worker does with a message, whatever carried it: decode, check, queue, answer.

No sockets here. Owns every request from its arrival until its reply is encoded. All of it runs
on the event loop; results come from the inference thread through the dispatcher.
"""

import math
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from gpu_service import logs
from gpu_service.batching import (
    NORMAL_PRIORITY,
    PRIORITIES,
    QueueFullError,
    RequestTooLargeError,
    Ticket,
)
from gpu_service.dispatch import BrokenError, Dispatcher, FinishedBatch, Tensors
from gpu_service.metrics import OK, Metrics, Reason
from gpu_service.protocol import (
    Cancel,
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Response,
    decode_message,
    encode_failure,
    encode_response,
)
from gpu_service.signature import Fit, ModelInfo

# Whoever is told that this worker's device is broken should come back to another one.
_BROKEN_RETRY_MS = 1000

# Longer ones are cut: timers do not take any number.
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000

# Of failed requests, with their tracebacks: a poisoned client must not fill the disk.
_LOGGED_FAILURES = 10
_LOGGED_PER_S = 10.0


class Caller(Protocol):
    """Where requests come from and replies go to: one connection."""

    def in_flight(self, request_id: str) -> "Ticket[InFlight] | None":
        """The request with this id that is queued or running for this caller."""

    def answer(self, payload: bytes, *, binary: bool, ticket: "Ticket[InFlight] | None") -> None:
        """Take one reply (binary, else UTF-8 text); `ticket` is None if nothing was queued."""

    def no_answer(self) -> None:
        """The message that was just received gets no answer of its own."""


class InFlight(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A request that was queued, and whom to answer."""

    request: Request
    caller: Caller
    arrived_at: float

    @property
    def inputs(self) -> Tensors:
        """The inputs [n, …] by name."""
        return self.request.inputs


class Service:
    """Serves one model. `worker` is the name by which clients know this process."""

    def __init__(
        self,
        *,
        model: ModelInfo,
        dispatcher: Dispatcher[InFlight],
        metrics: Metrics,
        worker: str,
        on_broken: Callable[[BrokenError], None] | None = None,
    ) -> None:
        self._model = model
        self._fit = Fit(model)
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._parameters = {"worker": worker}
        self._log_limit = logs.RateLimit(most=_LOGGED_FAILURES, per_s=_LOGGED_PER_S)
        dispatcher.start(self._on_batch, on_expired=self._on_expired, on_broken=on_broken)

    def receive(self, message: str | bytes, caller: Caller) -> Ticket[InFlight] | None:
        """Take one message. Never raises: whatever is wrong with it is answered.

        Returns its ticket when it was queued, to be cancelled if the caller goes away; None
        when it has been answered already, before this returns.
        """
        arrived_at = time.perf_counter()
        request_id = None
        reason = Reason.MALFORMED
        self._metrics.in_flight.inc()
        try:
            request = decode_message(message)
            if isinstance(request, Cancel):
                self._metrics.in_flight.dec()
                caller.no_answer()
                self._cancel_as_wished(caller.in_flight(request.id))
                return None
            request_id = request.id
            if request_id is not None and caller.in_flight(request_id):
                reason = Reason.DUPLICATE_ID
                raise ProtocolError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"id {request_id!r} is in flight on this connection already",
                    request_id=request_id,
                )
            reason = Reason.MISMATCH
            samples = self._fit.samples_in(request)
            work = InFlight(request=request, caller=caller, arrived_at=arrived_at)
            if not request.parameters:
                return self._dispatcher.submit(work, samples=samples)
            return self._dispatcher.submit(
                work, samples=samples, priority=_priority(request), timeout_s=_timeout_s(request)
            )
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
        except Exception as error:
            reason = Reason.INTERNAL
            failure = self._internal(error, request_id)
        self._refuse(failure, reason, caller, binary=not isinstance(message, str))
        return None

    def cancel(self, ticket: Ticket[InFlight]) -> None:
        """Forget a request whose caller has gone: it is never answered."""
        if self._dispatcher.cancel(ticket):
            self._metrics.in_flight.dec()
            self._metrics.ended(ErrorCode.CANCELLED, Reason.DISCONNECTED)

    def _cancel_as_wished(self, ticket: Ticket[InFlight] | None) -> None:
        # One that is not there was answered already, or never was: both are harmless.
        if ticket is not None and self._dispatcher.cancel(ticket):
            self._drop(ticket, ErrorCode.CANCELLED, Reason.CANCELLED, "as its client wished")

    def _on_expired(self, ticket: Ticket[InFlight]) -> None:
        message = "its timeout_ms was over before it could start"
        self._drop(ticket, ErrorCode.DEADLINE_EXCEEDED, Reason.EXPIRED, message)

    def _drop(
        self, ticket: Ticket[InFlight], code: ErrorCode, reason: Reason, message: str
    ) -> None:
        work = ticket.payload
        failure = Failure(id=work.request.id, code=code, message=message)
        self._refuse(failure, reason, work.caller, binary=work.request.binary, ticket=ticket)

    def _on_batch(self, batch: FinishedBatch[InFlight]) -> None:
        self._metrics.batch_samples.observe(batch.samples)
        self._metrics.input_s.observe(batch.input_s)
        self._metrics.infer_s.observe(batch.infer_s)
        self._metrics.output_s.observe(batch.output_s)
        for outcome in batch.outcomes:
            ticket = outcome.ticket
            self._metrics.queue_s.observe(ticket.started_at - ticket.queued_at)
            self._finish(ticket, outcome.result)

    def _finish(self, ticket: Ticket[InFlight], result: Tensors | BaseException) -> None:
        work = ticket.payload
        if isinstance(result, BaseException):
            reason = Reason.MODEL
            if isinstance(result, BrokenError):
                reason = Reason.DEVICE_BROKEN
                failure = Failure(
                    id=work.request.id,
                    code=ErrorCode.UNAVAILABLE,
                    message="this worker's device fails; it restarts",
                    retry_after_ms=_BROKEN_RETRY_MS,
                )
            else:
                failure = self._internal(result, work.request.id)
            self._refuse(failure, reason, work.caller, binary=work.request.binary, ticket=ticket)
            return
        try:
            payload = self._encoded(work.request, result)
        except ProtocolError as error:  # NaN, say, where the request came as text
            failure = Failure(id=work.request.id, code=error.code, message=error.message)
            caller = work.caller
            self._refuse(
                failure, Reason.NOT_JSON, caller, binary=work.request.binary, ticket=ticket
            )
            return
        work.caller.answer(payload, binary=work.request.binary, ticket=ticket)
        self._metrics.in_flight.dec()
        self._metrics.ended(OK)
        self._metrics.total_s.observe(time.perf_counter() - work.arrived_at)

    def _encoded(self, request: Request, outputs: Tensors) -> bytes:
        if request.outputs is not None:
            outputs = {name: outputs[name] for name in request.outputs}
        response = Response(
            id=request.id,
            model_name=self._model.name,
            model_version=self._model.version,
            outputs=outputs,
            parameters=self._parameters,
        )
        return encode_response(response, binary=request.binary)

    def _refuse(
        self,
        failure: Failure,
        reason: Reason,
        caller: Caller,
        *,
        binary: bool,
        ticket: Ticket[InFlight] | None = None,
    ) -> None:
        caller.answer(encode_failure(failure, binary=binary), binary=binary, ticket=ticket)
        self._metrics.in_flight.dec()
        self._metrics.ended(failure.code, reason)

    def _internal(self, error: BaseException, request_id: str | None) -> Failure:
        # The cause is for the operator: it may tell a stranger more than they should know.
        if (kept_back := self._log_limit.admit()) is not None:
            more = {"failures_not_logged": kept_back} if kept_back else {}
            logs.error("request_failed", cause=error, id=request_id, **more)
        return Failure(
            id=request_id,
            code=ErrorCode.INTERNAL,
            message="this request failed on the server; its log has the cause",
        )


def _priority(request: Request) -> int:
    priority = request.parameters.get("priority", NORMAL_PRIORITY)
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
        raise ProtocolError(
            ErrorCode.INVALID_ARGUMENT,
            f"parameter 'priority' must be a whole number from {PRIORITIES[0]} to "
            f"{PRIORITIES[-1]}; {NORMAL_PRIORITY} is normal, more is sooner",
            request_id=request.id,
        )
    return priority


def _timeout_s(request: Request) -> float:
    timeout_ms = request.parameters.get("timeout_ms", math.inf)
    if isinstance(timeout_ms, bool | str) or not timeout_ms > 0:
        raise ProtocolError(
            ErrorCode.INVALID_ARGUMENT,
            "parameter 'timeout_ms' must be a number greater than 0",
            request_id=request.id,
        )
    return min(timeout_ms, _LONGEST_TIMEOUT_MS) / 1000 if timeout_ms != math.inf else math.inf
