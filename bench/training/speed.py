"""What the training program costs beside a bare DDP loop, and what a second rank gains.

Without arguments, the whole measurement; `--rank` is one rank of it. The bare loop is the one that
a tutorial shows: nothing but DDP, a sampler and an optimizer. Both take turns, an epoch each, in
the same processes, so that whatever else the machine does falls on both alike.

On a machine with a GPU, it is a vision transformer on that GPU instead, and how much of what the
GPU can do the program makes use of: the model's FLOPs utilisation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from bench.results import Row, write
from bench.training import utilisation
from bench.training.launching import launch
from bench.training.ranks import Quiet
from gpu_service import bundle
from gpu_service.training import distributed
from gpu_service.training.distributed import Placement
from gpu_service.training.loop import Run
from gpu_service.training.monitor import Progress
from gpu_service.training.settings import Settings
from gpu_service.training.snapshot import Snapshots
from gpu_service.training.task import Source, Task

COMMAND = "python -m bench.training.speed"
BATCHES = (64, 256)
STEPS = 12  # of an epoch
EPOCHS = 8  # of each loop
ROUNDS = 2  # of one rank, of two, and of two processes apart
CNN = bundle.Architecture(name="digits_cnn", arguments={"width": 16})


def main() -> int:
    """0 when the bars hold."""
    if "--rank" in sys.argv:
        rank(Path(sys.argv[-1]))
    rows = on_gpu() if torch.cuda.is_available() else on_cpu()
    return 0 if write("training", COMMAND, rows) else 1


def on_gpu() -> list[Row]:
    """One rank on one GPU: what it costs beside a bare loop, and the FLOPs utilisation."""
    with tempfile.TemporaryDirectory() as name:
        launch(1, "bench.training.speed", "--rank", name)
        found = json.loads(Path(name, f"{utilisation.BATCH}.json").read_text())
    overhead = 100 * (found["ours_s"] / found["bare_s"] - 1)
    what = f"ViT {utilisation.SIZE}, bf16, batch {utilisation.BATCH}"
    per_s = utilisation.BATCH * utilisation.flops_of_a_sample() / found["ours_s"]
    rows = [
        Row(
            name=f"training: time over a bare loop, GPU, {what}",
            value=overhead,
            unit="%",
            at_most=3.0,
        ),
        Row(
            name=f"training: speed on {found['device']}, {what}", value=per_s / 1e12, unit="TFLOP/s"
        ),
    ]
    if peak := utilisation.peak(found["device"]):
        name = f"training: FLOPs utilisation of {found['device']}, {what}"
        rows.append(Row(name=name, value=100 * per_s / peak, unit="%"))
    return rows


def on_cpu() -> list[Row]:
    """One rank and two, of one thread each."""
    rows = []
    measured: dict[tuple[int, int], list[dict[str, float]]] = {}
    beside: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        for world_size in (1, 2):
            for batch, found in one_run(world_size).items():
                measured.setdefault((world_size, batch), []).append(found)
        with ThreadPoolExecutor() as both:
            beside += [found[256] for found in both.map(one_run, (1, 1))]
    for batch in BATCHES:
        overhead = statistics.median(
            100 * (found["ours_s"] / found["bare_s"] - 1) for found in measured[2, batch]
        )
        name = f"training: time over a bare DDP loop, 2 ranks, batch {batch}"
        # Where a batch is smaller, the same microseconds a step are a larger share of it.
        bar = 3.0 if batch == max(BATCHES) else None
        rows.append(Row(name=name, value=overhead, unit="%", at_most=bar))
        overhead = statistics.median(
            100 * (found["ours_cpu_s"] / found["bare_cpu_s"] - 1) for found in measured[2, batch]
        )
        name = f"training: CPU time over a bare DDP loop, 2 ranks, batch {batch}"
        rows.append(Row(name=name, value=overhead, unit="%"))
    # The least of several, because others use the machine, too.
    alone, two = (min(found["ours_s"] for found in measured[ranks, 256]) for ranks in (1, 2))
    name = "training: speed of 2 ranks of 1 thread against 1, CNN, batch 256"
    # Cores of a virtual machine may share one of the processor's: two ranks cannot be faster than
    # two processes that have nothing to do with each other.
    apart = 2 * alone / min(found["ours_s"] for found in beside)
    rows += [
        Row(name=name, value=alone / two, unit="times", at_least=1.5),
        Row(name="training: speed of 2 processes apart against 1", value=apart, unit="times"),
        Row(
            name="training: speed of 2 ranks by that of 2 processes apart",
            value=alone / two / apart,
            unit="",
        ),
        Row(name="training: step of 1 rank, CNN, batch 256", value=1000 * alone, unit="ms"),
        Row(name="training: step of 2 ranks, CNN, batch 256", value=1000 * two, unit="ms"),
    ]
    return rows


def one_run(world_size: int) -> dict[int, dict[str, float]]:
    """What rank 0 of so many ranks found, by batch."""
    with tempfile.TemporaryDirectory() as name:
        launch(world_size, "bench.training.speed", "--rank", name)
        return {batch: json.loads(Path(name, f"{batch}.json").read_text()) for batch in BATCHES}


def rank(folder: Path) -> None:
    """Measure on this rank; rank 0 writes what both loops take."""
    place = distributed.placement(os.environ)
    torch.set_num_threads(1)
    with distributed.process_group(place, timeout_s=120) as device:
        if device.type == "cuda":
            batch, task = utilisation.BATCH, digits_like(STEPS * utilisation.BATCH, utilisation.VIT)
            found = compare(place, device, task, Settings(batch_size=batch, precision="bf16"))
            name = torch.cuda.get_device_name(device)
            (folder / f"{batch}.json").write_text(json.dumps({**found, "device": name}))
            os._exit(0)
        for batch in BATCHES:
            found = compare(
                place, device, digits_like(STEPS * batch, CNN), Settings(batch_size=batch)
            )
            if place.rank == 0:
                (folder / f"{batch}.json").write_text(json.dumps(found))
    os._exit(0)


def compare(
    place: Placement, device: torch.device, task: Task, chosen: Settings
) -> dict[str, float]:
    """The median step of each loop, in seconds: `ours_s`, `ours_cpu_s`, `bare_s`, `bare_cpu_s`."""
    settings = dataclasses.replace(chosen, epochs=EPOCHS)
    bare = Bare(task, settings, place=place, device=device)
    turns = Turns(settings, place, bare)
    Run(
        task=task,
        settings=settings,
        place=place,
        device=device,
        snapshots=Snapshots(None, place=place, device=device, course={}),
        monitor=turns,
    ).train()
    # Without the first epoch of each, in which memory is laid out.
    found = {}
    for name, steps in (("ours", turns.steps), ("bare", bare.steps)):
        wall, cpu = zip(*steps.taken[STEPS - 1 :], strict=True)
        found |= {f"{name}_s": statistics.median(wall), f"{name}_cpu_s": statistics.median(cpu)}
    return found


class Steps:
    """What each step took, by the wall and in CPU time of this process, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = (0.0, 0.0)
        self.taken: list[tuple[float, float]] = []

    def note(self, step: int) -> None:
        """At the end of a step; the first of an epoch only sets the clock."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # until then it has only been asked for
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        if step:
            self.taken.append((wall_s - self._last[0], cpu_s - self._last[1]))
        self._last = (wall_s, cpu_s)


class Turns(Quiet):
    """Notes how long our steps take, and has the other loop take its turn after each epoch."""

    def __init__(self, settings: Settings, place: Placement, bare: Bare) -> None:
        super().__init__(settings, place)
        self._bare, self.steps = bare, Steps(bare.device)

    def step(self, *, step: int, **_: Any) -> None:
        self.steps.note(step)

    def epoch(self, progress: Progress) -> None:
        self._bare.epoch(progress.epoch)


class Bare:
    """Distributed training as a tutorial shows it."""

    def __init__(
        self, task: Task, settings: Settings, *, place: Placement, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        self.device, self.steps = device, Steps(device)
        self._autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=settings.precision == "bf16"
        )
        samples = TensorDataset(*(tensor.to(device) for tensor in task.train.tensors))
        self._sampler: DistributedSampler[Any] = DistributedSampler(samples, drop_last=True)
        batches = BatchSampler(
            self._sampler, settings.batch_size // place.world_size, drop_last=True
        )
        self._loader = DataLoader(samples, sampler=batches, batch_size=None)
        self._model = DistributedDataParallel(
            task.build().to(device), gradient_as_bucket_view=True, static_graph=True
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-3, fused=True)

    def epoch(self, epoch: int) -> None:
        self._sampler.set_epoch(epoch)
        for number, (image, label) in enumerate(self._loader):
            with self._autocast():
                loss = cross_entropy(self._model(image), label)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.steps.note(number)


def digits_like(count: int, architecture: bundle.Architecture) -> Task:
    """Random images for a network of digits, whose speed does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((count, 1, 28, 28), generator=generator)
    label = torch.randint(0, 10, (count,), generator=generator)
    return Task(
        name="speed",
        architecture=architecture,
        inputs=(bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 28, 28)),),
        outputs=(bundle.TensorSpec(name="logits", datatype="FP32", shape=(10,)),),
        labels=tuple("0123456789"),
        source=Source(name="random numbers", sha256="0" * 64),
        train=TensorDataset(image, label),
        test=TensorDataset(image[:1], label[:1]),
        loss=partial(cross_entropy, reduction="none"),
    )


if __name__ == "__main__":
    sys.exit(main())
