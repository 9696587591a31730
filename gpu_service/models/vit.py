"""A vision transformer: work enough to keep a GPU busy, in the sizes that papers call by name."""

import torch
from torch import nn

# Width, layers and heads, as in "An Image Is Worth 16x16 Words" and DeiT; `tiny` is for tests.
SIZES = {
    "tiny": (64, 2, 2),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class VisionTransformer(nn.Module):
    """Pixels [n, channels, image, image] float in 0..1 → logits [n, classes].

    `size` is one of SIZES. An image is cut into square patches, which attend to each other; the
    mean of what comes out is what the classes are told apart by.
    """

    def __init__(
        self,
        *,
        size: str = "small",
        image: int = 28,
        patch: int = 4,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        width, layers, heads = SIZES[size]
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    heads,
                    dim_feedforward=4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes]."""
        patches = self.patches(image - 0.5).flatten(2).transpose(1, 2) + self.places
        logits: torch.Tensor = self.classes(self.norm(self.layers(patches)).mean(dim=1))
        return logits
