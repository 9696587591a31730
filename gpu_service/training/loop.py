"""The epochs of a run: what every rank does, in step with the others.

Owns where the run stands, and its curve. Needs a process group.
"""

import dataclasses
import math
import time

import torch
import torch.distributed as dist

from gpu_service.training import TrainingError, data, evaluation
from gpu_service.training.distributed import Placement
from gpu_service.training.learner import Learner, learning_rate
from gpu_service.training.monitor import Monitor, Progress
from gpu_service.training.settings import Settings
from gpu_service.training.snapshot import Snapshot, Snapshots
from gpu_service.training.task import Task

_BEST = "best."  # prefix of the best weights among a snapshot's tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What comes out, equal on every rank: weights, and one row of the curve per epoch."""

    weights: dict[str, torch.Tensor]
    curve: tuple[dict[str, float], ...]
    samples: int
    version: str  # of the bundle that it becomes, which a resumed run keeps


class Run:
    """One run on one rank. Make it, and `train`."""

    def __init__(
        self,
        *,
        task: Task,
        settings: Settings,
        place: Placement,
        device: torch.device,
        snapshots: Snapshots,
        monitor: Monitor,
        version: str = "",
    ) -> None:
        self.task, self.settings, self.place, self.device = task, settings, place, device
        self.snapshots, self.monitor, self.version = snapshots, monitor, version
        samples, validation = data.hold_out(task.train, settings.validation)
        self.samples, self.validation = data.on(device, samples), data.on(device, validation)
        self.batches = data.Batches(
            len(samples),
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=place.rank,
            world_size=place.world_size,
            keep_last=settings.uneven == "keep",
        )
        self.steps = len(self.batches)  # of an epoch
        if not self.steps:
            raise TrainingError(
                f"--batch-size {settings.batch_size}: there are only {len(samples)} training "
                "samples"
            )
        self.loader = data.load(
            self.samples, self.batches, workers=settings.workers, pin=device.type == "cuda"
        )
        torch.manual_seed(settings.seed)  # of the first weights
        self.learner = Learner(
            task=task, settings=settings, device=device, steps=self.steps * settings.epochs
        )
        self.epoch, self.step = 0, 0  # where the run begins, or goes on
        self.loss = torch.zeros((), device=device)  # summed over the epoch's steps so far
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] = {}

    def train(self) -> Trained:
        """Learn until the end, from the beginning or from the newest snapshot.

        Raises TrainingError, on every rank, when the loss is no longer a number.
        """
        if snapshot := self.snapshots.resume():
            self._restore(snapshot)
        for epoch in range(self.epoch, self.settings.epochs):
            if self._patience_is_out():
                break
            self._learn(epoch)
            self._save(epoch + 1, 0)
        self.snapshots.wait()
        return Trained(
            weights=self.best or self.learner.weights(),
            curve=tuple(self.curve),
            samples=len(self.samples),
            version=self.version,
        )

    def _learn(self, epoch: int) -> None:
        """The steps of an epoch that are left, and its row of the curve."""
        started_s, first = time.monotonic(), self.step
        self.batches.set_epoch(epoch, first=first)  # each epoch has another order
        for step, batch in enumerate(self.loader, start=first):
            # All that is random in a step follows from its position: nothing to restore.
            data.seed_step(self.device, self.settings.seed, epoch, step, self.place.rank)
            sample = data.moved(batch, self.device)
            if self.task.augment:
                sample = self.task.augment(*sample)
            inputs, targets = self.task.divide(sample)
            loss = self.learner.step(
                inputs,
                targets,
                weight=self.batches.weight(step),
                number=epoch * self.steps + step,
            )
            self.loss += loss
            self.monitor.step(epoch=epoch, step=step, steps=self.steps, loss=loss)
            if self._snapshot_is_due(step + 1):
                self._save(epoch, step + 1)
        samples = sum(map(self.batches.size, range(first, self.steps)))
        self._finish(epoch, samples=samples, elapsed_s=time.monotonic() - started_s)

    def _finish(self, epoch: int, *, samples: int, elapsed_s: float) -> None:
        """Add the epoch's row to the curve, keep the best weights, and tell."""
        loss = self._loss_over_ranks() / (self.place.world_size * self.steps)
        if not math.isfinite(loss):
            raise TrainingError(
                f"epoch {epoch + 1}: the loss is {loss}; try a --learning-rate below "
                f"{self.settings.learning_rate:g}, or --clip-norm 1"
            )
        self.loss.zero_()
        self.step = 0
        number = (epoch + 1) * self.steps
        rate = learning_rate(number - 1, self.steps * self.settings.epochs, self.settings)
        validation = self._validate()
        row = {"epoch": epoch + 1, "loss": loss, "learning_rate": rate}
        self.curve.append(row | {f"validation_{name}": v for name, v in validation.items()})
        if self.settings.patience and self._best_epoch() == epoch + 1:
            self.best = self.learner.weights()
        self.monitor.epoch(
            Progress(
                epoch=epoch + 1,
                epochs=self.settings.epochs,
                loss=loss,
                learning_rate=rate,
                samples_per_s=samples / elapsed_s,
                remaining_s=elapsed_s * (self.settings.epochs - epoch - 1),
                efficiency=self.learner.efficiency(),
                validation=validation,
            )
        )

    def _validate(self) -> dict[str, float]:
        if not self.settings.validation:
            return {}
        return evaluation.evaluate(
            task=self.task,
            model=self.learner.served(),
            samples=self.validation,
            device=self.device,
            workers=self.settings.workers,
        ).metrics

    def _best_epoch(self) -> int:
        """By validation loss, from 1 on; the first of equals."""
        return int(min(self.curve, key=lambda row: row["validation_loss"])["epoch"])

    def _patience_is_out(self) -> bool:
        patience = self.settings.patience
        return bool(patience and self.curve) and len(self.curve) - self._best_epoch() >= patience

    # -------------------------------------------------------------------------- snapshots

    def _snapshot_is_due(self, step: int) -> bool:
        every = self.settings.snapshot_steps
        return bool(every) and step % every == 0 and step < self.steps

    def _save(self, epoch: int, step: int) -> None:
        """Take a snapshot that goes on before `step` of `epoch`."""
        if not self.snapshots:
            return
        loss = self._loss_over_ranks()
        tensors, facts = self.learner.state()
        tensors |= {_BEST + name: value for name, value in self.best.items()}
        facts |= {"curve": self.curve, "loss": loss, "version": self.version}
        self.snapshots.save(epoch=epoch, step=step, tensors=tensors, facts=facts)

    def _restore(self, snapshot: Snapshot) -> None:
        self.learner.restore(snapshot.tensors, snapshot.facts)
        self.best = {
            name.removeprefix(_BEST): value.to(self.device)
            for name, value in snapshot.tensors.items()
            if name.startswith(_BEST)
        }
        self.curve, self.version = snapshot.facts["curve"], snapshot.facts["version"]
        self.loss += snapshot.facts["loss"] / self.place.world_size
        self.epoch, self.step = snapshot.epoch, snapshot.step
        if self.epoch < self.settings.epochs and not self._patience_is_out():
            where = f"resumed at epoch {self.epoch + 1}, step {self.step + 1} of {self.steps}"
        else:
            where = "this run had learnt to its end"
        self.monitor.say(f"{where}; {snapshot.facts['world_size']} ranks took the snapshot")

    def _loss_over_ranks(self) -> float:
        total = self.loss.clone()
        dist.all_reduce(total)
        return float(total.item())
