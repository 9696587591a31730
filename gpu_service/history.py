"""How a model came to be, as text: its curve, its figures per class, and beside another model.

Pure: manifests in, lines out. No torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from gpu_service.bundle import Manifest, Training

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 50  # of a curve
_MOST_CLASSES = 30  # of a table; of more, the worst alone are shown
_WORST = 5


def curve(training: Training) -> Iterator[str]:
    """A line per value that the curve has: where it began, how it went, where it ended."""
    names = dict.fromkeys(name for row in training.curve for name in row if name != "epoch")
    for name in names:
        values = [row[name] for row in training.curve if name in row]
        yield f"{name:<22}{values[0]:>10.4g} {_drawn(values)} {values[-1]:.4g}"


def classes(training: Training) -> Iterator[str]:
    """The confusion matrix with recall and precision; of many classes, the worst ones."""
    labels = list(training.classes)
    if not labels or len(training.confusion) != len(labels):
        return
    if len(labels) <= _MOST_CLASSES:
        yield from _table(training, labels)
    else:
        worst = sorted(labels, key=lambda label: training.classes[label]["recall"])[:_WORST]
        yield "least found: " + ", ".join(
            f"{label} (recall {training.classes[label]['recall']:.1%})" for label in worst
        )
    if mistakes := _mistakes(training.confusion, labels):
        yield "most confused: " + ", ".join(mistakes)


def differences(before: Manifest, after: Manifest) -> Iterator[str]:
    """What differs between two models: metrics first, then classes, then how they were trained."""
    yield f"{before.name} {before.version} → {after.name} {after.version}"
    if before.files["model.safetensors"].sha256 == after.files["model.safetensors"].sha256:
        yield "the weights are the same"
    old, new = before.training, after.training
    if old is None or new is None:
        yield "nothing to compare: the weights of one were brought, and have no history"
        return
    for name in dict.fromkeys([*old.metrics, *new.metrics]):
        yield _change(name, old.metrics.get(name), new.metrics.get(name))
    yield from _class_changes(old, new)
    facts = {
        "data": (old.dataset_sha256, new.dataset_sha256),
        "training samples": (old.train_samples, new.train_samples),
        "test samples": (old.test_samples, new.test_samples),
        "epochs": (old.epochs, new.epochs),
        "seed": (old.seed, new.seed),
        "world size": (old.world_size, new.world_size),
        "backend": (old.backend, new.backend),
        "torch": (old.torch, new.torch),
        "code": (old.code, new.code),
        "network": (str(before.architecture), str(after.architecture)),
    }
    for name in dict.fromkeys([*old.settings, *new.settings]):
        if name not in facts:
            facts[name] = (str(old.settings.get(name)), str(new.settings.get(name)))
    yield from (f"{name}: {a} → {b}" for name, (a, b) in facts.items() if a != b)
    if (
        old.dataset_sha256 != new.dataset_sha256
        or old.split != new.split
        or old.test_samples != new.test_samples
    ):
        yield "the metrics are of different test samples: they say little about each other"


def _drawn(values: Sequence[float]) -> str:
    """The values as a row of bars; where there are too many, each bar is the mean of some."""
    width = min(_WIDTH, len(values))
    edges = [round(at * len(values) / width) for at in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _table(training: Training, labels: Sequence[str]) -> Iterator[str]:
    most = max(max(row) for row in training.confusion)
    cell = max(len(str(most)), *(min(len(label), 8) for label in labels)) + 1
    head = "".join(f"{label[:8]:>{cell}}" for label in labels)
    yield f"{'true ↓  predicted →':<20}{head}   recall  precision"
    for label, row in zip(labels, training.confusion, strict=True):
        counts = "".join(f"{count or '·':>{cell}}" for count in row)
        figures = training.classes[label]
        yield f"{label[:18]:>18}  {counts}{figures['recall']:>9.1%}{figures['precision']:>11.1%}"


def _mistakes(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> list[str]:
    found = [
        (count, labels[true], labels[predicted])
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    found.sort(key=lambda mistake: -mistake[0])
    return [f"{true} as {predicted} ({count})" for count, true, predicted in found[:_WORST]]


def _class_changes(old: Training, new: Training) -> Iterator[str]:
    for label in old.classes:
        a, b = _recall(old.classes, label), _recall(new.classes, label)
        if a != b:
            yield _change(f"recall of {label}", a, b)


def _recall(figures: Mapping[str, Mapping[str, float]], label: str) -> float | None:
    return figures[label]["recall"] if label in figures else None


def _change(name: str, old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return f"{name}: {_shown(old)} → {_shown(new)}"
    return f"{name}: {old:.4g} → {new:.4g} ({new - old:+.2g})"


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
