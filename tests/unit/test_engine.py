import gc
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, fusion
from gpu_service.bundle import TensorSpec
from gpu_service.device import StartupError, Stream, Tensors
from gpu_service.engine import (
    BF16,
    FP32,
    TF32,
    TorchEngine,
    _Rounded,
    affordable,
    between,
    buckets,
    choose_device,
    configure,
    good_batch,
    open_bundle,
    padded,
    quick_batch,
    typical,
)
from gpu_service.logs import JsonFormatter
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
    state: tuple[TensorSpec, ...] = (),
    max_batch: int = 6,
    max_streams: int = 3,
    examples: Tensors | None = None,
) -> tuple[TorchEngine, Module]:
    module = Module(function)
    info = ModelInfo(name="m", version="1", inputs=inputs, outputs=outputs, state=state)
    engine = TorchEngine(
        module.to(device),
        info=info,
        device=torch.device(device),
        max_batch=max_batch,
        max_streams=max_streams,
        examples=examples,
    )
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


def test_warm_up_runs_every_size() -> None:
    engine, module = make(lambda x: x)
    engine.warm_up()
    assert sorted(set(module.sizes)) == [1, 2, 3, 4, 5, 6]
    assert module.sizes[-2:] == [5, 3]  # once is enough for what is not compared
    assert engine.good_batch in (1, 2, 4, 6)
    assert engine.good_batch <= engine.best_batch <= 6


@pytest.mark.parametrize(
    ("limit_s", "sizes"),
    [(100.0, [9, 7, 6, 5, 3]), (12.0, [7, 6, 5, 3]), (6.5, [5, 3]), (1.0, []), (0.0, [])],
)
def test_as_many_sizes_as_there_is_time_for_run_once(limit_s: float, sizes: list[int]) -> None:
    seconds = {1: 1.0, 2: 2.0, 4: 3.0, 8: 3.0, 10: 8.0}
    assert between(seconds, limit_s) == sizes


def test_warm_up_runs_every_bucket_of_a_slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_service.engine._BETWEEN_S", 0)
    engine, module = make(lambda x: x)
    engine.warm_up()
    assert sorted(set(module.sizes)) == [1, 2, 4, 6]


@pytest.mark.parametrize(
    "pace",
    [
        (1, 1, 1, 1, 1),
        (3, 1, 3, 2, 5),  # another machine at each turn
    ],
)
def test_a_slow_while_does_not_decide_what_is_fast(pace: tuple[int, ...]) -> None:
    turns = [{"a": 0.3 * speed, "b": 0.1 * speed} for speed in pace]
    turns[2]["b"] = 0.9  # somebody else had the core
    assert typical(turns) == pytest.approx({"a": 0.3, "b": 0.1})


@pytest.mark.parametrize(
    ("seconds", "good"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # time grows with size
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),  # it does not at all
        ({1: 2.0, 2: 2.1, 4: 4.0, 8: 8.1}, 2),  # up to here it pays
        ({1: 1.0, 2: 1.3, 4: 2.1, 8: 4.4}, 2),  # up to here it pays enough
    ],
)
def test_a_good_batch_is_the_smallest_that_is_as_fast_as_any(
    seconds: dict[int, float], good: int
) -> None:
    assert good_batch(seconds) == good


@pytest.mark.parametrize(
    ("seconds", "quick"),
    [
        ({1: 0.0001, 2: 0.0002, 4: 0.0012, 8: 0.0024}, 2),
        ({1: 0.0001, 2: 0.0019, 4: 0.0004}, 1),  # all smaller ones have to be
        ({1: 0.01, 2: 0.01}, 0),
    ],
)
def test_a_quick_batch_is_the_largest_that_takes_no_time(
    seconds: dict[int, float], quick: int
) -> None:
    assert quick_batch(seconds) == quick


