from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray

from gpu_service.bundle import TensorSpec
from gpu_service.dispatch import StartupError
from gpu_service.engine import (
    TorchEngine,
    _traced,
    buckets,
    choose_device,
    configure,
    good_batch,
)
from gpu_service.signature import ModelInfo

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this host has no GPU")
DEVICES = ["cpu", pytest.param("cuda:0", marks=needs_gpu)]

X = TensorSpec(name="x", datatype="FP32", shape=(2,))
K = TensorSpec(name="k", datatype="INT64", shape=())
Y = TensorSpec(name="y", datatype="FP32", shape=(2,))


class Module(torch.nn.Module):
    """A module of one function that keeps the sizes of its batches."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.sizes: list[int] = []

    def forward(self, *inputs: torch.Tensor) -> Any:
        self.sizes.append(len(inputs[0]))
        return self.function(*inputs)


def make(
    function: Callable[..., Any],
    *,
    device: str = "cpu",
    inputs: tuple[TensorSpec, ...] = (X,),
    outputs: tuple[TensorSpec, ...] = (Y,),
    max_batch: int = 6,
) -> tuple[TorchEngine, Module]:
    module = Module(function)
    info = ModelInfo(name="m", version="1", inputs=inputs, outputs=outputs)
    engine = TorchEngine(module, info=info, device=torch.device(device), max_batch=max_batch)
    return engine, module


def rows(*values: float) -> dict[str, NDArray[Any]]:
    return {"x": numpy.array([[value, -value] for value in values], "<f4")}


@pytest.mark.parametrize("device", DEVICES)
def test_requests_run_as_one_batch_in_order(device: str) -> None:
    engine, module = make(lambda x: x * 10, device=device)
    output = engine.run([rows(1), rows(2, 3)])
    assert output.outputs["y"].tolist() == [[10, -10], [20, -20], [30, -30]]
    assert len(module.sizes) == 1
    assert min(output.input_s, output.infer_s, output.output_s) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_several_inputs_and_outputs_keep_their_places(device: str) -> None:
    engine, _ = make(
        lambda x, k: (k + 1, x * k[:, None]), device=device, inputs=(X, K), outputs=(K, Y)
    )
    requests = [rows(value) | {"k": numpy.array([value])} for value in (2, 3)]
    outputs = engine.run(requests).outputs
    assert outputs["k"].tolist() == [3, 4]
    assert outputs["y"].tolist() == [[4, -4], [9, -9]]


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_survive_the_next_batch_even_if_they_are_the_input(device: str) -> None:
    engine, _ = make(lambda x: x, device=device)
    first = engine.run([rows(1)]).outputs["y"]
    engine.run([rows(2)])
    assert first.tolist() == [[1, -1]]


def test_a_cpu_runs_no_sample_that_nobody_sent() -> None:
    engine, module = make(lambda x: x)
    engine.run([rows(1, 2, 3)])
    assert module.sizes == [3]


@needs_gpu
def test_a_gpu_runs_buckets() -> None:
    engine, module = make(lambda x: x, device="cuda:0")
    assert engine.run([rows(1, 2, 3)]).outputs["y"].shape == (3, 2)
    engine.run([rows(1, 2, 3, 4, 5)])
    assert module.sizes == [4, 6]


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_batch: int, sizes: list[int]) -> None:
    assert buckets(max_batch) == sizes


def test_warm_up_runs_every_bucket() -> None:
    engine, module = make(lambda x: x)
    engine.warm_up()
    assert sorted(set(module.sizes)) == [1, 2, 4, 6]
    assert engine.good_batch in (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("seconds", "good"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # time grows with size
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),  # it does not at all
        ({1: 2.0, 2: 2.1, 4: 4.0, 8: 8.1}, 2),  # up to here it pays
    ],
)
def test_a_good_batch_is_the_smallest_that_is_as_fast_as_any(
    seconds: dict[int, float], good: int
) -> None:
    assert good_batch(seconds) == good


def test_a_device_is_checked_with_a_sample_of_its_own() -> None:
    engine, module = make(lambda x: x)
    engine.check()
    assert module.sizes == [1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.double(), r"'y' as float64 .* FP32"),
        (lambda x: x[:, :1], r"shape \[3, 1\]"),
        (lambda x: (x, x), "returned 2 outputs, its bundle says 1"),
    ],
)
def test_outputs_other_than_declared_are_an_error(
    function: Callable[..., Any], message: str
) -> None:
    engine, _ = make(function)
    with pytest.raises(ValueError, match=message):
        engine.run([rows(1, 2, 3)])


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        result = x * weight
        seen.append(result.requires_grad)
        return result

    engine, _ = make(function)
    engine.run([rows(1)])
    assert seen == [False]


def test_the_self_test_compares_all_samples_in_batches_that_fit() -> None:
    engine, module = make(lambda x: 2 * x, max_batch=6)
    x = rows(*range(10))["x"]
    assert engine.self_test({"x": x, "expected.y": 2 * x, "label": numpy.zeros(10)}) == 0
    assert module.sizes == [6, 4]


def test_the_self_test_refuses_a_model_that_answers_differently() -> None:
    engine, _ = make(lambda x: 2 * x)
    x = rows(1, 2)["x"]
    with pytest.raises(StartupError, match=r"self-test of model m 1 on cpu: output 'y' is off by"):
        engine.self_test({"x": x, "expected.y": 3 * x, "label": numpy.zeros(2)})


def test_a_device_that_is_not_there_is_named() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(StartupError, match=f"device cuda:{count}: torch .* finds {count} GPUs"):
        choose_device(f"cuda:{count}")


def test_auto_takes_what_is_there() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected
    assert choose_device("cpu").type == "cpu"


def test_float32_is_computed_as_float32_and_the_event_loop_keeps_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    try:
        configure(threads=0)
        assert torch.get_num_threads() == 3
        configure(threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def info(*inputs: TensorSpec) -> ModelInfo:
    return ModelInfo(name="m", version="1", inputs=inputs, outputs=(Y,))


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], -1) * 2


class ByValue(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class BySize(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.full_like(x, len(x.tolist()))


def test_a_traced_network_answers_as_its_module() -> None:
    traced = _traced(Plain().eval(), info(X), max_batch=4)
    assert traced is not None
    x = torch.rand(3, 2)
    assert torch.equal(traced(x), 2 * x)


@pytest.mark.parametrize("module", [ByValue(), BySize()])
def test_what_depends_on_values_or_sizes_is_not_traced(module: torch.nn.Module) -> None:
    assert _traced(module.eval(), info(X), max_batch=4) is None
