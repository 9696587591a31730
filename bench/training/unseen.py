"""How the streaming example does with people whom it has never seen: each of them once.

Five runs, each without two of the ten people (1 and 6, 2 and 7, …), who are its test. The run
without 5 and 10 is the one of which the bundle is; its settings were chosen with the other eight.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

from bench.results import Row, write
from bench.training.launching import launch
from bench.training.ranks import Quiet
from gpu_service.training import distributed, evaluation, settings, watch
from gpu_service.training.loop import Run
from gpu_service.training.snapshot import Snapshots

COMMAND = "python -m bench.training.unseen"
FOLDS = ((5, 10), (1, 6), (2, 7), (3, 8), (4, 9))
RANKS = 2
BAR = 0.85


def main() -> int:
    """0 when the bar holds."""
    if "--rank" in sys.argv:
        rank(Path(sys.argv[-1]), FOLDS[int(sys.argv[-2])])
    found = []
    for number, people in enumerate(FOLDS):
        with tempfile.TemporaryDirectory() as name:
            launch(RANKS, "bench.training.unseen", "--rank", str(number), name, timeout_s=3600)
            found.append(json.loads(Path(name, "metrics.json").read_text()))
        print(f"people {people}: {found[-1]}", flush=True)
    return 0 if write("training", COMMAND, rows(found)) else 1


def rows(found: list[dict[str, float]]) -> list[Row]:
    """The rows of what the folds measured, in their order."""
    accuracy = [each["accuracy"] for each in found]
    at_end = [each["at_end"] for each in found]
    name = "training: watch, answers right"
    row = partial(Row, unit="", counted=True)
    return [
        row(
            name=f"{name}, people 5 and 10, held out from the start",
            value=accuracy[0],
            at_least=BAR,
        ),
        row(name=f"{name}, each person unseen once", value=mean(accuracy), at_least=BAR),
        row(name=f"{name}, standard deviation of five folds", value=stdev(accuracy)),
        *(
            row(name=f"{name}, people {a} and {b} unseen", value=value)
            for (a, b), value in zip(FOLDS[1:], accuracy[1:], strict=True)
        ),
        row(name="training: watch, last answer right, each person unseen once", value=mean(at_end)),
    ]


def rank(folder: Path, people: tuple[int, ...]) -> None:
    """One rank of a run without `people`; rank 0 writes what the model is worth with them."""
    place = distributed.placement(os.environ)
    torch.set_num_threads(1)
    task, chosen = watch.task(people), settings.parse(watch.OPTIONS)
    with distributed.process_group(place, timeout_s=600) as device:
        trained = Run(
            task=task,
            settings=chosen,
            place=place,
            device=device,
            snapshots=Snapshots(None, place=place, device=device, course={}),
            monitor=Quiet(chosen, place),
        ).train()
        model = task.build()
        model.load_state_dict(trained.weights)
        result = evaluation.evaluate(
            task=task, model=model.to(device), samples=task.test, device=device
        )
        if place.rank == 0:
            (folder / "metrics.json").write_text(json.dumps(result.metrics))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
