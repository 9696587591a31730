"""Forms of a network that give the same answers on a CPU, sooner.

Owns tracing, which makes one call of a network, and fusing, which makes one kernel of layers that
follow each other. Both live in this process only: made from the bundle's weights at each start,
compared with the module, and never stored.
"""

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch

from gpu_service import datatypes, logs
from gpu_service.bundle import TensorSpec
from gpu_service.signature import ModelInfo

# oneDNN would keep its last 1,024 kernels, also those of networks that are long gone: half a MiB
# for a form of 12 layers. It asks when it makes the first one.
os.environ.setdefault("DNNL_GRAPH_COMPILED_PARTITION_CACHE_CAPACITY", "0")

# What the fused forms of one network may hold together. Each has weights laid out for its kernels,
# and the kernels' code: 2 MiB for the 8 layers of the example model.
_BYTES = 128 << 20
_CODE_BYTES = 2 << 20

# The first run finds out the sizes, the second one fuses for them and the third one may be the
# first that is only a run.
_RUNS_UNTIL_FUSED = 3

# What it takes to make a form, in runs of its size: those, and one of the module.
RUNS = _RUNS_UNTIL_FUSED + 1

# Other kernels add up in another order. Relative and absolute.
_FUSED_TOLERANCE = (1e-4, 1e-5)

# As torch.testing has them; integers and booleans have to be equal.
_TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


class Form:
    """A fused form. Called with the network's inputs, it returns the outputs, or None.

    None where a number in the inputs is not finite, or so large that what it becomes may not be:
    oneDNN's kernels take NaN for 0 in what follows a layer (ReLU, pooling), so what such an input
    did would not be seen in the answer. It is for the network as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._run = function

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        *results, norm = self._run(*inputs)
        # By way of numpy, which keeps the GIL.
        return tuple(results) if math.isfinite(norm.numpy()) else None


class _Trace:
    """What `network` does to inputs like these, to be called for as long as somebody has it.

    Weights are the network's own, as constants. Not by torch.jit.trace and torch.jit.freeze: torch
    keeps what they return until the process ends, with weights and kernels, and so each reload of
    the example model took 31 MiB more (2026-11-30).
    """

    def __init__(self, network: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        def unnamed(value: torch.Tensor) -> str:
            return ""

        network.requires_grad_(False)  # else they are no constants
        strict, without_in_place = True, False
        self._graph, _ = torch._C._create_graph_by_tracing(
            network, tuple(inputs), unnamed, strict, without_in_place
        )
        torch._C._jit_pass_inline(self._graph)
        torch._C._jit_pass_optimize_frozen_graph(self._graph, True)

    def function(self) -> Callable[..., Any]:
        """Called with inputs as the network's; fused or not by what holds in its first runs."""
        function: Callable[..., Any] = torch._C._create_function_from_graph(
            "forward", self._graph.copy()
        )
        return function


