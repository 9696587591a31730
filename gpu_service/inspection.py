"""`python -m gpu_service inspect` and `compare`: what bundles are, and differ in, for people.

Owns nothing between calls. Reads the manifest and the weights' header; no torch, so it's quick.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import safetensors
from numpy.typing import NDArray

from gpu_service import bundle, golden, history

_WIDTH = 14
_LABELS = 12


def main(path: Path, *, output: TextIO | None = None) -> int:
    """Print the summary of the bundle in `path`, then check its files.

    Raises bundle.BundleError for files that are not what the manifest says, after the summary.
    """
    print(summary(path), file=output)
    bundle.verify(path)
    print(_line("checked", "every file is what the manifest says"), file=output)
    samples = bundle.load_samples(path)
    print(_line("samples", _samples(samples)), file=output)
    print(_line("weights", _weights(path / bundle.WEIGHTS)), file=output)
    return 0


def compare(before: Path, after: Path, *, output: TextIO | None = None) -> int:
    """Print what differs between two bundles. Raises bundle.BundleError."""
    manifests = bundle.verify(before), bundle.verify(after)
    first, *lines = history.differences(*manifests)
    lines += _answers(*manifests, bundle.load_samples(before), bundle.load_samples(after))
    print("\n".join([first, *(f"  {line}" for line in lines)]), file=output)
    return 0


def _answers(
    old: bundle.Manifest,
    new: bundle.Manifest,
    before: Mapping[str, NDArray[Any]],
    after: Mapping[str, NDArray[Any]],
) -> Iterator[str]:
    """Where two classifiers of the same classes see golden samples otherwise."""
    output = old.outputs[0].name
    if not old.labels or old.labels != new.labels or output != new.outputs[0].name:
        return
    count, changed = golden.answered_otherwise(before, after, output)
    what = ", ".join(f"{old.labels[a]} → {new.labels[b]}" for a, b in changed[:_LABELS])
    yield f"golden samples in both: {count}, answered otherwise: {len(changed)}" + (
        f" ({what})" if what else ""
    )


def summary(path: Path) -> str:
    """What the manifest of the bundle in `path` says, some lines of text. Raises BundleError."""
    manifest = bundle.read_manifest(path)
    lines = [f"{manifest.name} {manifest.version}, written {manifest.created}"]
    lines += [_line("folder", str(path)), _line("digest", bundle.digest(path))]
    architecture = manifest.architecture
    arguments = ", ".join(f"{key}={value!r}" for key, value in architecture.arguments.items())
    lines.append(_line("network", f"{architecture.name}({arguments})"))
    if bundle.factory(architecture):
        lines.append(_line("", f"served with: --factories {architecture.name}"))
    for title, specs in (
        ("inputs", manifest.inputs),
        ("outputs", manifest.outputs),
        ("state", manifest.state),
    ):
        lines += _named(title, map(_signature, specs))
    lines += _named("feedback", (f"{a} → {b}" for a, b in manifest.feedback.items()))
    if manifest.done:
        lines.append(_line("", f"until {manifest.done} is true"))
    if manifest.labels:
        more = ", …" if len(manifest.labels) > _LABELS else ""
        shown = ", ".join(manifest.labels[:_LABELS])
        lines.append(_line("labels", f"{len(manifest.labels)}: {shown}{more}"))
    lines += _training(manifest.training)
    lines += _named(
        "files",
        (
            f"{name}, {entry.bytes:,} bytes, sha256 {entry.sha256}"
            for name, entry in manifest.files.items()
        ),
    )
    return "\n".join(lines)


def _line(title: str, text: str) -> str:
    return f"  {title:<{_WIDTH}}{text}"


def _named(title: str, texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield _line("" if number else title, text)


def _signature(spec: bundle.TensorSpec) -> str:
    sizes = ("any" if size == bundle.ANY else str(size) for size in spec.shape)
    return f"{spec.name}: {spec.datatype} [{', '.join(['n', *sizes])}]"


def _training(training: bundle.Training | None) -> Iterator[str]:
    if training is None:
        yield _line("training", "none here: the weights were brought")
        return
    split = f", split {training.split}" if training.split else ""
    terms = f", {training.dataset_license}" if training.dataset_license else ""
    yield _line("training", f"{training.dataset}{split}{terms}")
    yield _line("", f"sha256 {training.dataset_sha256}")
    yield _line(
        "",
        f"{training.train_samples:,} samples, {training.epochs} epochs, seed {training.seed}, "
        f"world size {training.world_size} ({training.backend}), torch {training.torch}",
    )
    settings = ", ".join(f"{key}={value}" for key, value in training.settings.items())
    if settings:
        yield _line("", settings)
    metrics = ", ".join(f"{key}={value:.4g}" for key, value in training.metrics.items())
    yield _line(
        "measured", f"{metrics or 'nothing'}, on {training.test_samples:,} held-out samples"
    )
    if training.code:
        yield _line("code", training.code)
    yield from _named("curve", history.curve(training))
    yield from _named("classes", history.classes(training))


def _samples(samples: Mapping[str, NDArray[Any]]) -> str:
    count = len(next(iter(samples.values())))
    truth = "with" if bundle.LABEL in samples else "without"
    sizes = (
        f"{name} {list(array.shape)}"
        for name, array in samples.items()
        if not name.startswith(bundle.EXPECTED)
    )
    return f"{count} golden ones, {truth} true labels: {', '.join(sizes)}"


def _weights(file: Path) -> str:
    try:
        with safetensors.safe_open(file, framework="numpy") as weights:
            slices = [weights.get_slice(key) for key in weights.keys()]  # noqa: SIM118
            count = sum(math.prod(part.get_shape()) for part in slices)
            kinds = ", ".join(sorted({part.get_dtype() for part in slices}))
    except safetensors.SafetensorError as error:
        raise bundle.BundleError(f"{file}: not a safetensors file: {error}") from None
    return f"{count:,} values in {len(slices)} tensors of {kinds or 'no type'}"
