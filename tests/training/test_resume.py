"""A run that was interrupted ends with the weights of one that never was, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.training.resume import WAYS

PROGRAM = Path(__file__).parent / "resume.py"
WORLD_SIZES = (3, 2)  # in this order: the second goes on with a run of the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for world_size in WORLD_SIZES:
        for process in launch(world_size, str(PROGRAM), str(folder)):
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, out + err
    return folder


def each_rank(folder: Path, world_size: int) -> Any:
    for rank in range(world_size):
        name = f"{rank}-of-{world_size}"
        report = json.loads((folder / f"{name}.json").read_text())
        yield safetensors.torch.load_file(folder / f"{name}.safetensors"), report


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_ends_the_same_to_the_last_bit(
    folder: Path, world_size: int, way: str
) -> None:
    """Noise and dropout are in it, and each run was interrupted three times, in mid-epoch."""
    for tensors, report in each_rank(folder, world_size):
        whole = {key: value for key, value in tensors.items() if key.startswith(f"{way} whole: ")}
        assert len(whole) == 6
        for key, value in whole.items():
            assert torch.equal(value, tensors[key.replace(" whole: ", " resumed: ")]), key
        resumed = report[f"{way} resumed"]
        for row, expected in zip(resumed, report[f"{way} whole"], strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        assert all(report["interrupted"])


def test_it_says_where_it_goes_on(folder: Path) -> None:
    _, report = next(each_rank(folder, 2))
    assert report["said"][:2] == [
        "resumed at epoch 2, step 1 of 8; 2 ranks took the snapshot",
        "resumed at epoch 3, step 4 of 8; 2 ranks took the snapshot",
    ]


def test_another_number_of_ranks_goes_on_with_the_same_batches(folder: Path) -> None:
    """Equal but for the order of additions."""
    for tensors, report in each_rank(folder, 2):
        assert report["said"][-1].endswith("; 3 ranks took the snapshot")
        for key, value in tensors.items():
            if key.startswith("shared whole: "):
                other = tensors[key.replace("shared whole: ", "shared: ")]
                torch.testing.assert_close(other, value, rtol=0, atol=1e-10, msg=key)