@pytest.mark.parametrize(("threads", "quick"), [(1, 6), (2, 0)])
def test_what_takes_a_team_of_threads_is_not_quick(threads: int, quick: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine, _ = make(lambda x: x)
        assert engine.quick_batch == 0  # before the warm-up nothing is known to be
        engine.warm_up()
    finally:
        torch.set_num_threads(before)
    assert engine.quick_batch == quick


class Forms(fusion.Fusion):
    """Makes forms that answer with the size of batch that they are for, and keeps weak ones."""

    def __init__(self, *, most: int = 100, fails_at: int | None = None) -> None:
        self.made: dict[int, weakref.ref[Any]] = {}
        self._most, self._fails_at = most, fails_at

    @property
    def most(self) -> int:
        return self._most

    def form(self, samples: int) -> Any:
        if samples == self._fails_at:
            return None
        form = Module(lambda x: (x + samples,))
        self.made[samples] = weakref.ref(form)
        return form


def fused_engine(
    forms: Forms, *, max_fused: int = 100, inputs: tuple[TensorSpec, ...] = (X,)
) -> TorchEngine:
    return TorchEngine(
        Module(lambda x: x + 0),
        info=info(*inputs),
        device=torch.device("cpu"),
        max_batch=8,
        fusion=forms,
        max_fused=max_fused,
    )


@pytest.mark.parametrize(
    ("fused", "sizes"),
    [
        ({1: 0.5, 2: 1.9, 4: 4.0, 8: 7.0}, {1: 1, 2: 2, 8: 8}),  # 7 takes as long as 8 fused
        ({8: 5.0}, {6: 8, 7: 8, 8: 8}),
        ({1: 0.96, 8: 7.7}, {}),  # not worth weights of its own
        ({}, {}),
    ],
)
def test_a_batch_is_padded_to_a_fused_size_where_that_takes_less(
    fused: dict[int, float], sizes: dict[int, int]
) -> None:
    assert padded({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, fused) == sizes


def test_each_size_of_batch_runs_in_the_form_that_is_faster_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forms = Forms()
    engine = fused_engine(forms)
    monkeypatch.setattr("gpu_service.engine.padded", lambda plain, fused: {2: 2, 3: 4, 4: 4})
    engine.warm_up()
    assert engine.fused == [2, 4]
    assert engine.sizes == [1, 2, 4, 5, 6, 7, 8]
    for samples, value in ((1, 0), (2, 2), (3, 4), (4, 4), (5, 0), (8, 0)):
        outputs = engine.run([{"x": numpy.zeros((samples, 2), "<f4")}]).outputs["y"]
        assert outputs.shape == (samples, 2)
        assert (outputs == value).all()


def test_fused_forms_that_are_not_faster_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms()
    engine = fused_engine(forms)
    monkeypatch.setattr("gpu_service.engine.padded", lambda plain, fused: {4: 4})
    engine.warm_up()
    assert sorted(forms.made) == [1, 2, 3, 4, 5, 6, 7, 8]
    gc.collect()
    assert [size for size, form in forms.made.items() if form() is not None] == [4]
    engine.close()
    gc.collect()
    assert forms.made[4]() is None


@pytest.mark.parametrize(
    ("most", "max_fused", "fails_at", "made"),
    [
        (100, 100, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 100, None, [1, 4, 8]),  # memory for so many
        (100, 2, None, [1, 8]),
        (100, 0, None, []),
        (100, 100, 4, [1, 8]),  # what can't be fused for one size can't be for the others
    ],
)
def test_fused_forms_are_made_for_as_many_sizes_as_are_allowed(
    most: int, max_fused: int, fails_at: int | None, made: list[int]
) -> None:
    forms = Forms(most=most, fails_at=fails_at)
    fused_engine(forms, max_fused=max_fused).warm_up()
    assert sorted(forms.made) == made


def test_fused_forms_are_made_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_service.engine.affordable", lambda sizes, first, limit_s: sizes)
    monkeypatch.setattr("gpu_service.engine._FUSING_S", 0)
    forms = Forms()
    engine = fused_engine(forms)
    engine.warm_up()
    assert list(forms.made) == [1]
    assert engine.sizes == engine.fused == []


@pytest.mark.parametrize(("limit_s", "sizes"), [(16.0, [1, 4, 2, 3]), (13.0, [1, 2, 3]), (3.9, [])])
def test_no_form_is_made_of_a_size_that_takes_too_long(limit_s: float, sizes: list[int]) -> None:
    assert affordable([1, 4, 2, 3], {1: 1.0, 2: 2.0, 4: 4.0}, limit_s) == sizes


def test_what_a_fused_form_does_not_take_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms()
    monkeypatch.setattr(forms, "form", lambda samples: Module(lambda x: None))
    monkeypatch.setattr("gpu_service.engine.padded", lambda plain, fused: {3: 4, 4: 4})
    engine = fused_engine(forms)
    engine.warm_up()
    assert engine.run([rows(1, 2, 3)]).outputs["y"].tolist() == [[1, -1], [2, -2], [3, -3]]


def test_what_a_batch_failed_at_is_not_in_the_padding_of_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that the model raises at fails its own batch, not the next one in its buffer."""

    def refuse(x: torch.Tensor) -> torch.Tensor:
        if (x < 0).any():
            raise IndexError("below zero")
        return x

    forms = Forms()
    monkeypatch.setattr(forms, "form", lambda samples: Module(lambda x: (refuse(x),)))
    engine = fused_engine(forms)
    monkeypatch.setattr("gpu_service.engine.padded", lambda plain, fused: {3: 4, 4: 4})
    engine.warm_up()
    with pytest.raises(IndexError):
        engine.run([{"x": numpy.full((4, 2), -1, "<f4")}])
    outputs = engine.run([{"x": numpy.ones((3, 2), "<f4")}]).outputs["y"]
    assert outputs.tolist() == [[1, 1]] * 3


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
    comparison = engine.self_test({"x": x, "expected.y": 2 * x, "label": numpy.zeros(10)})
    assert (comparison.max_abs_diff, comparison.problem) == (0, None)
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


def test_tf32_is_used_only_where_it_was_chosen() -> None:
    before = torch.get_num_threads()
    try:
        for precision, allowed in ((TF32, True), (BF16, False), (FP32, False)):
            configure(threads=before, precision=precision)
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        configure(threads=before)


def info(*inputs: TensorSpec) -> ModelInfo:
    return ModelInfo(name="m", version="1", inputs=inputs, outputs=(Y,))


# ------------------------------------------------------------------------------ datatypes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("datatype", sorted(datatypes.NUMPY))
def test_each_datatype_arrives_and_returns_as_it_is(datatype: str, device: str) -> None:
    spec = TensorSpec(name="a", datatype=datatype, shape=(3,))
    engine, _ = make(lambda a: a, device=device, inputs=(spec,), outputs=(spec,))
    dtype = datatypes.NUMPY[datatype]
    first, second = (numpy.array([[0, 1, 0]]).astype(dtype), numpy.array([[1, 1, 0]]).astype(dtype))
    if dtype.kind in "iu":
        second[0, 2] = numpy.iinfo(dtype).max
    outputs = engine.run([{"a": first}, {"a": second}]).outputs["a"]
    assert outputs.dtype == dtype
    assert numpy.array_equal(outputs, numpy.concatenate([first, second]))


@pytest.mark.parametrize("device", DEVICES)
def test_large_batches_are_copied_as_small_ones(device: str) -> None:
    spec = TensorSpec(name="x", datatype="FP32", shape=(300_000,))
    engine, _ = make(lambda x: x + 1, device=device, inputs=(spec,), outputs=(spec,), max_batch=2)
    arrays = [numpy.full((1, 300_000), value, "<f4") for value in (1, 2)]
    outputs = engine.run([{"x": array} for array in arrays]).outputs["x"]
    assert (outputs[0] == 2).all()
    assert (outputs[1] == 3).all()


# ------------------------------------------------------------------------------ dynamic shapes

WORDS = TensorSpec(name="words", datatype="INT64", shape=(-1,))
LENGTHS = TensorSpec(name="lengths", datatype="INT64", shape=())
EXAMPLES: Tensors = {"words": numpy.ones((2, 5), "<i8")}


@pytest.mark.parametrize("device", DEVICES)
def test_a_dynamic_dimension_is_as_long_as_the_batch_has_it(device: str) -> None:
    engine, module = make(
        lambda words: (words * 2, words.sum(-1)),
        device=device,
        inputs=(WORDS,),
        outputs=(WORDS, LENGTHS),
        examples=EXAMPLES,
    )
    for length in (1, 4, 7):
        words = numpy.arange(length)[None].repeat(3, axis=0)
        outputs = engine.run([{"words": words[:2]}, {"words": words[2:]}]).outputs
        assert numpy.array_equal(outputs["words"], words * 2)
        assert outputs["lengths"].tolist() == [words[0].sum()] * 3
    assert module.sizes == [3, 3, 3]  # never padded


@pytest.mark.parametrize("device", DEVICES)
def test_a_dynamic_model_is_warmed_up_and_checked_with_an_example(device: str) -> None:
    seen: list[tuple[int, ...]] = []

    def function(words: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(words.shape))
        return words

    engine, _ = make(
        function, device=device, inputs=(WORDS,), outputs=(WORDS,), examples=EXAMPLES, max_batch=2
    )
    engine.warm_up()
    engine.check()
    assert set(seen) == {(1, 5), (2, 5)}


def test_a_dynamic_output_has_to_have_its_other_dimensions() -> None:
    spec = TensorSpec(name="y", datatype="INT64", shape=(-1, 2))
    engine, _ = make(
        lambda words: words[..., None].repeat(1, 1, 3),
        inputs=(WORDS,),
        outputs=(spec,),
        examples=EXAMPLES,
    )
    with pytest.raises(ValueError, match=r"shape \[1, 5, 3\], its bundle says .* \[-1, 2\]"):
        engine.run([{"words": numpy.ones((1, 5), "<i8")}])


# ------------------------------------------------------------------------------ state

H = TensorSpec(name="h", datatype="FP32", shape=(2,))
STEPS = TensorSpec(name="steps", datatype="INT64", shape=())


def running(x: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An exponential sum: what comes out depends on all that came in, and on its order."""
    new = 0.5 * h + x
    return new * (steps + 1)[:, None], new, steps + 1


def stateful(function: Callable[..., Any] = running, **options: Any) -> tuple[TorchEngine, Module]:
    return make(function, state=(H, STEPS), **options)


def alone(values: Sequence[float]) -> list[list[float]]:
    h, outputs = numpy.zeros(2, "f4"), []
    for steps, value in enumerate(values):
        h = numpy.float32(0.5) * h + numpy.array([value, -value], "f4")
        outputs.append((h * (steps + 1)).tolist())
    return outputs


def advance(
    engine: TorchEngine, values: Sequence[float], streams: Sequence[Stream | None]
) -> list[list[float]]:
    y: list[list[float]] = engine.launch([rows(v) for v in values], streams)().outputs["y"].tolist()
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_sequences_that_run_together_are_as_each_alone(device: str, warm: bool) -> None:
    engine, _ = stateful(device=device, max_streams=5)
    if warm:
        engine.warm_up()
    sequences = {slot: [slot + 1, 2.0 * slot, 3, -slot, 4] for slot in (3, 0, 4)}
    streams = {slot: Stream(slot) for slot in sequences}
    got: dict[int, list[list[float]]] = {slot: [] for slot in sequences}
    # In other company and another place each time, with steps of no sequence in between.
    for who in ([3], [0, 3], [4, 0], [3, 4, 0], [0, 3, 4], [4, 0], [3, 4]):
        who = [slot for slot in who if len(got[slot]) < 5]
        assert who
        values: list[float] = [sequences[slot][len(got[slot])] for slot in who]
        given: list[Stream | None] = [streams[slot] for slot in who]
        values.insert(0, 9)
        given.insert(0, None)
        outputs = advance(engine, values, given)
        assert outputs.pop(0) == [9, -9]
        for slot, output in zip(who, outputs, strict=True):
            got[slot].append(output)
    for slot, values in sequences.items():
        assert got[slot] == alone(values)[: len(got[slot])]
        assert len(got[slot]) >= 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_new_sequence_starts_from_zeros_whatever_its_place_holds(device: str) -> None:
    engine, _ = stateful(device=device)
    before, other = Stream(1), Stream(0)
    for value in (5, 6):
        advance(engine, [value, value], [before, other])
    fresh = Stream(1)
    assert fresh.is_fresh
    outputs = advance(engine, [1, 7], [fresh, other])
    assert outputs == [alone([1])[-1], alone([5, 6, 7])[-1]]
    assert not fresh.is_fresh
    assert advance(engine, [2], [fresh]) == [alone([1, 2])[-1]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_without_a_sequence_starts_from_zeros_and_leaves_nothing(device: str) -> None:
    engine, _ = stateful(device=device)
    for _ in range(2):
        assert advance(engine, [3, 4], [None, None]) == [[3, -3], [4, -4]]
    assert engine.run([rows(1, 2), rows(3)]).outputs["y"].tolist() == [[1, -1], [2, -2], [3, -3]]


def wrong_state(x: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x, h[:, :1], steps


def fewer(x: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x, h


def raising(x: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h += 1
    raise RuntimeError("no")


def unfetchable(x: torch.Tensor, h: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.complex(x, x).conj().imag, h + 1, steps + 1


@pytest.mark.parametrize("function", [wrong_state, fewer, raising, unfetchable])
def test_a_step_that_fails_changes_the_state_of_nobody(function: Callable[..., Any]) -> None:
    engine, module = stateful()
    old, fresh = Stream(0), Stream(1)
    advance(engine, [1], [old])
    module.function = function
    with pytest.raises((ValueError, RuntimeError)):
        engine.launch([rows(2), rows(3)], [old, fresh])()
    assert fresh.is_fresh
    module.function = running
    outputs = advance(engine, [2, 3], [old, fresh])
    assert outputs == [alone([1, 2])[-1], alone([3])[-1]]


def test_a_state_other_than_declared_is_named() -> None:
    engine, _ = stateful(wrong_state)
    with pytest.raises(ValueError, match=r"returned 'h' as float32 of shape \[1, 1\]"):
        engine.launch([rows(1)], [Stream(0)])
    engine, _ = stateful(fewer)
    with pytest.raises(ValueError, match="2 outputs, its bundle says 3, 2 of them the new state"):
        engine.launch([rows(1)], [Stream(0)])


def test_places_for_state_are_of_stateful_models_only() -> None:
    engine, _ = stateful(max_streams=7)
    assert engine.max_streams == 7
    assert engine.state_bytes == 8 * (2 * 4 + 8)
    engine, _ = make(lambda x: x, max_streams=7)
    assert (engine.max_streams, engine.state_bytes) == (0, 0)


def test_a_closed_engine_holds_nothing() -> None:
    engine, module = stateful()
    engine.close()
    assert engine.state_bytes == 0
    assert engine._network is not module


# ------------------------------------------------------------------------------ CUDA graphs


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


def wide(device: str, *, max_batch: int = 6) -> TorchEngine:
    return TorchEngine(
        Wide().eval().to(device), info=info(X), device=torch.device(device), max_batch=max_batch
    )


@needs_gpu
def test_a_graph_of_each_bucket_answers_as_the_module() -> None:
    eager, graphs = wide("cuda:0"), wide("cuda:0")
    graphs.warm_up()
    assert graphs.graphs == len(buckets(6))
    assert eager.graphs == 0
    for samples in range(1, 7):
        request = rows(*range(samples))
        expected = eager.run([request]).outputs["y"]
        numpy.testing.assert_allclose(graphs.run([request]).outputs["y"], expected, rtol=1e-6)


@needs_gpu
def test_what_a_graph_cannot_hold_runs_as_the_module() -> None:
    engine, _ = make(lambda x: x if x.sum().item() > 0 else -x, device="cuda:0")
    engine.warm_up()
    assert engine.graphs == 0
    assert engine.run([rows(-2)]).outputs["y"].tolist() == [[-2, 2]]


@pytest.mark.parametrize("device", DEVICES)
def test_two_batches_launched_before_the_first_is_fetched_keep_apart(device: str) -> None:
    engine, reference = wide(device), wide("cpu")
    engine.warm_up()
    requests = [rows(1, 2, 3), rows(4), rows(5, 6)]
    expected = [reference.run([request]).outputs["y"] for request in requests]
    no = [None]
    first = engine.launch([requests[0]], no)
    second = engine.launch([requests[1]], no)
    got = [first().outputs["y"]]
    third = engine.launch([requests[2]], no)
    got += [second().outputs["y"], third().outputs["y"]]
    for mine, wanted in zip(got, expected, strict=True):
        numpy.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_a_sequence_launched_behind_one_another_see_each_other(device: str) -> None:
    engine, _ = stateful(device=device)
    engine.warm_up()
    stream, other = Stream(0), Stream(1)
    launched = [engine.launch([rows(value), rows(10 * value)], [stream, other]) for value in (1, 2)]
    assert [result().outputs["y"].tolist() for result in launched] == [
        [alone([1])[-1], alone([10])[-1]],
        [alone([1, 2])[-1], alone([10, 20])[-1]],
    ]


@needs_gpu
def test_outputs_of_a_gpu_are_contiguous_so_that_they_can_be_fed_back() -> None:
    square = TensorSpec(name="x", datatype="FP32", shape=(2, 2))
    engine, _ = make(
        lambda x: x.transpose(1, 2), device="cuda:0", inputs=(square,), outputs=(square,)
    )
    x = numpy.arange(8, dtype="<f4").reshape(2, 2, 2)
    once = engine.run([{"x": x}]).outputs["x"]
    assert once.flags.c_contiguous
    assert numpy.array_equal(engine.run([{"x": once[:1]}, {"x": once[1:]}]).outputs["x"], x)


# ------------------------------------------------------------------------------ precision


def rounded(function: Callable[..., Any], outputs: tuple[TensorSpec, ...] = (Y,)) -> TorchEngine:
    told = ModelInfo(name="m", version="1", inputs=(X,), outputs=outputs)
    device = torch.device("cpu")
    network = _Rounded(Module(function), told, device)
    return TorchEngine(network, info=told, device=device, max_batch=6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), "returned 2 outputs, its bundle says 1"),
        (lambda x: x.double(), "'y' as float64"),
    ],
)
def test_rounding_hides_no_output_other_than_declared(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rounded(function).run([rows(1)])


def test_rounding_does_not_make_integers_of_numbers() -> None:
    whole = TensorSpec(name="y", datatype="INT64", shape=(2,))
    with pytest.raises(ValueError, match="'y' as float32"):
        rounded(lambda x: x * 1.5, outputs=(whole,)).run([rows(1)])


# ------------------------------------------------------------------------------ whole bundles

FACTORY = """
import torch

class Recurrent(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.cell = torch.nn.GRUCell(2, size)
        self.head = torch.nn.Linear(size, 2)

    def forward(self, x, h):
        new = self.cell(x, h)
        return self.head(new), new
"""

HIDDEN = TensorSpec(name="h", datatype="FP32", shape=(4,))


@pytest.fixture
def recurrent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.nn.Module]:
    """The bundle of a small recurrent network, and the network."""
    (tmp_path / "recurrent_network.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "recurrent_network", raising=False)
    import recurrent_network  # type: ignore[import-not-found]

    torch.manual_seed(0)
    network: torch.nn.Module = recurrent_network.Recurrent(4).eval()
    x = numpy.random.default_rng(0).random((8, 2), "f4")
    with torch.inference_mode():
        y = network(torch.from_numpy(x), torch.zeros(8, 4))[0].numpy()
    path = bundle.write(
        directory=tmp_path,
        name="recurrent",
        architecture=bundle.Architecture(name="recurrent_network:Recurrent", arguments={"size": 4}),
        inputs=(X,),
        outputs=(Y,),
        state=(HIDDEN,),
        labels=(),
        state_dict=network.state_dict(),
        samples={"x": x, "expected.y": y},
    )
    return path, network


def opened(path: Path, device: str = "cpu", **options: Any) -> TorchEngine:
    return open_bundle(
        path,
        device=torch.device(device),
        max_batch=4,
        max_streams=2,
        factories=("recurrent_network",),
        **options,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_stateful_bundle_answers_as_its_network(
    recurrent: tuple[Path, torch.nn.Module], device: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, network = recurrent
    with caplog.at_level("INFO"):
        engine = opened(path, device)
    assert engine.model.version == path.name
    assert engine.model.digest == bundle.digest(path)
    assert engine.max_streams == 2
    streams = [Stream(0), Stream(1)]
    h = torch.zeros(2, 4)
    for values in ([1.0, 2.0], [3.0, -1.0], [0.5, 0.25]):
        requests = [rows(value) for value in values]
        got = engine.launch(requests, streams)().outputs["y"]
        with torch.inference_mode():
            y, h = network(torch.from_numpy(numpy.concatenate([r["x"] for r in requests])), h)
        numpy.testing.assert_allclose(got, y.numpy(), rtol=1e-4, atol=1e-5)
    told = fields_of(caplog, "model_loaded")
    assert told["forward"] == ("traced" if device == "cpu" else "graphs")
    assert told["precision"] == FP32
    assert told["max_abs_diff"] < 1e-3
    assert told["state_bytes"] == 3 * 4 * 4


class Elman(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = torch.nn.Linear(2 + 4, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.relu(self.step(torch.cat((x, h), 1)))
        return self.head(new), new


def test_sequences_keep_their_state_in_batches_that_are_padded_to_a_fused_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Elman().eval()
    told = ModelInfo(name="m", version="1", inputs=(X,), outputs=(Y,), state=(HIDDEN,))
    forms = fusion.traced(network, told, max_batch=4)
    assert forms is not None
    monkeypatch.setattr("gpu_service.engine.padded", lambda plain, fused: {1: 4, 2: 4, 3: 4, 4: 4})
    engine = TorchEngine(
        forms[0],
        info=told,
        device=torch.device("cpu"),
        max_batch=4,
        max_streams=2,
        fusion=forms[1],
        max_fused=24,
    )
    engine.warm_up()
    assert engine.fused == [4]
    streams, h = [Stream(0), Stream(1)], torch.zeros(2, 4)
    for values in ([1.0, 2.0], [3.0], [-1.0, 0.5], [0.25, 4.0]):
        requests = [rows(value) for value in values]
        got = engine.launch(requests, streams[: len(values)])().outputs["y"]
        with torch.inference_mode():
            x = torch.from_numpy(numpy.concatenate([r["x"] for r in requests]))
            y, h[: len(values)] = network(x, h[: len(values)])
        numpy.testing.assert_allclose(got, y.numpy(), rtol=1e-4, atol=1e-5)


def test_bfloat16_changes_the_answers_a_little_and_says_how_much(
    recurrent: tuple[Path, torch.nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = recurrent
    exact = opened(path)
    with caplog.at_level("INFO"):
        coarse = opened(path, precision=BF16)
    request = [rows(0.3, 0.7)]
    one, other = exact.run(request).outputs["y"], coarse.run(request).outputs["y"]
    assert other.dtype == numpy.dtype("<f4")
    assert not numpy.array_equal(one, other)
    numpy.testing.assert_allclose(one, other, atol=0.05)
    told = fields_of(caplog, "model_loaded")
    assert told["precision"] == BF16
    assert 0 < told["max_abs_diff"] < 0.05


def fields_of(caplog: pytest.LogCaptureFixture, event: str) -> dict[str, Any]:
    (record,) = [record for record in caplog.records if record.getMessage() == event]
    told: dict[str, Any] = json.loads(JsonFormatter().format(record))
    return told
