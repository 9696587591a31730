"""`python -m gpu_service inspect`: what a bundle is, for people."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from gpu_service import __main__ as command_line
from gpu_service import bundle


def write(directory: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "directory": directory,
        "name": "writer",
        "version": "v1",
        "architecture": bundle.Architecture(name="my.nets:Writer", arguments={"width": 8}),
        "inputs": (
            bundle.TensorSpec(name="token", datatype="INT64", shape=()),
            bundle.TensorSpec(name="prompt", datatype="FP32", shape=(-1, 2)),
        ),
        "outputs": (
            bundle.TensorSpec(name="next", datatype="INT64", shape=()),
            bundle.TensorSpec(name="ended", datatype="BOOL", shape=()),
        ),
        "labels": (),
        "state": (bundle.TensorSpec(name="hidden", datatype="FP32", shape=(4,)),),
        "feedback": {"next": "token"},
        "done": "ended",
        "state_dict": {"a": torch.ones(2, 3), "b": torch.tensor(1)},
        "samples": {
            "token": numpy.arange(3),
            "prompt": numpy.ones((3, 5, 2), "f4"),
            "expected.next": numpy.arange(3),
            "expected.ended": numpy.zeros(3, "?"),
        },
    }
    return bundle.write(**(arguments | changes))


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command_line.main(["inspect", str(path)])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_a_bundle_that_was_brought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    code, said, _ = inspect(path, capsys)
    assert code == 0
    for part in (
        "writer v1, written 20",
        f"folder {path}",
        f"digest {bundle.digest(path)}",
        "network my.nets:Writer(width=8) served with: --factories my.nets:Writer",
        "inputs token: INT64 [n] prompt: FP32 [n, any, 2]",
        "outputs next: INT64 [n] ended: BOOL [n]",
        "state hidden: FP32 [n, 4]",
        "feedback next → token until ended is true",
        "training none here",
        f"sha256 {bundle.read_manifest(path).files['model.safetensors'].sha256}",
        "checked every file is what the manifest says",
        "samples 3 golden ones, without true labels: ",
        "prompt [3, 5, 2]",
        "weights 7 values in 2 tensors of F32, I64",
    ):
        assert part in said, part


def test_a_bundle_that_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = bundle.Training(
        dataset="made up",
        dataset_sha256="0" * 64,
        train_samples=8000,
        test_samples=4000,
        epochs=1,
        seed=3,
        world_size=2,
        backend="gloo",
        torch="2.13.0",
        metrics={"test_accuracy": 0.75},
        settings={"batch_size": 64},
        split="random",
        dataset_license="MIT",
    )
    path = write(
        tmp_path,
        architecture=bundle.Architecture(name="digits_cnn", arguments={}),
        training=training,
        labels=(),
        state=(),
        feedback={},
        done=None,
    )
    code, said, _ = inspect(path.parent, capsys)
    assert code == 0
    for part in (
        "network digits_cnn() inputs",
        f"training made up, split random, MIT sha256 {'0' * 64}",
        "8,000 samples, 1 epochs, seed 3, world size 2 (gloo), torch 2.13.0 batch_size=64",
        "measured test_accuracy=0.75, on 4,000 held-out samples",
    ):
        assert part in said, part
    for part in ("state", "feedback", "served with"):
        assert part not in said


def test_damage_is_said_after_what_it_should_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    (path / "model.safetensors").write_bytes(b"x")
    code, said, error = inspect(path, capsys)
    assert code == 1
    assert "writer v1" in said
    assert "checked" not in said
    assert "gpu_service inspect: " in error
    assert "model.safetensors: 1 bytes, expected" in error


def test_many_labels_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = (bundle.TensorSpec(name="scores", datatype="FP32", shape=(20,)),)
    samples = {
        "token": numpy.arange(3),
        "prompt": numpy.ones((3, 5, 2), "f4"),
        "expected.scores": numpy.zeros((3, 20), "f4"),
    }
    path = write(
        tmp_path,
        outputs=outputs,
        samples=samples,
        labels=tuple(f"class{n}" for n in range(20)),
        feedback={},
        done=None,
    )
    said = inspect(path, capsys)[1]
    assert "labels 20: class0, class1, " in said
    assert "class11, …" in said
    assert "class12" not in said


def classifier(directory: Path, version: str, answers: list[int], **changes: Any) -> Path:
    """One that sees in samples 0, 1, … the classes `answers`."""
    count = len(answers)
    arguments: dict[str, Any] = {
        "version": version,
        "labels": ("cat", "dog", "cow"),
        "inputs": (bundle.TensorSpec(name="image", datatype="FP32", shape=()),),
        "outputs": (bundle.TensorSpec(name="logits", datatype="FP32", shape=(3,)),),
        "state": (),
        "feedback": {},
        "done": None,
        "samples": {
            "image": numpy.arange(count, dtype="f4"),
            "expected.logits": numpy.eye(3, dtype="f4")[answers],
        },
    }
    return write(directory, **(arguments | changes))


def compared(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert command_line.main(["compare", str(before), str(after)]) == 0
    return capsys.readouterr().out


def test_two_bundles_differ_in_how_they_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are found again by what they are, not by where they stand."""
    before = classifier(tmp_path, "v1", [0, 1, 2, 0])
    after = classifier(
        tmp_path,
        "v2",
        [],
        samples={
            "image": numpy.array([3, 2, 9], "f4"),
            "expected.logits": numpy.eye(3, dtype="f4")[[1, 2, 0]],
        },
    )
    said = compared(before, after, capsys)
    assert said.startswith("writer v1 → writer v2\n")
    assert "golden samples in both: 2, answered otherwise: 1 (cat → dog)" in said


def test_what_has_other_classes_is_not_compared_by_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = classifier(tmp_path, "v1", [0, 1, 2, 0])
    after = classifier(tmp_path, "v2", [0, 1, 2, 0], labels=("a", "b", "c"))
    assert "golden samples" not in compared(before, after, capsys)


def test_a_damaged_bundle_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = classifier(tmp_path, "v1", [0]), classifier(tmp_path, "v2", [0])
    (after / bundle.SAMPLES).write_bytes(b"")
    assert command_line.main(["compare", str(before), str(after)]) == 1
    assert "samples.safetensors: 0 bytes" in capsys.readouterr().err
