"""What is trained: a model, its data, its loss. Written by the user, named by `--task`.

`package.module:factory` is a function without arguments that returns a Task. The factory runs on
every rank and must return the same there. Owns nothing; `digits.py` is the example.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from gpu_service import bundle, models
from gpu_service.training import TrainingError

Tensors = tuple[torch.Tensor, ...]


class Samples(Protocol):
    """A map-style data set: each sample is a tuple of its inputs, then its targets.

    A `TensorDataset` is kept on the device and indexed with whole batches; of any other one,
    samples are fetched one by one, in processes of their own with `--workers`, and stacked.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Tensors: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data comes from; `sha256` pins its bytes, `split` says how test data was chosen."""

    name: str
    sha256: str
    license: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All that the training program does not know by itself.

    `loss` gives one value per sample, [n], of the model's output and the targets: the mean over a
    step's samples is then the same, however many ranks share them. `augment` changes the inputs of
    a training batch with torch's default generators, which are seeded anew for every step.
    `measure` gives further values per sample, [n] each by name, whose means over the test samples
    go into the bundle. With `labels`, the first output is logits [n, classes] and the first target
    the class, int64 [n]: accuracy, figures per class and the confusion matrix come by themselves.
    A model with `state` is trained on single steps from the zero state.
    """

    name: str
    architecture: bundle.Architecture
    inputs: tuple[bundle.TensorSpec, ...]
    outputs: tuple[bundle.TensorSpec, ...]
    source: Source
    train: Samples
    test: Samples
    loss: Callable[..., torch.Tensor]
    labels: tuple[str, ...] = ()
    state: tuple[bundle.TensorSpec, ...] = ()
    augment: Callable[..., Tensors] | None = None
    measure: Callable[..., Mapping[str, torch.Tensor]] | None = None

    def build(self) -> nn.Module:
        """A freshly initialised model, on the CPU; TrainingError if its architecture fails."""
        try:
            return models.build(self.architecture, factories=(self.architecture.name,))
        except bundle.BundleError as error:
            raise TrainingError(str(error)) from error

    def divide(self, sample: Tensors) -> tuple[Tensors, Tensors]:
        """The inputs and the targets of a sample, or of a batch."""
        return tuple(sample[: len(self.inputs)]), tuple(sample[len(self.inputs) :])

    def outputs_of(self, model: Callable[..., Any], inputs: Tensors) -> Tensors:
        """What `model` answers to a batch of `inputs` [n, …], without the new state."""
        count, device = len(inputs[0]), inputs[0].device
        zeros = (torch.zeros((count, *spec.shape), device=device) for spec in self.state)
        answer = model(*inputs, *zeros)
        outputs = answer if isinstance(answer, tuple) else (answer,)
        return outputs[: len(self.outputs)]

    def losses(self, model: Callable[..., Any], inputs: Tensors, targets: Tensors) -> torch.Tensor:
        """The loss of each sample, [n]; TrainingError if the task's `loss` gives another shape."""
        losses = self.loss(*self.outputs_of(model, inputs), *targets)
        if losses.shape != inputs[0].shape[:1]:
            raise TrainingError(
                f"task {self.name!r}: its loss has shape {list(losses.shape)} for a batch of "
                f"{len(inputs[0])}; one value per sample is needed (reduction='none')"
            )
        return losses


def load(name: str) -> Task:
    """The task that `package.module:factory` makes. Raises TrainingError if it cannot."""
    module, separator, attribute = name.partition(":")
    if not (module and separator and attribute):
        raise TrainingError(f"--task {name}: must be package.module:factory")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TrainingError(
            f"--task {name}: {error}; its package must be installed, or its folder be the current "
            "one or in PYTHONPATH"
        ) from error
    task = factory()
    if not isinstance(task, Task):
        raise TrainingError(
            f"--task {name}: returned {type(task).__name__}, not gpu_service.training.task.Task"
        )
    if not len(task.train) or not len(task.test):
        raise TrainingError(f"--task {name}: has no training samples, or no test samples")
    return task
