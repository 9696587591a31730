from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpu_service import signature
from gpu_service.bundle import TensorSpec
from gpu_service.messages import ErrorCode, ProtocolError, Request
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
    ("request_", "message"),
    [
        (Request(inputs=inputs(b=None)), "takes the inputs 'a', 'b'"),
        (Request(inputs=inputs(c=numpy.zeros(4))), "got 'a', 'b', 'c'"),
        (Request(inputs={}), "got none"),
        (
            Request(inputs=inputs(), outputs=("z",)),
            "has the outputs 'y'; got 'z'",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((4, 2, 3), "<f8"))),
            r"FP32 of shape \[n, 2, 3\]; got FP64",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((4, 6), "<f4"))),
            r"of shape \[4, 6\]",
        ),
        (
            Request(inputs=inputs(b=numpy.zeros((4, 1), "<i8"))),
            r"shape \[n\]; got INT64 of shape \[4, 1\]",
        ),
        (
            Request(inputs=inputs(b=numpy.zeros(3, "<i8"))),
            r"same number of samples.*\[3, 4\]",
        ),
        (
            Request(inputs=inputs(a=numpy.zeros((0, 2, 3), "<f4"), b=numpy.zeros(0, "<i8"))),
            "at least one",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused(request_: Request, message: str) -> None:
    request = Request(
        **{field: getattr(request_, field) for field in request_.__struct_fields__} | {"id": "7"}
    )
    for judge in (lambda it: signature.samples_in(it, MODEL), signature.Fit(MODEL).samples_in):
        with pytest.raises(ProtocolError, match=message) as caught:
            judge(request)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert caught.value.request_id == "7"


def test_requests_of_one_layout_are_looked_at_once_and_others_are_looked_at() -> None:
    fit = signature.Fit(MODEL)
    four, two, wrong = object(), object(), object()
    half = {name: array[:2] for name, array in inputs().items()}
    for _ in range(2):
        assert fit.samples_in(Request(inputs=inputs(), layout=four)) == 4
        for _ in range(2):
            with pytest.raises(ProtocolError, match="got none"):
                fit.samples_in(Request(inputs={}, layout=wrong))
            with pytest.raises(ProtocolError, match="got none"):
                fit.samples_in(Request(inputs={}))
        assert fit.samples_in(Request(inputs=half, layout=two)) == 2
        assert fit.samples_in(Request(inputs=half)) == 2
    # It is the layout that decides.
    assert fit.samples_in(Request(inputs=inputs(), layout=two)) == 4
    assert fit.samples_in(Request(inputs={}, layout=two)) == 4


def test_metadata_shows_the_batch_dimension_and_the_labels() -> None:
    metadata = signature.metadata(MODEL)
    assert metadata["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, 2, 3]}
    assert metadata["outputs"][0]["shape"] == [-1, 10]
    assert metadata["versions"] == ["3"]
    assert metadata["parameters"]["labels"] == ("zero", "one")


DYNAMIC = ModelInfo(
    name="d",
    version="1",
    inputs=(
        TensorSpec(name="tokens", datatype="INT64", shape=(-1,)),
        TensorSpec(name="image", datatype="UINT8", shape=(-1, 4)),
    ),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=()),),
)


def dynamic(tokens: tuple[int, ...], image: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    return {"tokens": numpy.zeros(tokens, "<i8"), "image": numpy.zeros(image, "u1")}


def test_a_dynamic_dimension_takes_any_size() -> None:
    fit = signature.Fit(DYNAMIC)
    for tokens, rows in ((1, 1), (7, 3), (1000, 2)):
        request = Request(inputs=dynamic((2, tokens), (2, rows, 4)))
        assert fit.samples_in(request) == signature.samples_in(request, DYNAMIC) == 2


@pytest.mark.parametrize(
    ("tokens", "image", "message"),
    [
        ((2, 0), (2, 1, 4), r"'tokens' must be INT64 of shape \[n, any\]; got .* \[2, 0\]"),
        ((2, 3, 1), (2, 1, 4), r"shape \[n, any\]; got INT64 of shape \[2, 3, 1\]"),
        ((2,), (2, 1, 4), r"shape \[n, any\]; got INT64 of shape \[2\]"),
        ((2, 3), (2, 1, 5), r"shape \[n, any, 4\]; got UINT8 of shape \[2, 1, 5\]"),
        ((2, 3), (1, 1, 4), r"same number of samples.*\[1, 2\]"),
    ],
)
def test_the_other_dimensions_beside_a_dynamic_one_have_to_fit(
    tokens: tuple[int, ...], image: tuple[int, ...], message: str
) -> None:
    for judge in (lambda it: signature.samples_in(it, DYNAMIC), signature.Fit(DYNAMIC).samples_in):
        with pytest.raises(ProtocolError, match=message):
            judge(Request(inputs=dynamic(tokens, image)))


def test_requests_of_the_same_sizes_may_run_together() -> None:
    fit = signature.Fit(DYNAMIC)
    assert fit.key(dynamic((1, 3), (1, 2, 4))) == fit.key(dynamic((5, 3), (5, 2, 4)))
    assert fit.key(dynamic((1, 3), (1, 2, 4))) != fit.key(dynamic((1, 4), (1, 2, 4)))
    assert fit.key(dynamic((1, 3), (1, 2, 4))) != fit.key(dynamic((1, 3), (1, 3, 4)))
    assert signature.Fit(MODEL).key(inputs()) is None


def test_metadata_says_what_a_model_can_do() -> None:
    state = (TensorSpec(name="h", datatype="FP32", shape=(4,)),)
    model = ModelInfo(
        name="s",
        version="1",
        inputs=DYNAMIC.inputs,
        outputs=DYNAMIC.outputs,
        state=state,
        feedback={"y": "tokens"},
    )
    parameters = signature.metadata(model)["parameters"]
    assert (parameters["stateful"], parameters["many_responses"]) == (True, True)
    parameters = signature.metadata(MODEL)["parameters"]
    assert (parameters["stateful"], parameters["many_responses"]) == (False, False)
    assert signature.metadata(DYNAMIC)["inputs"][1]["shape"] == [-1, -1, 4]
