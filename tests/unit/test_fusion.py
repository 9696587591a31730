"""Traced and fused forms of networks: the same answers, or none."""

import gc
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpu_service import fusion
from gpu_service.bundle import TensorSpec
from gpu_service.logs import JsonFormatter
from gpu_service.signature import ModelInfo

X = TensorSpec(name="x", datatype="FP32", shape=(2,))
IMAGE = TensorSpec(name="x", datatype="FP32", shape=(1, 8, 8))
IDS = TensorSpec(name="ids", datatype="INT64", shape=(5,))
Y = TensorSpec(name="y", datatype="FP32", shape=(2,))


def info(*inputs: TensorSpec) -> ModelInfo:
    return ModelInfo(name="m", version="1", inputs=inputs, outputs=(Y,))


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], -1) * 2


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class BySize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.full_like(x, len(x.tolist()))


class Residual(nn.Module):
    """Several branches, normalisation, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.normal = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.relu(self.first(x))
        high = torch.relu(low + self.normal(self.second(low)))
        return high, high.mean((2, 3))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def text() -> nn.Module:
    layers = nn.Embedding(3, 16), nn.Flatten(), nn.Linear(80, 32), nn.GELU(), nn.Linear(32, 2)
    return nn.Sequential(*layers)


def both(
    module: nn.Module, spec: TensorSpec, *, max_batch: int = 4
) -> tuple[Callable[..., Any], fusion.Fusion]:
    found = fusion.traced(module.eval(), info(spec), max_batch=max_batch)
    assert found is not None
    return found


def test_a_traced_network_answers_as_its_module() -> None:
    traced, _ = both(Plain(), X)
    x = torch.rand(3, 2)
    assert torch.equal(traced(x), 2 * x)


@pytest.mark.parametrize("module", [ByValue(), BySize()])
def test_what_depends_on_values_or_sizes_is_not_traced(module: nn.Module) -> None:
    assert fusion.traced(module.eval(), info(X), max_batch=4) is None


@pytest.mark.parametrize(("build", "spec"), [(convolution, IMAGE), (Residual, IMAGE), (text, IDS)])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_a_fused_form_answers_as_its_module(
    build: Callable[[], nn.Module], spec: TensorSpec, samples: int
) -> None:
    module = build()
    _, fused = both(module, spec)
    form = fused.form(samples)
    assert form is not None
    x = torch.rand(samples, *spec.shape)
    inputs = x if spec.datatype == "FP32" else (x * 3).long()
    with torch.inference_mode():
        expected = fusion.as_tuple(module(inputs))
        torch.testing.assert_close(form(inputs), expected, rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    """Takes two, of which one is not what a form usually has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolution()

    def forward(self, x: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.layers(x) + half.float()
        return answers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, -1e20])
def test_a_fused_form_takes_nothing_that_is_not_finite_or_too_large(value: float) -> None:
    half = TensorSpec(name="half", datatype="FP16", shape=(1,))
    found = fusion.traced(Pair().eval(), info(IMAGE, half), max_batch=4)
    assert found is not None
    form = found[1].form(2)
    assert form is not None
    with torch.inference_mode():
        for number in range(2):
            inputs = [torch.rand(2, 1, 8, 8), torch.full((2, 1), 60_000, dtype=torch.float16)]
            assert form(*inputs) is not None
            inputs[number].view(-1)[1] = value
            assert form(*inputs) is None


