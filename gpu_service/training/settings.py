"""What a training run can be told: one dataclass, from which the command line is derived.

Pure: reads what it is handed, touches nothing. `python -m gpu_service.training.settings` prints
the reference for docs/training.md.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from gpu_service.training import TrainingError


def _about(
    meaning: str,
    *,
    unit: str = "",
    at_least: float = 0,
    at_most: float = 1e9,
    choices: tuple[str, ...] = (),
    course: bool = True,
) -> dict[str, Any]:
    """`course`: whether it decides which weights come out, so that a resumed run must keep it."""
    return {
        "about": meaning,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "choices": choices,
        "course": course,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run, the same on every rank."""

    task: str = field(
        default="gpu_service.training.digits:task",
        metadata=_about("what is trained, as package.module:factory"),
    )
    output: Path = field(
        default=Path("models"), metadata=_about("folder that gets NAME/VERSION/", course=False)
    )
    name: str = field(
        default="", metadata=_about("name of the model; empty: the task's", course=False)
    )
    version: str = field(
        default="", metadata=_about("its version; empty: the time in UTC", course=False)
    )

    epochs: int = field(
        default=30, metadata=_about("how often to go through the training samples", at_least=1)
    )
    batch_size: int = field(
        default=64, metadata=_about("size of a step over all ranks", unit="samples", at_least=1)
    )
    accumulate: int = field(
        default=1,
        metadata=_about(
            "parts in which a rank takes its share of a step: less memory, the same result",
            at_least=1,
        ),
    )
    uneven: str = field(
        default="drop",
        metadata=_about(
            "the last, smaller batch of an epoch: leave it out, or use it, each sample with the "
            "same weight",
            choices=("drop", "keep"),
        ),
    )
    workers: int = field(
        default=0,
        metadata=_about(
            "processes per rank that fetch samples; 0: the rank itself", at_most=256, course=False
        ),
    )

    learning_rate: float = field(
        default=3e-3, metadata=_about("peak, after the warm-up", at_most=10)
    )
    warmup: float = field(
        default=0.15,
        metadata=_about("share of all steps in which the learning rate rises to it", at_most=1),
    )
    weight_decay: float = field(
        default=1e-2, metadata=_about("AdamW's decay of the weights", at_most=10)
    )
    clip_norm: float = field(
        default=0.0, metadata=_about("most that the gradients' norm may be; 0: anything")
    )
    ema: float = field(
        default=0.0,
        metadata=_about(
            "decay per step of a moving average of the weights, which is what is evaluated and "
            "written; 0: none",
            at_most=1,
        ),
    )
    validation: float = field(
        default=0.0,
        metadata=_about("share of the training samples held out for validation", at_most=0.9),
    )
    patience: int = field(
        default=0,
        metadata=_about(
            "epochs without a better validation loss after which to stop, and write the best "
            "weights; 0: never",
        ),
    )

    precision: str = field(
        default="fp32",
        metadata=_about("of the matrix products (autocast)", choices=("fp32", "bf16", "fp16")),
    )
    compile: bool = field(default=False, metadata=_about("torch.compile the model"))
    compress: str = field(
        default="none",
        metadata=_about("gradients on their way between ranks", choices=("none", "fp16")),
    )
    zero: bool = field(
        default=False,
        metadata=_about("each rank keeps a part of the optimizer's state (ZeRO, stage 1)"),
    )
    sync_batch_norm: bool = field(
        default=False,
        metadata=_about("batch normalisation over the batches of all ranks (GPUs only)"),
    )
    deterministic: bool = field(
        default=False,
        metadata=_about("the same bits in every run with the same world size; may be slower"),
    )
    seed: int = field(
        default=0, metadata=_about("of every random choice of the run", at_most=2**31 - 1)
    )

    snapshots: str = field(
        default="",
        metadata=_about(
            "folder of snapshots, from which an interrupted run goes on; empty: none",
            course=False,
        ),
    )
    snapshot_steps: int = field(
        default=0,
        metadata=_about(
            "take one every so many steps, beside the one after each epoch; 0: no others",
            course=False,
        ),
    )
    timeout_s: float = field(
        default=60.0,
        metadata=_about(
            "how long a rank waits for the others",
            unit="seconds",
            at_least=1,
            at_most=86400,
            course=False,
        ),
    )
    tensorboard: str = field(
        default="", metadata=_about("folder for TensorBoard's files; empty: none", course=False)
    )
    profile: str = field(
        default="",
        metadata=_about(
            "folder for one trace per rank of a few early steps; empty: none", course=False
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
        text = f"{option.metadata['about']} (default {_default(option) or 'none'})"
        if option.type is bool:
            parser.add_argument(
                _flag(option.name), action=argparse.BooleanOptionalAction, default=False, help=text
            )
            continue
        parser.add_argument(
            _flag(option.name),
            type=option.type,
            default=option.default,
            choices=option.metadata["choices"] or None,
            metavar=None if option.metadata["choices"] else option.name.rsplit("_")[-1].upper(),
            help=text,
        )
    # `python -m torch.distributed.launch` adds this; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    chosen = vars(parser.parse_args(arguments))
    del chosen["local_rank"]
    return Settings(**chosen)


def launched_the_old_way(arguments: Sequence[str]) -> bool:
    """Whether `torch.distributed.launch`, which torch will remove, started this process."""
    return any(argument.startswith(("--local-rank", "--local_rank")) for argument in arguments)


def check(settings: Settings, *, world_size: int, gpu: bool) -> None:
    """Raises TrainingError with every setting that cannot be used."""
    problems = []
    for option in dataclasses.fields(settings):
        value, low, high = getattr(settings, option.name), *_limits(option)
        if isinstance(value, (int, float)) and not low <= value <= high:
            problems.append(f"{_flag(option.name)} {value}: not in {low:g}..{high:g}")
    if 1 <= settings.batch_size < world_size:
        problems.append(f"--batch-size {settings.batch_size}: less than one for each rank")
    if settings.patience and not settings.validation:
        problems.append("--patience: needs --validation, a share of the training samples")
    if settings.ema >= 1:
        problems.append(f"--ema {settings.ema:g}: an average that never changes; try 0.999")
    if settings.sync_batch_norm and not gpu:
        problems.append("--sync-batch-norm: torch has it for GPUs only, and this run uses none")
    if settings.snapshot_steps and not settings.snapshots:
        problems.append("--snapshot-steps: needs --snapshots, the folder for them")
    if problems:
        raise TrainingError("; ".join(problems))


def course(settings: Settings) -> dict[str, Any]:
    """The settings that decide which weights come out."""
    return {
        option.name: getattr(settings, option.name)
        for option in dataclasses.fields(settings)
        if option.metadata["course"]
    }


def reference() -> str:
    """All settings as a Markdown table."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in dataclasses.fields(Settings):
        choices = " or ".join(f"`{choice}`" for choice in option.metadata["choices"])
        meaning = option.metadata["about"] + (f": {choices}" if choices else "")
        default = _default(option)
        lines.append(
            f"| `{_flag(option.name)}` | {f'`{default}`' if default else 'none'} | {meaning} |"
        )
    return "\n".join(lines) + "\n"


def _default(option: "dataclasses.Field[Any]") -> str:
    if option.type is bool:
        return "off"
    unit = f" {option.metadata['unit']}" if option.metadata["unit"] else ""
    value = option.default
    return (f"{value:g}" if isinstance(value, float) else str(value)) + unit


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _limits(option: "dataclasses.Field[Any]") -> tuple[float, float]:
    return option.metadata["at_least"], option.metadata["at_most"]


if __name__ == "__main__":
    print(reference(), end="")
