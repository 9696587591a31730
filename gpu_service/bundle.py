"""Model bundles: what training and `gpu_service bundle` write, deploys copy and workers load.

Owns the folder `MODELS/NAME/VERSION/` and its `manifest.json`, which pins every other file by
SHA-256. Plain functions without state, safe from any thread; torch is imported only in `write`.
"""

import datetime
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from gpu_service import datatypes

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
SAMPLES = "samples.safetensors"
PICTURE = "confusion.svg"  # for people; no program reads it
LABEL = "label"  # the tensor in SAMPLES that holds the true labels, where they are known
EXPECTED = "expected."  # prefix of the tensors in SAMPLES that hold the model's own outputs
ANY = -1  # a dynamic dimension in a shape

_FILES = (WEIGHTS, SAMPLES)
_MAX_MANIFEST_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_MAX_FACTORY = 200
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CREATED = "%Y-%m-%dT%H:%M:%SZ"


class BundleError(Exception):
    """A bundle is missing, damaged or not to be written; the message says which file and why."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input, output or state: `shape` is per sample, without the batch dimension.

    A size of -1 is a dynamic dimension: any size from 1 on, the same in all samples of a batch.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dynamic(self) -> bool:
        """Whether any dimension is."""
        return ANY in self.shape

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether one sample may have this `shape`, which holds no dynamic dimension."""
        return len(shape) == len(self.shape) and all(
            size == own or (own == ANY and size >= 1)
            for own, size in zip(self.shape, shape, strict=True)
        )


