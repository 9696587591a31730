"""DataParallel against DistributedDataParallel, on one model: `python -m bench.data_parallel`.

Prints a table, writes bench/results/data_parallel.svg and rows in bench/results/training.json.
docs/explanation/data-parallel.md tells what it shows. `--rank` is one rank of the DDP part.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from bench import results
from bench.data_parallel import chart, ways
from bench.data_parallel.ways import BATCH, MODELS, PARTS, Emulated, Single, Step
from bench.training.launching import launch
from gpu_service.training import distributed

COMMAND = "python -m bench.data_parallel"
STEPS, WARM_UP, ROUNDS = 30, 5, 3
EMULATED = "DataParallel, emulated"

Steps = list[Step]


def main() -> int:
    """Always 0: these figures explain, and have no bar."""
    if "--rank" in sys.argv:
        rank(Path(sys.argv[-1]))
    torch.set_num_threads(1)
    real = torch.cuda.device_count() >= PARTS
    parallel = "DataParallel" if real else EMULATED
    found: dict[str, dict[str, Steps]] = {
        model: {way: [] for way in ("one process", parallel, "DDP")} for model in MODELS
    }
    for _ in range(ROUNDS):  # in turns, so that whatever else runs here falls on all alike
        with_ddp = distributed_steps()
        for model, build in MODELS.items():
            steps = found[model]
            steps["one process"] += single(build())
            steps[parallel] += data_parallel(build()) if real else emulated(build())
            steps["DDP"] += with_ddp[model]
    report(found)
    return 0


def single(model: nn.Module) -> Steps:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return taken(Single(model.to(device), ways.batch(device)))


def emulated(model: nn.Module) -> Steps:
    return taken(Emulated(model, ways.batch(torch.device("cpu"))))


def data_parallel(model: nn.Module) -> Steps:
    device = torch.device("cuda", 0)
    parallel = nn.DataParallel(model.to(device), device_ids=list(range(PARTS)))
    return taken(Single(parallel, ways.batch(device)))


def distributed_steps() -> dict[str, Steps]:
    """By model, the steps of rank 0 of a process group."""
    with tempfile.TemporaryDirectory() as name:
        launch(PARTS, "bench.data_parallel", "--rank", name)
        rows = json.loads((Path(name) / "steps.json").read_text())
    return {model: [Step(**row) for row in steps] for model, steps in rows.items()}


def rank(folder: Path) -> None:
    """One rank: train each model with DDP; rank 0 writes what its steps took."""
    place = distributed.placement(os.environ)
    torch.set_num_threads(1)
    with distributed.process_group(place, timeout_s=120) as device:
        rows = {}
        for model, build in MODELS.items():
            data = ways.batch(device, BATCH // PARTS)
            steps = taken(Single(ways.wrapped(build().to(device), device), data))
            rows[model] = [vars(step) for step in steps]
        if place.rank == 0:
            (folder / "steps.json").write_text(json.dumps(rows))
    os._exit(0)


def taken(way: Single | Emulated) -> Steps:
    """The steps after the first few."""
    return [way.step() for _ in range(WARM_UP + STEPS)][WARM_UP:]


def report(found: dict[str, dict[str, Steps]]) -> None:
    header = (
        f"{'model':<18}{'way':<26}{'step':>10}{'copies':>8}{'moved':>12}{'copying':>10}"
        f"{'waiting':>10}"
    )
    print(header, "-" * len(header), sep="\n")
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    rows = []
    for model, by_way in found.items():
        for way, steps in by_way.items():
            step_ms = middle(step.wall_s for step in steps)
            waiting_ms = middle(step.waiting_s for step in steps)
            copying_ms = middle(step.copying_s for step in steps)
            kind = way.partition(",")[0]
            copies = PARTS - 1 if kind == "DataParallel" else 0
            moved = ways.moved_bytes(MODELS[model](), way=kind)
            print(
                f"{model:<18}{way:<26}{step_ms:>7.1f} ms{copies:>8}{moved:>10,} B"
                f"{copying_ms:>7.1f} ms{waiting_ms:>7.1f} ms"
            )
            groups.setdefault(model, {})[way] = (step_ms, waiting_ms)
            name = f"data parallel: {model}, {way}"
            rows += [
                results.Row(name=f"{name}, step", value=step_ms, unit="ms"),
                results.Row(name=f"{name}, waiting", value=waiting_ms, unit="ms"),
                results.Row(name=f"{name}, copying the model", value=copying_ms, unit="ms"),
                results.Row(name=f"{name}, moved", value=moved, unit="bytes"),
            ]
    print()
    results.write("training", COMMAND, rows)
    title = f"A step on a batch of {BATCH}, {PARTS} threads or ranks against one"
    note = "pale: a computing thread waited, for the interpreter's lock or for other ranks"
    file = results.RESULTS / "data_parallel.svg"
    file.write_text(chart.svg(title, note, groups))
    print(file)


def middle(values_s: Iterable[float]) -> float:
    """The median, in ms."""
    return 1000 * statistics.median(values_s)


if __name__ == "__main__":
    sys.exit(main())
