from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpu_service import signature
from gpu_service.bundle import TensorSpec
from gpu_service.protocol import ErrorCode, ProtocolError, Request
from gpu_service.signature import ModelInfo

MODEL = ModelInfo(
    name="m",
    version="3",
    inputs=(
        TensorSpec(name="a", datatype="FP32", shape=(2, 3)),
        TensorSpec(name="b", datatype="INT64", shape=()),
    ),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(10,)),),
    labels=("zero", "one"),
    digest="abc",
)


def inputs(**changes: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
    arrays = {"a": numpy.zeros((4, 2, 3), "<f4"), "b": numpy.zeros(4, "<i8")} | changes
    return {name: array for name, array in arrays.items() if array is not None}


def test_the_number_of_samples_is_the_batch_dimension() -> None:
    request = Request(inputs=inputs(), model_name="m", model_version="3", outputs=("y",))
    assert signature.samples_in(request, MODEL) == 4
    assert signature.Fit(MODEL).samples_in(request) == 4
    assert signature.Fit(MODEL).samples_in(Request(inputs=inputs())) == 4


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (Request(inputs=inputs(), model_name="n"), ErrorCode.NOT_FOUND, "served is 'm'"),
        (Request(inputs=inputs(), model_version="2"), ErrorCode.NOT_FOUND, "served is '3'"),
        (Request(inputs=inputs(b=None)), ErrorCode.INVALID_ARGUMENT, "takes the inputs 'a', 'b'"),
        (Request(inputs=inputs(c=numpy.zeros(4))), ErrorCode.INVALID_ARGUMENT, "got 'a', 'b', 'c'"),
        (Request(inputs={}), ErrorCode.INVALID_ARGUMENT, "got none"),
        (
            Request(inputs=inputs(), outputs=("z",)),
            ErrorCode.INVALID_ARGUMENT,
            "has the outputs 'y'; got 'z'",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((4, 2, 3), "<f8"))),
            ErrorCode.INVALID_ARGUMENT,
            r"FP32 of shape \[n, 2, 3\]; got FP64",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((4, 6), "<f4"))),
            ErrorCode.INVALID_ARGUMENT,
            r"of shape \[4, 6\]",
        ),
        (
            Request(inputs=inputs(b=numpy.zeros((4, 1), "<i8"))),
            ErrorCode.INVALID_ARGUMENT,
            r"shape \[n\]; got INT64 of shape \[4, 1\]",
        ),
        (
            Request(inputs=inputs(b=numpy.zeros(3, "<i8"))),
            ErrorCode.INVALID_ARGUMENT,
            r"same number of samples.*\[3, 4\]",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((0, 2, 3), "<f4"), b=numpy.zeros(0, "<i8"))),
            ErrorCode.INVALID_ARGUMENT,
            "at least one",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused(
    request_: Request, code: ErrorCode, message: str
) -> None:
    request = Request(
        **{field: getattr(request_, field) for field in request_.__struct_fields__} | {"id": "7"}
    )
    for judge in (lambda it: signature.samples_in(it, MODEL), signature.Fit(MODEL).samples_in):
        with pytest.raises(ProtocolError, match=message) as caught:
            judge(request)
        assert caught.value.code is code
        assert caught.value.request_id == "7"


def test_metadata_shows_the_batch_dimension_and_the_labels() -> None:
    metadata = signature.metadata(MODEL)
    assert metadata["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, 2, 3]}
    assert metadata["outputs"][0]["shape"] == [-1, 10]
    assert metadata["versions"] == ["3"]
    assert metadata["parameters"]["labels"] == ("zero", "one")
