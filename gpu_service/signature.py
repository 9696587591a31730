"""What a served model is called, takes and returns, and whether a request fits it.

Pure: immutable values and functions, shared by the server and the engine.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy
from numpy.typing import NDArray

from gpu_service import datatypes
from gpu_service.bundle import Manifest, TensorSpec
from gpu_service.messages import ErrorCode, ProtocolError, Request
from gpu_service.protocol import quote

DYNAMIC = -1  # a size that each request may choose

Shapes = tuple[tuple[int, ...], ...]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One model as clients see it. Shapes are per sample, without the batch dimension."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    digest: str = ""
    state: tuple[TensorSpec, ...] = ()
    feedback: Mapping[str, str] = {}
    done: str | None = None

    @classmethod
    def of(cls, manifest: Manifest, *, digest: str) -> "ModelInfo":
        """The model of a bundle; `digest` is `bundle.digest` of its folder."""
        return cls(
            name=manifest.name,
            version=manifest.version,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            labels=manifest.labels,
            digest=digest,
            state=manifest.state,
            feedback=manifest.feedback,
            done=manifest.done,
        )


class Fit:
    """Says what `samples_in` says of one model, at a fraction of its cost when nothing is wrong."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._inputs: list[tuple[str, numpy.dtype[Any], tuple[int, ...]]] = [
            (spec.name, datatypes.NUMPY[spec.datatype], (1, *spec.shape)) for spec in model.inputs
        ]
        self._is_dynamic = any(DYNAMIC in spec.shape for spec in model.inputs)
        # Of the last request that fitted.
        self._layout: object = None
        self._samples = 0

    def samples_in(self, request: Request) -> int:
        """The number n of samples in `request`; raises as `samples_in`."""
        layout = request.layout
        if layout is not None and layout is self._layout:
            return self._samples
        samples = 0
        if request.outputs is None and not self._is_dynamic:
            samples = self._samples_of(request.inputs)
        if not samples:
            samples = samples_in(request, self._model)
        self._layout, self._samples = layout, samples
        return samples

    def _samples_of(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """How many samples these are, if nothing is wrong with them; else 0."""
        if len(inputs) != len(self._inputs):
            return 0
        samples = 0
        for number, (name, dtype, one) in enumerate(self._inputs):
            array = inputs.get(name)
            if array is None or (array.dtype is not dtype and array.dtype != dtype):
                return 0
            shape = array.shape
            # Most requests have one sample: nothing is cut out for those.
            count = 1 if shape == one else shape[0] if shape[1:] == one[1:] else 0
            if number and count != samples:
                return 0
            samples = count
        return samples

    def key(self, inputs: Mapping[str, NDArray[Any]]) -> Shapes | None:
        """What inputs that fit must have in common to run together; None: all may."""
        if not self._is_dynamic:
            return None
        return tuple(inputs[name].shape[1:] for name, _, _ in self._inputs)


def samples_in(request: Request, model: ModelInfo) -> int:
    """The number n of samples in `request`, once it is known to fit `model`.

    Raises ProtocolError, INVALID_ARGUMENT, for inputs or outputs whose names, datatypes or
    shapes are not the model's.
    """
    problem = _tensor_problem(request, model)
    if problem:
        raise ProtocolError(ErrorCode.INVALID_ARGUMENT, problem, request_id=request.id)
    return len(request.inputs[model.inputs[0].name])


def shape_fits(shape: tuple[int, ...], declared: tuple[int, ...]) -> bool:
    """Whether a sample of `shape` is one of `declared`, where DYNAMIC is any size from 1 up."""
    if shape == declared:
        return True
    return len(shape) == len(declared) and all(
        size == wanted or (wanted == DYNAMIC and size >= 1)
        for size, wanted in zip(shape, declared, strict=True)
    )


def metadata(model: ModelInfo) -> dict[str, Any]:
    """The model metadata object of the Open Inference Protocol; -1 is the batch dimension."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "pytorch",
        "inputs": [_metadata(spec) for spec in model.inputs],
        "outputs": [_metadata(spec) for spec in model.outputs],
        "parameters": {
            "labels": model.labels,
            "digest": model.digest,
            "stateful": bool(model.state),
            "many_responses": bool(model.feedback),
        },
    }


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _tensor_problem(request: Request, model: ModelInfo) -> str | None:
    if request.inputs.keys() != {spec.name for spec in model.inputs}:
        expected, got = _listed(spec.name for spec in model.inputs), _listed(request.inputs)
        return f"model {model.name!r} takes the inputs {expected}; got {got}"
    known = {spec.name for spec in model.outputs}
    if request.outputs is not None and not known.issuperset(request.outputs):
        return (
            f"model {model.name!r} has the outputs {_listed(known)}; got {_listed(request.outputs)}"
        )
    for spec in model.inputs:
        array = request.inputs[spec.name]
        dtype = datatypes.NUMPY[spec.datatype]
        if array.dtype != dtype or not shape_fits(array.shape[1:], spec.shape):
            expected = ", ".join(["n", *("any" if n == DYNAMIC else str(n) for n in spec.shape)])
            return (
                f"input {spec.name!r} must be {spec.datatype} of shape [{expected}]; "
                f"got {datatypes.name_of(array.dtype)} of shape {list(array.shape)}"
            )
    counts = {array.shape[0] for array in request.inputs.values()}
    if len(counts) > 1 or 0 in counts:
        return f"all inputs need the same number of samples, at least one; got {sorted(counts)}"
    return None


def _listed(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(map(quote, shown[:8])) + (", …" if len(shown) > 8 else "") or "none"