class Architecture(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which network, and its constructor's arguments.

    `name` is one in the registry of `gpu_service.models`, or `package.module:factory`.
    """

    name: str
    arguments: dict[str, int | float | bool | str | list[int | float | bool | str]]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one file of the bundle must be."""

    sha256: str
    bytes: int


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights come from. `metrics` were measured on the held-out test samples.

    `curve` has a row per epoch; `classes` has figures per label, and `confusion` counts the test
    samples by true label (rows) and predicted one (columns). `code` names the program.
    """

    dataset: str
    dataset_sha256: str
    train_samples: int
    test_samples: int
    epochs: int
    seed: int
    world_size: int
    backend: str
    torch: str
    metrics: dict[str, float]
    dataset_license: str = ""
    split: str = ""
    settings: dict[str, int | float | bool | str] = {}
    code: str = ""
    curve: tuple[dict[str, float], ...] = ()
    classes: dict[str, dict[str, float]] = {}
    confusion: tuple[tuple[int, ...], ...] = ()


class Manifest(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """`manifest.json`. Its SHA-256 pins every byte of the bundle that is ever read.

    With `state`, the model is stateful: it takes the inputs and then the state, and returns the
    outputs and then the new state; a sequence begins with zeros. With `feedback` (output → input),
    it can answer one request many times: outputs become the next step's inputs, and the other
    inputs stay as they were, until `done`, a BOOL output, is true. `training` is None for models
    that were brought.
    """

    format: int
    name: str
    version: str
    created: str
    architecture: Architecture
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    state: tuple[TensorSpec, ...] = ()
    feedback: dict[str, str] = {}
    done: str | None = None
    training: Training | None = None
    files: dict[str, FileEntry]


# ------------------------------------------------------------------------------ reading


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    """The manifest in `data`, fully checked; `where` names its source in the error.

    Raises BundleError with every problem found, never anything else, whatever the bytes are.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: not a bundle manifest: {error}") from None
    problems = list(_manifest_problems(manifest))
    if problems:
        raise BundleError(_listed(where, problems))
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the bundle folder `path`; BundleError if there is none."""
    return parse_manifest(_manifest_bytes(path), where=str(path / MANIFEST))


def digest(path: Path) -> str:
    """SHA-256 in hex of the bundle's manifest, and so of the whole bundle."""
    return hashlib.sha256(_manifest_bytes(path)).hexdigest()


def verify(path: Path) -> Manifest:
    """The manifest of `path`, after every file was compared with it.

    Raises BundleError that lists all missing, truncated or altered files, not the first only.
    """
    manifest = read_manifest(path)
    problems = [
        problem
        for name, entry in manifest.files.items()
        for problem in _file_problems(path / name, entry)
    ]
    if problems:
        raise BundleError(_listed(str(path), problems))
    return manifest


def load_samples(path: Path) -> dict[str, NDArray[Any]]:
    """The golden samples of the bundle: n held-out test samples and what the model answers.

    One array [n, …] per input by its name, `expected.OUTPUT` [n, …] per output (the model's own,
    in eval mode; of a stateful model, of one step from the zero state), and `label` int64 [n]
    where the truth is known. Raises BundleError.
    """
    manifest = read_manifest(path)
    file = path / SAMPLES
    problems = list(_file_problems(file, manifest.files[SAMPLES]))
    if problems:
        raise BundleError(_listed(str(path), problems))
    try:
        samples: dict[str, NDArray[Any]] = safetensors.numpy.load(file.read_bytes())
    except (safetensors.SafetensorError, KeyError) as error:
        raise BundleError(f"{file}: not a safetensors file: {error}") from None
    problems = list(_sample_problems(manifest.inputs, manifest.outputs, samples))
    if problems:
        raise BundleError(_listed(str(file), problems))
    return samples


def latest(directory: Path) -> Path:
    """The newest version folder under `MODELS/NAME`, by its manifest's `created`, then name.

    Raises BundleError when there is none, and when any version there is damaged: an older
    model is never taken in place of a newer one that cannot be read.
    """
    found = []
    for path in _entries(directory):
        # Unfinished bundles have a leading dot, which no version has (see `write`).
        if not _VERSION.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        if not (path / MANIFEST).exists():
            continue
        manifest = read_manifest(path)
        if (manifest.name, manifest.version) != (directory.name, path.name):
            raise BundleError(
                f"{path / MANIFEST}: says it is {manifest.name}/{manifest.version}; "
                "a bundle's folder must be NAME/VERSION: rename or remove it"
            )
        found.append((manifest.created, path.name, path))
    if not found:
        raise BundleError(
            f"{directory}: no bundle here; train one with `python -m gpu_service.training`, "
            "or bring your own with `python -m gpu_service bundle`"
        )
    return max(found)[2]


def factory(architecture: Architecture) -> tuple[str, str] | None:
    """Module and attribute of an architecture `package.module:factory`; None for another name."""
    name = architecture.name
    if len(name) > _MAX_FACTORY or not _FACTORY.fullmatch(name):
        return None
    module, _, attribute = name.partition(":")
    return module, attribute


def find(path: Path) -> Path:
    """The version folder that `path` means: itself, or the newest one in a model's folder.

    Raises BundleError when there is none.
    """
    return path if (path / MANIFEST).is_file() else latest(path)


# ------------------------------------------------------------------------------ writing


def new_version(now: datetime.datetime | None = None) -> str:
    """The default version: the time in UTC, `YYYYMMDD-HHMMSS`."""
    return f"{now or datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}"


def check_writable(*, directory: Path, name: str, version: str) -> None:
    """Raises BundleError unless `directory/name/version` can be created; creates its parent.

    For training, which would rather know before it starts than after it ended.
    """
    problems = name_problems(name=name, version=version)
    if problems:
        raise BundleError("; ".join(problems))
    target = directory / name / version
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"{target.parent}: cannot create the folder: {error.strerror}") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BundleError(f"{target.parent}: no permission to write here")
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target}: this version exists already; choose another")


def name_problems(*, name: str, version: str) -> list[str]:
    """What is wrong with the name of a model and of its version."""
    problems = []
    if not _NAME.fullmatch(name):
        problems.append(f"bad model name {name!r}: allowed is {_NAME.pattern}")
    if not _VERSION.fullmatch(version):
        problems.append(f"bad version {version!r}: allowed is {_VERSION.pattern}")
    return problems


def state_problems(
    where: str, state: Sequence[TensorSpec], *, beside: Sequence[TensorSpec]
) -> Iterator[str]:
    """What is wrong with the state of a model that has `beside` as inputs and outputs."""
    if not state:
        return
    yield from spec_problems(where, state)
    taken = {spec.name for spec in beside}
    for spec in state:
        if spec.name in taken:
            yield f"{where}: {spec.name!r} is an input's or output's name, too"
        if spec.dynamic:
            yield f"{where}: {spec.name}: shape {list(spec.shape)} must be fixed, without -1"


