"""The task that keeps a GPU busy: a vision transformer on the images of digits.

    python -m gpu_service.training --task gpu_service.training.vit:base --precision bf16 --compile

Owns nothing but the choice of sizes; data, split and augmentation are those of `digits`.
"""

import dataclasses
from functools import partial

from gpu_service import bundle
from gpu_service.training import digits
from gpu_service.training.task import Task


def task(size: str) -> Task:
    """Digits, but with a vision transformer of that size (`models.vit.SIZES`)."""
    return dataclasses.replace(
        digits.task(),
        name=f"vit-{size}",
        architecture=bundle.Architecture(name="vit", arguments={"size": size}),
    )


tiny = partial(task, "tiny")
small = partial(task, "small")
base = partial(task, "base")
large = partial(task, "large")
