"""What became of requests that ran together, as the inference thread hands it over.

Values; beside `batches` because they are compiled, and interfaces are not.
"""

from typing import Generic, TypeVar

from gpu_service.batching import Ticket
from gpu_service.device import Tensors

W = TypeVar("W")


class Outcome(Generic[W]):
    """How one request ended. Its rows are cut out when asked for: by the event loop, not by the
    inference thread, for which the device waits.

    `whole` is of the batch: its outputs, or the exception that it caused; `start` its first row.
    """

    __slots__ = ("start", "ticket", "whole")

    def __init__(self, ticket: Ticket[W], whole: Tensors | BaseException, start: int = 0) -> None:
        self.ticket = ticket
        self.whole = whole
        self.start = start

    @property
    def result(self) -> Tensors | BaseException:
        """Its own outputs [n, …] by name, or the exception it caused."""
        whole = self.whole
        if isinstance(whole, BaseException):
            return whole
        rows = slice(self.start, self.start + self.ticket.samples)
        return {name: array[rows] for name, array in whole.items()}


class FinishedBatch(Generic[W]):
    """What the inference thread hands over: everything that ran together."""

    __slots__ = ("infer_s", "input_s", "outcomes", "output_s", "samples")

    def __init__(
        self,
        *,
        outcomes: list[Outcome[W]],
        samples: int,
        input_s: float = 0.0,
        infer_s: float = 0.0,
        output_s: float = 0.0,
    ) -> None:
        self.outcomes = outcomes
        self.samples = samples
        self.input_s = input_s
        self.infer_s = infer_s
        self.output_s = output_s
