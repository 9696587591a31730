"""Many ranks compute what one does: the greatest difference of gradients and of trajectories."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from bench.results import Row, write
from bench.training.launching import launch
from bench.training.ranks import TRAJECTORIES

COMMAND = "python -m bench.training.equality"
BARS = {"float32": 1e-6, "float64": 1e-15} | dict.fromkeys(TRAJECTORIES, 1e-10)


def main() -> int:
    """0 when every difference is within its bar."""
    differences = measure((2, 4))
    rows = []
    for (ranks, part), value in differences.items():
        what = "gradient" if part.startswith("float") else "50 steps in float64"
        name = f"training: {what}, {part}, {ranks} ranks against one"
        rows.append(Row(name=name, value=value, unit="", at_most=BARS[part]))
    return 0 if write("training", COMMAND, rows) else 1


def measure(world_sizes: Sequence[int]) -> dict[tuple[int, str], float]:
    """By number of ranks and part: the greatest absolute difference to one rank, on any rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world_size in (1, *world_sizes):
            launch(world_size, "bench.training.ranks", str(folder))
        alone = safetensors.torch.load_file(folder / "0-of-1.safetensors")
        found: dict[tuple[int, str], float] = {}
        for world_size in world_sizes:
            for rank in range(world_size):
                file = folder / f"{rank}-of-{world_size}.safetensors"
                for key, value in safetensors.torch.load_file(file).items():
                    part = (world_size, key.partition(":")[0])
                    difference = (value - alone[key]).abs().max().item()
                    found[part] = max(found.get(part, 0.0), difference)
    return found


if __name__ == "__main__":
    sys.exit(main())
