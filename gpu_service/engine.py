"""A model on its device: copies requests in, runs them as one batch, copies the outputs out.

Owns the device, its static buffers and the weights. Everything here runs on the inference
thread (see `dispatch`). The only module of the service that imports torch.
"""

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, golden, logs, models
from gpu_service.dispatch import BatchOutput, StartupError, Tensors
from gpu_service.signature import ModelInfo

# A batch of inputs up to this size is copied in one go, with the GIL held for some 100 µs at most.
_JOINED_BYTES = 1 << 20

# Of each size of batch in the warm-up; the fastest one counts.
_TIMED_RUNS = 3

# How much longer a sample may take in a batch that is called good.
_GOOD_ENOUGH = 1.1


class TorchEngine:
    """Runs `model`, as `models.load_model` returns it, in batches of up to `max_batch` samples.

    Inputs are copied once, into static host buffers (pinned where there is a GPU).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        info: ModelInfo,
        device: torch.device,
        max_batch: int,
    ) -> None:
        self._network = model.to(device)
        self._info = info
        self._device = device
        self._max_batch = max_batch
        self._good_batch = max_batch
        self._host = [
            torch.zeros(
                (max_batch, *spec.shape),
                dtype=_torch_dtype(spec.datatype),
                pin_memory=device.type == "cuda",
            )
            for spec in info.inputs
        ]
        # The same memory again, to be written without torch's overhead for each request.
        self._host_arrays = [buffer.numpy() for buffer in self._host]
        self._host_views = [array.reshape(-1).view("u1").data for array in self._host_arrays]
        self._on_device = [
            buffer if device.type == "cpu" else torch.zeros_like(buffer, device=device)
            for buffer in self._host
        ]

    @property
    def model(self) -> ModelInfo:
        """What the model takes and returns."""
        return self._info

    @property
    def description(self) -> Mapping[str, str]:
        """The device, and what runs on it."""
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        return {
            "device": str(self._device),
            "device_name": name,
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
        }

    @property
    def good_batch(self) -> int:
        """Samples beyond which larger batches hardly gained anything in the warm-up."""
        return self._good_batch

    def check(self) -> None:
        """Run one sample of zeros; raises if the device fails."""
        self.run([{spec.name: _zeros(spec, 1) for spec in self._info.inputs}])

    @torch.inference_mode()
    def run(self, requests: Sequence[Tensors]) -> BatchOutput:
        """Inputs [k, …] by name for each request → outputs [n, …], n being the sum of all k.

        Inputs have the declared dtypes and shapes, and are contiguous.

        Raises whatever the model raises, and ValueError for outputs that are not as declared.
        """
        started = time.perf_counter()
        samples = self._fill(requests)
        batch = self._to_device(samples)
        copied = time.perf_counter()
        results = self._network(*batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        inferred = time.perf_counter()
        outputs = self._to_host(results, samples)
        return BatchOutput(
            outputs=outputs,
            input_s=copied - started,
            infer_s=inferred - copied,
            output_s=time.perf_counter() - inferred,
        )

    def warm_up(self) -> None:
        """Run each bucket, so that no client waits for kernels to be chosen or loaded.

        What that takes tells which size of batch is good enough.
        """
        seconds = {}
        for size in buckets(self._max_batch):
            batch = [{spec.name: _zeros(spec, size) for spec in self._info.inputs}]
            self.run(batch)
            runs = [self.run(batch) for _ in range(_TIMED_RUNS)]
            seconds[size] = min(run.infer_s for run in runs)
        self._good_batch = good_batch(seconds)

    def self_test(self, samples: Tensors) -> float:
        """Compare the model with its bundle's samples; the greatest difference found.

        Raises StartupError if it answers differently from when it was trained.
        """
        inputs = golden.inputs_of(samples)
        total = len(next(iter(inputs.values())))
        parts = [
            self.run([{name: array[at : at + self._max_batch] for name, array in inputs.items()}])
            for at in range(0, total, self._max_batch)
        ]
        outputs = {
            spec.name: numpy.concatenate([part.outputs[spec.name] for part in parts])
            for spec in self._info.outputs
        }
        comparison = golden.compare(outputs, samples)
        if comparison.problem:
            raise StartupError(
                f"self-test of model {self._info.name} {self._info.version} on {self._device}: "
                f"{comparison.problem}. It does not answer as it did when it was trained: "
                "check the torch version and the device, or train it anew"
            )
        return comparison.max_abs_diff

    def _fill(self, requests: Sequence[Tensors]) -> int:
        samples = 0
        for spec, buffer, view in zip(
            self._info.inputs, self._host_arrays, self._host_views, strict=True
        ):
            arrays = [inputs[spec.name] for inputs in requests]
            samples = sum(map(len, arrays))
            if samples * buffer[0].nbytes <= _JOINED_BYTES:
                # numpy gives the GIL away around each copy, and each time the event loop has it
                # next: many small arrays would wait for it more than they take to be copied.
                joined = b"".join(cast(Sequence[bytes], arrays))
                view[: len(joined)] = joined
            else:
                numpy.concatenate(arrays, out=buffer[:samples])
        return samples

    def _to_device(self, samples: int) -> list[torch.Tensor]:
        if self._device.type == "cpu":
            # The time of a batch grows with its size on a CPU: padding would be pure cost.
            return [buffer[:samples] for buffer in self._host]
        size = next(size for size in buckets(self._max_batch) if size >= samples)
        return [
            device[:size].copy_(host[:size], non_blocking=True)
            for host, device in zip(self._host, self._on_device, strict=True)
        ]

    def _to_host(self, results: Any, samples: int) -> dict[str, NDArray[Any]]:
        tensors = results if isinstance(results, tuple) else (results,)
        if len(tensors) != len(self._info.outputs):
            raise ValueError(
                f"the model returned {len(tensors)} outputs, its bundle says "
                f"{len(self._info.outputs)}"
            )
        outputs = {}
        for spec, tensor in zip(self._info.outputs, tensors, strict=True):
            # A copy in any case: a model may return its input, which the next batch overwrites.
            array = tensor[:samples].cpu().numpy().copy()
            if array.dtype != datatypes.NUMPY[spec.datatype] or array.shape[1:] != spec.shape:
                raise ValueError(
                    f"the model returned output {spec.name!r} as {array.dtype} of shape "
                    f"{list(array.shape)}, its bundle says {spec.datatype} of {list(spec.shape)} "
                    "a sample"
                )
            outputs[spec.name] = array
        return outputs


def open_bundle(path: Path, *, device: str, threads: int, max_batch: int) -> TorchEngine:
    """The engine of the bundle in `path`: verified, loaded, warmed up and tested.

    `threads` as for `configure`. Raises bundle.BundleError, or StartupError for a device that
    is not there or a model that fails its self-test.
    """
    configure(threads=threads)
    chosen = choose_device(device)
    network = models.load_model(path)
    info = ModelInfo.of(bundle.read_manifest(path), digest=bundle.digest(path))
    traced = _traced(network, info, max_batch=max_batch) if chosen.type == "cpu" else None
    if traced is not None:
        network = traced
    engine = TorchEngine(network, info=info, device=chosen, max_batch=max_batch)
    engine.warm_up()
    difference = engine.self_test(bundle.load_samples(path))
    logs.info(
        "model_loaded",
        model=info.name,
        version=info.version,
        digest=info.digest,
        max_abs_diff=difference,
        forward="module" if traced is None else "traced",
        **engine.description,
    )
    return engine


def configure(*, threads: int) -> None:
    """Settings of torch that hold for the whole process.

    `threads` is the number of CPU threads; 0 stands for one per core that this process may use,
    but one, which the event loop needs: a batch waits for the slowest of its threads.
    """
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) - 1))
    # Convolutions on a GPU would use TF32 by default, and answer differently from the third
    # digit on: https://docs.pytorch.org/docs/stable/notes/cuda.html#tf32-on-ampere
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _traced(network: torch.nn.Module, info: ModelInfo, *, max_batch: int) -> torch.nn.Module | None:
    """The same network as one call; None where that may not be the same.

    A module gives the GIL away and wants it back around each operation, and the event loop has it
    then: on a CPU its clients see a quarter less of what the device can do. The trace lives in
    this process only. Whatever depends on values, or on the size of a batch, can't be traced.
    """
    sizes = sorted({max_batch, min(2, max_batch), 1}, reverse=True)
    examples = [[_example(spec, size) for spec in info.inputs] for size in sizes]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)  # nothing else is as quick to load
            warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            trace = torch.jit.trace(  # type: ignore[no-untyped-call]
                network, tuple(examples[0]), check_trace=False
            )
            traced: torch.nn.Module = torch.jit.freeze(trace)
            for example in examples:
                torch.testing.assert_close(traced(*example), network(*example))
    except Exception as error:
        logs.info("not_traced", reason=f"{type(error).__name__}: {error}"[:300])
        return None
    return traced


def _example(spec: bundle.TensorSpec, samples: int) -> torch.Tensor:
    zeros = torch.from_numpy(_zeros(spec, samples))
    return torch.rand_like(zeros) if zeros.is_floating_point() else zeros


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


def good_batch(seconds: Mapping[int, float]) -> int:
    """The smallest size of a batch whose samples take hardly longer than in any other.

    `seconds` of one run by size. Where time grows with size, as on a CPU, two small batches are
    better than a large one: the first is answered while the second one runs.
    """
    best = min(duration / size for size, duration in seconds.items())
    return min(size for size, duration in seconds.items() if duration / size <= best * _GOOD_ENOUGH)


def _torch_dtype(datatype: str) -> torch.dtype:
    return torch.from_numpy(numpy.empty(0, datatypes.NUMPY[datatype])).dtype


def _zeros(spec: bundle.TensorSpec, samples: int) -> NDArray[Any]:
    return numpy.zeros((samples, *spec.shape), datatypes.NUMPY[spec.datatype])
