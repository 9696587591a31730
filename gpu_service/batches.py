"""What goes to the inference thread, and who is told what became of it; `finished` has that."""

from typing import Protocol, TypeVar

import msgspec

from gpu_service.batching import Ticket
from gpu_service.device import Stream, Tensors
from gpu_service.finished import FinishedBatch


class Work(Protocol):
    """What is queued: anything that holds inputs [n, …] by name, maybe a step of a stream."""

    @property
    def inputs(self) -> Tensors: ...

    @property
    def stream(self) -> Stream | None: ...


W = TypeVar("W", bound=Work)


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
