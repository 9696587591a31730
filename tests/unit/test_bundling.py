"""From somebody's factory and weights to a bundle: what is found out, and what is refused."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_service import __main__ as command_line
from gpu_service import bundle, bundling, datatypes, models

NETWORKS = """
import torch
from torch import nn


class Double(nn.Module):
    '''x [n, 3] → y [n, 3].'''

    def __init__(self, *, by: float = 2.0, bias: bool = False) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor([by]))
        if bias:
            self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.by


class Random(nn.Module):
    '''Weights that differ each time it is built, in no parameter.'''

    def __init__(self, *, buffer: bool = False) -> None:
        super().__init__()
        weight = torch.randn(3)
        if buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = weight

    def forward(self, x):
        return x * self.weight


class Returns(nn.Module):
    '''Whatever is asked for.'''

    def __init__(self, *, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, *inputs):
        x = inputs[0]
        return {
            "half": x.bfloat16(),
            "complex": torch.complex(x, x),
            "dict": {"y": x},
            "list": [x, x],
            "none": None,
            "scalar": x.sum(),
            "squeezed": x.squeeze(0),
            "nan": x / 0 * 0,
            "infinite": torch.where(x > 0.5, x, -torch.inf),
            "noise": x + torch.randn(3),
            "dropout": torch.nn.functional.dropout(x),
            "centred": x - x.mean(0),
            "rest": x * (len(x) % 2),
            "in_place": x.mul_(2),
            "pair": (x, (x * 100).long()),
            "with_state": (x, x[:, :2]),
            "wrong_state": (x, x.double()),
            "sizes": torch.arange(x.shape[1]).repeat(len(x), 1),
            "fails": x,
        }[self.what] if self.what != "fails" else undefined


class Normalised(nn.Module):
    '''Mixes its batch in training mode only.'''

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(x))


class Pooled(nn.Module):
    '''Images of any size, and a mask of the same → three outputs of different dependence.'''

    def forward(self, image, mask):
        masked = image * mask[:, None]
        return masked.mean((2, 3)), masked[:, 0, ::2], masked.sum(1, keepdim=True) > 1


class Counter(nn.Module):
    '''A running sum, that also feeds back.'''

    def forward(self, step, total):
        total = total + step[:, None].float()
        return step, (total[:, 0] > 5), total


class Blend(nn.Module):
    '''Mixes the states of its batch, which zeros do not tell.'''

    def forward(self, x, mixed):
        return x, x + mixed.mean(0)


class Feeds(nn.Module):
    '''Returns what it cannot take.'''

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, token):
        self.table(token)
        return token + 50


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, token, previous=None):
        return self.table(token.long()).sum(1)


class AtMost(nn.Module):
    '''Positions end.'''

    def __init__(self, *, most: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(most, 1))
        self.most = most

    def forward(self, x):
        if x.shape[1] > self.most:
            raise ValueError("too long")
        return x + self.positions[: x.shape[1], 0]
