"""A model on its device: copies requests in, runs them as one batch, copies the outputs out.

Owns the device's buffers, the weights and the state of sequences. `open_bundle` runs on whatever
thread loads models; once an engine serves, the inference thread alone calls it (see `dispatch`).
Of a worker that serves, only this module, `fusion` and the networks in `models/` import torch.
"""

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy
import torch
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, fusion, golden, logs, models
from gpu_service.bundle import TensorSpec
from gpu_service.device import BatchOutput, StartupError, Stream, Tensors
from gpu_service.fusion import Form, Fusion, as_tuple, assert_close
from gpu_service.signature import DYNAMIC, ModelInfo, shape_fits

K = TypeVar("K")

# A batch of inputs up to this size is copied in one go, with the GIL held for some 100 µs at most.
_JOINED_BYTES = 1 << 20

# How often the warm-up measures all sizes of batch. Fewer where that takes long.
_TIMED_TURNS = 9
_TIMED_S = 3.0

# How long the warm-up may take for the sizes between those, each of which it runs once.
_BETWEEN_S = 1.0

# What a batch costs beside its run: to be taken, handed over and waited for. Without it, the
# choice of a good size would be between a large batch and twice the hand-overs for nothing.
_HAND_OVER_S = 0.0002

# The event loop itself runs a batch that takes less: handing it to a thread and back takes 0.05 to
# 0.1 ms. What arrives meanwhile waits for the device in any case.
_QUICK_S = 0.001

# How long the warm-up may make fused forms, and the share of a batch's time that one may take at
# most, for it has weights of its own.
_FUSING_S = 3.0
_WORTH_FUSING = 0.95

# How much longer a sample may take in a batch that is called good. More is lost when all that
# clients have sent is in one batch, and the device waits until all of it has been answered: with
# 16 to 48 clients, batches of 16 that take 1.25 times as long a sample give 1.0 to 1.16 times the
# answers of larger ones (2026-11-30, the example model). Where more wait, batches are larger.
_GOOD_ENOUGH = 1.3

# On a GPU one batch runs while the next one is copied, so each needs host buffers of its own.
_UNDER_WAY = 2

_MOST_SLICES = 1024

FP32, TF32, BF16 = "fp32", "tf32", "bf16"

# TF32 keeps 10 bits of a number, bfloat16 7; layer by layer the rounding adds up to some percent
# of the largest value. What is farther off is not rounding.
_ROUNDED = {"max_abs_diff": 0.05, "classes_may_differ": 0.02}
_TOLERANCE: dict[str, dict[str, float]] = {FP32: {}, TF32: _ROUNDED, BF16: _ROUNDED}


class _Host:
    """Host memory that the inputs of a whole batch are written to; pinned where there is a GPU."""

    def __init__(self, specs: Sequence[TensorSpec], *, rows: int, pinned: bool) -> None:
        self.read: torch.cuda.Event | None = None  # the GPU has read what was last written
        self.tensors = [
            torch.zeros((rows, *spec.shape), dtype=_torch_dtype(spec), pin_memory=pinned)
            for spec in specs
        ]
        # The same memory again, to be written without torch's overhead for each request.
        self.arrays = [tensor.numpy() for tensor in self.tensors]
        self._views = [array.reshape(-1).view("u1").data for array in self.arrays]
        self._row_bytes = [array[0].nbytes for array in self.arrays]
        self._first: dict[int, list[torch.Tensor]] = {}

    def fill(self, number: int, arrays: Sequence[NDArray[Any]], samples: int) -> None:
        """Write `arrays` [k, …], of so many samples together, into buffer `number`."""
        if samples * self._row_bytes[number] > _JOINED_BYTES:
            numpy.concatenate(arrays, out=self.arrays[number][:samples])
            return
        # numpy gives the GIL away around each copy, and each time the event loop has it next:
        # many small arrays would wait for it more than they take to be copied.
        joined = b"".join(cast(Sequence[bytes], arrays))
        self._views[number][: len(joined)] = joined

    def clear(self, start: int, end: int) -> None:
        """Zeros in those rows of each buffer: what an earlier batch failed at is not run again."""
        for array in self.arrays:
            array[start:end] = 0

    def first(self, rows: int) -> list[torch.Tensor]:
        """The first `rows` of each buffer.

        Kept, because each operation of torch gives the GIL away, and the event loop has it next.
        """
        found = self._first.get(rows)
        if found is None:
            if len(self._first) >= _MOST_SLICES:
                self._first.clear()
            found = self._first[rows] = [tensor[:rows] for tensor in self.tensors]
        return found


