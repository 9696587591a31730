"""An image model: RGB pictures of any size, as bytes → which way their stripes run.

From this file to a served model:

    python -m examples.image build
    python -m gpu_service bundle examples.image:Stripes --name stripes --output models \\
        --weights build/image.safetensors --samples build/image.npz \\
        --input image:UINT8:-1,-1,3 --output-name logits --labels across,down,slanted
    python -m gpu_service serve --bundle models/stripes --factories examples.image:Stripes
    python -m gpu_service predict ws://127.0.0.1:9005 --bundle models/stripes
"""

import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

ANGLES = (0.0, numpy.pi / 2, numpy.pi / 4)


class Stripes(nn.Module):
    """Pixels [n, height, width, 3] uint8 → logits [n, 3] of across, down and slanted.

    Pixels come as a decoder gives them: what turns them into what the layers like is in here, so
    that clients in any language need not know it.
    """

    def __init__(self, *, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classes = nn.Linear(2 * width, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [n, 3]; the mean over all places makes any size fit."""
        pixels = image.permute(0, 3, 1, 2).float() / 255 - 0.5
        logits: torch.Tensor = self.classes(self.layers(pixels).mean((2, 3)))
        return logits


def pictures(
    random: numpy.random.Generator, count: int, *, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes of any colour, wavelength and phase, with noise; and which way they run."""
    labels = random.integers(0, 3, count)
    y, x = numpy.mgrid[:height, :width]
    angle = numpy.asarray(ANGLES)[labels][:, None, None]
    wavelength = random.uniform(4, 9, (count, 1, 1))
    phase = random.uniform(0, 2 * numpy.pi, (count, 1, 1))
    along = y * numpy.cos(angle) + x * numpy.sin(angle)
    wave = numpy.sin(2 * numpy.pi * along / wavelength + phase)[..., None]
    colour = random.uniform(0.3, 1, (count, 1, 1, 3))
    noise = random.normal(0, 0.1, (count, height, width, 3))
    image = (127.5 + 100 * wave * colour + 127.5 * noise).clip(0, 255).astype("u1")
    return torch.from_numpy(image), torch.from_numpy(labels)


def main(folder: Path) -> None:
    """Train for some seconds; write the weights, and samples with their true labels."""
    torch.manual_seed(0)
    random = numpy.random.default_rng(0)
    model = Stripes()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        side = int(random.integers(24, 49))
        image, label = pictures(random, 32, height=side, width=72 - side)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "image.safetensors")
    image, label = pictures(random, 16, height=40, width=56)
    numpy.savez(folder / "image.npz", image=image.numpy(), label=label.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
