"""Runs a model that somebody brought on samples: what it returns, and whether it can be served.

Owns nothing between calls. Everything runs on the CPU, in the calling thread.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy
import torch
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, golden
from gpu_service.bundle import TensorSpec

# Samples that are also run by themselves; the others are like them.
_ALONE = 16

Arrays = dict[str, NDArray[Any]]


class ProblemsError(Exception):
    """What is wrong; `problems` holds all that was found, one text each."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes, and what it is said to return.

    Without `output_names`, outputs are `output`, or `output_0` and so on. `feedback` leads from
    outputs to inputs.
    """

    inputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...] = ()
    output_names: tuple[str, ...] = ()
    feedback: dict[str, str] = {}


def observe(
    model: torch.nn.Module, signature: Signature, given: Arrays
) -> tuple[tuple[TensorSpec, ...], Arrays]:
    """The outputs' specifications, and the outputs [n, …] by name for the samples in `given`.

    Sizes that change with the inputs' dynamic ones are -1. Raises ProblemsError for a model that
    fails, or whose answers depend on chance or on what else is in a batch.
    """
    inputs = {spec.name: given[spec.name] for spec in signature.inputs}
    results = run(model, signature, inputs)
    specs = [
        TensorSpec(name=name, datatype=datatypes.name_of(array.dtype), shape=array.shape[1:])
        for name, array in results.items()
    ]
    if any(spec.dynamic for spec in signature.inputs):
        other = _run_resized(model, signature, inputs)
        specs = [_generalised(spec, other[spec.name]) for spec in specs]
    problems = [
        f"output {name!r} holds NaN; is a weight missing, or a sample out of range?"
        for name, array in results.items()
        if array.dtype.kind == "f" and numpy.isnan(array).any()
    ]
    problems += _batch_problems(model, signature, inputs)
    if problems:
        raise ProblemsError(*problems)
    return tuple(specs), results


def run(
    model: torch.nn.Module, signature: Signature, inputs: Arrays, *, what: str = "on the samples"
) -> Arrays:
    """The outputs [n, …] by name of one step from the zero state. Raises ProblemsError."""
    return _step(model, signature, inputs, what=what)[0]


def _two_steps(model: torch.nn.Module, signature: Signature, inputs: Arrays) -> Arrays:
    """All that one step returns, and for a model that takes more of them, the next one, too."""
    outputs, state = _step(model, signature, inputs, what="on the samples")
    if not (signature.state or signature.feedback):
        return outputs
    following = inputs | {
        name: outputs[output]
        for output, name in signature.feedback.items()
        if _leads_back(outputs.get(output), inputs.get(name))
    }
    later = _step(model, signature, following, state=state, what="in its second step")
    second = {f"{name} of the second step": array for name, array in (later[0] | later[1]).items()}
    return outputs | state | second


def _leads_back(output: NDArray[Any] | None, given: NDArray[Any] | None) -> bool:
    # What does not fit is refused with the manifest, which says it better than the model would.
    return (
        output is not None
        and given is not None
        and (output.dtype, output.ndim) == (given.dtype, given.ndim)
    )


def _step(
    model: torch.nn.Module,
    signature: Signature,
    inputs: Arrays,
    *,
    what: str,
    state: Arrays | None = None,
) -> tuple[Arrays, Arrays]:
    """Outputs and new state [n, …] by name; both are checked."""
    count = len(next(iter(inputs.values())))
    if state is None:
        state = {
            spec.name: numpy.zeros((count, *spec.shape), datatypes.NUMPY[spec.datatype])
            for spec in signature.state
        }
    # Copies, because a model may write to its inputs.
    tensors = [torch.from_numpy(array.copy()) for array in (*inputs.values(), *state.values())]
    try:
        with torch.inference_mode():
            results = model(*tensors)
    except Exception as error:  # the model may be anybody's
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
        raise ProblemsError(
            f"the model fails {what} ({shapes}): {type(error).__name__}: {error}"
        ) from None
    results = results if isinstance(results, tuple) else (results,)
    outputs = len(results) - len(signature.state)
    names = signature.output_names or _default_names(outputs)
    if outputs < 1 or len(names) != outputs:
        raise ProblemsError(
            f"the model returned {len(results)} tensors; expected {len(names) or 'one or more'} "
            f"outputs and {len(signature.state)} of state"
        )
    problems: list[str] = []
    arrays = []
    wanted = [*names, *(spec.name for spec in signature.state)]
    for name, tensor in zip(wanted, results, strict=True):
        try:
            arrays.append(_as_array(name, tensor, count))
        except ProblemsError as error:
            problems += error.problems
    if not problems:
        problems = list(_state_problems(signature.state, arrays[outputs:]))
    if problems:
        raise ProblemsError(*problems)
    found = list(zip(wanted, arrays, strict=True))
    return dict(found[:outputs]), dict(found[outputs:])


def _default_names(count: int) -> tuple[str, ...]:
    return ("output",) if count == 1 else tuple(f"output_{n}" for n in range(count))


def _as_array(name: str, tensor: Any, count: int) -> NDArray[Any]:
    if not isinstance(tensor, torch.Tensor):
        raise ProblemsError(
            f"output {name!r} is a {type(tensor).__name__}; forward must return a tensor, or a "
            "tuple of tensors (outputs, then new state)"
        )
    try:
        array: NDArray[Any] = tensor.cpu().numpy().copy()
        datatypes.name_of(array.dtype)
    except (TypeError, RuntimeError, ValueError):
        known = ", ".join(datatypes.NUMPY)
        raise ProblemsError(
            f"output {name!r} is {tensor.dtype}, which the protocol does not have; "
            f"convert it in forward, with .float() say. Known are {known}"
        ) from None
    if array.shape[:1] != (count,):
        raise ProblemsError(
            f"output {name!r} has shape {list(array.shape)} for a batch of {count}; it must begin "
            "with the batch dimension"
        )
    return array


def _state_problems(specs: tuple[TensorSpec, ...], arrays: Sequence[NDArray[Any]]) -> Iterator[str]:
    for spec, array in zip(specs, arrays, strict=True):
        if array.dtype != datatypes.NUMPY[spec.datatype] or array.shape[1:] != spec.shape:
            yield (
                f"new state {spec.name!r} is {datatypes.name_of(array.dtype)} "
                f"{list(array.shape[1:])} a sample, expected {spec.datatype} {list(spec.shape)}"
            )


def _run_resized(model: torch.nn.Module, signature: Signature, inputs: Arrays) -> Arrays:
    """The outputs for other sizes of all dynamic dimensions: twice, or else half as large."""
    problems: list[str] = []
    for double in (True, False):
        resized = {
            spec.name: _resized(inputs[spec.name], spec, double=double) for spec in signature.inputs
        }
        if all(resized[name].shape == array.shape for name, array in inputs.items()):
            continue
        try:
            return run(model, signature, resized, what="with other sizes of what is dynamic")
        except ProblemsError as error:
            problems += error.problems
    raise ProblemsError(*problems)


def _resized(array: NDArray[Any], spec: TensorSpec, *, double: bool) -> NDArray[Any]:
    for axis, size in enumerate(spec.shape, start=1):
        if size != bundle.ANY:
            continue
        if double:
            array = numpy.concatenate([array, array], axis)
        else:
            array = array.take(range(max(1, array.shape[axis] // 2)), axis)
    return array


def _generalised(spec: TensorSpec, other: NDArray[Any]) -> TensorSpec:
    """`spec` with -1 where the size was another one in another run."""
    shape = other.shape[1:]
    if len(shape) != len(spec.shape):
        raise ProblemsError(
            f"output {spec.name!r} has {len(spec.shape)} dimensions a sample for some sizes of the "
            f"inputs and {len(shape)} for others"
        )
    sizes = zip(spec.shape, shape, strict=True)
    return msgspec.structs.replace(
        spec, shape=tuple(one if one == two else bundle.ANY for one, two in sizes)
    )


def _batch_problems(model: torch.nn.Module, signature: Signature, inputs: Arrays) -> list[str]:
    """Whether answers depend on chance, or on what else is in the batch."""
    results = _two_steps(model, signature, inputs)
    expected = {bundle.EXPECTED + name: array for name, array in results.items()}
    again = golden.compare(_two_steps(model, signature, inputs), expected)
    if again.problem:
        return [f"the model answers otherwise from run to run: {again.problem}"]
    few = {key: array[:_ALONE] for key, array in expected.items()}
    for copies in (1, 2):  # of each sample, by itself
        parts = [
            _two_steps(
                model, signature, {key: array.repeat(copies, 0) for key, array in one.items()}
            )
            for one in golden.one_by_one(inputs)[:_ALONE]
        ]
        try:
            last = {
                name: numpy.concatenate([part[name][-1:] for part in parts]) for name in results
            }
            problem = golden.compare(last, few).problem
        except ValueError:
            problem = "its outputs have other shapes"
        if problem:
            return [
                f"the answer to a sample depends on the rest of its batch: {problem}. Look for "
                "what mixes the first dimension: batch statistics, reshape, flatten(0), squeeze"
            ]
    return []
