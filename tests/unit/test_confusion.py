"""The confusion matrix as a picture."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import msgspec
import numpy
import pytest

from gpu_service import bundle, confusion
from gpu_service.training import evaluation
from tests.unit.test_history import training

SVG = "{http://www.w3.org/2000/svg}"


def drawn(matrix: Any, names: tuple[str, ...] | None = None) -> ElementTree.Element:
    labels = names or tuple(f"class {at}" for at in range(len(matrix)))
    figures = evaluation.by_class(tuple(map(tuple, matrix)), labels)
    made = msgspec.structs.replace(training(), classes=figures, confusion=matrix)
    return ElementTree.fromstring(confusion.svg(made, title="pets <1>"))


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter(f"{SVG}text")]


def fields(svg: ElementTree.Element) -> list[tuple[str, float]]:
    return [
        (field.attrib["fill"], float(field.attrib["fill-opacity"]))
        for field in svg.iter(f"{SVG}rect")
        if "fill-opacity" in field.attrib
    ]


def test_it_says_what_the_matrix_says() -> None:
    said = texts(drawn(((3, 1), (0, 4)), ("cat", "dog & co")))
    assert said[0] == "pets <1>"
    assert said[1] == "7 of 8 answers are right: 87.50%"
    assert said.count("3") == said.count("1") == said.count("4") == 1
    assert "0" not in said
    assert "cat" in said
    assert "75.0%, 100.0%" in said
    assert "100.0%, 80.0%" in said


def test_what_is_wrong_has_another_colour_and_what_is_frequent_is_darker() -> None:
    (hit, strong), (miss, weak), (_, strongest) = fields(drawn(((3, 1), (0, 4))))
    assert hit != miss
    assert weak < strong < strongest


@pytest.mark.parametrize("size", [1, 7, 30, 31, 100])
def test_any_matrix_lies_within_its_picture(size: int) -> None:
    matrix = numpy.random.default_rng(size).integers(0, 10**6, (size, size)).tolist()
    svg = drawn(matrix)
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for field in svg.iter(f"{SVG}rect"):
        at = {key: float(field.attrib.get(key, 0)) for key in ("x", "y", "width", "height")}
        assert at["x"] + at["width"] <= width + 0.5
        assert at["y"] + at["height"] <= height + 0.5
    for text in svg.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height


def test_without_labels_there_is_no_picture() -> None:
    made: bundle.Training = training(classes={}, confusion=())
    assert confusion.svg(made, title="x") == ""
