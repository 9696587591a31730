"""Which bundles the quality gate lets pass."""

from __future__ import annotations

import math

import pytest

from provision import quality


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "passes"),
    [
        (0.98, 0.98, 0.98, True),
        (0.979, 0.98, 1.0, False),
        (1.01, 0.98, 1.0, False),
        (math.nan, 0.0, 1.0, False),
    ],
)
def test_a_bar_holds_at_its_own_figure_and_never_for_nan(
    value: float, at_least: float, at_most: float, passes: bool
) -> None:
    found = quality.problems(
        {"accuracy": value}, at_least={"accuracy": at_least}, at_most={"accuracy": at_most}
    )
    assert (not found) == passes


def test_without_bars_everything_passes() -> None:
    assert quality.problems({}, at_least={}, at_most={}) == []


def test_a_bundle_without_the_metric_does_not_pass() -> None:
    (problem,) = quality.problems({}, at_least={"accuracy": 0.5}, at_most={"accuracy": 1.0})
    assert problem == "it has no metric accuracy, of which a bar is set; its metrics: none"
