"""How much work a GPU has with the vision transformer, and how much it could do.

FLOPs are counted by torch, for a forward and a backward pass: what is recomputed, copied or
compared counts for nothing.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from gpu_service import bundle
from gpu_service.models.vit import VisionTransformer

SIZE, BATCH = "base", 512
VIT = bundle.Architecture(name="vit", arguments={"size": SIZE})

# bf16 with dense matrices, in FLOP/s, from the makers' data sheets; by a part of the device's name.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}


def peak(device: str) -> float | None:
    """Of a device by its name; None where it is not known."""
    return next((value for part, value in PEAKS.items() if part in device), None)


def flops_of_a_sample(size: str = SIZE) -> int:
    """Of learning from one image: forward and backward."""
    with torch.device("meta"):
        model = VisionTransformer(size=size)
        with FlopCounterMode(display=False) as counter:
            model(torch.rand(1, 1, 28, 28)).sum().backward()
    return counter.get_total_flops()
