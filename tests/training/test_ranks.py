"""Several ranks do what one process does, in real processes with a real process group."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bench.training import tiny
from bench.training.equality import BARS
from tests.training.ranks import COUNTS, WAYS

RANKS = Path(__file__).parent / "ranks.py"
WORLD_SIZES = (1, 3)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]
) -> dict[int, list[tuple[dict[str, torch.Tensor], dict[str, Any]]]]:
    """By world size: what each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    read = {}
    for world_size in WORLD_SIZES:
        for process in launch(world_size, str(RANKS), str(folder)):
            out, err = process.communicate(timeout=180)
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


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}: ")}


@pytest.mark.parametrize("name", BARS)
def test_many_ranks_compute_what_one_does(results: dict[int, Any], name: str) -> None:
    """One step's gradients of the whole batch, and the weights after 50 steps."""
    alone = part(results[1][0][0], name)
    assert len(alone) == 6
    assert all(value.abs().max() > 1e-4 for value in alone.values())
    for tensors, _ in results[3]:
        for key, value in alone.items():
            torch.testing.assert_close(tensors[key], value, rtol=0, atol=BARS[name], msg=key)


def test_many_ranks_learn_from_streams_what_one_does(results: dict[int, Any]) -> None:
    """DDP sees one call a batch, however many steps its streams have."""
    alone = part(results[1][0][0], "streams")
    assert set(alone) == {f"streams: {name}" for name in tiny.Memory().state_dict()}
    torch.manual_seed(0)
    begun = tiny.streams().build().state_dict()
    assert (alone["streams: cell.weight_hh"] - begun["cell.weight_hh"]).abs().max() > 0.01
    for tensors, _ in results[3]:
        for key, value in alone.items():
            torch.testing.assert_close(tensors[key], value, rtol=0, atol=1e-10, msg=key)


def test_of_streams_each_answer_counts_and_none_after_their_end(results: dict[int, Any]) -> None:
    task = tiny.streams()
    _, label = task.test.tensors
    reports = [report["streams"] for _, report in (*results[1], *results[3])]
    assert all(report["confusion"] == reports[0]["confusion"] for report in reports)
    assert all(report["metrics"] == pytest.approx(reports[0]["metrics"]) for report in reports)
    confusion = torch.tensor(reports[0]["confusion"])
    assert confusion.sum(dim=1).tolist() == [int((label == of).sum()) for of in range(3)]
    hits, answers = confusion.trace().item(), (label >= 0).sum().item()
    assert reports[0]["metrics"]["accuracy"] == hits / answers


def test_each_way_to_train_leads_elsewhere(results: dict[int, Any]) -> None:
    """Otherwise the comparison above would compare nothing."""
    tensors = results[1][0][0]
    torch.manual_seed(0)
    begun = tiny.make(random=False).build().state_dict()
    key = "layers.0.weight"
    plain = tensors[f"plain: {key}"]
    assert (plain - begun[key]).abs().max() > 0.01
    for other in ("uneven", "uneven, accumulation", "clipped, averaged"):
        assert (plain - tensors[f"{other}: {key}"]).abs().max() > 1e-4, other


def test_the_weights_are_equal_on_every_rank(results: dict[int, Any]) -> None:
    first, *others = (tensors for tensors, _ in results[3])
    for other in others:
        for key, value in first.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_way_to_train_learns(results: dict[int, Any], world_size: int, way: str) -> None:
    for _, report in results[world_size]:
        assert report[way] < 1.09  # of three classes at chance: ln 3 = 1.0986


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_patience_ends_a_run_with_its_best_weights(
    results: dict[int, Any], world_size: int
) -> None:
    for _, report in results[world_size]:
        losses = [row["validation_loss"] for row in report["early"]]
        assert len(losses) < 40
        assert losses.index(min(losses)) == len(losses) - 3  # two more epochs were no better
        assert report["held out"] == pytest.approx(min(losses), abs=1e-12)


def test_a_loss_that_is_no_number_ends_every_rank(results: dict[int, Any]) -> None:
    for _, report in results[3]:
        assert report["diverged"].startswith("epoch 1: the loss is nan; try a --learning-rate")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_each_sample_is_evaluated_exactly_once(
    results: dict[int, Any], world_size: int, count: int
) -> None:
    reports = [report[str(count)] for _, report in results[world_size]]
    asked = [number for report in reports for number in report["asked"]]
    assert sorted(asked) == list(range(count))
    wrong = [number for number in range(count) if number % 3 == 2]
    labels = [number + (number in wrong) for number in range(count)]
    for report in reports:
        metrics = report["metrics"]
        assert metrics["accuracy"] == (count - len(wrong)) / count
        assert metrics["loss"] == pytest.approx(2)
        assert metrics["label"] == pytest.approx(sum(label % 10 for label in labels) / count)
        confusion = report["confusion"]
        assert sum(map(sum, confusion)) == count
        assert all(confusion[(number + 1) % 10][number] == 1 for number in wrong)
