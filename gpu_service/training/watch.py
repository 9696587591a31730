"""The streaming task: movements of a wrist, from the package seglearn, and which exercise they are.

Owns the reading of its file, the split by person, and the augmentation. Pure functions; seglearn
itself is never imported, since none of what it needs is installed.
"""

import hashlib
import math
import pickletools
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import TensorDataset

from gpu_service import bundle
from gpu_service.models.watch import CHUNK
from gpu_service.training import TrainingError
from gpu_service.training.task import Source, Task

PACKAGE = "seglearn==1.2.5"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
LABELS = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius row",
    "bent-over row",
)
TEST_PEOPLE = (5, 10)  # every fifth, chosen before anything was trained
NO_LABEL = -1
# Of the training program; they were chosen with the people who are not held out, in four folds.
OPTIONS = (
    *("--task", "gpu_service.training.watch:task", "--epochs", "100", "--batch-size", "16"),
    *("--learning-rate", "0.004", "--weight-decay", "0.05", "--clip-norm", "1"),
)

_HEADER = 128  # bytes of the .npy file before its content
_RECORDINGS = 140
_STEPS = 30  # of a stream that is learnt from: 15 seconds


class Recordings(NamedTuple):
    """What the file holds, in its order: one exercise of one person with one arm each."""

    movement: tuple[NDArray[Any], ...]  # [samples, 6] each, 50 a second
    label: NDArray[Any]  # int64, index of LABELS
    person: NDArray[Any]  # int64, 1 to 10
    left: NDArray[Any]  # bool


def task(test_people: tuple[int, ...] = TEST_PEOPLE) -> Task:
    """A stream of movements → the exercise so far; TrainingError without the package of data."""
    recordings = load()
    test = numpy.isin(recordings.person, test_people)
    return Task(
        name="watch",
        architecture=bundle.Architecture(name="watch_gru", arguments={}),
        inputs=(
            bundle.TensorSpec(name="movement", datatype="FP32", shape=(CHUNK, 6)),
            bundle.TensorSpec(name="left", datatype="BOOL", shape=()),
        ),
        outputs=(bundle.TensorSpec(name="logits", datatype="FP32", shape=(len(LABELS),)),),
        state=(
            bundle.TensorSpec(name="recent", datatype="FP32", shape=(25, 6)),
            bundle.TensorSpec(name="hidden", datatype="FP32", shape=(64,)),
        ),
        streams=True,
        labels=LABELS,
        source=Source(
            name="wrist movements in physiotherapy of the shoulder, as seglearn 1.2.5 ships them "
            "(10 people, 7 exercises, both arms; D. Burns et al., 2018)",
            sha256=SHA256,
            license="BSD-3-Clause",
            split=(
                f"by person: {' and '.join(map(str, test_people))} of 1 to 10 are held out for the "
                "test; nothing of them was seen in training or when settings were chosen. The "
                "accuracy counts every answer of their streams, one each half second from the "
                "first on; at_end counts the last answer of each stream"
            ),
        ),
        train=streams(recordings, numpy.flatnonzero(~test)),
        test=streams(recordings, numpy.flatnonzero(test)),
        loss=loss,
        augment=augment,
        measure=measure,
    )


def load() -> Recordings:
    """All recordings. TrainingError where the package is missing, or another version of it.

    The file is a pickled dictionary of numpy arrays, and a pickle can run code. It is not
    unpickled: pickletools only lists what it says, and the numbers are taken out of that. Where
    they are is known, because the file's digest is.
    """
    content = _file().read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != SHA256:
        raise TrainingError(f"{_file()}: sha256 {actual}, expected {SHA256} of {PACKAGE}")
    arrays = [
        text.encode("latin1")  # how pickle's protocol 2 writes bytes
        for _, text, _ in pickletools.genops(content[_HEADER:])
        if isinstance(text, str) and len(text) >= 8 * _RECORDINGS
    ]
    *movement, label, person, right = arrays
    return Recordings(
        # Column after column, as its arrays are in memory.
        movement=tuple(
            numpy.frombuffer(each, "<f8").reshape(6, -1).T.astype("f4") for each in movement
        ),
        label=numpy.frombuffer(label, "<i8").astype("i8"),
        person=numpy.frombuffer(person, "<i8").astype("i8"),
        left=numpy.frombuffer(right, "<f8") == 0,
    )


