"""The bundle format: what is written can be read back, and nothing else is accepted."""

import datetime
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_service import bundle

INPUTS = (bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 2, 2)),)
OUTPUTS = (bundle.TensorSpec(name="logits", datatype="FP32", shape=(3,)),)
TRAINING = bundle.Training(
    dataset="made up",
    dataset_sha256="0" * 64,
    train_samples=8,
    test_samples=4,
    epochs=1,
    seed=0,
    world_size=2,
    backend="gloo",
    torch="2.13.0",
    metrics={"test_accuracy": 0.75},
)


def samples(count: int = 4) -> dict[str, Any]:
    return {
        "image": numpy.linspace(0, 1, count * 4, dtype="f4").reshape(count, 1, 2, 2),
        "expected.logits": numpy.zeros((count, 3), "f4"),
        "label": numpy.arange(count) % 3,
    }


def write(directory: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "directory": directory,
        "name": "digits",
        "version": "v1",
        "architecture": bundle.Architecture(name="digits_cnn", arguments={"width": 8}),
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "labels": ("a", "b", "c"),
        "training": TRAINING,
        "state_dict": {"weight": torch.arange(6.0).reshape(2, 3).t(), "steps": torch.tensor(7)},
        "samples": samples(),
    }
    return bundle.write(**(arguments | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "manifest.json"
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


# ------------------------------------------------------------------------------ sound


def test_what_is_written_reads_back(tmp_path: Path, path: Path) -> None:
    assert path == tmp_path / "digits" / "v1"
    manifest = bundle.verify(path)
    assert manifest == bundle.read_manifest(path)
    assert (manifest.name, manifest.version, manifest.format) == ("digits", "v1", 1)
    assert (manifest.inputs, manifest.outputs, manifest.labels) == (INPUTS, OUTPUTS, tuple("abc"))
    assert manifest.training == TRAINING
    for name, entry in manifest.files.items():
        data = (path / name).read_bytes()
        assert (entry.sha256, entry.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    for key, array in bundle.load_samples(path).items():
        numpy.testing.assert_array_equal(array, samples()[key], strict=True)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["v1"]


def test_the_manifest_has_the_documented_shape(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_bytes())
    assert content["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [1, 2, 2]}]
    assert content["architecture"] == {"name": "digits_cnn", "arguments": {"width": 8}}
    assert set(content["files"]) == {"model.safetensors", "samples.safetensors"}
    assert set(content) == {
        *("format", "name", "version", "created", "architecture", "inputs", "outputs"),
        *("labels", "training", "files"),
    }


def test_a_picture_is_pinned_like_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, picture="<svg/>")
    assert (path / "confusion.svg").read_text() == "<svg/>"
    assert set(bundle.verify(path).files) == {p.name for p in path.iterdir()} - {"manifest.json"}
    (path / "confusion.svg").write_text("<SVG/>")
    with pytest.raises(bundle.BundleError, match=r"confusion\.svg: sha256"):
        bundle.verify(path)
    (path / "confusion.svg").unlink()
    with pytest.raises(bundle.BundleError, match=r"confusion\.svg: No such file"):
        bundle.verify(path)


def test_the_same_content_gives_the_same_weights_file(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    weights = [bundle.read_manifest(path).files["model.safetensors"] for path in (one, other)]
    assert weights[0] == weights[1]


def test_digest_pins_the_manifest(path: Path) -> None:
    before = bundle.digest(path)
    assert before == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
    change_manifest(path, lambda content: content["training"].update(seed=1))
    assert bundle.digest(path) != before


def test_a_link_to_the_folder_is_followed(tmp_path: Path, path: Path) -> None:
    """Hosts make a version current by a symbolic link to its folder."""
    (tmp_path / "current").symlink_to(path)
    assert bundle.verify(tmp_path / "current").version == "v1"


def test_the_default_version_is_the_time() -> None:
    now = datetime.datetime(2026, 1, 31, 12, 34, 56, tzinfo=datetime.UTC)
    assert bundle.new_version(now) == "20260131-123456"


def test_reading_needs_no_torch(path: Path) -> None:
    code = (
        "import sys, pathlib; from gpu_service import bundle; p = pathlib.Path(sys.argv[1]);"
        "bundle.verify(p); bundle.load_samples(p); bundle.latest(p.parent);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0


# ------------------------------------------------------------------------------ damaged


def truncate(path: Path, name: str) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:-1])


def flip(path: Path, name: str) -> None:
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)


def replace_with_link(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")


def replace_with_folder(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name).mkdir()


def replace_with_pipe(path: Path, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "samples.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"{actual_bytes} bytes, expected {bytes}"),
        (flip, r"sha256 {actual_sha256}, expected {sha256}"),
        (lambda path, name: (path / name).unlink(), r"No such file"),
        (replace_with_link, r"regular file, not a symbolic link"),
        (replace_with_folder, r"regular file, not a folder"),
        (replace_with_pipe, r"regular file, not a device, pipe"),
    ],
)
def test_damage_is_named(
    path: Path, name: str, damage: Callable[[Path, str], None], message: str
) -> None:
    entry = bundle.read_manifest(path).files[name]
    damage(path, name)
    actual = (path / name).read_bytes() if (path / name).is_file() else b""
    wanted = message.format(
        bytes=entry.bytes,
        sha256=entry.sha256,
        actual_bytes=len(actual),
        actual_sha256=hashlib.sha256(actual).hexdigest(),
    )
    with pytest.raises(bundle.BundleError) as error:
        bundle.verify(path)
    assert f"{name}: " in str(error.value)
    assert wanted in str(error.value)
    assert str(path) in str(error.value)
    if name == "samples.safetensors":
        with pytest.raises(bundle.BundleError, match=name):
            bundle.load_samples(path)


def test_all_damage_is_listed_at_once(path: Path) -> None:
    flip(path, "model.safetensors")
    truncate(path, "samples.safetensors")
    with pytest.raises(bundle.BundleError, match=r"2 problems:") as error:
        bundle.verify(path)
    assert "model.safetensors: sha256" in str(error.value)
    assert "samples.safetensors: " in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, name: (path / name).unlink(),
        replace_with_link,
        replace_with_folder,
        replace_with_pipe,
        lambda path, name: (path / name).write_bytes(b" " * (1 << 21)),
    ],
)
def test_a_manifest_must_be_a_small_regular_file(
    path: Path, damage: Callable[[Path, str], None]
) -> None:
    damage(path, "manifest.json")
    for read in (bundle.read_manifest, bundle.digest, bundle.verify, bundle.load_samples):
        with pytest.raises(bundle.BundleError, match=r"manifest\.json: "):
            read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["training"].update(surprise=1), "surprise"),
        (lambda m: m.pop("labels"), "labels"),
        (lambda m: m.update(format=2), "format is 2, this program reads format 1"),
        (lambda m: m.update(format="1"), "format"),
        (lambda m: m.update(name="../digits"), "bad name '../digits'"),
        (lambda m: m.update(name="Digits"), "bad name"),
        (lambda m: m.update(name="d" * 65), "bad name"),
        (lambda m: m.update(version=".."), "bad version '..'"),
        (lambda m: m.update(version=".hidden"), "bad version"),
        (lambda m: m.update(version="v1/../../v2"), "bad version"),
        (lambda m: m.update(version="v1\n"), "bad version"),
        (lambda m: m.update(version=""), "bad version"),
        (lambda m: m.update(created="yesterday"), "created is 'yesterday'"),
        (lambda m: m.update(created="2026-1-31T12:34:56Z"), "created is"),
        (lambda m: m["architecture"].update(name="os.system"), "bad architecture name"),
        (lambda m: m["architecture"]["arguments"].update(width={}), "arguments"),
        (lambda m: m.update(inputs=[]), "inputs: at least one"),
        (lambda m: m.update(outputs=m["outputs"] * 2), "outputs: a name occurs twice"),
        (lambda m: m["inputs"][0].update(datatype="FP8"), "unknown datatype 'FP8'; known: BOOL"),
        (lambda m: m["inputs"][0].update(shape=[1, 0, 2]), "size below 1"),
        (lambda m: m["inputs"][0].update(shape=[1, -2, 2]), "size below 1"),
        (lambda m: m["outputs"][0].update(shape=[-1]), "3 labels for an output of [-1] values"),
        (lambda m: m["architecture"].update(name="os:"), "bad architecture name 'os:'"),
        (lambda m: m["architecture"].update(name="a..b:c"), "bad architecture name"),
        (lambda m: m["architecture"].update(name="../a:c"), "bad architecture name"),
        (lambda m: m["architecture"].update(name="a:b:c"), "bad architecture name"),
        (lambda m: m["architecture"].update(name="a:b.c"), "bad architecture name"),
        (lambda m: m["architecture"].update(name="a:b\n"), "bad architecture name"),
        (lambda m: m["architecture"].update(name="a:" + "b" * 200), "bad architecture name"),
        (lambda m: m["architecture"]["arguments"].update(width=[{}]), "arguments"),
        (lambda m: m["inputs"][0].update(name="label"), "bad tensor name 'label'"),
        (lambda m: m["inputs"][0].update(name="expected.logits"), "bad tensor name"),
        (lambda m: m["labels"].append("d"), "4 labels for an output of [3] values"),
        (lambda m: m["training"]["metrics"].update(test_accuracy=None), "metrics"),
        (lambda m: m["files"].pop("model.safetensors"), "missing file 'model.safetensors'"),
        (lambda m: m["files"].update({"../x": m["files"]["model.safetensors"]}), "'../x'"),
        (lambda m: m["files"].update({"/etc/passwd": {"sha256": "", "bytes": 1}}), "/etc/passwd"),
        (lambda m: m["files"]["model.safetensors"].update(sha256="0" * 63), "64 hex digits"),
        (lambda m: m["files"]["model.safetensors"].update(bytes=-1), "size in bytes"),
    ],
)
def test_a_bad_manifest_is_refused(
    path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(path, change)
    with pytest.raises(bundle.BundleError) as error:
        bundle.read_manifest(path)
    assert message in str(error.value)
    assert str(path / "manifest.json") in str(error.value)


GENERATOR: dict[str, Any] = {
    "inputs": (
        bundle.TensorSpec(name="token", datatype="INT64", shape=()),
        bundle.TensorSpec(name="prompt", datatype="FP32", shape=(-1, 2)),
    ),
    "outputs": (
        bundle.TensorSpec(name="next", datatype="INT64", shape=()),
        bundle.TensorSpec(name="mixed", datatype="FP32", shape=(-1, 2)),
        bundle.TensorSpec(name="ended", datatype="BOOL", shape=()),
    ),
    "labels": (),
    "state": (bundle.TensorSpec(name="hidden", datatype="FP32", shape=(4,)),),
    "feedback": {"next": "token", "mixed": "prompt"},
    "done": "ended",
    "training": None,
    "architecture": bundle.Architecture(
        name="my.models:generator", arguments={"sizes": [1.5, 2], "names": ["a", "b"]}
    ),
    "samples": {
        "token": numpy.arange(3),
        "prompt": numpy.ones((3, 5, 2), "f4"),
        "expected.next": numpy.arange(3),
        "expected.mixed": numpy.ones((3, 7, 2), "f4"),
        "expected.ended": numpy.zeros(3, "?"),
    },
}


def test_a_stateful_model_that_answers_many_times_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, **GENERATOR)
    manifest = bundle.verify(path)
    for name in ("inputs", "outputs", "state", "feedback", "done", "training", "architecture"):
        assert getattr(manifest, name) == GENERATOR[name]
    assert bundle.factory(manifest.architecture) == ("my.models", "generator")
    loaded = bundle.load_samples(path)
    assert loaded.keys() == GENERATOR["samples"].keys()
    for key, array in loaded.items():
        numpy.testing.assert_array_equal(array, GENERATOR["samples"][key], strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["state"][0].update(shape=[-1]), "hidden: shape [-1] must be fixed"),
        (lambda m: m["state"][0].update(shape=[0]), "size below 1"),
        (lambda m: m["state"][0].update(name="prompt"), "state: 'prompt' is an input's or output"),
        (lambda m: m["state"][0].update(name="ended"), "state: 'ended' is an input's or output"),
        (lambda m: m["state"][0].update(name="a.b"), "state: bad tensor name 'a.b'"),
        (lambda m: m["state"][0].update(datatype="FP8"), "state: hidden: unknown datatype"),
        (lambda m: m.update(state=m["state"] * 2), "state: a name occurs twice"),
        (lambda m: m.update(state={}), "state"),
        (lambda m: m["feedback"].update(nothing="token"), "'nothing' → 'token' must lead from"),
        (lambda m: m["feedback"].update(next="nothing"), "'next' → 'nothing' must lead from"),
        (lambda m: m["feedback"].update(hidden="token"), "'hidden' → 'token' must lead from"),
        (
            lambda m: m["feedback"].update(mixed="token"),
            "output 'mixed' is FP32 [-1, 2], input 'token' is INT64 []; they must be equal",
        ),
        (lambda m: m["outputs"][0].update(datatype="INT32"), "output 'next' is INT32 []"),
        (lambda m: m["outputs"][1].update(shape=[3, 2]), "output 'mixed' is FP32 [3, 2]"),
        (lambda m: m["feedback"].update(mixed="token"), "two outputs lead to the same input"),
        (lambda m: m["feedback"].update(next=None), "feedback"),
        (lambda m: m.update(done="next"), "done: 'next' must be a BOOL output of shape []"),
        (lambda m: m.update(done="nothing"), "done: 'nothing' must be a BOOL output"),
        (lambda m: m["outputs"][2].update(shape=[1]), "done: 'ended' must be a BOOL output"),
        (lambda m: m.update(feedback={}), "done: without feedback"),
    ],
)
def test_bad_state_feedback_and_done_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = write(tmp_path, **GENERATOR)
    change_manifest(path, change)
    with pytest.raises(bundle.BundleError) as error:
        bundle.read_manifest(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": numpy.ones((3, 5, 3), "f4")},
            "is float32[3, 5, 3], expected float32[n, -1, 2]",
        ),
        ({"prompt": numpy.ones((3, 0, 2), "f4")}, "is float32[3, 0, 2], expected"),
        ({"prompt": numpy.ones((3, 2), "f4")}, "is float32[3, 2], expected"),
        ({"expected.mixed": numpy.ones((3, 7, 1), "f4")}, "'expected.mixed' is float32[3, 7, 1]"),
        ({"hidden": numpy.ones((3, 4), "f4")}, "unknown tensor 'hidden'"),
    ],
)
def test_samples_must_fit_dynamic_dimensions(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(bundle.BundleError) as error:
        write(tmp_path, **(GENERATOR | {"samples": GENERATOR["samples"] | changes}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("own", "shape", "takes"),
    [
        ((), (), True),
        ((3,), (3,), True),
        ((3,), (4,), False),
        ((3, -1), (3, 9), True),
        ((3, -1), (3, 0), False),
        ((3, -1), (2, 9), False),
        ((-1,), (), False),
        ((-1,), (1, 1), False),
    ],
)
def test_dynamic_dimensions_take_any_size_from_1(
    own: tuple[int, ...], shape: tuple[int, ...], takes: bool
) -> None:
    spec = bundle.TensorSpec(name="x", datatype="FP32", shape=own)
    assert spec.takes(shape) is takes
    assert spec.dynamic is (-1 in own)


def test_tied_weights_are_written(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    path = write(tmp_path, state_dict={"one": weight, "same": weight, "part": weight[1]})
    loaded = safetensors.torch.load_file(path / "model.safetensors")
    torch.testing.assert_close(loaded, {"one": weight, "same": weight, "part": weight[1]})


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_give_a_bundle_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(bundle.BundleError):
        bundle.parse_manifest(data, where="here")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_manifest = st.fixed_dictionaries(dict.fromkeys(bundle.Manifest.__struct_fields__, _json))


@given(_manifest)
def test_any_values_give_a_bundle_error_and_nothing_else(content: dict[str, Any]) -> None:
    with pytest.raises(bundle.BundleError):
        bundle.parse_manifest(json.dumps(content).encode(), where="here")


def specs(*, name: str, smallest: int) -> st.SearchStrategy[bundle.TensorSpec]:
    sizes = st.integers(smallest, 1 << 40).filter(bool)
    return st.builds(
        bundle.TensorSpec,
        name=st.from_regex(rf"\A{name}[a-z0-9_]{{0,9}}\Z"),
        datatype=st.sampled_from(["BOOL", "UINT8", "FP16", "FP32", "FP64", "INT64"]),
        shape=st.lists(sizes, max_size=4).map(tuple),
    )


@st.composite
def manifests(draw: st.DrawFn) -> bundle.Manifest:
    spec = draw(specs(name="a", smallest=-1))
    feedback = draw(st.sampled_from([{}, {spec.name: spec.name}]))
    ended = bundle.TensorSpec(name="ended", datatype="BOOL", shape=())
    entry = bundle.FileEntry(sha256="a" * 64, bytes=1)
    return bundle.Manifest(
        format=1,
        name="m",
        version="v",
        created="2026-01-31T12:34:56Z",
        architecture=bundle.Architecture(
            name=draw(st.sampled_from(["a", "a:b", "a_1.b:C"])),
            arguments={"sizes": [1, 2.5, "x"], "bias": True},
        ),
        inputs=(spec,),
        outputs=(spec, ended),
        labels=(),
        state=tuple(draw(st.lists(specs(name="s", smallest=1), max_size=1))),
        feedback=feedback,
        done=draw(st.sampled_from([None, "ended"])) if feedback else None,
        training=draw(st.sampled_from([None, TRAINING])),
        files={bundle.WEIGHTS: entry, bundle.SAMPLES: entry},
    )


@given(manifests())
def test_any_sound_manifest_survives_the_round_trip(manifest: bundle.Manifest) -> None:
    assert bundle.parse_manifest(msgspec.json.encode(manifest), where="here") == manifest


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value within `value`."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    found = [path] if path else []
    return found + [deeper for key, part in pairs for deeper in places(part, (*path, key))]


@given(manifests(), st.data())
def test_a_changed_manifest_is_read_or_refused_and_nothing_else(
    manifest: bundle.Manifest, data: st.DataObject
) -> None:
    content = json.loads(msgspec.json.encode(manifest))
    *path, last = data.draw(st.sampled_from(places(content)))
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(_json | st.sampled_from([spec.name for spec in manifest.outputs]))
    try:
        read = bundle.parse_manifest(json.dumps(content).encode(), where="here")
    except bundle.BundleError:
        return
    # What was read is sound, so that whoever uses it need not look again.
    assert bundle.parse_manifest(msgspec.json.encode(read), where="here") == read
    names = [spec.name for spec in (*read.inputs, *read.outputs)]
    assert all(spec.name not in names and not spec.dynamic for spec in read.state)
    assert set(read.feedback) | {read.done or names[0]} <= set(names)


def test_a_deeply_nested_manifest_is_refused() -> None:
    with pytest.raises(bundle.BundleError):
        bundle.parse_manifest(b'{"format":' + b"[" * 500_000, where="here")


# ------------------------------------------------------------------------------ latest


def test_latest_is_the_last_created_not_the_greatest_name(tmp_path: Path) -> None:
    for version, created in (("z", "2026-01-01"), ("a", "2026-03-01"), ("m", "2026-02-01")):
        stamp = f"{created}T00:00:00Z"
        change_manifest(
            write(tmp_path, version=version), lambda m, stamp=stamp: m.update(created=stamp)
        )
    assert bundle.latest(tmp_path / "digits").name == "a"


def test_latest_breaks_a_tie_by_name(tmp_path: Path) -> None:
    for version in ("b", "c", "a"):
        path = write(tmp_path, version=version)
        change_manifest(path, lambda m: m.update(created="2026-01-01T00:00:00Z"))
    assert bundle.latest(tmp_path / "digits").name == "c"


def test_latest_passes_over_what_is_no_bundle(path: Path) -> None:
    (path.parent / "notes").mkdir()
    (path.parent / "readme.txt").touch()
    shutil.copytree(path, path.parent / ".writing-v2-0123abcd")
    (path.parent / "current").symlink_to(path)
    assert bundle.latest(path.parent) == path


def test_latest_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match=r"python -m gpu_service\.training"):
        bundle.latest(tmp_path / "digits")


def test_latest_never_hides_a_damaged_version(tmp_path: Path, path: Path) -> None:
    (write(tmp_path, version="v2") / "manifest.json").write_bytes(b"{")
    with pytest.raises(bundle.BundleError, match=r"v2/manifest\.json"):
        bundle.latest(path.parent)


def test_latest_refuses_a_bundle_under_another_name(path: Path) -> None:
    path.rename(path.parent / "v9")
    with pytest.raises(bundle.BundleError, match=r"says it is digits/v1"):
        bundle.latest(path.parent)


# ------------------------------------------------------------------------------ writing


def test_an_existing_version_is_never_replaced(tmp_path: Path, path: Path) -> None:
    before = bundle.digest(path)
    with pytest.raises(bundle.BundleError, match=r"digits/v1: this version exists already"):
        write(tmp_path, labels=("x", "y", "z"))
    assert bundle.digest(path) == before


def test_a_version_that_appears_meanwhile_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    before = bundle.digest(path)
    monkeypatch.setattr(bundle, "check_writable", lambda **_: None)
    with pytest.raises(bundle.BundleError, match=r"digits/v1: cannot write"):
        write(tmp_path, labels=("x", "y", "z"))
    assert bundle.digest(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["v1"]


@pytest.mark.parametrize("failing", ["rename", "open"])
def test_a_failure_before_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, failing, fail)
    with pytest.raises(bundle.BundleError, match=r"digits/v1: .*No space left"):
        write(tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / "digits").iterdir()) == []
    assert write(tmp_path) == bundle.latest(tmp_path / "digits")


def test_a_check_sees_the_whole_bundle_before_it_gets_its_name(tmp_path: Path) -> None:
    seen = []

    def check(path: Path) -> None:
        assert not (tmp_path / "digits" / "v1").exists()
        seen.append(bundle.verify(path))

    path = write(tmp_path, check=check)
    assert seen == [bundle.read_manifest(path)]

    def refuse(path: Path) -> None:
        raise bundle.BundleError("not good enough")

    with pytest.raises(bundle.BundleError, match="not good enough"):
        write(tmp_path, version="v2", check=refuse)
    assert [entry.name for entry in path.parent.iterdir()] == ["v1"]


def test_a_crash_before_the_end_leaves_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL or a power cut: the cleaning up does not run either."""

    class PowerCut(BaseException):
        pass

    def cut(*_: object, **__: object) -> None:
        raise PowerCut

    monkeypatch.setattr(pathlib.Path, "rename", cut)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(PowerCut):
        write(tmp_path)
    monkeypatch.undo()
    assert len(list((tmp_path / "digits").iterdir())) == 1
    with pytest.raises(bundle.BundleError, match="no bundle here"):
        bundle.latest(tmp_path / "digits")
    assert write(tmp_path) == bundle.latest(tmp_path / "digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../up"}, "bad model name '../up'"),
        ({"version": "../up"}, "bad version '../up'"),
        ({"version": "/abs"}, "bad version '/abs'"),
        ({"labels": ("a", "b")}, "2 labels"),
        ({"training": msgspec.structs.replace(TRAINING, metrics={"x": float("nan")})}, "metrics"),
        ({"samples": samples() | {"label": numpy.zeros(4, "i4")}}, "'label' is int32[4]"),
        ({"samples": samples() | {"label": numpy.zeros(3, "i8")}}, "same number of samples"),
        ({"samples": samples() | {"other": numpy.zeros(4, "f4")}}, "unknown tensor 'other'"),
        ({"samples": {}}, "missing tensor 'image'"),
        ({"samples": samples(0)}, "one or more"),
        (
            {"samples": samples() | {"image": numpy.zeros((4, 1, 2, 3), "f4")}},
            "expected float32[n, 1, 2, 2]",
        ),
    ],
)
def test_bad_content_is_not_written(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(bundle.BundleError) as error:
        write(tmp_path / "models", **changes)
    assert message in str(error.value)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_models_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(bundle.BundleError, match="models/digits: cannot create the folder"):
        write(tmp_path / "models")


def test_find_takes_a_version_or_the_newest_of_a_model(tmp_path: Path, path: Path) -> None:
    assert bundle.find(path) == path
    assert bundle.find(path.parent) == path
    with pytest.raises(bundle.BundleError, match="no bundle here"):
        bundle.find(tmp_path / "other")
