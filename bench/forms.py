"""What fused kernels gain on a CPU, by kind of network: `python -m bench.forms`.

Networks of some kinds with random weights, on one thread, and the example model: as the module,
as one traced call, and in a form with fused kernels (gpu_service/fusion.py), in turns. A row is a
form's time by that of the traced call in the same turn; below 1 is faster. The warm-up of a worker
measures the same and keeps what is.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench import harness
from bench.results import Row, write
from gpu_service import bundle, fusion, models
from gpu_service.bundle import TensorSpec
from gpu_service.signature import ModelInfo

_SIZES = (1, 8, 32)

# Of each measurement: as many runs as fit in, one at least.
_SECONDS = 0.02


@dataclass(frozen=True)
class Kind:
    """A network and its input."""

    name: str
    network: nn.Module
    input: TensorSpec


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] → the same."""
        return torch.relu(x + self.layers(x))


class LastStep(nn.Module):
    """A recurrent network of two layers, [n, t, 40] → [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(40, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last step alone."""
        logits: torch.Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


class Encoder(nn.Module):
    """A transformer of two layers, [n, t] int64 → [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the mean of all steps."""
        logits: torch.Tensor = self.head(self.layers(self.embedding(x)).mean(1))
        return logits


def residual() -> nn.Module:
    """[n, 3, 64, 64] → [n, 100]."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU()]
    for channels, following in itertools.pairwise((64, 128, 256)):
        layers += [Block(channels), nn.Conv2d(channels, following, 3, stride=2), nn.ReLU()]
    layers += [Block(256), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def sound() -> nn.Module:
    """[n, 1, 4000] → [n, 8]."""
    return nn.Sequential(
        nn.Conv1d(1, 32, 16, stride=4),
        nn.ReLU(),
        nn.Conv1d(32, 64, 8, stride=4),
        nn.ReLU(),
        nn.Conv1d(64, 64, 4, stride=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 8),
    )


def perceptron() -> nn.Module:
    """[n, 784] → [n, 10]."""
    layers = nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10)
    return nn.Sequential(*layers)


def kinds() -> list[Kind]:
    """The example model first."""
    path = harness.model()
    (image,) = bundle.read_manifest(path).inputs

    def spec(*shape: int, datatype: str = "FP32") -> TensorSpec:
        return TensorSpec(name="x", datatype=datatype, shape=shape)

    return [
        Kind("the example model", models.load_model(path), image),
        Kind("residual network, 64 x 64", residual(), spec(3, 64, 64)),
        Kind("convolutions of sound", sound(), spec(1, 4000)),
        Kind("perceptron", perceptron(), spec(784)),
        Kind("transformer, 64 tokens", Encoder(), spec(64, datatype="INT64")),
        Kind("GRU, 50 steps", LastStep(), spec(50, 40)),
    ]


def seconds(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """The shortest of some runs in a while."""
    best, ends = float("inf"), time.perf_counter() + _SECONDS
    while (started := time.perf_counter()) < ends:
        run(x)
        best = min(best, time.perf_counter() - started)
    return best


@torch.inference_mode()
def measure(kind: Kind, turns: int) -> list[Row]:
    """The rows of one kind: first those of the module, by size."""
    info = ModelInfo(name=kind.name, version="", inputs=(kind.input,), outputs=())
    forms = fusion.traced(kind.network.eval(), info, max_batch=max(_SIZES))
    if forms is None:
        sys.exit(f"{kind.name} can't be traced")
    traced, fused = forms
    rows = []
    for size in _SIZES:
        runs: dict[str, Callable[[torch.Tensor], object]]
        runs = {"module": kind.network, "traced": traced}
        if (form := fused.form(size)) is not None:
            runs["fused"] = form
        x = torch.rand(size, *kind.input.shape)
        x = x if kind.input.datatype == "FP32" else (x * 1000).long()
        found = [{name: seconds(run, x) for name, run in runs.items()} for _ in range(turns)]
        for name in runs.keys() - {"traced"}:
            ratio = statistics.median(turn[name] / turn["traced"] for turn in found)
            rows.append(Row(name=f"{kind.name}, batches of {size}: {name}", value=ratio, unit=""))
    return sorted(rows, key=lambda row: row.name.rpartition(":")[2], reverse=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.forms", description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for kind in kinds() for row in measure(kind, options.turns)]
    return 0 if write("serving", "python -m bench.forms", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
