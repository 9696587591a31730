import math
from typing import Any

import numpy
import pytest
from numpy.typing import NDArray

from gpu_service import golden

EXPECTED = numpy.array([[0.1, 0.9], [0.8, 0.2]], "<f4")
SAMPLES: dict[str, NDArray[Any]] = {
    "x": numpy.array([[1.0], [2.0]], "<f4"),
    "expected.y": EXPECTED,
    "label": numpy.array([1, 0]),
}


def test_inputs_are_what_is_neither_label_nor_expected() -> None:
    assert golden.inputs_of(SAMPLES).keys() == {"x"}


def test_one_by_one_keeps_the_batch_dimension() -> None:
    first, second = golden.one_by_one(SAMPLES)
    assert first["x"].tolist() == [[1.0]]
    assert second["x"].tolist() == [[2.0]]


def test_equal_outputs_pass() -> None:
    assert golden.compare({"y": EXPECTED}, SAMPLES) == golden.Comparison(
        max_abs_diff=0.0, problem=None
    )


def test_a_small_difference_passes_and_is_reported() -> None:
    comparison = golden.compare({"y": EXPECTED + numpy.float32(5e-4)}, SAMPLES)
    assert comparison.problem is None
    assert comparison.max_abs_diff == pytest.approx(5e-4, rel=1e-3)


def test_a_small_difference_that_changes_the_class_fails() -> None:
    samples = SAMPLES | {"expected.y": numpy.array([[0.5, 0.5004], [0.8, 0.2]], "<f4")}
    output = numpy.array([[0.5004, 0.5], [0.8, 0.2]], "<f4")
    assert "1 of 2 classes differ" in str(golden.compare({"y": output}, samples).problem)


@pytest.mark.parametrize(
    ("outputs", "problem"),
    [
        ({"y": EXPECTED + 1}, "off by 1"),
        ({"y": numpy.full_like(EXPECTED, math.nan)}, "off by nan"),
        ({"y": EXPECTED[:1]}, r"expected shape [2, 2], got shape [1, 2]"),
        ({}, "got nothing"),
    ],
)
def test_wrong_outputs_fail(outputs: dict[str, NDArray[Any]], problem: str) -> None:
    assert problem in str(golden.compare(outputs, SAMPLES).problem)
