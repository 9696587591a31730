"""The streaming task: its data, its split, its augmentation, and the network's state."""

from itertools import product
from pathlib import Path

import numpy
import pytest
import torch

from gpu_service.models.watch import WatchGRU
from gpu_service.training import TrainingError, watch
from gpu_service.training.task import Task


@pytest.fixture(scope="module")
def recordings() -> watch.Recordings:
    return watch.load()


@pytest.fixture(scope="module")
def task() -> Task:
    return watch.task()


def test_every_person_does_every_exercise_with_both_arms(recordings: watch.Recordings) -> None:
    found = set(zip(*(a.tolist() for a in recordings[1:]), strict=True))
    assert found == set(product(range(7), range(1, 11), (False, True)))
    assert len(recordings.movement) == 140


def test_the_numbers_are_movements(recordings: watch.Recordings) -> None:
    """In columns read as rows, neighbours in time would have nothing in common."""
    smooth = []
    for movement in recordings.movement:
        assert 18 < len(movement) / 50 < 53  # seconds
        assert numpy.isfinite(movement).all()
        acceleration = numpy.linalg.norm(movement[:, :3], axis=1)
        assert 0.9 < acceleration.mean() < 4  # in g, and 1 of it is the earth's
        smooth.append(numpy.abs(numpy.diff(movement, axis=0)).mean(0) / movement.std(0))
    assert numpy.mean(smooth) < 0.3


def test_in_a_mirror_the_arms_do_the_same(recordings: watch.Recordings) -> None:
    mirror = WatchGRU().mirror.numpy()
    apart = {False: 0.0, True: 0.0}
    for person in range(1, 11):
        for label in range(7):
            mine = (recordings.person == person) & (recordings.label == label)
            left, right = (
                recordings.movement[numpy.flatnonzero(mine & (recordings.left == is_left))[0]]
                for is_left in (True, False)
            )
            for mirrored in apart:
                seen = left * mirror if mirrored else left
                apart[mirrored] += float(numpy.abs(seen.mean(0) - right.mean(0)).sum())
    assert apart[True] < 0.4 * apart[False]


def test_nobody_is_in_both_parts(recordings: watch.Recordings, task: Task) -> None:
    test = numpy.isin(recordings.person, watch.TEST_PEOPLE)
    for samples, chosen in ((task.train, ~test), (task.test, test)):
        first = {each.tobytes() for each in samples.tensors[0][:, 0].numpy()}
        assert first == {
            watch.steps(recordings.movement[index])[0].tobytes()
            for index in numpy.flatnonzero(chosen)
        }
    assert (len(task.train), len(task.test)) == (112, 28)


def test_other_people_can_be_held_out() -> None:
    """As cross-validation does, in which everybody is once."""
    task = watch.task((3, 8))
    assert "by person: 3 and 8 of 1 to 10" in task.source.split
    first, other = (each.test.tensors[0][:, 0] for each in (task, watch.task()))
    assert first.shape == other.shape
    assert not any(torch.equal(a, b) for a in first for b in other)


def test_streams_take_turns_and_end_without_a_label(task: Task) -> None:
    movement, left, label = task.test.tensors
    assert label[:, 0].tolist() == list(range(7)) * 4
    ended = label == watch.NO_LABEL
    assert ended.any()
    assert not movement[ended].any()
    assert (label.where(~ended, label[:, :1]) == label[:, :1]).all()
    assert (left == left[:, :1]).all()


def test_augmented_streams_are_other_movements_of_the_same_kind(task: Task) -> None:
    sample = tuple(tensor[:64] for tensor in task.train.tensors)
    torch.manual_seed(1)
    movement, left, label = task.augment(*sample)
    assert movement.shape == (64, 30, 25, 6)
    assert torch.equal(left, sample[1][:, :30])
    assert torch.equal(label, sample[2][:, :1].expand(-1, 30))
    assert movement.isfinite().all()
    gravity = movement[..., :3].norm(dim=-1).mean(dim=(1, 2))
    assert ((gravity > 0.8) & (gravity < 4)).all()
    assert not torch.isclose(movement[:, 0], sample[0][:, 0], atol=1e-4).all(dim=(1, 2)).any()
    torch.manual_seed(1)
    assert torch.equal(task.augment(*sample)[0], movement)


def test_a_turn_changes_no_length() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(9, 5, 2, 3)
    turned = watch._turned(vectors, 1.0)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    # All vectors of one stream by the same turn: their angles to each other stay.
    torch.testing.assert_close(turned[:, 0] @ turned[:, 1].mT, vectors[:, 0] @ vectors[:, 1].mT)
    assert (turned - vectors).norm(dim=-1).max() > 0.5


def test_a_loss_and_a_measure_look_at_nothing_after_the_end() -> None:
    label = torch.tensor([[2, 2, -1], [0, 0, 0]])
    logits = torch.zeros(2, 3, 7)
    logits[0, 1, 2] = logits[1, 1, 0] = logits[1, 2, 5] = 9.0
    assert watch.measure(logits, label)["at_end"].tolist() == [1, 0]
    before = watch.loss(logits, label)
    logits[0, 2] = torch.randn(7)
    assert torch.equal(watch.loss(logits, label), before)
    logits[0, 1, 2] = 0
    assert watch.loss(logits, label)[0] > before[0]


def test_whole_streams_are_what_single_steps_are(task: Task) -> None:
    torch.manual_seed(0)
    model = task.build().eval()
    movement, left, _ = (tensor[:3, :4] for tensor in task.test.tensors)
    with torch.inference_mode():
        (whole,) = task.whole(model)(movement, left)
        state = [torch.zeros(3, *spec.shape) for spec in task.state]
        for step in range(4):
            logits, *state = model(movement[:, step], left[:, step], *state)
            torch.testing.assert_close(logits, whole[:, step])
        assert not torch.allclose(task.step(model)(movement[:, 3], left[:, 3])[0], logits)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda _: None)
    with pytest.raises(TrainingError, match=r"pip install --no-deps seglearn==1\.2\.5"):
        watch.load()


def test_another_file_in_its_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Above all, nothing of it is unpickled."""
    (tmp_path / "watch.npy").write_bytes(b"c__main__\nexplode\n.")
    monkeypatch.setattr(watch, "_file", lambda: tmp_path / "watch.npy")
    with pytest.raises(TrainingError, match=r"watch\.npy: sha256 .* expected eb122f23"):
        watch.load()
