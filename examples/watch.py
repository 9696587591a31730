"""A stream of movements: a watch on the wrist, half a second at a time → the exercise so far.

From nothing to a served model; the data is in the package seglearn, which `make setup` installs:

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m gpu_service.training \\
        --task gpu_service.training.watch:task --epochs 100 --batch-size 16 \\
        --learning-rate 0.004 --weight-decay 0.05 --clip-norm 1 --output models
    python -m gpu_service serve --bundle models/watch

`python -m examples.watch listen ws://127.0.0.1:9005` then streams to it what a person does that the
model has never seen, as one sequence: what it remembers of the movements stays on the device.

The task is gpu_service/training/watch.py, the network gpu_service/models/watch.py.
"""

import asyncio
import sys

import numpy

from gpu_service.client import Client
from gpu_service.training import watch


async def listen(url: str, *, number: int = 0) -> None:
    """Stream a test person's recording, and print what the model takes it for after each step."""
    recordings = watch.load()
    mine = numpy.flatnonzero(numpy.isin(recordings.person, watch.TEST_PEOPLE))[number]
    print(f"{watch.LABELS[recordings.label[mine]]}, person {recordings.person[mine]}:")
    left = recordings.left[mine : mine + 1]
    async with Client(url) as client, client.sequence(model="watch") as sequence:
        for step, movement in enumerate(watch.steps(recordings.movement[mine]), start=1):
            result = await sequence.step({"movement": movement[None], "left": left})
            logits = result.outputs["logits"][0]
            print(f"{step / 2:5.1f} s: {watch.LABELS[logits.argmax()]}")


if __name__ == "__main__":
    asyncio.run(listen(sys.argv[2], number=int(sys.argv[3]) if sys.argv[3:] else 0))