class ByDeviation(nn.Module):
    """What a picture of one colour is NaN to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convolution()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
        answers: torch.Tensor = self.layers(pictures)
        return answers


def test_a_form_to_which_something_is_a_number_that_is_none_is_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """oneDNN's ReLU and pooling make 0 of NaN."""
    caplog.set_level("INFO", "gpu_service")
    _, fused = both(ByDeviation(), IMAGE)
    assert fused.form(1) is None
    (record,) = [record for record in caplog.records if record.getMessage() == "not_fused"]
    assert "output 0 is not close" in JsonFormatter().format(record)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_networks_are_traced(kind: type[nn.RNNBase]) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(1, 4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            last: torch.Tensor = self.layers(x)[0][:, -1]
            return last

    module = Last()
    traced, _ = both(module, TensorSpec(name="x", datatype="FP32", shape=(5, 1)))
    x = torch.rand(3, 5, 1)
    with torch.inference_mode():
        torch.testing.assert_close(traced(x), module(x))


def test_where_nothing_can_be_fused_there_is_no_form(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gpu_service")
    _, fused = both(Plain(), X)
    assert fused.form(4) is None
    assert "not_fused" in caplog.messages


def test_a_form_that_answers_differently_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = convolution()
    _, fused = both(module, IMAGE)
    monkeypatch.setattr(module, "forward", lambda x: torch.zeros(len(x), 36))
    assert fused.form(4) is None


def test_torch_keeps_nothing_of_a_network_that_nobody_has_any_more() -> None:
    module = convolution()
    weights = weakref.ref(module[0].weight)
    forms = both(module, IMAGE)
    assert forms[1].form(2) is not None
    del module
    gc.collect()
    assert weights() is not None  # which the trace has
    del forms
    gc.collect()
    assert weights() is None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_kernels_go_with_their_form() -> None:
    def load() -> None:
        layers = [nn.Conv2d(16 if number else 1, 16, 3, padding=1) for number in range(12)]
        module = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())])
        assert both(module, IMAGE)[1].form(2) is not None

    load()
    before = resident_bytes()
    for _ in range(40):
        load()
    assert resident_bytes() - before < 8 << 20  # 1 MiB; 21 where oneDNN keeps its kernels


def test_nothing_else_in_the_process_is_fused() -> None:
    _, fused = both(convolution(), IMAGE)
    fused.form(4)
    assert not torch.jit.onednn_fusion_enabled()  # type: ignore[no-untyped-call]


def test_what_fused_forms_hold_together_is_bounded() -> None:
    _, of_little = both(convolution(), IMAGE)
    assert of_little.most > 24
    weights = nn.Linear(64, 10 << 14)  # 41 MiB
    _, of_much = both(nn.Sequential(nn.Flatten(), weights), IMAGE)
    assert of_much.most == 3


@given(st.integers(1, 5000))
def test_batches_are_padded_by_a_quarter_at_most(max_batch: int) -> None:
    sizes = fusion.fused_sizes(max_batch)
    assert sizes[:2] == [1, max_batch][:max_batch]
    assert len(set(sizes)) == len(sizes)
    for samples in range(1, max_batch + 1):
        assert min(size for size in sizes if size >= samples) <= samples * 1.25


def test_the_most_useful_sizes_come_first() -> None:
    assert fusion.fused_sizes(16) == [1, 16, 8, 4, 2, 14, 12, 10, 7, 6, 5, 3]
    assert fusion.fused_sizes(12) == [1, 12, 8, 4, 2, 10, 7, 6, 5, 3]
    assert fusion.fused_sizes(1) == [1]


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        (torch.ones(2), torch.ones(2) + 1e-6, None),
        (torch.ones(2), torch.ones(2) + 1e-3, "off by 0.001"),
        (torch.ones(2), torch.tensor([1.0, torch.nan]), "not close"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "expected torch.float64"),
        (torch.ones(2), torch.ones(1), "expected torch.float32 (1,)"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "not close"),
        (torch.tensor([True]), torch.tensor([True]), None),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), None),
    ],
)
def test_forms_of_a_network_are_compared_as_torch_testing_does(
    found: torch.Tensor, expected: torch.Tensor, problem: str | None
) -> None:
    if problem is None:
        fusion.assert_close(found, expected)
        torch.testing.assert_close(found, expected, equal_nan=True)
        return
    with pytest.raises(AssertionError, match=re.escape(problem)):
        fusion.assert_close(found, expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, equal_nan=True)
