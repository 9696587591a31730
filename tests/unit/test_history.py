"""How a model came to be, as text."""

from typing import Any

import msgspec

from gpu_service import bundle, history

DIGEST = "0" * 64


def training(**changes: Any) -> bundle.Training:
    return msgspec.structs.replace(
        bundle.Training(
            dataset="made up",
            dataset_sha256=DIGEST,
            train_samples=80,
            test_samples=7,
            epochs=3,
            seed=3,
            world_size=2,
            backend="gloo",
            torch="2.13.0",
            metrics={"test_accuracy": 0.75},
            settings={"batch_size": 64},
            curve=(
                {"epoch": 1, "loss": 2.0},
                {"epoch": 2, "loss": 1.0, "validation_loss": 1.5},
                {"epoch": 3, "loss": 0.0, "validation_loss": 1.5},
            ),
            classes={
                "cat": {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4},
                "dog": {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3},
            },
            confusion=((3, 1), (1, 2)),
        ),
        **changes,
    )


def manifest(version: str, weights: str = DIGEST, **changes: Any) -> bundle.Manifest:
    return bundle.Manifest(
        format=1,
        name="pets",
        version=version,
        created="2026-01-31T12:34:56Z",
        architecture=bundle.Architecture(name="digits_cnn", arguments={}),
        inputs=(),
        outputs=(),
        labels=("cat", "dog"),
        training=training(**changes),
        files={"model.safetensors": bundle.FileEntry(sha256=weights, bytes=1)},
    )


def test_a_curve_shows_where_it_began_how_it_went_and_where_it_ended() -> None:
    loss, validation = history.curve(training())
    assert loss.split() == ["loss", "2", "█▅▁", "0"]
    assert validation.split() == ["validation_loss", "1.5", "▁▁", "1.5"]


def test_a_long_curve_is_drawn_in_a_line() -> None:
    rows = tuple({"epoch": n, "loss": 1000.0 - n} for n in range(1000))
    (line,) = history.curve(training(curve=rows))
    bars = line.split()[2]
    assert len(bars) == 50
    assert list(bars) == sorted(bars, reverse=True)


def test_a_confusion_matrix_has_its_recall_and_precision() -> None:
    head, cat, dog, mistakes = (line.split() for line in history.classes(training()))
    assert head[-4:] == ["cat", "dog", "recall", "precision"]
    assert cat == ["cat", "3", "1", "75.0%", "75.0%"]
    assert dog == ["dog", "1", "2", "66.7%", "66.7%"]
    assert mistakes == ["most", "confused:", "cat", "as", "dog", "(1),", "dog", "as", "cat", "(1)"]


def test_of_many_classes_the_worst_are_named() -> None:
    names = [f"c{number}" for number in range(40)]
    classes = {
        name: {"precision": 1.0, "recall": number / 40, "f1": 1.0, "support": 1}
        for number, name in enumerate(names)
    }
    confusion = tuple(tuple(int(a == b) for a in range(40)) for b in range(40))
    (line,) = history.classes(training(classes=classes, confusion=confusion))
    assert line.startswith("least found: c0 (recall 0.0%), c1 (recall 2.5%), ")
    assert "c6" not in line


def test_without_labels_there_is_no_table() -> None:
    assert list(history.classes(training(classes={}, confusion=()))) == []
    assert list(history.curve(training(curve=()))) == []


def test_two_models_differ_in_what_they_measure_and_in_how_they_were_made() -> None:
    classes = {**training().classes, "cat": {"precision": 1.0, "recall": 1.0, "f1": 1.0}}
    after = manifest(
        "v2",
        "1" * 64,
        metrics={"test_accuracy": 0.8, "test_loss": 0.1},
        classes=classes,
        seed=4,
        settings={"batch_size": 32},
    )
    assert list(history.differences(manifest("v1"), after)) == [
        "pets v1 → pets v2",
        "test_accuracy: 0.75 → 0.8 (+0.05)",
        "test_loss: not measured → 0.1",
        "recall of cat: 0.75 → 1 (+0.25)",
        "seed: 3 → 4",
        "batch_size: 64 → 32",
    ]


def test_figures_of_other_test_samples_are_not_passed_off_as_progress() -> None:
    lines = list(history.differences(manifest("v1"), manifest("v2", dataset_sha256="1" * 64)))
    assert "the weights are the same" in lines
    assert lines[-1].startswith("the metrics are of different test samples")


def test_a_model_that_was_brought_has_no_history() -> None:
    brought = msgspec.structs.replace(manifest("v2"), training=None)
    assert list(history.differences(manifest("v1"), brought))[-1].startswith("nothing to compare")
