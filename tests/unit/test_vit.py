"""The vision transformer: sizes by name, and a task that trains it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_service import bundle, models
from gpu_service.models.vit import SIZES, VisionTransformer
from gpu_service.training import task as tasks


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_the_parameters_and_the_work_of_its_name(size: str) -> None:
    width, layers, _ = SIZES[size]
    with torch.device("meta"):
        model = VisionTransformer(size=size)
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 1, 28, 28))
    parameters = sum(value.numel() for value in model.parameters())
    assert parameters == pytest.approx(12 * layers * width**2, rel=0.2)
    tokens = 49
    expected = layers * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_the_task_trains_it_and_bundles_name_it() -> None:
    task = tasks.load("gpu_service.training.vit:tiny")
    assert (task.name, task.architecture.name) == ("vit-tiny", "vit")
    torch.manual_seed(0)
    model, (image, label) = task.build(), task.train[:32]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = task.losses(task.whole(model), (image,), (label,)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert all(value.grad is not None for value in model.parameters())


def test_an_image_is_answered_by_itself() -> None:
    architecture = bundle.Architecture(name="vit", arguments={"size": "tiny"})
    model = models.build(architecture).eval()
    images = torch.rand(3, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]))
