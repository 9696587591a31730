"""What is trained: a model, its data, its loss. Written by the user, named by `--task`.

`package.module:factory` is a function without arguments that returns a Task. The factory runs on
every rank and must return the same there. Owns nothing; `digits.py` is the example.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy
import torch
from torch import nn

from gpu_service import bundle, models
from gpu_service.datatypes import NUMPY
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
    step's samples is then the same, however many ranks share them. `augment` changes a training
    batch, its inputs and its targets, with torch's default generators, which are seeded anew for
    every step. `measure` gives further values per sample, [n] each by name, whose means over the
    test samples go into the bundle. With `labels`, the first output is logits [n, classes] and the
    first target the class, int64 [n]: accuracy, figures per class and the confusion matrix come by
    themselves.

    A model with `state` begins with zeros. It is trained on single steps or, with `streams`, on
    whole streams: each input of a sample is [steps, …], the model takes one step after the other,
    and its outputs are [n, steps, …]. The label is then [n, steps], and one below 0 says that
    there is none: streams of one batch may so have different lengths.
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
    streams: bool = False
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

    def whole(self, model: nn.Module) -> nn.Module:
        """`model` as a module of a batch's inputs alone, which returns all outputs as a tuple.

        One call of it is one step of learning, also where it calls `model` for many steps of a
        stream: DistributedDataParallel must see just one.
        """
        return Whole(model, state=self.state, outputs=len(self.outputs), streams=self.streams)

    def step(self, model: nn.Module) -> nn.Module:
        """The same for a batch of single steps, each from the zero state."""
        return Whole(model, state=self.state, outputs=len(self.outputs), streams=False)

    def first(self, sample: Tensors) -> Tensors:
        """The first steps of a batch of streams; of other samples, all there is."""
        return tuple(tensor[:, 0] for tensor in sample) if self.streams else sample

    def losses(self, whole: Callable[..., Any], inputs: Tensors, targets: Tensors) -> torch.Tensor:
        """The loss of each sample, [n]; TrainingError if the task's `loss` gives another shape."""
        losses = self.loss(*whole(*inputs), *targets)
        if losses.shape != inputs[0].shape[:1]:
            raise TrainingError(
                f"task {self.name!r}: its loss has shape {list(losses.shape)} for a batch of "
                f"{len(inputs[0])}; one value per sample is needed (reduction='none')"
            )
        return losses


class Whole(nn.Module):
    """A model from its inputs to its outputs, with the state in between; no names of its own."""

    def __init__(
        self,
        model: nn.Module,
        *,
        state: tuple[bundle.TensorSpec, ...],
        outputs: int,
        streams: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self._state, self._outputs, self._streams = state, outputs, streams

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        """The outputs [n, …] of inputs [n, …]; of streams, both are [n, steps, …]."""
        state = self._zeros(len(inputs[0]), inputs[0].device)
        if not self._streams:
            return self._step(inputs, state)[0]
        answers = []
        for step in range(inputs[0].shape[1]):
            outputs, state = self._step(tuple(tensor[:, step] for tensor in inputs), state)
            answers.append(outputs)
        return tuple(torch.stack(each, dim=1) for each in zip(*answers, strict=True))

    def _step(self, inputs: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        answer = self.model(*inputs, *state)
        answers = answer if isinstance(answer, tuple) else (answer,)
        return answers[: self._outputs], answers[self._outputs :]

    def _zeros(self, count: int, device: torch.device) -> Tensors:
        return tuple(
            torch.from_numpy(numpy.zeros((count, *spec.shape), NUMPY[spec.datatype])).to(device)
            for spec in self._state
        )


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
