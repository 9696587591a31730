"""A text model: UTF-8 bytes of any length → what kind of text they are.

From this file to a served model:

    python -m examples.text build
    python -m gpu_service bundle examples.text:Kinds --name kinds --output models \\
        --weights build/text.safetensors --samples build/text.npz \\
        --input text:UINT8:-1 --output-name logits --labels date,address,number,words
    python -m gpu_service serve --bundle models/kinds --factories examples.text:Kinds
    python -m gpu_service predict ws://127.0.0.1:9005 --bundle models/kinds

Texts of one batch have one length: a client that sends several pads them with zeros, which the
model passes over.
"""

import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn

WORDS = ("wir", "schicken", "das", "paket", "heute", "thank", "you", "for", "a", "quick", "café")


class Kinds(nn.Module):
    """UTF-8 bytes [n, length] uint8, padded with zeros → logits [n, 4].

    An embedding of bytes, a GRU, and the mean of its outputs over what is no padding. Bytes are
    all there is to know of the text's encoding: no tokenizer has to be deployed with the model.
    """

    def __init__(self, *, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.classes = nn.Linear(width, 4)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits [n, 4] of date, address, number and words."""
        mask = (text != 0).unsqueeze(-1)
        # It reads forwards, so that what stands before the padding does not depend on it.
        hidden, _ = self.recurrent(self.embedding(text.long()))
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: torch.Tensor = self.classes(mean)
        return logits


def encode(texts: list[str]) -> torch.Tensor:
    """Bytes [n, length of the longest] of some texts, padded with zeros."""
    encoded = [text.encode() for text in texts]
    longest = max(map(len, encoded))
    return torch.tensor([list(text.ljust(longest, b"\0")) for text in encoded], dtype=torch.uint8)


def texts(random: numpy.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up texts, and which kind each is."""
    labels = random.integers(0, 4, count)
    found = []
    for label in labels:
        one, two, three = (int(number) for number in random.integers(1, 28, 3))
        words = [str(word) for word in random.choice(WORDS, 3 + three // 9)]
        kinds = (
            random.choice(
                [f"20{one:02}-{three % 12 + 1:02}-{two:02}", f"{two}.{one % 12 + 1}.19{three}"]
            ),
            f"{words[0]}.{words[1]}@{words[2]}.{random.choice(['com', 'de', 'org'])}",
            random.choice([f"{one * two * three:,}", f"{one / three:.4f}", f"-{one}e{two}"]),
            " ".join(words),
        )
        found.append(str(kinds[label]))
    return encode(found), torch.from_numpy(labels)


def main(folder: Path) -> None:
    """Train for some seconds; write the weights, and samples with their true labels."""
    torch.manual_seed(0)
    random = numpy.random.default_rng(0)
    model = Kinds()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        text, label = texts(random, 64)
        loss = nn.functional.cross_entropy(model(text), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 39:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "text.safetensors")
    text, label = texts(random, 16)
    numpy.savez(folder / "text.npz", text=text.numpy(), label=label.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
