"""What goes to the inference thread and comes back: requests, and what became of them."""

from typing import Generic, Protocol, TypeVar

import msgspec

from gpu_service.batching import Ticket
from gpu_service.device import Stream, Tensors


class Work(Protocol):
    """What is queued: anything that holds inputs [n, …] by name, maybe a step of a stream."""

    @property
    def inputs(self) -> Tensors: ...

    @property
    def stream(self) -> Stream | None: ...


W = TypeVar("W", bound=Work)


class Outcome(msgspec.Struct, Generic[W], frozen=True):
    """How one request ended. Its rows are cut out when asked for: by the event loop, not by the
    inference thread, for which the device waits.
    """

    ticket: Ticket[W]
    whole: Tensors | BaseException  # of the batch
    start: int = 0  # its first row

    @property
    def result(self) -> Tensors | BaseException:
        """Its own outputs [n, …] by name, or the exception it caused."""
        whole = self.whole
        if isinstance(whole, BaseException):
            return whole
        rows = slice(self.start, self.start + self.ticket.samples)
        return {name: array[rows] for name, array in whole.items()}


class FinishedBatch(msgspec.Struct, Generic[W], frozen=True, kw_only=True):
    """What the inference thread hands over: everything that ran together."""

    outcomes: list[Outcome[W]]
    samples: int
    input_s: float
    infer_s: float
    output_s: float


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one model's queue; see `batching.Queue`."""

    max_batch: int
    max_queue: int
    max_delay_s: float = 0.0


class Events(Protocol[W]):
    """Who is told on the event loop what became of the requests of one model."""

    def on_batch(self, batch: FinishedBatch[W]) -> None:
        """A batch is finished; those of its requests that were cancelled are left out."""

    def on_expired(self, ticket: Ticket[W]) -> None:
        """The time of a request was up before it could start."""