def spec_problems(where: str, specs: Sequence[TensorSpec]) -> Iterator[str]:
    """What is wrong with these inputs or outputs, whichever `where` names."""
    if not specs:
        yield f"{where}: at least one is needed"
    if len({spec.name for spec in specs}) < len(specs):
        yield f"{where}: a name occurs twice"
    for spec in specs:
        if not _IDENTIFIER.fullmatch(spec.name) or spec.name == LABEL:
            yield f"{where}: bad tensor name {spec.name!r}"
        if spec.datatype not in datatypes.NUMPY:
            known = ", ".join(datatypes.NUMPY)
            yield f"{where}: {spec.name}: unknown datatype {spec.datatype!r}; known: {known}"
        if any(size < 1 and size != ANY for size in spec.shape):
            yield (
                f"{where}: {spec.name}: shape {list(spec.shape)} has a size below 1 "
                "(-1 is a dynamic dimension)"
            )


def write(
    *,
    directory: Path,
    name: str,
    architecture: Architecture,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    labels: tuple[str, ...],
    state_dict: Mapping[str, "torch.Tensor"],
    samples: Mapping[str, NDArray[Any]],
    training: Training | None = None,
    state: tuple[TensorSpec, ...] = (),
    feedback: Mapping[str, str] | None = None,
    done: str | None = None,
    picture: str = "",
    version: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write `directory/name/version` as a whole or not at all, and return that folder.

    Everything is written and synced in a hidden folder beside it, which is then renamed: a
    crash leaves that hidden folder, which no reader looks at. `check` gets it before that, and
    what it raises keeps the version from being. `samples` as in `load_samples`; `picture` is an
    SVG file for people, or nothing. Raises BundleError for bad content, an existing version or a
    folder that cannot be written.
    """
    import safetensors.torch

    now = datetime.datetime.now(datetime.UTC)
    version = version or new_version(now)
    check_writable(directory=directory, name=name, version=version)
    contents = {
        WEIGHTS: safetensors.torch.save(_separate(state_dict)),
        SAMPLES: safetensors.numpy.save(
            {key: numpy.ascontiguousarray(array) for key, array in samples.items()}
        ),
    }
    if picture:
        contents[PICTURE] = picture.encode()
    manifest = Manifest(
        format=FORMAT,
        name=name,
        version=version,
        created=now.strftime(_CREATED),
        architecture=architecture,
        inputs=inputs,
        outputs=outputs,
        labels=labels,
        state=state,
        feedback=dict(feedback or {}),
        done=done,
        training=training,
        files={
            file: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
            for file, data in contents.items()
        },
    )
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    parse_manifest(encoded, where=MANIFEST)  # what cannot be read back is never written
    problems = list(_sample_problems(inputs, outputs, samples))
    if problems:
        raise BundleError(_listed("samples", problems))
    _write_folder(directory / name / version, contents | {MANIFEST: encoded}, check)
    return directory / name / version


# ------------------------------------------------------------------------------ inside


def _separate(state_dict: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The same on the CPU, each with memory of its own: safetensors refuses tied weights."""
    separate: dict[str, torch.Tensor] = {}
    storages = set()
    for key, tensor in state_dict.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        separate[key] = own.clone() if storage in storages else own
        storages.add(storage)
    return separate


def _listed(where: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where}: {len(problems)} problems:" + "".join(f"\n  - {line}" for line in problems)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(f"{directory}: cannot be read: {error.strerror}") from None


def _manifest_bytes(path: Path) -> bytes:
    file = path / MANIFEST
    try:
        status = file.lstat()
    except OSError as error:
        raise BundleError(f"{file}: not a bundle here: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file}: must be a regular file, not {_kind(status)}")
    if status.st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{file}: {status.st_size} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}"
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read: {error.strerror}") from None


def _manifest_problems(manifest: Manifest) -> Iterator[str]:
    if manifest.format != FORMAT:
        yield f"format is {manifest.format}, this program reads format {FORMAT}"
    if not _NAME.fullmatch(manifest.name):
        yield f"bad name {manifest.name!r}: allowed is {_NAME.pattern}"
    if not _VERSION.fullmatch(manifest.version):
        yield f"bad version {manifest.version!r}: allowed is {_VERSION.pattern}"
    if not (_IDENTIFIER.fullmatch(manifest.architecture.name) or factory(manifest.architecture)):
        yield (
            f"bad architecture name {manifest.architecture.name!r}: allowed is "
            f"{_IDENTIFIER.pattern} or package.module:factory"
        )
    if not _is_time(manifest.created):
        yield f"created is {manifest.created!r}, expected a UTC time like 2026-01-31T12:34:56Z"
    yield from spec_problems("inputs", manifest.inputs)
    yield from spec_problems("outputs", manifest.outputs)
    beside = (*manifest.inputs, *manifest.outputs)
    yield from state_problems("state", manifest.state, beside=beside)
    yield from _feedback_problems(manifest)
    classes = manifest.outputs[0].shape[-1:] if manifest.outputs else ()
    if manifest.labels and classes != (len(manifest.labels),):
        yield f"{len(manifest.labels)} labels for an output of {list(classes)} values"
    for file in sorted(manifest.files.keys() - {PICTURE} ^ set(_FILES)):
        kind = "unknown" if file in manifest.files else "missing"
        yield f"files: {kind} file {file!r}; a bundle has {', '.join(_FILES)}, maybe {PICTURE}"
    for file, entry in manifest.files.items():
        if not _SHA256.fullmatch(entry.sha256) or entry.bytes < 0:
            yield f"files: {file!r} needs 64 hex digits of sha256 and a size in bytes"


