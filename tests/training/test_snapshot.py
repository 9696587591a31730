"""Snapshots on the disk: whole or not there, and never taken for what they are not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.training import TrainingError, distributed, snapshot
from gpu_service.training.snapshot import Snapshot, Snapshots

ALONE = distributed.Placement(rank=0, world_size=1, local_rank=0, master="")
CPU = torch.device("cpu")
FACTS = {"a": [0.1, None, "x"], "course": {}, "world_size": 1}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with distributed.process_group(ALONE, timeout_s=10):
        yield


def made(epoch: int, step: int = 0, value: float = 1.0) -> Snapshot:
    tensors = {"model.weight": torch.full((3, 2), value, dtype=torch.float64)}
    return Snapshot(epoch=epoch, step=step, tensors=tensors, facts=FACTS)


def snapshots(folder: Path, course: dict[str, Any] | None = None) -> Snapshots:
    return Snapshots(folder, place=ALONE, device=CPU, course=course or {})


def save(one: Snapshots, epoch: int, step: int = 0, value: float = 1.0) -> None:
    made_one = made(epoch, step, value)
    one.save(epoch=epoch, step=step, tensors=made_one.tensors, facts=made_one.facts)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_what_is_read() -> None:
    read = snapshot.decode(snapshot.encode(made(3, 7, 0.1)))
    assert (read.epoch, read.step, read.facts) == (3, 7, FACTS)
    assert torch.equal(read.tensors["model.weight"], made(3, 7, 0.1).tensors["model.weight"])


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, snapshot.encode(made(1))[:-1]])
def test_what_is_no_snapshot_is_refused(content: bytes) -> None:
    with pytest.raises(snapshot.SnapshotError):
        snapshot.decode(content)


def test_two_are_kept(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        snapshot.write(tmp_path, made(epoch))
    assert [name[:16] for name in files(tmp_path)] == ["000002-000000000", "000003-000000000"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_one_falls_back_to_the_one_before(
    tmp_path: Path, group: None, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    snapshot.write(tmp_path, made(1, value=1.0))
    damage(snapshot.write(tmp_path, made(1, 5, value=2.0)))
    one = snapshots(tmp_path)
    resumed = one.resume()
    assert resumed is not None
    assert (resumed.step, resumed.tensors["model.weight"].unique().tolist()) == (0, [1.0])
    assert "is damaged: sha256" in capsys.readouterr().out
    assert sum(name.endswith(".damaged") for name in files(tmp_path)) == 1
    save(one, 1, 3)
    save(one, 1, 6)
    one.wait()
    # The damaged one takes the place of neither.
    assert [name[:16] for name in files(tmp_path) if not name.endswith(".damaged")] == [
        "000001-000000003",
        "000001-000000006",
    ]


def test_of_all_ranks_the_same_goes_on_where_the_newest_is(tmp_path: Path, group: None) -> None:
    one = snapshots(tmp_path, {"seed": 1})
    save(one, 2, 9)
    save(one, 10, 1)
    one.wait()
    resumed = snapshots(tmp_path, {"seed": 1}).resume()
    assert resumed is not None
    assert (resumed.epoch, resumed.step, resumed.facts["world_size"]) == (10, 1, 1)


def test_a_folder_without_any_begins(tmp_path: Path, group: None) -> None:
    assert snapshots(tmp_path / "new").resume() is None
    assert snapshots(tmp_path / "new") and not Snapshots(None, place=ALONE, device=CPU, course={})


def test_a_snapshot_is_of_the_moment_it_was_taken(tmp_path: Path, group: None) -> None:
    """Training goes on, and changes the tensors, while the file is written."""
    weight = torch.ones(1000)
    one = snapshots(tmp_path)
    one.save(epoch=0, step=1, tensors={"weight": weight}, facts={})
    weight.zero_()
    one.wait()
    resumed = snapshots(tmp_path).resume()
    assert resumed is not None
    assert torch.equal(resumed.tensors["weight"], torch.ones(1000))


def test_other_settings_are_refused_and_named(tmp_path: Path, group: None) -> None:
    one = snapshots(tmp_path, {"seed": 1, "epochs": 5, "zero": False})
    save(one, 1)
    one.wait()
    with pytest.raises(TrainingError) as error:
        snapshots(tmp_path, {"seed": 2, "epochs": 5, "zero": True}).resume()
    for part in ("seed was 1, is 2; zero was False, is True", "another folder"):
        assert part in str(error.value)


def test_a_disk_that_fails_ends_the_run(tmp_path: Path, group: None) -> None:
    one = snapshots(tmp_path / "gone")
    save(one, 1)
    with pytest.raises(TrainingError, match="gone: cannot write a snapshot: No such file"):
        save(one, 2)  # learns of the one before


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path, group: None) -> None:
    (tmp_path / ".writing-0123").write_bytes(b"half")
    assert snapshots(tmp_path).resume() is None
    assert files(tmp_path) == []
