"""The README's training command, as it is: real images, two ranks, a bundle worth serving."""

from pathlib import Path

import numpy
import torch

from gpu_service import bundle, models
from gpu_service.training import digits


def test_the_example_model_is_right_on_held_out_images(trained: Path) -> None:
    manifest = bundle.verify(trained)
    assert manifest.training.world_size == 2
    assert manifest.training.test_samples == 1000
    assert manifest.training.metrics["test_accuracy"] >= 0.985


def test_the_stated_accuracy_is_what_the_written_bundle_has(trained: Path) -> None:
    images, labels = digits.load()[1].tensors
    with torch.inference_mode():
        logits = models.load_model(trained)(images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    stated = bundle.read_manifest(trained).training.metrics["test_accuracy"]
    assert abs(accuracy - stated) < 1e-9


def test_golden_samples_are_held_out_images_with_the_models_own_answers(trained: Path) -> None:
    samples = bundle.load_samples(trained)
    with torch.inference_mode():
        logits = models.load_model(trained)(torch.from_numpy(samples["image"])).numpy()
    assert numpy.abs(logits - samples["expected.logits"]).max() < 1e-4
    held_out = digits.load()[1].tensors[0].numpy()
    for image in samples["image"]:
        assert (held_out == image).all(axis=(1, 2, 3)).any()