"""


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "brought.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    yield
    sys.modules.pop("brought", None)


def make(directory: Path, network: str = "Double", **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "factory": f"brought:{network}",
        "name": "mine",
        "version": "v1",
        "directory": directory / "models",
        "inputs": ("x:FP32:3",),
    }
    return bundling.make(bundling.Plan(**(arguments | changes)))


def refused(directory: Path, network: str = "Double", **changes: Any) -> str:
    """What is said; nothing is written."""
    with pytest.raises(bundle.BundleError) as caught:
        make(directory, network, **changes)
    assert not list(directory.rglob("manifest.json"))
    return str(caught.value)


def save(file: Path, **arrays: Any) -> Path:
    numpy.savez(file, **arrays)
    return file


def weights(file: Path, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file(tensors, file)
    return file


ROOT = Path(__file__).parents[2]
PETS = bundle.Architecture(name="my_models.pets:Pets", arguments={})

X = numpy.arange(12, dtype="f4").reshape(4, 3)


# ------------------------------------------------------------------------------ sound


def test_a_factory_weights_and_samples_become_a_bundle(tmp_path: Path) -> None:
    path = make(
        tmp_path,
        arguments='{"bias": true}',
        weights=(weights(tmp_path / "w.safetensors", by=torch.tensor([5.0]), bias=torch.ones(3)),),
        samples=save(tmp_path / "s.npz", x=X, label=numpy.array([0, 1, 2, 0], "i4")),
        output_names=("y",),
        labels="a,b, c",
    )
    assert path == tmp_path / "models/mine/v1"
    manifest = bundle.verify(path)
    assert manifest.architecture == bundle.Architecture(
        name="brought:Double", arguments={"bias": True}
    )
    assert manifest.inputs == (bundle.TensorSpec(name="x", datatype="FP32", shape=(3,)),)
    assert manifest.outputs == (bundle.TensorSpec(name="y", datatype="FP32", shape=(3,)),)
    assert manifest.labels == ("a", "b", "c")
    assert manifest.training is None
    samples = bundle.load_samples(path)
    numpy.testing.assert_array_equal(samples["x"], X)
    numpy.testing.assert_array_equal(samples["expected.y"], 5 * X)
    assert samples["label"].dtype == numpy.dtype("<i8")
    model = models.load_model(path, factories=("brought:Double",))
    assert model(torch.tensor([1.0])).item() == 5.0


def test_random_samples_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one, same, other = (
        bundle.load_samples(make(tmp_path / name, seed=seed))["x"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    numpy.testing.assert_array_equal(one, same)
    assert one.shape == (16, 3)
    assert (one != other).all()


def test_what_is_random_elsewhere_stays_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make(tmp_path, "Random", arguments='{"buffer": true}')
    assert torch.equal(torch.rand(3), expected)


def test_the_weights_are_the_factory_s_own_where_none_are_given(tmp_path: Path) -> None:
    path = make(tmp_path, "Random", arguments='{"buffer": true}')
    model = models.load_model(path, factories=("brought",))
    samples = bundle.load_samples(path)
    numpy.testing.assert_array_equal(
        model(torch.from_numpy(samples["x"])).numpy(), samples["expected.output"]
    )


def test_a_registered_name_is_a_factory_too(tmp_path: Path) -> None:
    path = make(tmp_path, factory="digits_cnn", inputs=("image:FP32:1,28,28",))
    assert bundle.read_manifest(path).architecture.name == "digits_cnn"
    assert models.load_model(path)


def test_weights_may_be_in_several_files(tmp_path: Path) -> None:
    parts = (
        weights(tmp_path / "1.safetensors", by=torch.tensor([5.0])),
        weights(tmp_path / "2.safetensors", bias=torch.ones(3)),
    )
    path = make(tmp_path, arguments='{"bias": true}', weights=parts)
    assert bundle.load_samples(path)["expected.output"].max() > 2
    assert "--weights" in refused(tmp_path / "b", weights=parts[:1] * 2)


def test_the_model_runs_in_eval_mode(tmp_path: Path) -> None:
    path = make(tmp_path, "Normalised", samples=save(tmp_path / "s.npz", x=X))
    numpy.testing.assert_allclose(bundle.load_samples(path)["expected.output"], X, rtol=1e-4)


def test_dynamic_sizes_of_outputs_are_found(tmp_path: Path) -> None:
    path = make(
        tmp_path,
        "Pooled",
        inputs=("image:FP32:3,-1,-1", "mask:FP32:-1,-1"),
        output_names=("mean", "rows", "bright"),
        dynamic_sizes=("image:6,8", "mask:6,8"),
    )
    outputs = {spec.name: spec for spec in bundle.read_manifest(path).outputs}
    assert outputs["mean"].shape == (3,)
    assert (outputs["rows"].datatype, outputs["rows"].shape) == ("FP32", (-1, -1))
    assert (outputs["bright"].datatype, outputs["bright"].shape) == ("BOOL", (1, -1, -1))
    samples = bundle.load_samples(path)
    assert samples["image"].shape == (16, 3, 6, 8)
    assert samples["expected.rows"].shape == (16, 3, 8)


def test_inputs_whose_sizes_go_together_are_found_with_default_sizes(tmp_path: Path) -> None:
    path = make(tmp_path, "Pooled", inputs=("image:FP32:3,-1,-1", "mask:FP32:-1,-1"))
    assert bundle.load_samples(path)["mask"].shape == (16, 16, 16)
    assert [spec.name for spec in bundle.read_manifest(path).outputs] == [
        *("output_0", "output_1", "output_2")
    ]


def test_a_size_that_cannot_be_doubled_is_halved(tmp_path: Path) -> None:
    path = make(tmp_path, "AtMost", arguments='{"most": 16}', inputs=("x:FP32:-1",))
    assert bundle.read_manifest(path).outputs[0].shape == (-1,)


def test_state_feedback_and_done(tmp_path: Path) -> None:
    path = make(
        tmp_path,
        "Counter",
        inputs=("step:INT64",),
        ranges=("step:1,3",),
        state=("total:FP32:1",),
        output_names=("next", "ended"),
        feedback=("next=step",),
        done="ended",
    )
    manifest = bundle.read_manifest(path)
    assert manifest.state == (bundle.TensorSpec(name="total", datatype="FP32", shape=(1,)),)
    assert (manifest.feedback, manifest.done) == ({"next": "step"}, "ended")
    samples = bundle.load_samples(path)
    assert samples.keys() == {"step", "expected.next", "expected.ended"}
    assert set(samples["step"].tolist()) == {1, 2, 3}
    assert not samples["expected.ended"].any()


@pytest.mark.parametrize(
    ("datatype", "ranges", "low", "high"),
    [
        ("UINT8", (), 0, 255),
        ("INT8", (), -128, 127),
        ("INT32", ("x:-5,5",), -5, 5),
        ("INT64", (f"x:{-(1 << 63)},{(1 << 63) - 1}",), -(1 << 63), (1 << 63) - 1),
        ("FP32", (), 0, 1),
        ("FP64", ("x:-2.5,2.5",), -2.5, 2.5),
        ("BOOL", (), 0, 1),
    ],
)
def test_random_samples_are_within_their_range(
    tmp_path: Path, datatype: str, ranges: tuple[str, ...], low: float, high: float
) -> None:
    path = make(tmp_path, "Double", inputs=(f"x:{datatype}:9",), ranges=ranges, sample_count=64)
    values = bundle.load_samples(path)["x"]
    assert values.shape == (64, 9)
    assert low <= values.min() < values.max() <= high
    # Of that many, some are in the outer tenths.
    assert values.min() <= low + (high - low) / 10
    assert values.max() >= high - (high - low) / 10


def test_expected_outputs_of_elsewhere_are_compared(tmp_path: Path) -> None:
    good = save(tmp_path / "good.npz", x=X, **{"expected.output": 2 * X + 1e-4})
    path = make(tmp_path, samples=good)
    numpy.testing.assert_array_equal(bundle.load_samples(path)["expected.output"], 2 * X)
    bad = save(tmp_path / "bad.npz", x=X, **{"expected.output": 3 * X})
    said = refused(tmp_path / "b", samples=bad)
    assert "does not answer as --samples says: output 'output' is off by 11" in said


def test_samples_may_be_safetensors_and_only_some_of_them(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    safetensors.numpy.save_file({"x": X}, file)
    path = make(tmp_path, samples=file, sample_count=2)
    numpy.testing.assert_array_equal(bundle.load_samples(path)["x"], X[:2])


def test_one_sample_is_enough(tmp_path: Path) -> None:
    path = make(tmp_path, samples=save(tmp_path / "s.npz", x=X[:1]))
    assert len(bundle.load_samples(path)["x"]) == 1


def test_labels_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat, small\ndog\nbird\n")
    path = make(tmp_path, labels=str(tmp_path / "labels.txt"))
    assert bundle.read_manifest(path).labels == ("cat, small", "dog", "bird")


def test_infinities_are_no_problem(tmp_path: Path) -> None:
    path = make(tmp_path, "Returns", arguments='{"what": "infinite"}')
    assert numpy.isinf(bundle.load_samples(path)["expected.output"]).any()


def test_a_model_that_writes_to_its_input_leaves_the_samples_alone(tmp_path: Path) -> None:
    file = save(tmp_path / "s.npz", x=X)
    path = make(tmp_path, "Returns", arguments='{"what": "in_place"}', samples=file)
    numpy.testing.assert_array_equal(bundle.load_samples(path)["x"], X)


# ------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("half", "output 'output' is torch.bfloat16, which the protocol does not have"),
        ("complex", "output 'output' is torch.complex64"),
        ("dict", "output 'output' is a dict; forward must return a tensor, or a tuple"),
        ("list", "output 'output' is a list"),
        ("none", "output 'output' is a NoneType"),
        ("scalar", "output 'output' has shape [] for a batch of 16"),
        ("nan", "output 'output' holds NaN"),
        ("noise", "answers otherwise from run to run"),
        ("dropout", "answers otherwise from run to run"),
        ("centred", "depends on the rest of its batch: output 'output' is off by"),
        ("rest", "depends on the rest of its batch"),
        ("squeezed", "has shape [3] for a batch of 1"),
        ("fails", "fails on the samples (x [16, 3]): NameError: name 'undefined'"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(tmp_path: Path, what: str, message: str) -> None:
    assert message in refused(tmp_path, "Returns", arguments=json.dumps({"what": what}))


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("pair", {"output_names": ("y",)}, "returned 2 tensors; expected 1 outputs and 0 of state"),
        ("pair", {"state": ("s:FP32:3",)}, "new state 's' is INT64 [3] a sample, expected FP32"),
        ("with_state", {"state": ("s:FP32:3",)}, "new state 's' is FP32 [2] a sample"),
        ("wrong_state", {"state": ("s:FP32:3",)}, "new state 's' is FP64 [3] a sample"),
        ("in_place", {"state": ("s:FP32:3",)}, "expected one or more outputs and 1 of state"),
        (
            "pair",
            {"output_names": ("y", "n"), "feedback": ("n=x",)},
            "feedback: output 'n' is INT64 [3], input 'x' is FP32 [3]; they must be equal",
        ),
        ("pair", {"feedback": ("n=x",)}, "feedback: 'n' → 'x' must lead from an output"),
        ("pair", {"done": "output_0"}, "done: 'output_0' must be a BOOL output"),
        ("pair", {"output_names": ("y", "y")}, "--output-name: a name occurs twice"),
        ("pair", {"output_names": ("y", "a b")}, "--output-name: bad tensor name 'a b'"),
        ("in_place", {"labels": "a,b"}, "2 labels for an output of [3] values"),
    ],
)
def test_a_signature_that_is_not_the_model_s_is_refused(
    tmp_path: Path, what: str, changes: dict[str, Any], message: str
) -> None:
    said = refused(tmp_path, "Returns", arguments=json.dumps({"what": what}), **changes)
    assert message in said


def test_what_only_a_second_step_tells_is_found(tmp_path: Path) -> None:
    said = refused(tmp_path, "Blend", state=("mixed:FP32:3",))
    assert "depends on the rest of its batch: output 'mixed of the second step' is off by" in said
    inputs, ranges, feedback = ("token:INT64",), ("token:0,49",), ("output=token",)
    said = refused(tmp_path, "Feeds", inputs=inputs, ranges=ranges, feedback=feedback)
    assert "fails in its second step (token [16]): IndexError" in said


def test_a_dynamic_size_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    inputs, sizes = ("x:FP32:-1",), ("x:3",)
    said = refused(tmp_path, "Normalised", inputs=inputs, dynamic_sizes=sizes)
    assert "fails with other sizes of what is dynamic (x [16, 6])" in said
    assert "(x [16, 1])" in said


def test_a_value_out_of_range_is_said_with_the_shapes(tmp_path: Path) -> None:
    said = refused(tmp_path, "Embedded", inputs=("token:INT32:4",), ranges=("token:0,50",))
    assert "fails on the samples (token [16, 4]): IndexError: index out of range" in said
    assert make(tmp_path, "Embedded", inputs=("token:INT32:4",), ranges=("token:0,49",))


def test_what_is_in_no_parameter_is_missed_after_reloading(tmp_path: Path) -> None:
    said = refused(tmp_path, "Random")
    assert "built anew from its bundle, answers otherwise" in said
    assert [file.name for file in (tmp_path / "models/mine").iterdir()] == []


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        name="My Model",
        version="../v",
        inputs=("x:FP8:3", "a b:FP32:x", "y:FP32:0"),
        state=("s:FP32:-1",),
        feedback=("y",),
        labels="/nonexistent",
        arguments='{"nothing": 1}',
        weights=(tmp_path / "none.safetensors",),
    )
    for part in (
        "nothing was written; 9 to correct:",
        "bad model name 'My Model'",
        "bad version '../v'",
        "--input 'a b:FP32:x': expected NAME:DATATYPE:SIZE",
        "--input: x: unknown datatype 'FP8'; known: BOOL",
        "--input: y: shape [0] has a size below 1",
        "--state: s: shape [-1] must be fixed",
        "--feedback 'y': expected OUTPUT=INPUT",
        "--labels /nonexistent: No such file",
        "TypeError: ",
    ):
        assert part in said, part
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": "[1]"}, "--arguments '[1]': Expected `object`, got `array`"),
        ({"arguments": "{"}, "--arguments '{': "),
        ({"arguments": '{"by": {}}'}, "expected a JSON object of the factory's keyword arguments"),
        ({"arguments": '{"by": 1}, "name": "x"'}, "--arguments"),
        ({"factory": "brought:Missing"}, "has no attribute 'Missing'"),
        ({"factory": "os.system"}, "unknown architecture 'os.system'"),
        ({"factory": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"factory": "torch:rand", "arguments": '{"size": [3]}'}, "returned Tensor, not a torch"),
        ({"inputs": ("x:FP32:3", "x:FP32:3")}, "--input: a name occurs twice"),
        ({"inputs": ("label:FP32:3",)}, "--input: bad tensor name 'label'"),
        ({"inputs": ("x",)}, "--input: x: unknown datatype ''"),
        ({"state": ("x:FP32:3",)}, "--state: 'x' is an input's or output's name"),
        ({"feedback": ("a=x", "a=x")}, "--feedback 'a=x': expected OUTPUT=INPUT, each output once"),
        ({"inputs": ("x:INT64:3",)}, "--range is needed for input 'x' of INT64"),
        ({"ranges": ("y:0,1",)}, "--range 'y:0,1': no such input; there are x"),
        ({"ranges": ("x:0",)}, "--range x: expected LOW,HIGH"),
        ({"ranges": ("x:1,0",)}, "--range x: expected LOW,HIGH"),
        ({"ranges": ("x:nan,1",)}, "--range x: expected LOW,HIGH"),
        ({"ranges": ("x:0,many",)}, "expected INPUT:N,…, numbers"),
        ({"inputs": ("x:UINT8:3",), "ranges": ("x:0,256",)}, "within 0…255 of UINT8"),
        ({"inputs": ("x:UINT8:3",), "ranges": ("x:0,0.5",)}, "whole numbers"),
        ({"dynamic_sizes": ("x:4",)}, "--dynamic-size x: 0 sizes from 1 on are needed"),
        (
            {"inputs": ("x:FP32:-1,2",), "dynamic_sizes": ("x:4,4",)},
            "1 sizes from 1 on are needed, one for each -1 of [-1, 2]; got 2",
        ),
        ({"inputs": ("x:FP32:-1",), "dynamic_sizes": ("x:0",)}, "sizes from 1 on are needed"),
        ({"inputs": ("x:FP32:99999999",)}, "6,399,999,936 bytes, allowed are 268,435,456"),
        ({"labels": "a\0b"}, "not UTF-8 text"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array 'x'; it has none"),
        ({"y": X}, "unknown array 'y'; known are label, x, expected.OUTPUT"),
        ({"x": X.astype("f8")}, "'x' is float64; convert it: .astype('float32')"),
        ({"x": X[:, :2]}, "'x' has shape [4, 2], expected [n, 3]"),
        ({"x": numpy.float32(1)}, "'x' has shape [], expected [n, 3]"),
        ({"x": X[:0]}, "one or more"),
        ({"x": X, "label": numpy.zeros(3, "i8")}, "same number of samples"),
        ({"x": X, "label": numpy.zeros(4, "f4")}, "'label' is float32; convert it"),
        ({"x": X, "expected.z": X}, "output 'z': expected shape [4, 3], got nothing"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    said = refused(tmp_path, samples=save(tmp_path / "s.npz", **arrays))
    assert message in said


def test_samples_that_are_pickled_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / "s.npz"
    numpy.savez(file, x=numpy.array([Trap()], dtype=object))
    assert "allow_pickle=False" in refused(tmp_path, samples=file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.npz", b"not a zip", "s.npz: cannot be read: "),
        ("s.npz", b"PK\x03\x04", "s.npz: cannot be read: "),
        ("s.safetensors", b"\xff" * 64, "s.safetensors: cannot be read: "),
        ("s.csv", b"1,2,3", "expected .npz (numpy.savez) or .safetensors"),
    ],
)
def test_samples_in_no_such_file_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path, samples=tmp_path / name)
    (tmp_path / name).unlink()
    if not name.endswith("csv"):
        assert "No such file" in refused(tmp_path, samples=tmp_path / name)


def test_random_samples_have_options_that_given_ones_have_not(tmp_path: Path) -> None:
    file = save(tmp_path / "s.npz", x=X)
    said = refused(tmp_path, samples=file, ranges=("x:0,1",))
    assert "--dynamic-size and --range are for random samples" in said


@pytest.mark.parametrize(
    ("tensors", "messages"),
    [
        ({}, ["missing: by"]),
        ({"by": torch.ones(1), "by2": torch.ones(1)}, ["unknown: by2"]),
        ({"by": torch.ones(2)}, ["by is [2], expected [1]"]),
        ({"a": torch.ones(2)}, ["missing: by", "unknown: a"]),
        ({"module.by": torch.ones(1)}, ["every key begins with 'module.'"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], messages: list[str]
) -> None:
    said = refused(tmp_path, weights=(weights(tmp_path / "w.safetensors", **tensors),))
    for message in messages:
        assert f"--weights do not fit brought:Double: {message}" in said


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"\xff" * 64)
    assert "w.safetensors: not a safetensors file: " in refused(tmp_path, weights=(file,))
    assert "No such file" in refused(tmp_path, weights=(tmp_path / "none",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "it's.ckpt", "disguised.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_refused_with_the_lines_that_convert_it(
    tmp_path: Path, name: str, wrapped: bool
) -> None:
    state: dict[str, Any] = {"by": torch.tensor([5.0])}
    file = tmp_path / name
    torch.save({"state_dict": state} if wrapped else state, file)
    said = refused(tmp_path, weights=(file,))
    assert "a pickle, which can run code when it is read, is not read here" in said
    told, _, lines = said.partition(".safetensors:\n")
    exec(textwrap.dedent(lines), {})
    converted = Path(told.rpartition("--weights ")[2] + ".safetensors")
    samples = save(tmp_path / "s.npz", x=X)
    path = make(tmp_path, weights=(converted,), samples=samples)
    numpy.testing.assert_array_equal(bundle.load_samples(path)["expected.output"], 5 * X)


def test_an_existing_version_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = bundle.digest(path)
    with pytest.raises(bundle.BundleError, match=r"mine/v1: exists; choose a --version"):
        make(tmp_path)
    assert bundle.digest(path) == before


_texts = st.text(max_size=8)
_specs = st.builds(
    ":".join,
    st.tuples(
        st.sampled_from(["x", "y", "", "é"]) | _texts,
        st.sampled_from(["FP32", "INT64", "BOOL", "UINT8"]) | _texts,
        st.sampled_from(["3", "-1", "3,", "99999999999", "٣", "1" * 5000]) | _texts,
    ),
)
_pairs = st.builds(
    "{}{}{}".format, st.sampled_from(["x", "y"]), st.sampled_from([":", "="]), _texts
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "name": _texts,
            "version": _texts,
            "arguments": _texts | st.just("[" * 100_000),
            "inputs": st.lists(_specs, min_size=1, max_size=2).map(tuple),
            "state": st.lists(_specs, max_size=1).map(tuple),
            "feedback": st.lists(_pairs, max_size=2).map(tuple),
            "output_names": st.lists(_texts, max_size=2).map(tuple),
            "done": _texts,
            "labels": _texts,
            "ranges": st.lists(_pairs, max_size=2).map(tuple),
            "dynamic_sizes": st.lists(_pairs, max_size=2).map(tuple),
        },
    ).filter(bool)
)
def test_any_text_gives_a_bundle_or_a_bundle_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = tmp_path / uuid.uuid4().hex
    try:
        path = make(directory, **changes)
    except bundle.BundleError:
        assert not list(directory.rglob("manifest.json"))
    else:
        assert bundle.verify(path)


# ------------------------------------------------------------------------------ command


def test_the_command_writes_shows_and_says_how_to_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bundle", "brought:Double", "--name", "mine", "--output", str(tmp_path / "models")]
    assert command_line.main([*arguments, "--version", "v1", "--input", "x:FP32:3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mine v1, written ")
    assert "no --weights: they are as the factory made them, with seed 0" in said
    path = tmp_path / "models/mine/v1"
    assert said.endswith(f"serve --bundle {path} --factories brought:Double\n")
    assert command_line.main(["inspect", str(path.parent)]) == 0
    assert "served with: --factories brought:Double" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bundle", "brought:Double", "--name", "mine", "--output", str(tmp_path / "models")]
    assert command_line.main([*arguments, "--input", "x:FP32:-3"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu_service bundle: nothing was written; 1 to correct:\n  - ")


def test_the_command_finds_factories_in_the_current_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_service", "bundle", "brought:Double", "--name", "mine"]
    done = subprocess.run(
        [*command, "--output", "models", "--input", "x:FP32:3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bundle.latest(tmp_path / "models/mine")


def test_the_guide_can_be_followed_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs/bundles.md").read_text().partition("## What the command takes")[0]
    factory, saving = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    commands = [
        shlex.split(text.replace("\\\n", ""))[3:]
        for text in re.findall(r"```\n(python -m gpu_service .*?)```", guide, re.DOTALL)
    ]
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models/pets.py").write_text(factory)
    monkeypatch.chdir(tmp_path)
    for module in ("my_models", "my_models.pets"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    exec(saving, {"model": models.build(PETS, factories=("my_models.pets",))})
    bundle_command, serve_command = commands
    assert command_line.main(bundle_command) == 0
    assert serve_command[0] == "serve"
    path = bundle.find(tmp_path / serve_command[serve_command.index("--bundle") + 1])
    allowed = serve_command[serve_command.index("--factories") + 1]
    assert models.load_model(path, factories=(allowed,))
    manifest = bundle.read_manifest(path)
    assert (manifest.inputs[0].shape, manifest.outputs[0].shape) == ((3, -1, -1), (2,))
    assert manifest.labels == ("cat", "dog")
    assert f"--factories {allowed}" in capsys.readouterr().out


def test_the_guide_names_every_option_and_datatype(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (ROOT / "docs/bundles.md").read_text()
    with pytest.raises(SystemExit):
        command_line.main(["bundle", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert {option for option in options if f"`{option}" not in guide} == set()
    assert {name for name in datatypes.NUMPY if f"`{name}`" not in guide} == set()
