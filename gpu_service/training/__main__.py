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
from torch.utils.data import TensorDataset

from gpu_service import bundle, models
from gpu_service.training import TrainingError, digits, distributed, loop
from gpu_service.training import settings as _settings

ARCHITECTURE = bundle.Architecture(name="digits_cnn", arguments={"width": 16})
INPUT = bundle.TensorSpec(name="image", datatype="FP32", shape=(1, 28, 28))
OUTPUT = bundle.TensorSpec(name="logits", datatype="FP32", shape=(10,))
GOLDEN_SAMPLES = 16


@record  # tells torchrun which rank failed first, and of what
def run(settings: _settings.Settings) -> None:
    """Train, evaluate, and write the bundle. Raises TrainingError and BundleError."""
    place = distributed.placement(os.environ)
    version = settings.version or bundle.new_version()
    if place.rank == 0:  # before anything that takes time
        _settings.check(settings, world_size=place.world_size)
        bundle.check_writable(directory=settings.output, name=settings.name, version=version)
    data = digits.load()
    torch.manual_seed(settings.seed)
    with distributed.process_group(place, timeout_s=settings.timeout_s) as device:
        model = models.build(ARCHITECTURE).to(device)
        _say(
            place,
            f"world size {place.world_size}, {dist.get_backend()} on {device.type}; {data.name}",
        )
        loop.train(
            model=model,
            samples=_on(device, data.train),
            augment=digits.augment,
            settings=settings,
            device=device,
            report=lambda progress: _say(place, _line(progress)),
        )
        metrics = loop.evaluate(model=model, samples=_on(device, data.test), device=device)
        _say(place, f"test accuracy {metrics['test_accuracy']:.2%} of {len(data.test)} held out")
        if place.rank == 0:
            path = _write(settings, version, data, model.cpu(), metrics)
            _say(place, f"bundle {path}")


def main() -> NoReturn:
    """Run, and end the process: 0 when the bundle is written, 2 when the person must act."""
    settings = _settings.parse(sys.argv[1:])
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


def _write(
    settings: _settings.Settings,
    version: str,
    data: digits.Data,
    model: torch.nn.Module,
    metrics: dict[str, float],
) -> Path:
    image, label = data.test[:GOLDEN_SAMPLES]
    with torch.inference_mode():
        logits = model.eval()(image)
    samples = {
        INPUT.name: image.numpy(),
        bundle.EXPECTED + OUTPUT.name: logits.numpy(),
        bundle.LABEL: label.numpy(),
    }
    return bundle.write(
        directory=settings.output,
        name=settings.name,
        version=version,
        architecture=ARCHITECTURE,
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        labels=data.labels,
        training=bundle.Training(
            dataset=data.name,
            dataset_sha256=data.sha256,
            dataset_license=data.license,
            split=data.split,
            train_samples=len(data.train),
            test_samples=len(data.test),
            epochs=settings.epochs,
            seed=settings.seed,
            world_size=dist.get_world_size(),
            backend=dist.get_backend(),
            torch=str(torch.__version__),
            settings={
                "batch_size": settings.batch_size,
                "learning_rate": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "label_smoothing": settings.label_smoothing,
            },
            metrics=metrics,
        ),
        state_dict=model.state_dict(),
        samples=samples,
    )


def _on(device: torch.device, samples: TensorDataset) -> TensorDataset:
    return TensorDataset(*(tensor.to(device) for tensor in samples.tensors))


def _line(progress: loop.Progress) -> str:
    minutes, seconds = divmod(round(progress.remaining_s), 60)
    return (
        f"epoch {progress.epoch:3}/{progress.epochs}  loss {progress.loss:.4f}  "
        f"lr {progress.learning_rate:.2e}  {progress.images_per_s:6.0f} images/s  "
        f"ETA {minutes}:{seconds:02}"
    )


def _say(place: distributed.Placement, text: str) -> None:
    if place.rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
