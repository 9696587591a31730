"""Ranks and agents that are killed, with the program that measures it: bench.training.kills."""

import random
from pathlib import Path

import pytest

from bench.training import kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> kills.Trial:
    return kills.trial(tmp_path_factory.mktemp("kills") / "whole", victim="", after_s=0.0)


@pytest.mark.parametrize("number", [kills.VICTIMS.index("rank 0"), kills.VICTIMS.index("agent")])
def test_a_killed_run_ends_as_if_nothing_had_been(
    whole: kills.Trial, tmp_path: Path, number: int
) -> None:
    one = kills.killed(tmp_path, number, random.Random(number), longest_s=whole.took_s)
    log = next(tmp_path.iterdir(), tmp_path) / "log"
    assert whole.weights
    assert one.weights == whole.weights, log.read_text()
