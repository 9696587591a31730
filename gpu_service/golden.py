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

# Two scores this close, relative to the greatest, are a tie: the last bits choose between them.
_TIE = 1e-5


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What was found over all outputs, and what is wrong with them (None: nothing).

    `max_abs_diff` is of floating point outputs, `classes_differ` the greatest share of classes
    or integers that differ in one output, 0 to 1.
    """

    max_abs_diff: float
    problem: str | None
    classes_differ: float = 0.0


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


def compare(
    outputs: Mapping[str, NDArray[Any]],
    samples: Mapping[str, NDArray[Any]],
    *,
    max_abs_diff: float = MAX_ABS_DIFF,
    classes_may_differ: float = 0.0,
) -> Comparison:
    """Outputs [n, …] by name against the expected ones in `samples`: each value, and the class.

    An output of floating point passes when no value is off by more than `max_abs_diff` (in
    proportion to the greatest expected one, where that is above 1), and when the greatest value
    along its last axis is the same one but for a share of `classes_may_differ`. One of integers
    or booleans passes when they are equal, but for that share.
    """
    found = [
        _compare_one(
            name.removeprefix(bundle.EXPECTED),
            outputs.get(name.removeprefix(bundle.EXPECTED)),
            expected,
            max_abs_diff=max_abs_diff,
            classes_may_differ=classes_may_differ,
        )
        for name, expected in samples.items()
        if name.startswith(bundle.EXPECTED)
    ]
    problems = [one.problem for one in found if one.problem]
    return Comparison(
        # numpy's max, because Python's passes over NaN
        max_abs_diff=float(numpy.max([one.max_abs_diff for one in found], initial=0.0)),
        problem="; ".join(problems) or None,
        classes_differ=max((one.classes_differ for one in found), default=0.0),
    )


def answered_otherwise(
    before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]], output: str
) -> tuple[int, list[tuple[int, int]]]:
    """How many samples two bundles have in common, and where they see another class.

    Classes are where `output` is greatest along its last axis; each pair is the one before and the
    one after. Samples are the same where all of their inputs are, to the last bit.
    """
    rows = {_key(before, row): row for row in range(_count(before))}
    pairs = [(rows[key], row) for row in range(_count(after)) if (key := _key(after, row)) in rows]
    name = bundle.EXPECTED + output
    classes = [
        (int(before[name][a].argmax()), int(after[name][b].argmax()))
        for a, b in pairs
        if before[name][a].shape == after[name][b].shape
    ]
    return len(classes), [(a, b) for a, b in classes if a != b]


def _count(samples: Mapping[str, NDArray[Any]]) -> int:
    return len(next(iter(samples.values())))


def _key(samples: Mapping[str, NDArray[Any]], row: int) -> bytes:
    inputs = sorted(inputs_of(samples).items())
    return b"\0".join(name.encode() + array[row].tobytes() for name, array in inputs)


def _compare_one(
    name: str,
    output: NDArray[Any] | None,
    expected: NDArray[Any],
    *,
    max_abs_diff: float,
    classes_may_differ: float,
) -> Comparison:
    if output is None or output.shape != expected.shape:
        got = "nothing" if output is None else f"shape {list(output.shape)}"
        return _wrong(f"output {name!r}: expected shape {list(expected.shape)}, got {got}")
    if output.dtype != expected.dtype:
        return _wrong(f"output {name!r}: expected {expected.dtype}, got {output.dtype}")
    diff, problem = 0.0, None
    if expected.dtype.kind == "f":
        diff, allowed = _difference(output, expected), max_abs_diff * max(1.0, _scale(expected))
        if not diff <= allowed:  # so written, NaN is a problem too
            problem = f"output {name!r} is off by {diff:.3g}, allowed is {allowed:.3g}"
        differ, what = _classes_differ(output, expected), "classes"
    else:
        differ, what = output != expected, "values"
    share = float(differ.mean()) if differ.size else 0.0
    if not problem and share > classes_may_differ:
        problem = f"output {name!r}: {differ.sum()} of {differ.size} {what} differ"
    return Comparison(max_abs_diff=diff, problem=problem, classes_differ=share)


def _wrong(problem: str) -> Comparison:
    return Comparison(max_abs_diff=0.0, problem=problem)


def _difference(output: NDArray[Any], expected: NDArray[Any]) -> float:
    # Equal infinities, and NaN where NaN is expected, are no difference: models mask with them.
    same = (output == expected) | (numpy.isnan(output) & numpy.isnan(expected))
    wrong = ~same
    difference = numpy.abs(output[wrong].astype("f8") - expected[wrong].astype("f8"))
    return float(difference.max(initial=0.0))


def _scale(expected: NDArray[Any]) -> float:
    finite = expected[numpy.isfinite(expected)]
    return float(numpy.abs(finite.astype("f8")).max(initial=0.0))


def _classes_differ(output: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """Whether another value is the greatest along the last axis, which is not a tie."""
    if expected.ndim < 2:
        return numpy.zeros(0, "?")
    chosen, right = output.argmax(-1), expected.argmax(-1)
    scores = [numpy.take_along_axis(expected, at[..., None], -1)[..., 0] for at in (chosen, right)]
    with numpy.errstate(invalid="ignore"):  # infinity less infinity
        behind = scores[1] - scores[0]
    tie = behind <= _TIE * numpy.maximum(1.0, numpy.abs(scores[1]))
    differ: NDArray[Any] = (chosen != right) & (scores[0] != scores[1]) & ~tie
    return differ
