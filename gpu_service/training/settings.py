"""What a training run can be told: one dataclass, from which the command line is derived.

Pure: reads what it is handed, touches nothing.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from gpu_service.training import TrainingError


def _about(
    meaning: str, *, unit: str = "", at_least: float = 0, at_most: float = 1e9
) -> dict[str, object]:
    return {"about": meaning, "unit": unit, "at_least": at_least, "at_most": at_most}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run, the same on every rank."""

    output: Path = field(default=Path("models"), metadata=_about("folder that gets NAME/VERSION/"))
    name: str = field(default="digits", metadata=_about("name of the model"))
    version: str = field(default="", metadata=_about("its version; empty: the time in UTC"))
    epochs: int = field(
        default=50, metadata=_about("how often to go through the training samples", at_least=1)
    )
    batch_size: int = field(
        default=64, metadata=_about("size of a step over all ranks", unit="samples", at_least=1)
    )
    learning_rate: float = field(
        default=3e-3, metadata=_about("peak of the one-cycle schedule", at_most=10)
    )
    weight_decay: float = field(
        default=1e-2, metadata=_about("AdamW's decay of the weights", at_most=10)
    )
    label_smoothing: float = field(
        default=0.1, metadata=_about("share of the target spread over all labels", at_most=1)
    )
    seed: int = field(
        default=0,
        metadata=_about("makes runs with the same world size repeatable", at_most=2**31 - 1),
    )
    timeout_s: float = field(
        default=60.0,
        metadata=_about(
            "how long a rank waits for the others", unit="seconds", at_least=1, at_most=86400
        ),
    )


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from the command line; argparse ends the process where it cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m gpu_service.training",
        description="Train a model with DistributedDataParallel and write its bundle.",
        epilog="On two cores: torchrun --standalone --nproc-per-node=2 -m gpu_service.training",
        allow_abbrev=False,
    )
    for option in dataclasses.fields(Settings):
        unit = f", {option.metadata['unit']}" if option.metadata["unit"] else ""
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=option.type,
            default=option.default,
            metavar=option.name.rsplit("_")[-1].upper(),
            help=f"{option.metadata['about']} (default {str(option.default) or 'none'}{unit})",
        )
    return Settings(**vars(parser.parse_args(arguments)))


def check(settings: Settings, *, world_size: int) -> None:
    """Raises TrainingError with every setting that cannot be used."""
    problems = []
    for option in dataclasses.fields(settings):
        value, low, high = getattr(settings, option.name), *_limits(option)
        if isinstance(value, (int, float)) and not low <= value <= high:
            problems.append(f"--{option.name.replace('_', '-')} {value}: not in {low:g}..{high:g}")
    if settings.batch_size % world_size:
        problems.append(
            f"--batch-size {settings.batch_size}: cannot be shared equally by {world_size} ranks"
        )
    if problems:
        raise TrainingError("; ".join(problems))


def _limits(option: "dataclasses.Field[Any]") -> tuple[float, float]:
    return option.metadata["at_least"], option.metadata["at_most"]
