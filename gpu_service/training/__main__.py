"""A training run from settings to bundle, in order.

Every rank runs this file; rank 0 alone checks the output, prints and writes.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from gpu_service import bundle
from gpu_service.training import TrainingError, distributed, evaluation, learner, output
from gpu_service.training import settings as _settings
from gpu_service.training import task as tasks
from gpu_service.training.loop import Run
from gpu_service.training.monitor import Monitor
from gpu_service.training.snapshot import Snapshots


@record  # tells torchrun which rank failed first, and of what
def run(settings: _settings.Settings) -> None:
    """Train, evaluate, and write the bundle. Raises TrainingError and BundleError."""
    place = distributed.placement(os.environ)
    distributed.end_with_launcher(os.environ)
    _settings.check(settings, world_size=place.world_size, gpu=torch.cuda.is_available())
    task = tasks.load(settings.task)
    if place.rank == 0:  # before anything that takes time
        output.check_writable(settings, task)
    monitor = Monitor(settings, place)
    with (
        distributed.process_group(place, timeout_s=settings.timeout_s) as device,
        learner.determinism(settings),
    ):
        monitor.say(
            f"world size {place.world_size}, {dist.get_backend()} on {device.type}; "
            f"{task.source.name}"
        )
        snapshots = Snapshots(
            Path(settings.snapshots) if settings.snapshots else None,
            place=place,
            device=device,
            course=_settings.course(settings),
        )
        trained = Run(
            task=task,
            settings=settings,
            place=place,
            device=device,
            snapshots=snapshots,
            monitor=monitor,
            version=settings.version or bundle.new_version(),
        ).train()
        model = task.build()
        model.load_state_dict(trained.weights)
        result = evaluation.evaluate(
            task=task, model=model.to(device), samples=task.test, device=device
        )
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        monitor.say(f"test {figures}, of {len(task.test)} held out")
        if place.rank == 0:
            path = output.write(settings, task, trained, result, model=model.cpu())
            monitor.say(f"bundle {path}")
        monitor.close()


def main() -> NoReturn:
    """Run, and end the process: 0 when the bundle is written, 2 when the person must act."""
    settings = _settings.parse(sys.argv[1:])
    if _settings.launched_the_old_way(sys.argv[1:]) and os.environ.get("RANK") == "0":
        print(
            "training: torch.distributed.launch is going to be removed from torch; "
            "`torchrun` takes the same options",
            file=sys.stderr,
        )
    code = 0
    try:
        run(settings)
    except (TrainingError, bundle.BundleError) as error:
        print(f"training: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: while the interpreter shuts down, threads of torch.distributed may abort the
    # process (torch 2.13), which torchrun takes for a failed worker.
    os._exit(code)


if __name__ == "__main__":
    main()