def _feedback_problems(manifest: Manifest) -> Iterator[str]:
    inputs = {spec.name: spec for spec in manifest.inputs}
    outputs = {spec.name: spec for spec in manifest.outputs}
    for source, target in manifest.feedback.items():
        if source not in outputs or target not in inputs:
            yield f"feedback: {source!r} → {target!r} must lead from an output to an input"
            continue
        given, taken = outputs[source], inputs[target]
        if (given.datatype, given.shape) != (taken.datatype, taken.shape):
            yield (
                f"feedback: output {source!r} is {given.datatype} {list(given.shape)}, "
                f"input {target!r} is {taken.datatype} {list(taken.shape)}; they must be equal"
            )
    if len(set(manifest.feedback.values())) < len(manifest.feedback):
        yield "feedback: two outputs lead to the same input"
    if manifest.done is None:
        return
    spec = outputs.get(manifest.done)
    if spec is None or (spec.datatype, spec.shape) != ("BOOL", ()):
        yield f"done: {manifest.done!r} must be a BOOL output of shape [], one value a sample"
    if not manifest.feedback:
        yield "done: without feedback, each request has one response anyway"


def _file_problems(file: Path, entry: FileEntry) -> Iterator[str]:
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            # A symlink could point at what the manifest does not pin.
            yield f"{file.name}: must be a regular file, not {_kind(status)}"
            return
        if status.st_size != entry.bytes:
            yield f"{file.name}: {status.st_size} bytes, expected {entry.bytes}"
            return
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        yield f"{file.name}: {error.strerror}"
        return
    if actual != entry.sha256:
        yield f"{file.name}: sha256 {actual}, expected {entry.sha256}"


def _sample_problems(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    samples: Mapping[str, NDArray[Any]],
) -> Iterator[str]:
    expected = {spec.name: spec for spec in inputs}
    expected |= {EXPECTED + spec.name: spec for spec in outputs}
    if LABEL in samples:
        expected[LABEL] = TensorSpec(name=LABEL, datatype="INT64", shape=())
    for key in sorted(expected.keys() ^ samples.keys()):
        yield f"{'unknown' if key in samples else 'missing'} tensor {key!r}"
    counts = set()
    for key in expected.keys() & samples.keys():
        spec, array = expected[key], samples[key]
        dtype = datatypes.NUMPY[spec.datatype]
        if array.dtype != dtype or array.ndim == 0 or not spec.takes(array.shape[1:]):
            wanted = ", ".join(["n", *map(str, spec.shape)])
            actual = ", ".join(map(str, array.shape))
            yield f"tensor {key!r} is {array.dtype}[{actual}], expected {dtype}[{wanted}]"
        counts.add(array.shape[:1])
    if len(counts) > 1 or (0,) in counts:
        yield f"needs the same number of samples, one or more, in each tensor, not {counts}"


def _is_time(text: str) -> bool:
    try:
        # Only the one spelling, because `latest` compares these as text.
        return datetime.datetime.strptime(text, _CREATED).strftime(_CREATED) == text
    except ValueError:
        return False


def _kind(status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return "a symbolic link"
    return "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"


def _write_folder(
    target: Path, contents: Mapping[str, bytes], check: Callable[[Path], None] | None
) -> None:
    beside = target.parent / f".writing-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir()
        for name, data in contents.items():
            with (beside / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        _sync_folder(beside)
        if check is not None:
            check(beside)
        # Fails if the target has come to exist meanwhile: a folder with files is never replaced.
        beside.rename(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise BundleError(f"{target}: cannot write the bundle: {error.strerror}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
