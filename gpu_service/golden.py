"""Whether a model still answers what it answered when it was trained.

Pure: compares outputs with the expected ones that every bundle carries. A worker does so
before it says it is ready, and `verify` does so over the network after a deploy.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy
from numpy.typing import NDArray

from gpu_service import bundle

# Another device, thread count or batch size changes the order of additions, and by that the
# last bits; a damaged or wrong model is off by far more.
MAX_ABS_DIFF = 1e-3


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`max_abs_diff` over all outputs, and what is wrong with them (None: nothing)."""

    max_abs_diff: float
    problem: str | None


def inputs_of(samples: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The inputs [n, …] by name among the tensors of `bundle.load_samples`."""
    return {
        name: array
        for name, array in samples.items()
        if name != bundle.LABEL and not name.startswith(bundle.EXPECTED)
    }


def one_by_one(samples: Mapping[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    """The inputs of each sample by itself: [1, …] by name."""
    inputs = inputs_of(samples)
    total = len(next(iter(inputs.values())))
    return [{name: array[n : n + 1] for name, array in inputs.items()} for n in range(total)]


def compare(outputs: Mapping[str, NDArray[Any]], samples: Mapping[str, NDArray[Any]]) -> Comparison:
    """Outputs [n, …] by name against the expected ones in `samples`: each value, and the class.

    An output passes when no value is off by more than MAX_ABS_DIFF and, where it has a last
    axis to choose from, every sample has the same greatest value.
    """
    worst = 0.0
    problems = []
    for key, expected in samples.items():
        if not key.startswith(bundle.EXPECTED):
            continue
        name = key.removeprefix(bundle.EXPECTED)
        output = outputs.get(name)
        if output is None or output.shape != expected.shape:
            got = "nothing" if output is None else f"shape {list(output.shape)}"
            problems.append(f"output {name!r}: expected shape {list(expected.shape)}, got {got}")
            continue
        diff = float(numpy.abs(output.astype("f8") - expected.astype("f8")).max(initial=0.0))
        worst = max(worst, diff)
        if not diff <= MAX_ABS_DIFF:  # so written, NaN is a problem too
            problems.append(f"output {name!r} is off by {diff:.3g}, allowed is {MAX_ABS_DIFF:g}")
        elif expected.ndim > 1 and (output.argmax(-1) != expected.argmax(-1)).any():
            differ = output.argmax(-1) != expected.argmax(-1)
            problems.append(f"output {name!r}: {differ.sum()} of {differ.size} classes differ")
    return Comparison(max_abs_diff=worst, problem="; ".join(problems) or None)
