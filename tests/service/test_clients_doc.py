"""The programs in docs/clients.md run as they stand, but for the address."""

import asyncio
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import pytest

from gpu_service.bundle import TensorSpec
from gpu_service.device import BatchOutput, Engine, Stream, Tensors
from gpu_service.settings import Settings
from gpu_service.signature import ModelInfo
from tests.service.conftest import ROOT, Worker
from tests.service.fakes import BOUND_S, Gate

PROGRAMS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/clients.md").read_text(), re.DOTALL)


def spec(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)


DIGITS = ModelInfo(
    name="digits",
    version="1",
    inputs=(spec("image", "FP32", 1, 28, 28),),
    outputs=(spec("logits", "FP32", 10),),
)
WRITER = ModelInfo(
    name="writer",
    version="1",
    inputs=(spec("window", "UINT8", 32),),
    outputs=(spec("byte", "UINT8"), spec("window", "UINT8", 32), spec("ended", "BOOL")),
    feedback={"window": "window"},
    done="ended",
)
LISTENER = ModelInfo(
    name="listener",
    version="1",
    inputs=(spec("sound", "FP32", 400),),
    outputs=(spec("logits", "FP32", 3),),
    state=(spec("heard", "FP32", 48),),
)


class Zeros(Engine):
    """Answers with zeros; what is fed back is passed on, and `byte` counts it up to a `Z`."""

    model = DIGITS
    max_streams = 0
    description: Mapping[str, str] = {"device": "none"}

    def __init__(self, model: ModelInfo) -> None:
        self.model = model
        self.gate = Gate()
        self.max_streams = 10 if model.state else 0

    def launch(
        self, requests: Sequence[Tensors], streams: Sequence[Stream | None]
    ) -> Callable[[], BatchOutput]:
        first = self.model.inputs[0].name
        batch = numpy.concatenate([inputs[first] for inputs in requests])
        outputs = {
            output.name: numpy.zeros((len(batch), *output.shape), "<f4")
            for output in self.model.outputs
        }
        if "byte" in outputs:
            byte = batch[:, -1] + 1
            window = numpy.concatenate([batch[:, 1:], byte[:, None]], 1)
            outputs = {"byte": byte, "window": window, "ended": byte == ord("Z")}
        return lambda: BatchOutput(outputs=outputs)


PRINTED = {
    0: r"100 \(1, 10\) test-worker\n",
    1: r"100 \(1, 10\) test-worker\n",
    2: r"test-worker\n",
    3: r"test-worker\n",
    4: r"A batch [!-Z]+Z",
    5: r"(0\n){11}",
    6: r"12 \(1, 3\)\n",
}


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
async def test_each_program_runs(number: int, tmp_path: Path) -> None:
    worker = Worker(Zeros(DIGITS), Settings(bundle=(Path("unused"),)))  # type: ignore[arg-type]
    await worker.start()
    try:
        for model in (WRITER, LISTENER):
            worker.registry.add(Zeros(model), source=Path(model.name))
        program = PROGRAMS[number].replace("ws://localhost:8009", worker.url)
        assert program != PROGRAMS[number]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "GPU_SERVICE_TOKEN": "a-token"},
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(BOUND_S):
            output, _ = await process.communicate()
    finally:
        await worker.stop()
    assert process.returncode == 0
    assert re.fullmatch(PRINTED[number], output.decode())