class _Graph:
    """A CUDA graph of one size of batch: replayed, the GPU needs no word of Python's."""

    def __init__(
        self,
        network: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        *,
        stream: torch.cuda.Stream,
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Thread-local, because another model may serve meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._results = as_tuple(network(*inputs))

    def replay(self) -> tuple[torch.Tensor, ...]:
        """Run it on its inputs' memory; the next replay overwrites the results."""
        self._graph.replay()
        return self._results


class _Fetched:
    """What waits for nothing any more."""

    __slots__ = ("_output",)

    def __init__(self, output: BatchOutput) -> None:
        self._output = output

    def __call__(self) -> BatchOutput:
        return self._output


class TorchEngine:
    """Runs `network`, called as what `models.load_model` returns, which is on `device`, in batches
    of up to `max_batch` samples.

    `fusion` makes forms of the same network for single sizes of batch, of which the warm-up keeps
    up to `max_fused` that it finds faster; smaller batches are padded to them.
    `max_streams` sequences may hold state, in rows of tensors on the device: one gather before
    a batch, one scatter after it. `examples` are inputs [n, …] by name, needed for a model with
    dynamic dimensions, whose warm-up takes their sizes. An `Engine`.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        info: ModelInfo,
        device: torch.device,
        max_batch: int,
        max_streams: int = 0,
        examples: Tensors | None = None,
        fusion: Fusion | None = None,
        max_fused: int = 0,
    ) -> None:
        self._network = network
        self._fusion = fusion
        self._max_fused = max_fused
        self._fused: dict[int, Form] = {}
        self._padded: Mapping[int, int] = {}  # to one of those sizes
        # Made once: each costs as much as an operation of torch. Nothing here runs twice at a time.
        self._inference = torch.inference_mode()
        self._input_names = [spec.name for spec in info.inputs]
        self._output_names = [spec.name for spec in info.outputs]
        self._info = info
        self._device = device
        self._max_batch = max_batch
        self._examples = examples or {}
        self._good_batch = max_batch
        self._best_batch = max_batch
        self._quick_batch = 0
        self._cuda = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._graphs: dict[int, _Graph] = {}
        self._hosts: list[_Host] = []
        self._on_device: list[torch.Tensor] = []
        if not _is_dynamic(info):
            self._make_buffers()
        self._max_streams = max_streams if info.state else 0
        # The last row is for steps that belong to no sequence.
        self._state = _zeros(info.state, self._max_streams + 1, device)
        self._state_in = _zeros(info.state, max_batch if self._cuda else 0, device)

    @property
    def model(self) -> ModelInfo:
        """What the model takes and returns."""
        return self._info

    @property
    def description(self) -> Mapping[str, str]:
        """The device, and what runs on it."""
        name = torch.cuda.get_device_name(self._device) if self._cuda else ""
        return {
            "device": str(self._device),
            "device_name": name,
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
        }

    @property
    def good_batch(self) -> int:
        """Samples beyond which larger batches gained little in the warm-up."""
        return self._good_batch

    @property
    def best_batch(self) -> int:
        """Samples of the batch that was the fastest a sample in the warm-up."""
        return self._best_batch

    @property
    def sizes(self) -> Sequence[int]:
        """The buckets of a GPU; on a CPU, all but those that are padded to a fused form's."""
        if self._has_buckets:
            return buckets(self._max_batch)
        every = range(1, self._max_batch + 1) if self._padded else ()
        return [size for size in every if self._padded.get(size, size) == size]

    @property
    def quick_batch(self) -> int:
        """Samples of the largest batch that the event loop may run itself."""
        return self._quick_batch

    @property
    def max_streams(self) -> int:
        """How many sequences may hold state at once."""
        return self._max_streams

    @property
    def overlaps(self) -> bool:
        """On a GPU, whose batches run while the next one is copied."""
        return self._cuda is not None

    @property
    def state_bytes(self) -> int:
        """Device memory for the state of sequences, used or not."""
        return sum(state.nbytes for state in self._state)

    @property
    def _has_buckets(self) -> bool:
        return self._cuda is not None and bool(self._hosts)

    @property
    def fused(self) -> Sequence[int]:
        """The sizes of batch that there are fused forms of."""
        return sorted(self._fused)

    @property
    def graphs(self) -> int:
        """How many sizes of batch run as CUDA graphs."""
        return len(self._graphs)

    def check(self) -> None:
        """Run one sample; raises if the device fails."""
        self.run([self._example(1)])

    def close(self) -> None:
        """Give the memory back."""
        self._graphs.clear()
        self._fused.clear()
        self._padded = {}
        self._network = torch.nn.Identity()
        self._fusion = None
        for buffers in (self._state, self._state_in, self._on_device, self._hosts):
            buffers.clear()
        if self._cuda is not None:
            torch.cuda.empty_cache()

    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        """Inputs [k, …] by name for each request → outputs [n, …], n being the sum of all k."""
        return self.launch(requests, [None] * len(requests))()

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        """Begin a batch; what is returned waits for its outputs.

        Inputs have the declared dtypes and shapes, and are contiguous; dynamic dimensions are
        the same in all requests. Raises whatever the model raises, and ValueError for outputs
        that are not as declared.
        """
        if self._cuda is None:
            with self._inference:
                return self._begin(requests, streams)
        with self._inference, torch.cuda.stream(self._cuda):
            return self._begin(requests, streams)

    def _begin(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        started = time.perf_counter()
        first = self._input_names[0]
        counts = [len(inputs[first]) for inputs in requests]
        samples = sum(counts)
        batch = self._inputs(requests, samples)
        size = batch[0].shape[0]
        rows = self._rows(streams, counts, size) if self._state else None
        copied = self._mark()
        results = self._forward(batch, rows, size)
        outputs = results[: len(self._output_names)]
        if size != samples:
            outputs = tuple([tensor[:samples] for tensor in outputs])
        _check(outputs, self._info.outputs, samples)
        inferred = self._mark()
        fetch: Callable[[], BatchOutput]
        if self._cuda is None:
            fetch = _Fetched(self._copied(outputs, started, copied, inferred))
        else:
            fetch = self._fetch(outputs, started, copied, inferred)
        if rows is not None:  # last: what fails before it changes no state
            self._keep(results[len(outputs) :], rows, streams)
        return fetch

    def warm_up(self) -> None:
        """Run each size, so that no client waits for kernels to be chosen or loaded.

        On a GPU each bucket becomes a CUDA graph, where the model allows it; on a CPU some sizes
        get fused forms. What a batch takes tells which of those pay and which size is good enough.
        """
        sizes = buckets(self._max_batch)
        first = {size: self.run([self._example(size)]).infer_s for size in reversed(sizes)}
        if self._has_buckets:
            self._capture()
        self._fuse(first)
        plain, fused = self._timed(sizes)
        self._padded = padded(plain, fused)
        for size in fused.keys() - set(self._padded.values()):
            del self._fused[size]  # with its copy of the weights
        seconds = {
            size: fused[self._padded[size]] if size in self._padded else plain[size]
            for size in sorted({*sizes, *self._fused})
        }
        self._choose({size: duration_s + _HAND_OVER_S for size, duration_s in seconds.items()})
        if self._may_be_quick():
            self._quick_batch = quick_batch(seconds)
        if not self._has_buckets:
            # oneDNN makes code for each size that comes first, which takes up to three times as
            # long as the batch, and keeps it.
            for size in between(first, _BETWEEN_S, without=self._padded):
                self.run([self._example(size)])

    def _choose(self, seconds: Mapping[int, float]) -> None:
        """Sizes of batch to aim at, by what one takes altogether."""
        self._good_batch = good_batch(seconds)
        self._best_batch = min(seconds, key=lambda size: seconds[size] / size)

    def _fuse(self, first: Mapping[int, float]) -> None:
        """Make fused forms, of the most useful sizes if there is no time for all.

        `first` has the seconds of a first run by size.
        """
        if self._fusion is None:
            return
        most = min(self._fusion.most, self._max_fused)
        started = time.perf_counter()
        for size in affordable(fusion.fused_sizes(self._max_batch), first, _FUSING_S)[:most]:
            form = self._fusion.form(size)
            if form is None or time.perf_counter() - started > _FUSING_S:
                break
            self._fused[size] = form
        self._fusion = None  # and with it the module

    def _may_be_quick(self) -> bool:
        """Not on a GPU, which is waited for; nor with threads of torch's, of which a second caller
        would have a second team; nor with sizes that only the requests know.
        """
        return self._cuda is None and torch.get_num_threads() == 1 and not _is_dynamic(self._info)

    def _timed(self, sizes: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of a batch by size, of the network as it is and of its fused forms."""
        forms = self._fused
        turns: list[dict[tuple[bool, int], float]] = []
        started = time.perf_counter()
        while len(turns) < _TIMED_TURNS and time.perf_counter() - started < _TIMED_S:
            turn: dict[tuple[bool, int], float] = {}
            for self._fused in [{}, forms] if forms else [{}]:
                for size in sorted(self._fused or sizes, reverse=True):
                    turn[bool(self._fused), size] = self._seconds(size)
            turns.append(turn)
        self._fused = forms
        seconds = typical(turns)
        plain, fused = (
            {size: duration_s for (of, size), duration_s in seconds.items() if of is is_fused}
            for is_fused in (False, True)
        )
        return plain, fused

    def _seconds(self, size: int) -> float:
        """Of a batch of that size; of one sample the second run, which an idle worker's client
        sees: the first one after another form measures the processor's caches.
        """
        example = [self._example(size)]
        duration_s = self.run(example).infer_s
        return duration_s if size > 1 else self.run(example).infer_s

    def outputs_of(self, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Outputs [n, …] by name for inputs [n, …] by name, n of any size."""
        total = len(next(iter(inputs.values())))
        parts = [
            self.run([{name: array[at : at + self._max_batch] for name, array in inputs.items()}])
            for at in range(0, total, self._max_batch)
        ]
        return {
            spec.name: numpy.concatenate([part.outputs[spec.name] for part in parts])
            for spec in self._info.outputs
        }

    def self_test(self, samples: Tensors, *, precision: str = FP32) -> golden.Comparison:
        """Compare the model with its bundle's samples.

        Raises StartupError if it answers differently from when it was trained, by more than
        `precision` explains.
        """
        outputs = self.outputs_of(golden.inputs_of(samples))
        comparison = golden.compare(outputs, samples, **_TOLERANCE[precision])
        if comparison.problem:
            raise StartupError(
                f"self-test of model {self._info.name} {self._info.version} on {self._device}: "
                f"{comparison.problem}. It does not answer as it did when it was trained: "
                "check the torch version and the device, or train it anew"
                + ("" if precision == FP32 else f"; or precision {precision} is too coarse for it")
            )
        return comparison

    # ------------------------------------------------------------------ into the device

    def _make_buffers(self) -> None:
        on_gpu = self._cuda is not None
        self._hosts = [
            _Host(self._info.inputs, rows=self._max_batch, pinned=on_gpu)
            for _ in range(_UNDER_WAY if on_gpu else 1)
        ]
        self._on_device = self._hosts[0].tensors
        if on_gpu:
            self._on_device = _zeros(self._info.inputs, self._max_batch, self._device)

    def _inputs(self, requests: Sequence[Tensors], samples: int) -> list[torch.Tensor]:
        """The batch on the device, in the order of the model's inputs; a bucket on a GPU."""
        by_input = [[inputs[name] for inputs in requests] for name in self._input_names]
        if not self._hosts:
            joined = [numpy.concatenate(arrays) for arrays in by_input]
            return [torch.from_numpy(array).to(self._device) for array in joined]
        self._hosts.append(host := self._hosts.pop(0))
        if host.read is not None:
            host.read.synchronize()
        for number, arrays in enumerate(by_input):
            host.fill(number, arrays, samples)
        if self._cuda is None:
            # The time of a batch grows with its size on a CPU: padded only where that pays.
            size = self._padded.get(samples, samples)
            if size != samples:
                host.clear(samples, size)
            return host.first(size)
        size = next(size for size in buckets(self._max_batch) if size >= samples)
        batch = [
            device[:size].copy_(tensor[:size], non_blocking=True)
            for tensor, device in zip(host.tensors, self._on_device, strict=True)
        ]
        host.read = cast(torch.cuda.Event, self._cuda.record_event())
        return batch

    def _rows(
        self, streams: Sequence[Stream | None], counts: Sequence[int], size: int
    ) -> torch.Tensor:
        """Which row of the state is whose, in the order of the batch, [size] int64.

        The rows of sequences without a step yet are zeros after this.
        """
        scratch = self._max_streams
        rows = [
            scratch if stream is None else stream.slot
            for stream, count in zip(streams, counts, strict=True)
            for _ in range(count)
        ]
        rows += [scratch] * (size - len(rows))
        fresh = [stream.slot for stream in streams if stream is not None and stream.is_fresh]
        if scratch in rows:
            fresh.append(scratch)
        if fresh:
            index = self._index(fresh)
            for state in self._state:
                state.index_fill_(0, index, 0)
        return self._index(rows)

    def _index(self, rows: Sequence[int]) -> torch.Tensor:
        index = torch.tensor(rows)
        if self._cuda is None:
            return index
        # Pinned, or the copy would wait for the batch that runs.
        return index.pin_memory().to(self._device, non_blocking=True)

    def _forward(
        self, batch: Sequence[torch.Tensor], rows: torch.Tensor | None, size: int
    ) -> tuple[torch.Tensor, ...]:
        graph = self._graphs.get(size)
        states: list[torch.Tensor] = []
        if rows is not None and graph is not None:
            for state, buffer in zip(self._state, self._state_in, strict=True):
                torch.index_select(state, 0, rows, out=buffer[:size])
        elif rows is not None:
            states = [state.index_select(0, rows) for state in self._state]
        form = self._fused.get(size)
        results = graph.replay() if graph else form(*batch, *states) if form else None
        if results is None:
            results = as_tuple(self._network(*batch, *states))
        expected = len(self._output_names) + len(self._state)
        if len(results) != expected:
            raise ValueError(
                f"the model returned {len(results)} outputs, its bundle says {expected}"
                + (f", {len(self._state)} of them the new state" if self._state else "")
            )
        return results

    def _keep(
        self, new: Sequence[torch.Tensor], rows: torch.Tensor, streams: Sequence[Stream | None]
    ) -> None:
        """The new state, of all sequences or, if anything is wrong with it, of none."""
        _check(new, self._info.state, len(rows))
        for state, tensor in zip(self._state, new, strict=True):
            state.index_copy_(0, rows, tensor)
        for stream in streams:
            if stream is not None:
                stream.is_fresh = False

    # ------------------------------------------------------------------ out of the device

    def _mark(self) -> "float | torch.cuda.Event":
        """This point in the device's time."""
        if self._cuda is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._cuda)
        return event

    def _copied(
        self, outputs: Sequence[torch.Tensor], started: float, copied: Any, inferred: Any
    ) -> BatchOutput:
        """The outputs of a CPU. Copies in any case: a model may return its input, which the next
        batch overwrites.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for name, tensor in zip(self._output_names, outputs, strict=True):
            arrays[name] = _copied(tensor.numpy())
        return BatchOutput(
            outputs=arrays,
            input_s=copied - started,
            infer_s=inferred - copied,
            output_s=time.perf_counter() - inferred,
        )

    def _fetch(
        self, outputs: Sequence[torch.Tensor], started: float, copied: Any, inferred: Any
    ) -> Callable[[], BatchOutput]:
        """Begin to copy the outputs from a GPU; what is returned waits for them."""
        names = self._output_names
        # Not blocking, so into pinned memory, which torch keeps and gives out again.
        tensors = [tensor.contiguous().to("cpu", non_blocking=True) for tensor in outputs]
        fetched: Any = self._mark()
        input_s = time.perf_counter() - started

        def result() -> BatchOutput:
            fetched.synchronize()
            return BatchOutput(
                outputs={name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)},
                input_s=input_s,
                infer_s=copied.elapsed_time(inferred) / 1e3,
                output_s=inferred.elapsed_time(fetched) / 1e3,
            )

        return result

    # ------------------------------------------------------------------ before it serves

    def _example(self, samples: int) -> dict[str, NDArray[Any]]:
        if not _is_dynamic(self._info):
            return {
                spec.name: numpy.zeros((samples, *spec.shape), datatypes.NUMPY[spec.datatype])
                for spec in self._info.inputs
            }
        return {
            spec.name: numpy.repeat(self._examples[spec.name][:1], samples, axis=0)
            for spec in self._info.inputs
        }

    @torch.inference_mode()
    def _capture(self) -> None:
        """Make a graph of each bucket, and see that it answers as the module does."""
        assert self._cuda is not None
        try:
            for size in reversed(buckets(self._max_batch)):
                inputs = [tensor[:size] for tensor in (*self._on_device, *self._state_in)]
                with torch.cuda.stream(self._cuda):
                    for tensor in inputs:
                        if tensor.is_floating_point():
                            tensor.uniform_()
                    expected = [each.clone() for each in as_tuple(self._network(*inputs))]
                graph = _Graph(self._network, inputs, stream=self._cuda)
                with torch.cuda.stream(self._cuda):
                    assert_close(graph.replay(), tuple(expected))
                self._graphs[size] = graph
        except Exception as error:
            self._graphs.clear()
            logs.info("no_cuda_graphs", reason=f"{type(error).__name__}: {error}"[:300])


def open_bundle(
    path: Path,
    *,
    device: torch.device,
    max_batch: int,
    max_streams: int = 0,
    max_fused: int = 0,
    precision: str = FP32,
    factories: Sequence[str] = (),
) -> TorchEngine:
    """The engine of the bundle in `path`: verified, loaded, warmed up and tested.

    `configure` comes first. Raises bundle.BundleError, or StartupError for a model that fails
    its self-test.
    """
    network = models.load_model(path, factories=tuple(factories)).to(device)
    info = ModelInfo.of(bundle.read_manifest(path), digest=bundle.digest(path))
    samples = bundle.load_samples(path)
    if precision == BF16:
        network = _Rounded(network, info, device)
    forms = None
    if device.type == "cpu" and not _is_dynamic(info):
        forms = fusion.traced(network, info, max_batch=max_batch)
    engine = TorchEngine(
        network if forms is None else forms[0],
        info=info,
        device=device,
        max_batch=max_batch,
        max_streams=max_streams,
        examples=golden.inputs_of(samples),
        fusion=None if forms is None else forms[1],
        max_fused=max_fused,
    )
    engine.warm_up()
    comparison = engine.self_test(samples, precision=precision)
    logs.info(
        "model_loaded",
        model=info.name,
        version=info.version,
        digest=info.digest,
        precision=precision,
        max_abs_diff=comparison.max_abs_diff,
        classes_differ=comparison.classes_differ,
        samples=len(next(iter(samples.values()))),
        forward="traced" if forms is not None else "graphs" if engine.graphs else "module",
        fused=engine.fused,
        good_batch=engine.good_batch,
        quick_batch=engine.quick_batch,
        best_batch=engine.best_batch,
        state_bytes=engine.state_bytes,
        **engine.description,
    )
    return engine


def configure(*, threads: int, precision: str = FP32) -> None:
    """Settings of torch that hold for the whole process.

    `threads` is the number of CPU threads; 0 stands for one per core that this process may use,
    but one, which the event loop needs: a batch waits for the slowest of its threads.
    """
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) - 1))
    # Convolutions on a GPU would use TF32 by default, and answer differently from the third
    # digit on: https://docs.pytorch.org/docs/stable/notes/cuda.html#tf32-on-ampere
    torch.backends.cudnn.allow_tf32 = precision == TF32
    torch.backends.cuda.matmul.allow_tf32 = precision == TF32


class _Rounded(torch.nn.Module):
    """The same network in bfloat16 where that is safe, with the outputs that were declared."""

    def __init__(self, network: torch.nn.Module, info: ModelInfo, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self._type = device.type
        self._dtypes = [_torch_dtype(spec) for spec in (*info.outputs, *info.state)]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As the network's."""
        # The cache of rounded weights would be dropped at each exit, and can't be traced.
        with torch.autocast(self._type, dtype=torch.bfloat16, cache_enabled=False):
            results = as_tuple(self.network(*inputs))
        return tuple(
            tensor.to(dtype) if tensor.dtype is torch.bfloat16 and dtype is not None else tensor
            for tensor, dtype in itertools.zip_longest(results, self._dtypes[: len(results)])
        )


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda:N` as a device of this host; StartupError if it has no such."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda:0" if count else "cpu")
    chosen = torch.device("cuda:0" if device == "cuda" else device)
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise StartupError(
            f"device {device}: torch {torch.__version__} finds {count} GPUs here; "
            "check `nvidia-smi`, whether this is the CPU build of torch, or choose `--device cpu`"
        )
    return chosen


def buckets(max_batch: int) -> list[int]:
    """The batch sizes of a GPU, which likes few fixed ones: powers of two, and the last."""
    sizes = [1 << power for power in range(max_batch.bit_length())]
    return sizes if sizes[-1] == max_batch else [*sizes, max_batch]


def typical(turns: Sequence[Mapping[K, float]]) -> dict[K, float]:
    """Seconds of each, of several turns in which each took so many.

    By their shares of a turn, which are the same on a machine that is slower for a while, or one
    such while would decide; and as in the quickest turn.
    """
    totals = [sum(turn.values()) for turn in turns]
    of_turns = [
        {key: seconds / total for key, seconds in turn.items()}
        for turn, total in zip(turns, totals, strict=True)
    ]
    return {
        key: statistics.median([shares[key] for shares in of_turns]) * min(totals)
        for key in turns[0]
    }


def padded(plain: Mapping[int, float], fused: Mapping[int, float]) -> dict[int, int]:
    """By its own size, to which size a batch is padded: the next one that has a fused form, if
    that takes less than the network as it is for the batch without padding.

    Seconds of a run by size, `plain` of the network as it is. In between, time is in proportion.
    """
    found: dict[int, int] = {}
    for smaller, size in itertools.pairwise([0, *sorted(fused)]):
        every = range(smaller + 1, size + 1)
        for samples, duration_s in zip(every, _interpolated(plain, every), strict=True):
            if fused[size] <= duration_s * _WORTH_FUSING:
                found[samples] = size
    return found


def affordable(sizes: Sequence[int], first: Mapping[int, float], limit_s: float) -> list[int]:
    """Those of `sizes` of which a fused form is made in `limit_s`, by what first runs took."""
    runs = zip(sizes, _interpolated(first, sizes), strict=True)
    return [size for size, duration_s in runs if fusion.RUNS * duration_s <= limit_s]


def _interpolated(seconds: Mapping[int, float], sizes: Sequence[int]) -> list[float]:
    measured = sorted(seconds)
    found: list[float] = numpy.interp(sizes, measured, [seconds[n] for n in measured]).tolist()
    return found


def good_batch(seconds: Mapping[int, float]) -> int:
    """The smallest size of a batch whose samples take hardly longer than in any other.

    `seconds` of one run by size. Where time grows with size, as on a CPU, two small batches are
    better than a large one: the first is answered while the second one runs.
    """
    best = min(duration / size for size, duration in seconds.items())
    return min(size for size, duration in seconds.items() if duration / size <= best * _GOOD_ENOUGH)


def quick_batch(seconds: Mapping[int, float]) -> int:
    """The size up to which batches are quick; 0 for none. Seconds of a run by size."""
    found = 0
    for size in sorted(seconds):
        if seconds[size] > _QUICK_S:
            break
        found = size
    return found


def between(
    seconds: Mapping[int, float], limit_s: float, *, without: Container[int] = ()
) -> list[int]:
    """The sizes of batch between those in `seconds`, as many as can be run once in `limit_s`.

    `seconds` of a first run by size. The smallest ones, which clients meet most; the largest of
    them first, or each of the others would find all memory that was freed before too small for it.
    """
    found: list[int] = []
    measured = sorted(seconds)
    for lower, upper in itertools.pairwise(measured):
        for size in range(lower + 1, upper):
            if size in without:
                continue
            limit_s -= seconds[upper]
            if limit_s < 0:
                return found[::-1]
            found.append(size)
    return found[::-1]


def _check(tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec], samples: int) -> None:
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.dtype is _torch_dtype(spec) and tensor.shape == (samples, *spec.shape):
            continue  # as most are; what follows also knows dynamic dimensions
        shape = tuple(tensor.shape)
        if (
            tensor.dtype != _torch_dtype(spec)
            or shape[:1] != (samples,)
            or not shape_fits(shape[1:], spec.shape)
        ):
            raise ValueError(
                f"the model returned {spec.name!r} as {str(tensor.dtype).removeprefix('torch.')} "
                f"of shape {list(shape)}, its bundle says {spec.datatype} of {list(spec.shape)} "
                f"a sample, for {samples} samples"
            )


def _copied(array: NDArray[Any]) -> NDArray[Any]:
    """A copy, with the GIL held unless it is a large one; see `_Host.fill`."""
    if array.nbytes > _JOINED_BYTES:
        return array.copy()
    return numpy.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def _is_dynamic(info: ModelInfo) -> bool:
    return any(DYNAMIC in spec.shape for spec in info.inputs)


@functools.cache
def _dtype_of(datatype: str) -> torch.dtype:
    return torch.from_numpy(numpy.empty(0, datatypes.NUMPY[datatype])).dtype


def _torch_dtype(spec: TensorSpec) -> torch.dtype:
    return _dtype_of(spec.datatype)


def _zeros(specs: Sequence[TensorSpec], rows: int, device: torch.device) -> list[torch.Tensor]:
    return [
        torch.zeros((rows, *spec.shape), dtype=_torch_dtype(spec), device=device) for spec in specs
    ]
