"""`python -m gpu_service bundle`: from somebody's factory and weights to a bundle.

Owns nothing between calls. Imports and runs the factory that the person at the command line
named, and nothing else; weights and samples are read as data. The model runs on the CPU, on
samples, which tells what its outputs are and whether it can be served in batches.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray

from gpu_service import bundle, datatypes, golden, models, trial
from gpu_service.bundle import BundleError, TensorSpec
from gpu_service.trial import Arrays, ProblemsError, Signature

SAMPLE_COUNT = 16
DYNAMIC_SIZE = 16

_SHOWN = 6
_MOST_RANDOM_BYTES = 1 << 28
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and the pickles of protocol 2 on


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to bundle, as the command line says it: `make` checks every text.

    `inputs` and `state` are `NAME:DATATYPE:SIZE,…` per sample (-1: dynamic), `feedback` is
    `OUTPUT=INPUT`, `dynamic_sizes` and `ranges` are `INPUT:NUMBER,…` for random samples.
    """

    factory: str
    name: str
    directory: Path
    inputs: tuple[str, ...]
    version: str | None = None
    arguments: str = "{}"
    weights: tuple[Path, ...] = ()
    output_names: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    feedback: tuple[str, ...] = ()
    done: str | None = None
    samples: Path | None = None
    labels: str = ""
    sample_count: int | None = None
    dynamic_sizes: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    seed: int = 0


class _Problems:
    """Gathers what is wrong, so that all of it is told at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        try:
            yield
        except ProblemsError as error:
            self.found += error.problems
        except BundleError as error:
            self.found.append(str(error))

    def stop_if_any(self) -> None:
        if self.found:
            lines = "".join(f"\n  - {problem}" for problem in self.found)
            raise BundleError(f"nothing was written; {len(self.found)} to correct:{lines}")


def make(plan: Plan) -> Path:
    """Write the bundle that `plan` describes, and return its folder.

    It is loaded again and compared with the model before it gets its name. Raises BundleError
    that lists all problems of what was given, or else all of how the model ran.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return _make(plan)


def _make(plan: Plan) -> Path:
    version = plan.version or bundle.new_version()
    problems = _Problems()
    problems.found += bundle.name_problems(name=plan.name, version=version)
    if (plan.directory / plan.name / version).exists():
        problems.found.append(f"{plan.directory / plan.name / version}: exists; choose a --version")
    signature: Signature | None = None
    with problems.gather():
        signature = _signature(plan)
    with problems.gather():
        labels = _labels(plan.labels)
    with problems.gather():
        architecture = _architecture(plan)
        model = models.build(architecture, factories=(plan.factory,))
        _load_weights(model, plan)
        model.eval()
    if signature is not None:
        with problems.gather():
            given = _samples(plan, signature)
    problems.stop_if_any()

    assert signature is not None  # else there was a problem
    with problems.gather():
        outputs, expected = trial.observe(model, signature, given)
    problems.stop_if_any()
    with problems.gather():
        _compare_with_given(expected, given)
    problems.stop_if_any()

    kept = {key: array for key, array in given.items() if not key.startswith(bundle.EXPECTED)}
    return bundle.write(
        directory=plan.directory,
        name=plan.name,
        version=version,
        architecture=architecture,
        inputs=signature.inputs,
        outputs=outputs,
        labels=labels,
        state=signature.state,
        feedback=signature.feedback,
        done=plan.done,
        state_dict=model.state_dict(),
        samples=kept | {bundle.EXPECTED + name: array for name, array in expected.items()},
        check=lambda path: _check_reloaded(path, plan.factory),
    )


# ------------------------------------------------------------------------------ what was given


def _signature(plan: Plan) -> Signature:
    problems = _Problems()
    specs: dict[str, list[TensorSpec]] = {"--input": [], "--state": []}
    for option, texts in (("--input", plan.inputs), ("--state", plan.state)):
        for text in texts:
            with problems.gather():
                specs[option].append(_spec(option, text))
    problems.found += bundle.spec_problems("--input", specs["--input"])
    problems.found += bundle.state_problems("--state", specs["--state"], beside=specs["--input"])
    named = [TensorSpec(name=name, datatype="FP32", shape=()) for name in plan.output_names]
    if named:
        problems.found += bundle.spec_problems("--output-name", named)
    feedback = {}
    for text in plan.feedback:
        output, separator, name = text.partition("=")
        if not (output and separator and name) or output in feedback:
            problems.found.append(f"--feedback {text!r}: expected OUTPUT=INPUT, each output once")
        feedback[output] = name
    if problems.found:
        raise ProblemsError(*problems.found)
    return Signature(
        inputs=tuple(specs["--input"]),
        state=tuple(specs["--state"]),
        output_names=plan.output_names,
        feedback=feedback,
    )


