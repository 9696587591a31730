"""What a worker does with a message, whatever carried it: decode, check, queue, answer.

No sockets here. Owns every request from its arrival until its reply is encoded. All of it runs
on the event loop; results come from the inference thread through the dispatcher.
"""

import math
import time
from typing import Protocol

import msgspec

from gpu_service import logs
from gpu_service.batching import QueueFullError, RequestTooLargeError, Ticket
from gpu_service.dispatch import Dispatcher, FinishedBatch, Tensors
from gpu_service.metrics import CANCELLED, OK, Metrics
from gpu_service.protocol import (
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Response,
    decode_request,
    encode_failure,
    encode_response,
)
from gpu_service.signature import ModelInfo, samples_in


class Caller(Protocol):
    """Where requests come from and replies go to: one connection."""

    def has_in_flight(self, request_id: str) -> bool:
        """Whether a request with this id is queued or running for this caller."""

    def answer(self, payload: bytes, *, binary: bool, ticket: "Ticket[InFlight] | None") -> None:
        """Take one reply (binary, else UTF-8 text); `ticket` is None if nothing was queued."""


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
    ) -> None:
        self._model = model
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._worker = worker
        dispatcher.start(self._on_batch)

    def receive(self, message: str | bytes, caller: Caller) -> Ticket[InFlight] | None:
        """Take one message. Never raises: whatever is wrong with it is answered.

        Returns its ticket when it was queued, to be cancelled if the caller goes away; None
        when it has been answered already, before this returns.
        """
        arrived_at = time.perf_counter()
        self._metrics.in_flight.inc()
        request_id = None
        try:
            request = decode_request(message)
            request_id = request.id
            if request_id is not None and caller.has_in_flight(request_id):
                raise ProtocolError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"id {request_id!r} is in flight on this connection already",
                    request_id=request_id,
                )
            samples = samples_in(request, self._model)
            work = InFlight(request=request, caller=caller, arrived_at=arrived_at)
            return self._dispatcher.submit(work, samples=samples)
        except ProtocolError as error:
            failure = Failure(id=error.request_id, code=error.code, message=error.message)
        except RequestTooLargeError as error:
            failure = Failure(id=request_id, code=ErrorCode.INVALID_ARGUMENT, message=str(error))
        except QueueFullError as error:
            failure = Failure(
                id=request_id,
                code=ErrorCode.UNAVAILABLE,
                message=str(error),
                retry_after_ms=math.ceil(error.retry_after_s * 1000),
            )
        except Exception as error:
            failure = _internal(error, request_id)
        self._refuse(failure, caller, binary=not isinstance(message, str))
        return None

    def cancel(self, ticket: Ticket[InFlight]) -> None:
        """Forget a request whose caller has gone: it is never answered."""
        if self._dispatcher.cancel(ticket):
            self._metrics.in_flight.dec()
            self._metrics.ended(CANCELLED)

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
            failure = _internal(result, work.request.id)
            self._refuse(failure, work.caller, binary=work.request.binary, ticket=ticket)
            return
        try:
            payload = self._encoded(work.request, result)
        except ProtocolError as error:  # NaN, say, where the request came as text
            failure = Failure(id=work.request.id, code=error.code, message=error.message)
            self._refuse(failure, work.caller, binary=work.request.binary, ticket=ticket)
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
            parameters={"worker": self._worker},
        )
        return encode_response(response, binary=request.binary)

    def _refuse(
        self,
        failure: Failure,
        caller: Caller,
        *,
        binary: bool,
        ticket: Ticket[InFlight] | None = None,
    ) -> None:
        caller.answer(encode_failure(failure, binary=binary), binary=binary, ticket=ticket)
        self._metrics.in_flight.dec()
        self._metrics.ended(failure.code)


def _internal(error: BaseException, request_id: str | None) -> Failure:
    # The cause is for the operator: it may tell a stranger more than they should know.
    logs.error("request_failed", cause=error, id=request_id)
    return Failure(
        id=request_id,
        code=ErrorCode.INTERNAL,
        message="this request failed on the server; its log has the cause",
    )
