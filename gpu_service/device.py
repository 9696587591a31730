"""A model on its device, as the rest of the service sees it. Pure interface.

Whoever brings an engine of their own implements `Engine`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

from gpu_service.signature import ModelInfo

Tensors = Mapping[str, NDArray[Any]]


class BrokenError(Exception):
    """The device fails, whatever it is given: nothing can be run here any more."""


class StartupError(Exception):
    """The worker cannot start, or not serve a model; the message is for who runs it."""


class StreamsFullError(Exception):
    """All the places for the state of sequences are taken."""

    def __init__(self, most: int, *, whose: str) -> None:
        super().__init__(f"{most} sequences of {whose} hold their state, which is all there may be")


class Stream:
    """A sequence whose state is in row `slot` of the engine's memory.

    `is_fresh` until a step of it succeeded: its state is zeros, whatever the row holds.
    The inference thread alone changes that.
    """

    __slots__ = ("is_fresh", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.is_fresh = True


class BatchOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Outputs [n, …] by name, n being the samples of the whole batch, and where time went."""

    outputs: Tensors
    input_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0


class Engine(Protocol):
    """A model on its device. Once it serves, one thread at a time calls it: the inference thread,
    or for a batch of up to `quick_batch` samples the event loop's.
    """

    @property
    def model(self) -> ModelInfo:
        """What it takes and returns; fixed."""

    @property
    def description(self) -> Mapping[str, str]:
        """What it runs on, for logs and metrics: `device` and the like; fixed."""

    @property
    def good_batch(self) -> int:
        """Samples beyond which larger batches gain little; fixed. 0: not known."""
        return 0

    @property
    def best_batch(self) -> int:
        """Samples of the batch that is the fastest a sample; fixed. 0: not known."""
        return 0

    @property
    def sizes(self) -> Sequence[int]:
        """The sizes of batch that run without padding, ascending; fixed. None if all do."""
        return ()

    @property
    def quick_batch(self) -> int:
        """Samples of the largest batch that is quicker run than handed to another thread; fixed.

        0: none. The event loop runs those itself, and does nothing else meanwhile.
        """
        return 0

    @property
    def max_streams(self) -> int:
        """How many sequences may hold state at once; fixed. 0: the model has no state."""
        return 0

    @property
    def overlaps(self) -> bool:
        """Whether a second batch may be launched while one runs; fixed."""
        return False

    def check(self) -> None:
        """Run something that is known to work; raises if it does not."""

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        """Begin to run all requests as one batch; what is returned waits for its end.

        Their outputs follow one another in the same order. `streams` are the sequences of which
        the requests are steps, all different, None for none; the state of none changes unless
        all succeeds.
        """
        output = self.run(requests)
        return lambda: output

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        """Run all requests as one batch, none of them a step of a sequence."""
        return self.launch(requests, [None] * len(requests))()

    def close(self) -> None:
        """Give back what it holds of the device. Nothing is run after it."""
