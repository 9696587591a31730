"""What a worker does with the requests of all connections once they have run: answer them.

No sockets here. Owns how requests end: replies, errors, their metrics and traces. `connection`
takes them. On the event loop; results come from the inference thread through the dispatcher.
"""

import time
from typing import Any, Final

from gpu_service import logs
from gpu_service.batching import Ticket
from gpu_service.connection import Caller, Connection, InFlight, Responses
from gpu_service.counts import Distribution, Number
from gpu_service.device import BrokenError, Tensors
from gpu_service.finished import FinishedBatch
from gpu_service.gil import give_way
from gpu_service.messages import ErrorCode, Failure, ProtocolError, Response
from gpu_service.metrics import Metrics, Reason
from gpu_service.protocol import BatchReplies, ReplyForm, encode_failure, encode_response
from gpu_service.registry import Registry, Served
from gpu_service.telemetry import Stages, Telemetry

# Whoever is told that this worker's device is broken should come back to another one.
_BROKEN_RETRY_MS = 1000

# Of failed requests, with their tracebacks: a poisoned client must not fill the disk.
_LOGGED_FAILURES = 10
_LOGGED_PER_S = 10.0

# Final: compiled, a variable of C's and no look-up.
_now: Final = time.perf_counter
_give_way: Final = give_way


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
        # Again, those that are counted for each request: here they are found at once. Annotated,
        # because `metrics` is not compiled, and its types are not known to the compiler.
        self.in_flight: Number = metrics.in_flight
        self._ok: Number = metrics.ok
        self._queue_s: Distribution = metrics.queue_s
        self._total_s: Distribution = metrics.total_s
        self.max_streams_per_connection = max_streams_per_connection
        self._telemetry = telemetry
        self._parameters = {"worker": worker}
        self._log_limit = logs.RateLimit(most=_LOGGED_FAILURES, per_s=_LOGGED_PER_S)
        registry.report_to(self)

    def connect(self, caller: Caller) -> "Connection":
        """The requests of one connection."""
        return Connection(self, caller)

    # ------------------------------------------------------------------ batches.Events

    def on_batch(self, batch: FinishedBatch[InFlight]) -> None:
        """Answer everything that ran together."""
        whole: Tensors | BaseException | None = None
        replies: BatchReplies | None = None
        for outcome in batch.outcomes:
            ticket = outcome.ticket
            work = ticket.payload
            if work.is_ended:  # by a message that was read when another of these was answered
                continue
            self._queue_s.observe(ticket.started_at - ticket.queued_at)
            if self._telemetry is not None:
                work.batch = batch
            if outcome.whole is not whole:
                whole = outcome.whole
                replies = self._replies(work.served, whole)
            if replies is not None and work.binary and work.is_whole and work.responses is None:
                pieces = replies.encode(work.id, start=outcome.start, samples=ticket.samples)
                self._reply(work, pieces)
                _give_way()
                continue
            result = outcome.result
            if isinstance(result, BaseException):
                self._failed(work, result)
            elif work.responses is None:
                self._succeeded(work, result)
            else:
                self._go_on(work, work.responses, result)
        # Last: they wait for their answers.
        metrics = self.metrics
        metrics.batch_samples.observe(batch.samples)
        metrics.input_s.observe(batch.input_s)
        metrics.infer_s.observe(batch.infer_s)
        metrics.output_s.observe(batch.output_s)

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
        work.release()
        self.answer_failure(failure, reason, work.connection.caller, binary=work.request.binary)

    def answer_failure(
        self, failure: Failure, reason: Reason, caller: Caller, *, binary: bool
    ) -> None:
        """End a message with an error."""
        caller.answer([encode_failure(failure, binary=binary)], binary=binary, final=True)
        self.in_flight.dec()
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
        if payload is not None:
            self._reply(work, [payload])

    def _reply(self, work: InFlight, pieces: list[Any]) -> None:
        connection = work.connection
        connection.forget(work)
        connection.caller.answer(pieces, binary=work.binary, final=True)
        self._count(work)

    def _go_on(self, work: InFlight, responses: Responses, outputs: Tensors) -> None:
        """Send one of many responses, and have the next one computed."""
        info = work.served.info
        final = responses.index + 1 == responses.most or (
            info.done is not None and bool(outputs[info.done].all())
        )
        payload = self._encoded(work, outputs, final=final)
        if payload is None:
            return
        responses.index += 1
        if final:
            work.connection.forget(work)
        work.connection.caller.answer([payload], binary=work.request.binary, final=final)
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
            index=None if work.responses is None else work.responses.index,
            final=final is not False,
        )
        try:
            return encode_response(response, binary=request.binary)
        except ProtocolError as error:  # NaN, say, where the request came as text
            failure = Failure(id=request.id, code=error.code, message=error.message)
            self.refuse(work, failure, Reason.NOT_JSON)
            return None

    def _replies(
        self, served: Served[InFlight], whole: Tensors | BaseException
    ) -> BatchReplies | None:
        """What encodes the binary replies to a batch; None where each is encoded by itself."""
        if isinstance(whole, BaseException):
            return None
        return self._form_of(served).of_batch(whole)

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
        self.in_flight.dec()
        self._ok.inc()
        self._total_s.observe(_now() - work.arrived_at)
        work.served.requests_ok += 1
        if self._telemetry is not None:
            self._trace(work)
        work.release()

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