def steps(movement: NDArray[Any]) -> NDArray[Any]:
    """A recording [samples, 6] as the steps of a stream [steps, 25, 6]; a rest is left out."""
    count = len(movement) // CHUNK
    return movement[: count * CHUNK].reshape(count, CHUNK, 6)


def streams(recordings: Recordings, chosen: NDArray[Any]) -> TensorDataset:
    """Some recordings by index, as streams: movement [n, steps, 25, 6], left and label [n, steps].

    As many steps as the longest of all has; after the end of a shorter one, zeros without a label.
    They take turns, one of each exercise after the other.
    """
    order = _taking_turns(recordings.label, chosen)
    longest = max(map(len, recordings.movement)) // CHUNK
    movement = numpy.zeros((len(order), longest, CHUNK, 6), "f4")
    label = numpy.full((len(order), longest), NO_LABEL)
    for row, index in enumerate(order):
        own = steps(recordings.movement[index])
        movement[row, : len(own)] = own
        label[row, : len(own)] = recordings.label[index]
    left = numpy.repeat(recordings.left[order, None], longest, axis=1)
    return TensorDataset(*map(torch.from_numpy, (movement, left, label)))


def _taking_turns(label: NDArray[Any], indices: NDArray[Any]) -> list[int]:
    """The indices in their order, but one of each label after the other."""
    of_each = (indices[label[indices] == of].tolist() for of in range(len(LABELS)))
    turns = zip_longest(*of_each)
    return [index for turn in turns for index in turn if index is not None]


def loss(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The mean over the steps of each stream [n] that have a label."""
    each = cross_entropy(
        logits.transpose(1, 2), label, ignore_index=NO_LABEL, label_smoothing=0.1, reduction="none"
    )
    return each.sum(dim=1) / (label != NO_LABEL).sum(dim=1).clamp(min=1)


def measure(logits: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whether the last answer to each stream [n] is right."""
    last = (label != NO_LABEL).sum(dim=1) - 1
    rows = torch.arange(len(label), device=label.device)
    return {"at_end": (logits.argmax(dim=-1) == label)[rows, last].double()}


def augment(
    movement: torch.Tensor, left: torch.Tensor, label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """15 seconds of each stream [n, steps, 25, 6], at another speed, the watch sitting otherwise.

    Every second one begins with its recording, the others anywhere in it.
    """
    count, device = len(movement), movement.device
    samples = movement.flatten(1, 2)
    ends = (label != NO_LABEL).sum(dim=1, keepdim=True) * CHUNK - 1
    speed = torch.empty((count, 1), device=device).uniform_(-0.2, 0.2).exp()
    room = (ends - speed * _STEPS * CHUNK).clamp(min=0)
    begin = room * torch.rand_like(room) * (torch.rand_like(room) < 0.5)
    at = begin + speed * torch.arange(_STEPS * CHUNK, device=device)
    at = at % ends  # a recording that is too short begins again
    before = at.long()
    part = (at - before)[..., None]
    taken = _at(samples, before) * (1 - part) + _at(samples, before + 1) * part
    stronger = torch.empty((count, 1, 1), device=device).uniform_(0.85, 1.15)
    turned = _turned(taken.view(*taken.shape[:2], 2, 3), math.radians(10))
    turned = torch.stack([turned[:, :, 0], turned[:, :, 1] * speed[..., None] * stronger], dim=2)
    return (
        turned.reshape(count, _STEPS, CHUNK, 6),
        left[:, :_STEPS],
        label[:, :1].expand(-1, _STEPS),
    )


def _at(samples: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return samples.gather(1, index[..., None].expand(-1, -1, samples.shape[2]))


def _turned(vectors: torch.Tensor, spread: float) -> torch.Tensor:
    """The vectors [n, …, 3] of each of n streams, turned around a random axis of its own."""
    count, device = len(vectors), vectors.device
    x, y, z = normalize(torch.randn((count, 3), device=device), dim=1).unbind(1)
    angle = spread * torch.randn((count, 1, 1), device=device)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(count, 3, 3)
    # Rodrigues' formula
    turn = torch.eye(3, device=device) + angle.sin() * cross + (1 - angle.cos()) * cross @ cross
    return torch.einsum("nij,n...j->n...i", turn, vectors)


def _file() -> Path:
    spec = find_spec("seglearn")  # looks the package up without running it
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "data", "watch_dataset.npy")
        if file.is_file():
            return file
    raise TrainingError(
        f"the training data is missing; it comes with a package: `pip install --no-deps {PACKAGE}`"
    )
