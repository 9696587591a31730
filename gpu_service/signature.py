"""What a served model is called, takes and returns, and whether a request fits it.

Pure: immutable values and functions, shared by the server and the engine.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from gpu_service import datatypes
from gpu_service.bundle import Manifest, TensorSpec
from gpu_service.protocol import ErrorCode, ProtocolError, Request, quote


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One model as clients see it. Shapes are per sample, without the batch dimension."""

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    digest: str = ""

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
        )


class Fit:
    """Says what `samples_in` says of one model, at a fraction of its cost when nothing is wrong."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._inputs = [
            (spec.name, datatypes.NUMPY[spec.datatype], spec.shape) for spec in model.inputs
        ]
        self._names = (None, model.name)
        self._versions = (None, model.version)

    def samples_in(self, request: Request) -> int:
        """The number n of samples in `request`; raises as `samples_in`."""
        inputs = request.inputs
        samples = 0
        if (
            request.outputs is None
            and request.model_name in self._names
            and request.model_version in self._versions
            and len(inputs) == len(self._inputs)
        ):
            for name, dtype, shape in self._inputs:
                array = inputs.get(name)
                if array is None or array.dtype != dtype or array.shape[1:] != shape:
                    break
                if samples not in (0, array.shape[0]):
                    break
                samples = array.shape[0]
            else:
                if samples:
                    return samples
        return samples_in(request, self._model)


def samples_in(request: Request, model: ModelInfo) -> int:
    """The number n of samples in `request`, once it is known to fit `model`.

    Raises ProtocolError: NOT_FOUND for another model or version, INVALID_ARGUMENT for inputs
    or outputs whose names, datatypes or shapes are not the model's.
    """
    problem = _model_problem(request, model)
    if problem:
        raise ProtocolError(ErrorCode.NOT_FOUND, problem, request_id=request.id)
    problem = _tensor_problem(request, model)
    if problem:
        raise ProtocolError(ErrorCode.INVALID_ARGUMENT, problem, request_id=request.id)
    return len(request.inputs[model.inputs[0].name])


def metadata(model: ModelInfo) -> dict[str, Any]:
    """The model metadata object of the Open Inference Protocol; -1 is the batch dimension."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "pytorch",
        "inputs": [_metadata(spec) for spec in model.inputs],
        "outputs": [_metadata(spec) for spec in model.outputs],
        "parameters": {"labels": model.labels, "digest": model.digest},
    }


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _model_problem(request: Request, model: ModelInfo) -> str | None:
    if request.model_name not in (None, model.name):
        return f"no model {quote(request.model_name)} here; served is {model.name!r}"
    if request.model_version not in (None, model.version):
        return (
            f"no version {quote(request.model_version)} of model {model.name!r} here; "
            f"served is {model.version!r}"
        )
    return None


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
        if array.dtype != datatypes.NUMPY[spec.datatype] or array.shape[1:] != spec.shape:
            expected = ", ".join(["n", *map(str, spec.shape)])
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
