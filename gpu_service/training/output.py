"""From what was learnt to a bundle: golden samples, and the history of the weights.

Rank 0 alone calls this. Owns nothing between calls.
"""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import default_collate

from gpu_service import bundle, confusion
from gpu_service.training import evaluation
from gpu_service.training import settings as _settings
from gpu_service.training.evaluation import Result
from gpu_service.training.loop import Trained
from gpu_service.training.settings import Settings
from gpu_service.training.task import Task

GOLDEN_SAMPLES = 16
_MOST_CLASSES = 100  # of a confusion matrix in a manifest

_PACKAGE = Path(__file__).parents[1]


def check_writable(settings: Settings, task: Task) -> None:
    """Raises BundleError where the bundle could not be written in the end.

    A version that exists is in order where there are snapshots: the run may have written it
    itself, and been interrupted before it could say so.
    """
    name, version = settings.name or task.name, settings.version or bundle.new_version()
    if settings.snapshots and (settings.output / name / version / bundle.MANIFEST).exists():
        return
    bundle.check_writable(directory=settings.output, name=name, version=version)


def write(
    settings: Settings, task: Task, trained: Trained, result: Result, *, model: nn.Module
) -> Path:
    """Write the bundle, and return its folder; one that this run has written is only verified.

    `model` has the weights and is on the CPU. Raises BundleError.
    """
    name = settings.name or task.name
    path = settings.output / name / trained.version
    if settings.snapshots and (path / bundle.MANIFEST).exists():
        bundle.verify(path)
        return path
    history = _history(settings, task, trained, result)
    return bundle.write(
        directory=settings.output,
        name=name,
        version=trained.version,
        architecture=task.architecture,
        inputs=task.inputs,
        outputs=task.outputs,
        labels=task.labels,
        state=task.state,
        training=history,
        picture=confusion.svg(history, title=f"{name} {trained.version}"),
        state_dict=model.state_dict(),
        samples=_golden(task, model),
    )


@torch.inference_mode()
def _golden(task: Task, model: nn.Module) -> dict[str, NDArray[Any]]:
    """The first test samples, what the model answers, and the labels where there are any.

    Of streams, it is their first steps.
    """
    count = min(GOLDEN_SAMPLES, len(task.test))
    sample = default_collate([task.test[at] for at in range(count)])
    inputs, targets = task.divide(task.first(sample))
    outputs = task.step(model.eval())(*inputs)
    golden = {spec.name: tensor.numpy() for spec, tensor in zip(task.inputs, inputs, strict=True)}
    for spec, tensor in zip(task.outputs, outputs, strict=True):
        golden[bundle.EXPECTED + spec.name] = tensor.numpy()
    if task.labels:
        golden[bundle.LABEL] = targets[0].numpy()
    return golden


def _history(settings: Settings, task: Task, trained: Trained, result: Result) -> bundle.Training:
    few = 0 < len(task.labels) <= _MOST_CLASSES
    return bundle.Training(
        dataset=task.source.name,
        dataset_sha256=task.source.sha256,
        dataset_license=task.source.license,
        split=task.source.split,
        train_samples=trained.samples,
        test_samples=len(task.test),
        epochs=len(trained.curve),
        seed=settings.seed,
        world_size=dist.get_world_size(),
        backend=dist.get_backend(),
        torch=str(torch.__version__),
        settings=_settings.course(settings),
        metrics={f"test_{name}": value for name, value in result.metrics.items()},
        code=_code(),
        curve=trained.curve,
        classes=evaluation.by_class(result.confusion, task.labels) if few else {},
        confusion=result.confusion if few else (),
    )


def _code() -> str:
    """The program that trained: SHA-256 of its source files, and the commit where there is one."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    try:
        git = ["git", "-C", str(_PACKAGE), "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        found = ""  # installed from a wheel
    commit = f", on commit {found.strip()}" if found else ""
    return f"gpu_service sha256 {digest.hexdigest()[:16]}{commit}"