def _spec(option: str, text: str) -> TensorSpec:
    name, _, rest = text.partition(":")
    datatype, _, sizes = rest.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(",")) if sizes else ()
    except ValueError:
        raise ProblemsError(
            f"{option} {text!r}: expected NAME:DATATYPE:SIZE,…, such as image:FP32:3,-1,-1 "
            "(-1: dynamic; no sizes: one value a sample)"
        ) from None
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def _labels(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    if "," in text:
        return tuple(label.strip() for label in text.split(","))
    try:
        return tuple(Path(text).read_text("utf-8").splitlines())
    except OSError as error:
        raise ProblemsError(f"--labels {text}: {error.strerror}; give a file, or A,B,C") from None
    except ValueError:  # UnicodeDecodeError, or a path with a zero byte
        raise ProblemsError(f"--labels {text!r}: not UTF-8 text, one label a line") from None


def _architecture(plan: Plan) -> bundle.Architecture:
    try:
        arguments = msgspec.json.decode(plan.arguments)
        return msgspec.convert(
            {"name": plan.factory, "arguments": arguments}, type=bundle.Architecture
        )
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProblemsError(
            f"--arguments {plan.arguments!r}: {error}; expected a JSON object of the factory's "
            'keyword arguments, such as {"width": 8}'
        ) from None


def _load_weights(model: torch.nn.Module, plan: Plan) -> None:
    state: dict[str, torch.Tensor] = {}
    for file in plan.weights:
        part = _read_weights(file)
        if twice := state.keys() & part.keys():
            raise ProblemsError(
                f"--weights {file}: has {_some(twice)}, which another file has, too"
            )
        state |= part
    if not plan.weights:
        return
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        differences = list(_differences(model.state_dict(), state)) or [str(error)]
        raise ProblemsError(
            *(f"--weights do not fit {plan.factory}: {difference}" for difference in differences)
        ) from None


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
        if file.suffix in _PICKLES or start.startswith(_PICKLE_STARTS):
            _refuse_pickle(file)
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise ProblemsError(f"--weights {file}: {error.strerror}") from None
    except safetensors.SafetensorError as error:
        raise ProblemsError(f"--weights {file}: not a safetensors file: {error}") from None


def _refuse_pickle(file: Path) -> NoReturn:
    target = file.with_suffix(".safetensors")
    if target == file:
        target = file.with_suffix(".converted.safetensors")
    lines = (
        "import torch",
        "from safetensors.torch import save_file",
        f'with open({str(file)!r}, "rb") as file:',
        '    state = torch.load(file, map_location="cpu", weights_only=True)',
        'state = state.get("state_dict", state)',
        "state = {key: value.clone().contiguous() for key, value in state.items()}",
        f"save_file(state, {str(target)!r})",
    )
    code = "".join(f"\n      {line}" for line in lines)
    raise ProblemsError(
        f"--weights {file}: a pickle, which can run code when it is read, is not read here. "
        f"Convert it once, with these lines of Python, and give --weights {target}:{code}"
    )


def _differences(own: dict[str, Any], given: dict[str, torch.Tensor]) -> Iterator[str]:
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    prefix = next(iter(given), "").partition(".")[0] + "."
    if missing and {key.removeprefix(prefix) for key in given} == own.keys():
        yield (
            f"every key begins with {prefix!r}, as wrappers such as DistributedDataParallel save "
            "them; remove that from the keys when you write the file"
        )
        return
    if missing:
        yield f"missing: {_some(missing)}"
    if unknown:
        yield f"unknown: {_some(unknown)}"
    for key in sorted(own.keys() & given.keys()):
        if own[key].shape != given[key].shape:
            yield f"{key} is {list(given[key].shape)}, expected {list(own[key].shape)}"


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


# ------------------------------------------------------------------------------ samples


def _samples(plan: Plan, signature: Signature) -> Arrays:
    """[n, …] per input, and what else the file holds that a bundle may."""
    if plan.samples is None:
        return _random_samples(plan, signature.inputs)
    if plan.dynamic_sizes or plan.ranges:
        raise ProblemsError("--dynamic-size and --range are for random samples, without --samples")
    arrays = _read_arrays(plan.samples)
    if plan.sample_count is not None:
        arrays = {key: array[: plan.sample_count] for key, array in arrays.items() if array.ndim}
    label = arrays.get(bundle.LABEL)
    if label is not None and label.dtype.kind in "iu":
        arrays[bundle.LABEL] = label.astype("<i8")
    problems = [
        f"--samples {plan.samples}: {problem}"
        for problem in _given_problems(arrays, signature.inputs)
    ]
    if problems:
        raise ProblemsError(*problems)
    return arrays


def _read_arrays(file: Path) -> Arrays:
    try:
        if file.suffix == ".npz":
            with file.open("rb") as stream, numpy.load(stream, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        if file.suffix == ".safetensors":
            return dict(safetensors.numpy.load(file.read_bytes()))
    except OSError as error:
        raise ProblemsError(f"--samples {file}: {error.strerror or error}") from None
    except Exception as error:  # whatever zipfile, numpy and safetensors raise of bad files
        raise ProblemsError(f"--samples {file}: cannot be read: {error}") from None
    raise ProblemsError(f"--samples {file}: expected .npz (numpy.savez) or .safetensors")


def _given_problems(arrays: Arrays, inputs: tuple[TensorSpec, ...]) -> Iterator[str]:
    specs = {spec.name: spec for spec in inputs}
    specs[bundle.LABEL] = TensorSpec(name=bundle.LABEL, datatype="INT64", shape=())
    for name in specs.keys() - arrays.keys() - {bundle.LABEL}:
        yield f"no array {name!r}; it has {_some(arrays) or 'none'}"
    for name, array in arrays.items():
        if name.startswith(bundle.EXPECTED):
            continue
        if name not in specs:
            yield f"unknown array {name!r}; known are {_some(specs)}, expected.OUTPUT"
            continue
        dtype = datatypes.NUMPY[specs[name].datatype]
        if array.dtype != dtype:
            yield f"{name!r} is {array.dtype}; convert it: .astype({dtype.name!r})"
        if not array.ndim or not specs[name].takes(array.shape[1:]):
            wanted = ", ".join(["n", *map(str, specs[name].shape)])
            yield f"{name!r} has shape {list(array.shape)}, expected [{wanted}]"
    counts = {array.shape[:1] for array in arrays.values()}
    if len(counts) > 1 or (0,) in counts:
        yield f"all arrays need the same number of samples, one or more, not {counts}"


def _random_samples(plan: Plan, inputs: tuple[TensorSpec, ...]) -> Arrays:
    problems = _Problems()
    known = {spec.name: spec for spec in inputs}
    sizes: dict[str, list[float]] = {}
    ranges: dict[str, list[float]] = {}
    for option, texts, parsed in (
        ("--dynamic-size", plan.dynamic_sizes, sizes),
        ("--range", plan.ranges, ranges),
    ):
        for text in texts:
            with problems.gather():
                name, numbers = _numbers(option, text, known)
                parsed[name] = numbers
    shapes, bounds = {}, {}
    for spec in inputs:
        with problems.gather():
            shapes[spec.name] = _sized(spec, sizes.get(spec.name))
        with problems.gather():
            bounds[spec.name] = _bounds(spec, ranges.get(spec.name))
    count = SAMPLE_COUNT if plan.sample_count is None else plan.sample_count
    taken = sum(
        count * math.prod(shape) * datatypes.NUMPY[known[name].datatype].itemsize
        for name, shape in shapes.items()
    )
    if taken > _MOST_RANDOM_BYTES:
        problems.found.append(
            f"random samples would take {taken:,} bytes, allowed are {_MOST_RANDOM_BYTES:,}; "
            "choose a smaller --sample-count or --dynamic-size, or give --samples"
        )
    if problems.found:
        raise ProblemsError(*problems.found)
    random = numpy.random.default_rng(plan.seed)
    return {
        name: _random(random, spec, (count, *shapes[name]), *bounds[name])
        for name, spec in known.items()
    }


def _numbers(option: str, text: str, known: dict[str, TensorSpec]) -> tuple[str, list[float]]:
    name, _, numbers = text.partition(":")
    if name not in known:
        raise ProblemsError(f"{option} {text!r}: no such input; there are {_some(known)}")
    integer = option == "--dynamic-size" or datatypes.NUMPY[known[name].datatype].kind != "f"
    try:
        return name, [(int if integer else float)(number) for number in numbers.split(",")]
    except ValueError:
        kind = "whole numbers" if integer else "numbers"
        raise ProblemsError(f"{option} {text!r}: expected INPUT:N,…, {kind}") from None


def _sized(spec: TensorSpec, sizes: Sequence[float] | None) -> tuple[int, ...]:
    dynamic = spec.shape.count(bundle.ANY)
    if sizes is None:
        sizes = [DYNAMIC_SIZE] * dynamic
    if len(sizes) != dynamic or any(size < 1 for size in sizes):
        raise ProblemsError(
            f"--dynamic-size {spec.name}: {dynamic} sizes from 1 on are needed, one for each -1 "
            f"of {list(spec.shape)}; got {len(sizes)}"
        )
    rest = iter(sizes)
    return tuple(int(next(rest)) if size == bundle.ANY else size for size in spec.shape)


def _bounds(spec: TensorSpec, given: Sequence[float] | None) -> tuple[float, float]:
    dtype = datatypes.NUMPY[spec.datatype]
    if given is None:
        if dtype.kind == "f":
            return 0.0, 1.0
        if dtype.kind == "b":
            return 0, 1
        if dtype.itemsize == 1:
            return int(numpy.iinfo(dtype).min), int(numpy.iinfo(dtype).max)
        raise ProblemsError(
            f"--range is needed for input {spec.name!r} of {spec.datatype}: which values are "
            f"valid, such as --range {spec.name}:0,999. Or give --samples"
        )
    about = numpy.finfo(dtype) if dtype.kind == "f" else None
    least, most = (about.min, about.max) if about else (0, 1)
    if dtype.kind in "iu":
        least, most = numpy.iinfo(dtype).min, numpy.iinfo(dtype).max
    if len(given) != 2 or not least <= given[0] <= given[1] <= most:
        raise ProblemsError(
            f"--range {spec.name}: expected LOW,HIGH within {least:g}…{most:g} of {spec.datatype}"
        )
    return given[0], given[1]


def _random(
    random: numpy.random.Generator,
    spec: TensorSpec,
    shape: tuple[int, ...],
    low: float,
    high: float,
) -> NDArray[Any]:
    dtype = datatypes.NUMPY[spec.datatype]
    if dtype.kind == "f":
        return (low + (high - low) * random.random(shape)).astype(dtype)
    wide = numpy.uint64 if dtype.kind == "u" else numpy.int64
    return random.integers(int(low), int(high), shape, wide, endpoint=True).astype(dtype)


# ------------------------------------------------------------------------------ proof


def _compare_with_given(expected: Arrays, given: Arrays) -> None:
    wanted = {key: array for key, array in given.items() if key.startswith(bundle.EXPECTED)}
    problem = golden.compare(expected, wanted).problem
    if problem:
        raise ProblemsError(f"the model does not answer as --samples says: {problem}")


def _check_reloaded(path: Path, factory: str) -> None:
    model = models.load_model(path, factories=(factory,))
    manifest, samples = bundle.read_manifest(path), bundle.load_samples(path)
    signature = Signature(
        inputs=manifest.inputs,
        state=manifest.state,
        output_names=tuple(spec.name for spec in manifest.outputs),
        feedback=manifest.feedback,
    )
    inputs = {spec.name: samples[spec.name] for spec in manifest.inputs}
    try:
        problem = golden.compare(trial.run(model, signature, inputs), samples).problem
    except ProblemsError as error:
        problem = "; ".join(error.problems)
    if problem:
        raise BundleError(
            f"nothing was written: the model, built anew from its bundle, answers otherwise: "
            f"{problem}. All that matters must be in its parameters, its buffers or --arguments"
        )
