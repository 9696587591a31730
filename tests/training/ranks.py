"""What one rank does in test_ranks.py: real training code, in a process of its own.

Run with torchrun's variables and a folder, into which it writes what the test looks at.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from gpu_service.models.digits import DigitsCNN
from gpu_service.training import TrainingError, distributed, loop
from gpu_service.training.settings import Settings

BATCH = 12  # shared equally by 1, 2 and 3 ranks
UNEVEN = (2, 7, 10)  # numbers of samples to evaluate


class Recorder(torch.nn.Module):
    """Answers each sample's own number modulo 10, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, number: torch.Tensor) -> torch.Tensor:
        self.asked += number.long().tolist()
        return torch.nn.functional.one_hot(number.long() % 10, 10).float()


def main() -> None:
    folder = Path(sys.argv[1])
    place = distributed.placement(os.environ)
    with distributed.process_group(place, timeout_s=60) as device:
        report: dict[str, object] = {}
        tensors = {**gradients(place, device), **trajectory(device, report)}
        report["diverged"] = divergence(device)
        report |= {str(count): evaluation(count, device) for count in UNEVEN}
    name = f"{place.rank}-of-{place.world_size}"
    safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    image = torch.rand((count, 1, 28, 28), generator=generator, dtype=torch.float64)
    return image, torch.randint(0, 10, (count,), generator=generator)


def gradients(place: distributed.Placement, device: torch.device) -> dict[str, torch.Tensor]:
    """One step's gradients in fp64, each rank having its share of the same batch."""
    torch.manual_seed(0)
    model = DigitsCNN(width=4).double()
    image, label = (tensor[place.rank :: place.world_size] for tensor in batch(BATCH))
    parallel = loop.wrap(model, device)
    cross_entropy(parallel(image), label).backward()
    named = {f"gradient {name}": value.grad for name, value in model.named_parameters()}
    return {name: grad.contiguous() for name, grad in named.items() if grad is not None}


def trajectory(device: torch.device, report: dict[str, object]) -> dict[str, torch.Tensor]:
    """Weights in fp64 after 15 steps of the real loop: 5 batches of 12, 3 epochs, 5 left over."""
    seen: list[list[float]] = []

    def note(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(image[:, 0, 0, 0].tolist())  # the first pixel is another in each sample
        report["generator"] = generator.initial_seed()
        return image

    report["seen"] = seen
    torch.manual_seed(0)
    model = DigitsCNN(width=4).double()
    loop.train(
        model=model,
        samples=TensorDataset(*batch(5 * BATCH + 5)),
        augment=note,
        settings=dataclasses.replace(Settings(), epochs=3, batch_size=BATCH),
        device=device,
        report=lambda _: None,
    )
    return {
        f"weight {name}": value.detach().contiguous() for name, value in model.named_parameters()
    }


def divergence(device: torch.device) -> str:
    image, label = batch(BATCH)
    try:
        loop.train(
            model=DigitsCNN(width=4).double(),
            samples=TensorDataset(image * math.inf, label),
            augment=lambda image, _: image,
            settings=dataclasses.replace(Settings(), batch_size=BATCH),
            device=device,
            report=lambda _: None,
        )
    except TrainingError as error:
        return str(error)
    return ""


def evaluation(count: int, device: torch.device) -> dict[str, object]:
    """Every third of `count` samples has a wrong label."""
    number = torch.arange(count)
    label = (number + (number % 3 == 2)) % 10
    model = Recorder()
    metrics = loop.evaluate(
        model=model, samples=TensorDataset(number.float(), label), device=device, batch_size=2
    )
    return {"asked": model.asked, "metrics": metrics}


if __name__ == "__main__":
    main()
