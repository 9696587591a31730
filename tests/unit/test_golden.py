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
        ({"y": EXPECTED.astype("f8")}, "expected float32, got float64"),
        ({"y": numpy.full_like(EXPECTED, math.inf)}, "off by inf"),
        ({}, "got nothing"),
    ],
)
def test_wrong_outputs_fail(outputs: dict[str, NDArray[Any]], problem: str) -> None:
    assert problem in str(golden.compare(outputs, SAMPLES).problem)


def test_every_wrong_output_is_named() -> None:
    samples = SAMPLES | {"expected.z": EXPECTED, "expected.w": EXPECTED}
    problem = str(golden.compare({"z": EXPECTED + 1, "w": EXPECTED}, samples).problem)
    assert "output 'y': expected shape [2, 2], got nothing; output 'z' is off by 1" in problem
    assert "'w'" not in problem


def test_a_tolerance_of_its_own() -> None:
    output = EXPECTED + numpy.float32(0.04)
    assert golden.compare({"y": output}, SAMPLES).problem
    assert golden.compare({"y": output}, SAMPLES, max_abs_diff=0.05).problem is None


def test_a_share_of_classes_may_differ() -> None:
    expected = numpy.array([[0.5, 0.5004], [0.8, 0.2], [0.8, 0.2], [0.8, 0.2]], "<f4")
    output = expected.copy()
    output[0] = [0.5004, 0.5]
    samples = {"expected.y": expected}
    comparison = golden.compare({"y": output}, samples, classes_may_differ=0.25)
    assert (comparison.problem, comparison.classes_differ) == (None, 0.25)
    problem = golden.compare({"y": output}, samples, classes_may_differ=0.24).problem
    assert problem == "output 'y': 1 of 4 classes differ"


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "<u2", "<i4", "<i8"])
def test_integers_and_booleans_must_be_equal(dtype: str) -> None:
    expected = numpy.array([[0, 1], [1, 0], [1, 1], [0, 0]], dtype)
    other = expected.copy()
    other[3, 1] = 1
    samples = {"expected.y": expected}
    assert golden.compare({"y": expected}, samples).problem is None
    comparison = golden.compare({"y": other}, samples)
    assert comparison.problem == "output 'y': 1 of 8 values differ"
    assert (comparison.classes_differ, comparison.max_abs_diff) == (0.125, 0.0)
    assert golden.compare({"y": other}, samples, classes_may_differ=0.125).problem is None


def test_great_integers_are_compared_exactly() -> None:
    """As floating point, they would be equal."""
    samples = {"expected.y": numpy.array([1 << 60])}
    assert golden.compare({"y": numpy.array([(1 << 60) + 1])}, samples).problem


def test_the_tolerance_grows_with_the_values() -> None:
    expected = numpy.array([[4000.0], [0.0]], "<f4")
    samples = {"expected.y": expected}
    assert golden.compare({"y": expected + 3}, samples).problem is None
    assert "off by 5, allowed is 4" in str(golden.compare({"y": expected + 5}, samples).problem)


def test_a_tie_is_not_another_class() -> None:
    """Saturated values differ in their last bit, and either may be the greatest."""
    expected = numpy.array([[1.0, 0.9999999]], "<f4")
    assert golden.compare({"y": expected[:, ::-1]}, {"expected.y": expected}).problem is None


def test_what_a_model_masks_with_is_equal_to_itself() -> None:
    expected = numpy.array([[-math.inf, 1.0], [math.nan, 0.0], [-math.inf, -math.inf]], "<f4")
    samples = {"expected.y": expected}
    assert golden.compare({"y": expected.copy()}, samples).problem is None
    other = expected.copy()
    other[0, 0] = 0.0
    assert "off by inf" in str(golden.compare({"y": other}, samples).problem)


def test_dynamic_sizes_are_compared_as_they_came() -> None:
    expected = numpy.zeros((2, 7, 3, 5), "<f2")
    samples = {"expected.y": expected}
    assert golden.compare({"y": expected}, samples).problem is None
    assert "got shape [2, 7, 3, 4]" in str(
        golden.compare({"y": expected[..., 1:]}, samples).problem
    )


def test_scalars_have_no_class() -> None:
    samples = {"expected.y": numpy.array([0.5, 0.7], "<f4")}
    output = numpy.array([0.5001, 0.6999], "<f4")
    assert golden.compare({"y": output}, samples).problem is None
