"""A streaming audio model: sound as it comes, 25 ms at a time → what was heard until now.

From this file to a served model:

    python -m examples.audio build
    python -m gpu_service bundle examples.audio:Listener --name listener --output models \\
        --weights build/audio.safetensors --samples build/audio.npz \\
        --input sound:FP32:400 --state heard:FP32:48 --output-name logits \\
        --labels nothing,rising,falling
    python -m gpu_service serve --bundle models/listener --factories examples.audio:Listener

`python -m examples.audio listen ws://127.0.0.1:9005` streams a melody to it, as one sequence: its
state stays on the device.
"""

import asyncio
import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

SAMPLES_PER_S = 16_000
CHUNK = 400
LABELS = ("nothing", "rising", "falling")


class Listener(nn.Module):
    """Sound [n, 400] float and state [n, 48] → logits [n, 3] and the new state [n, 48].

    It hears two tones, one after the other, whatever lies between them. 16,000 samples a second.
    """

    def __init__(self, *, width: int = 48) -> None:
        super().__init__()
        self.bands = nn.Linear(CHUNK // 2 + 1, 24)
        self.cell = nn.GRUCell(24, width)
        self.classes = nn.Linear(width, 3)

    def forward(
        self, sound: torch.Tensor, heard: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step: logits [n, 3], and the new state [n, width]."""
        spectrum = torch.fft.rfft(sound).abs().add(1e-3).log()
        heard = self.cell(torch.relu(self.bands(spectrum)), heard)
        return self.classes(heard), heard


def melodies(random: numpy.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sound [n, chunks, 400] of two tones each, and what is known after each chunk [n, chunks]."""
    chunks = 12
    sound = random.normal(0, 0.02, (count, chunks, CHUNK))
    labels = numpy.zeros((count, chunks), int)
    time = numpy.arange(CHUNK) / SAMPLES_PER_S
    for melody, label in zip(sound, labels, strict=True):
        first, second = random.choice([500, 900, 1600, 2800], 2, replace=False)
        starts = sorted(random.choice(numpy.arange(1, chunks), 2, replace=False))
        for start, pitch in zip(starts, (first, second), strict=True):
            melody[start] += 0.5 * numpy.sin(2 * numpy.pi * pitch * time)
        label[starts[1] :] = 1 if second > first else 2
    return torch.from_numpy(sound).float(), torch.from_numpy(labels)


def main(folder: Path) -> None:
    """Train for some seconds; write the weights, and samples: first chunks with what they tell."""
    torch.manual_seed(0)
    random = numpy.random.default_rng(0)
    model = Listener()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(250):
        sound, label = melodies(random, 64)
        heard = torch.zeros(64, 48)
        loss = torch.zeros(())
        for chunk in range(sound.shape[1]):
            logits, heard = model(sound[:, chunk], heard)
            loss = loss + nn.functional.cross_entropy(logits, label[:, chunk])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item() / sound.shape[1]:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "audio.safetensors")
    sound, label = melodies(random, 16)
    numpy.savez(folder / "audio.npz", sound=sound[:, 0].numpy(), label=label[:, 0].numpy())


async def listen(url: str) -> None:
    """Stream one melody to a server, and print what it has heard after each chunk."""
    from gpu_service.client import Client

    sound, _ = melodies(numpy.random.default_rng(1), 1)
    async with Client(url) as client, client.sequence(model="listener") as sequence:
        for number, chunk in enumerate(sound[0].numpy(), start=1):
            result = await sequence.step({"sound": chunk[None]})
            print(f"{25 * number:4} ms: {LABELS[result.outputs['logits'][0].argmax()]}")


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        asyncio.run(listen(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