class _Watched(torch.nn.Module):
    """The network, and as its last output the norm of all numbers in its inputs.

    That is infinite in float32 from 1.8e19 on. In the same call: one of its own before it would
    give the GIL away, and with it 5 % of what 64 clients get (2026-11-30, the example model).
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norms = [
            torch.linalg.vector_norm(each.float() if each.dtype is torch.float16 else each)
            for each in inputs
            if each.is_floating_point()
        ]
        norm = sum(norms[1:], norms[0]) if norms else torch.zeros(())
        return (*as_tuple(self.network(*inputs)), norm)


class Fusion:
    """Makes fused forms of `network`, which takes and returns what `info` says, from `watched`,
    the trace of it as `_Watched`.

    By oneDNN Graph: https://uxlfoundation.github.io/oneDNN/graph_extension.html. Its kernels are
    for the sizes of tensors that they were compiled with, so there is a form for each size of
    batch.
    """

    def __init__(self, network: torch.nn.Module, watched: _Trace, info: ModelInfo) -> None:
        self._network = network
        self._watched = watched
        self._specs = (*info.inputs, *info.state)
        weights = itertools.chain(network.parameters(), network.buffers())
        self._bytes = _CODE_BYTES + sum(tensor.nbytes for tensor in weights)

    @property
    def most(self) -> int:
        """How many forms may be kept. One at least, which may double the weights."""
        return max(1, _BYTES // self._bytes)

    @torch.inference_mode()
    def form(self, samples: int) -> Form | None:
        """The network for batches of so many samples; None where that gains nothing.

        That is: nothing in it can be fused, or the answers are not the same.
        """
        examples = [_random(self._specs, samples)]
        if samples == 1:  # What is 0 / 0 to the network has to be NaN here, too.
            examples += [_filled(examples[0], value) for value in (0, 1)]
        try:
            with _onednn_graph():
                function = self._watched.function()
                for _ in range(_RUNS_UNTIL_FUSED):
                    function(*examples[0])
                fused = "oneDNNFusionGroup" in str(torch._C._last_executed_optimized_graph())
            if not fused:
                raise ValueError("nothing in it can be fused")
            form = Form(function)
            for inputs in examples:
                assert_close(form(*inputs), as_tuple(self._network(*inputs)), _FUSED_TOLERANCE)
        except Exception as error:
            logs.info("not_fused", samples=samples, reason=_reason(error))
            return None
        return form


def traced(
    network: torch.nn.Module, info: ModelInfo, *, max_batch: int
) -> tuple[Callable[..., Any], Fusion] | None:
    """The same network as one call, and what makes fused forms of it; None where that is not the
    same. For models without dynamic dimensions.

    A module gives the GIL away and wants it back around each operation, and the event loop has it
    then: on a CPU its clients see a quarter less of what the device can do. Whatever depends on
    values, or on the size of a batch, can't be traced.
    """
    sizes = sorted({max_batch, min(2, max_batch), 1}, reverse=True)
    examples = [_random((*info.inputs, *info.state), size) for size in sizes]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            tracer_warning = torch.jit.TracerWarning  # type: ignore[attr-defined]
            warnings.simplefilter("error", tracer_warning)
            # Compares sizes that are the same for any batch.
            warnings.filterwarnings("ignore", "", tracer_warning, r"torch\.nn\.modules\.rnn$")
            function = _Trace(network, examples[0]).function()
            for each in examples:
                assert_close(function(*each), network(*each))
            watched = _Trace(_Watched(network).eval(), examples[-1])
    except Exception as error:
        logs.info("not_traced", reason=_reason(error))
        return None
    return function, Fusion(network, watched, info)


def fused_sizes(max_batch: int) -> list[int]:
    """Sizes of batch to have fused forms of, the most useful ones first.

    All up to 8, then four to each doubling, so that a batch is padded by a quarter at most. One
    sample and the largest batch come first, for idle and for busy workers; then powers of two.
    """
    steps = [*range(1, 8)]
    octave = 8
    while octave <= max_batch:
        steps += range(octave, 2 * octave, octave // 4)
        octave *= 2
    sizes = {*(size for size in steps if size < max_batch), max_batch}
    first = [1, max_batch] if max_batch > 1 else [1]

    def usefulness(size: int) -> tuple[bool, int]:
        return size & (size - 1) != 0, -size

    return [*first, *sorted(sizes - set(first), key=usefulness)]


@contextlib.contextmanager
def _onednn_graph() -> Iterator[None]:
    """What is run for the second time in here is fused.

    A switch of the whole process. Models are loaded one after the other, and what serves
    meanwhile was run twice before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.enable_onednn_fusion(True)
        try:
            yield
        finally:
            torch.jit.enable_onednn_fusion(False)


def assert_close(found: Any, expected: Any, tolerance: tuple[float, float] | None = None) -> None:
    """As torch.testing.assert_close(…, equal_nan=True), which takes a second of every start: it
    imports sympy, and 500 modules more. Raises AssertionError.
    """
    for number, (one, other) in enumerate(zip(as_tuple(found), as_tuple(expected), strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise AssertionError(
                f"output {number} is {one.dtype} {tuple(one.shape)}, "
                f"expected {other.dtype} {tuple(other.shape)}"
            )
        rtol, atol = tolerance or _TOLERANCES.get(other.dtype, (0.0, 0.0))
        if not other.is_floating_point():
            rtol = atol = 0.0
        if not torch.isclose(one, other, rtol=rtol, atol=atol, equal_nan=True).all():
            distance = float((one.double() - other.double()).abs().max())
            raise AssertionError(f"output {number} is not close: off by {distance:g} at most")


def as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    """What a network returned: one output, or several."""
    return results if isinstance(results, tuple) else (results,)


def _random(specs: Sequence[TensorSpec], samples: int) -> list[torch.Tensor]:
    """Numbers from 0 to 1 for what is floating point; zeros for what may be an index."""
    zeros = [
        torch.from_numpy(numpy.zeros((samples, *spec.shape), datatypes.NUMPY[spec.datatype]))
        for spec in specs
    ]
    return [torch.rand_like(each) if each.is_floating_point() else each for each in zeros]


def _filled(examples: Sequence[torch.Tensor], value: int) -> list[torch.Tensor]:
    """The same, with `value` for what is floating point."""
    return [torch.full_like(each, value) if each.is_floating_point() else each for each in examples]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
