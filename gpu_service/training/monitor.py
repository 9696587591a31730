"""What rank 0 tells while a run goes on: lines, TensorBoard's files, the profiler's traces.

Owns the writers of both. Nothing here changes what is learnt.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from gpu_service.training import TrainingError
from gpu_service.training.distributed import Placement
from gpu_service.training.settings import Settings

_LINE_EVERY_S = 10.0
_PROFILED = {"skip_first": 5, "wait": 1, "warmup": 2, "active": 5, "repeat": 1}  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """An epoch, from 1 on, over all ranks: `loss` is the mean over its samples.

    `efficiency` is the share of a step that is not spent waiting for other ranks' gradients.
    """

    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    samples_per_s: float
    remaining_s: float
    efficiency: float
    validation: dict[str, float]


class Monitor:
    """Tells of one run, on rank 0; on other ranks it only takes the trace. Close it."""

    def __init__(self, settings: Settings, place: Placement) -> None:
        self._place, self._settings = place, settings
        self._board = _board(settings.tensorboard) if place.rank == 0 else None
        self._profiler = _profiler(settings.profile, place) if settings.profile else None
        self._last_line_s = time.monotonic()
        if self._profiler:
            self._profiler.start()

    def say(self, text: str) -> None:
        """A line for people."""
        if self._place.rank == 0:
            print(text, flush=True)

    def step(self, *, epoch: int, step: int, steps: int, loss: torch.Tensor) -> None:
        """After each step: a line now and then where an epoch takes long."""
        if self._profiler:
            self._profiler.step()
        now_s = time.monotonic()
        if now_s - self._last_line_s > _LINE_EVERY_S:
            self._last_line_s = now_s
            if self._place.rank == 0:  # asking the device for the loss waits for it
                self.say(f"epoch {epoch + 1:3}  step {step + 1}/{steps}  loss {loss.item():.4f}")

    def epoch(self, progress: Progress) -> None:
        """After each epoch."""
        self._last_line_s = time.monotonic()
        self.say(_line(progress, self._place.world_size))
        if self._board:
            values = {
                "loss/train": progress.loss,
                "learning_rate": progress.learning_rate,
                "samples_per_s": progress.samples_per_s,
                "efficiency": progress.efficiency,
            }
            values |= {f"{name}/validation": v for name, v in progress.validation.items()}
            for name, value in values.items():
                self._board.add_scalar(name, value, progress.epoch)

    def close(self) -> None:
        """Write what is left to write."""
        if self._profiler:
            self._profiler.stop()
        if self._board:
            self._board.close()


def _line(progress: Progress, world_size: int) -> str:
    minutes, seconds = divmod(round(progress.remaining_s), 60)
    parts = [
        f"epoch {progress.epoch:3}/{progress.epochs}",
        f"loss {progress.loss:.4f}",
        *(f"validation {name} {value:.4f}" for name, value in progress.validation.items()),
        f"lr {progress.learning_rate:.2e}",
        f"{progress.samples_per_s:6.0f} samples/s",
        *([f"efficiency {progress.efficiency:.0%}"] if world_size > 1 else []),
        f"ETA {minutes}:{seconds:02}",
    ]
    return "  ".join(parts)


def _board(folder: str) -> Any:
    if not folder:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            f"--tensorboard {folder}: needs the package tensorboard: pip install tensorboard"
        ) from None
    return SummaryWriter(folder)


def _profiler(folder: str, place: Placement) -> torch.profiler.profile:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--profile {folder}: {error.strerror}") from None

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(path / f"rank-{place.rank}.json"))

    return torch.profiler.profile(
        schedule=torch.profiler.schedule(**_PROFILED), on_trace_ready=write
    )
