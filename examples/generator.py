"""A text generator: the begin of a sentence → its rest, one byte a response.

From this file to a served model:

    python -m examples.generator build
    python -m gpu_service bundle examples.generator:Writer --name writer --output models \\
        --weights build/generator.safetensors --samples build/generator.npz \\
        --input window:UINT8:32 --output-name byte --output-name window --output-name ended \\
        --feedback window=window --done ended
    python -m gpu_service serve --bundle models/writer --factories examples.generator:Writer

`python -m examples.generator ask ws://127.0.0.1:9005 "A batch "` prints the sentence. It is one
request with `max_responses`: the window that the model returns is its next input, on the server,
until `ended` is true.
"""

import asyncio
import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

LENGTH = 32
SENTENCES = (
    "A batch fires when the device is idle.\n",
    "State stays on the device, a row for each stream.\n",
    "Requests that nobody waits for any more cost nothing.\n",
    "Pickle is never loaded; weights are data.\n",
)


class Writer(nn.Module):
    """The last 32 bytes [n, 32] uint8 → the next one [n], the next window [n, 32], the end [n].

    Without a prompt that long, zeros come first. It knows four sentences, and no others.
    """

    def __init__(self, *, width: int = 16, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(LENGTH * width, hidden), nn.ReLU(), nn.Linear(hidden, 256)
        )

    def scores(self, window: torch.Tensor) -> torch.Tensor:
        """Logits [n, 256] of the next byte."""
        logits: torch.Tensor = self.layers(self.embedding(window.long()))
        return logits

    def forward(self, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The likeliest next byte, the window that ends with it, and whether it ends a line."""
        byte = self.scores(window).argmax(-1).to(torch.uint8)
        return byte, torch.cat([window[:, 1:], byte[:, None]], 1), byte == ord("\n")


def window_of(text: bytes) -> list[int]:
    """The last 32 bytes of `text`, with zeros before a shorter one."""
    return list(text[-LENGTH:].rjust(LENGTH, b"\0"))


def main(folder: Path) -> None:
    """Train for some seconds; write the weights, and the begins of the sentences as samples."""
    torch.manual_seed(0)
    pairs = [
        (window_of(sentence[:end].encode()), ord(sentence[end]))
        for sentence in SENTENCES
        for end in range(1, len(sentence))
    ]
    windows = torch.tensor([window for window, _ in pairs], dtype=torch.uint8)
    following = torch.tensor([byte for _, byte in pairs])
    model = Writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        loss = nn.functional.cross_entropy(model.scores(windows), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "generator.safetensors")
    samples = numpy.array([window_of(sentence[:9].encode()) for sentence in SENTENCES], "u1")
    numpy.savez(folder / "generator.npz", window=samples)


async def ask(url: str, begin: str) -> None:
    """Print what follows `begin`, byte by byte as it comes."""
    from gpu_service.client import Client

    window = numpy.array([window_of(begin.encode())], "u1")
    print(begin, end="", flush=True)
    async with Client(url) as client:
        responses = client.stream_infer({"window": window}, max_responses=200, model="writer")
        async for response in responses:
            print(chr(response.outputs["byte"][0]), end="", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        asyncio.run(ask(sys.argv[2], sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
