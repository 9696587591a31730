from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpu_service import predict
from gpu_service.predict import InputError, Model

INPUT = Model.Input(name="image", datatype="FP32", shape=[-1, 1, 28, 28])
SOURCE = "some.npy"


@pytest.mark.parametrize(
    ("shape", "samples"),
    [
        ((28, 28), 1),
        ((1, 28, 28), 1),
        ((1, 1, 28, 28), 1),
        ((5, 1, 28, 28), 5),
        ((5, 28, 28), 5),
        ((0, 28, 28), 0),
    ],
)
def test_one_sample_or_many_are_recognised(shape: tuple[int, ...], samples: int) -> None:
    array = numpy.arange(numpy.prod(shape), dtype="f8").reshape(shape)
    batch = predict._as_batch(SOURCE, array, INPUT)
    assert batch.shape == (samples, 1, 28, 28)
    assert batch.dtype == numpy.dtype("<f4")
    assert batch.ravel().tolist() == array.ravel().tolist()


@pytest.mark.parametrize(
    ("shape", "batch_shape"),
    [((7,), (1, 7)), ((5, 7), (5, 7)), ((5, 0), (5, 0))],
)
def test_a_size_may_be_left_open(shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> None:
    tokens = Model.Input(name="tokens", datatype="INT64", shape=[-1, -1])
    assert predict._as_batch(SOURCE, numpy.zeros(shape, "i8"), tokens).shape == batch_shape
    with pytest.raises(InputError, match="the model takes"):
        predict._as_batch(SOURCE, numpy.zeros((1, 2, 3), "i8"), tokens)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (numpy.zeros((28, 28), "u1"), "holds uint8, the model takes FP32"),
        (numpy.zeros((32, 32), "f4"), r"shape \[32, 32\], the model takes \[1, 28, 28\]"),
        (numpy.zeros((5, 5, 28, 28), "f4"), "the model takes"),
        (numpy.zeros((), "f4"), "the model takes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array: NDArray[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predict._as_batch(SOURCE, array, INPUT)


def test_confidence_is_the_softmax_of_the_best() -> None:
    index, confidence = predict._best(numpy.array([1000.0, 1001.0], "f4"))
    assert index == 1
    assert confidence == pytest.approx(numpy.e / (numpy.e + 1))
