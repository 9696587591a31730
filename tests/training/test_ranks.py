"""Several ranks do what one process does, in real processes with a real process group."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

RANKS = Path(__file__).parent / "ranks.py"


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]
) -> dict[int, list[tuple[dict[str, torch.Tensor], dict[str, Any]]]]:
    """By world size: what each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    read = {}
    for world_size in (1, 2, 3):
        for process in launch(world_size, str(RANKS), str(folder)):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
        names = [f"{rank}-of-{world_size}" for rank in range(world_size)]
        read[world_size] = [
            (
                safetensors.torch.load_file(folder / f"{name}.safetensors"),
                json.loads((folder / f"{name}.json").read_text()),
            )
            for name in names
        ]
    return read


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("kind", "atol"), [("gradient", 1e-15), ("weight", 1e-10)])
def test_many_ranks_compute_what_one_does(
    results: dict[int, Any], world_size: int, kind: str, atol: float
) -> None:
    """One step's gradient of the whole batch; the weights after 15 steps of the loop."""
    alone = {key: value for key, value in results[1][0][0].items() if key.startswith(kind)}
    assert len(alone) == 10
    assert all(value.abs().max() > 1e-4 for value in alone.values())
    for tensors, _ in results[world_size]:
        for key, value in alone.items():
            torch.testing.assert_close(tensors[key], value, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_weights_are_equal_on_every_rank(results: dict[int, Any], world_size: int) -> None:
    first, *others = (tensors for tensors, _ in results[world_size])
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_samples_in_another_order_each_epoch(
    results: dict[int, Any], world_size: int
) -> None:
    """As a set, each batch is the one that a single process would have had."""
    alone = results[1][0][1]["seen"]
    batches = zip(*(report["seen"] for _, report in results[world_size]), strict=True)
    together = [sorted(chain.from_iterable(shares)) for shares in batches]
    assert together == [sorted(batch) for batch in alone]
    epochs = [[*chain.from_iterable(alone[start : start + 5])] for start in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 60
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_loss_that_is_no_number_ends_every_rank(results: dict[int, Any]) -> None:
    for _, report in results[3]:
        assert report["diverged"].startswith("epoch 1: the loss is nan; try a --learning-rate")


def test_each_rank_distorts_its_images_in_its_own_way(results: dict[int, Any]) -> None:
    assert len({report["generator"] for _, report in results[3]}) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 7, 10])
def test_each_sample_is_evaluated_exactly_once(
    results: dict[int, Any], world_size: int, count: int
) -> None:
    reports = [report[str(count)] for _, report in results[world_size]]
    asked = [number for report in reports for number in report["asked"]]
    assert sorted(asked) == list(range(count))
    wrong = sum(number % 3 == 2 for number in range(count))
    for report in reports:
        assert report["metrics"]["test_accuracy"] == (count - wrong) / count
        assert report["metrics"] == pytest.approx(results[1][0][1][str(count)]["metrics"])
