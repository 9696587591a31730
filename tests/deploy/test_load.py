"""Real load through the gateway: every answer is the model's own, also while a worker dies.

What is compared with is computed here, directly from the bundle.
"""

from __future__ import annotations

import asyncio
import collections
from pathlib import Path

import numpy
import torch

from gpu_service import bundle, models
from gpu_service.client import Client
from tests.deploy.conftest import Deployment
from tests.deploy.test_deploy import UNITS, main_pids, wait_for

CONNECTIONS = 64
PREDICTIONS = 20_000

# Sums are taken in another order in another batch: the last bits of a float32 may differ.
TOLERANCE = 1e-4


class Load:
    """Closed-loop clients that take images from one list until all are answered."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        samples = bundle.load_samples(folder)["image"]
        rng = numpy.random.default_rng(20261124)
        noise = rng.random((1000, *samples.shape[1:]), dtype=numpy.float32)
        self.images = numpy.clip(samples[numpy.arange(1000) % len(samples)] + 0.2 * noise, 0, 1)
        with torch.inference_mode():
            self.expected = models.load_model(folder)(torch.from_numpy(self.images)).numpy()
        self.answered = 0
        self.under_way = asyncio.Event()  # a tenth of the predictions are answered
        self.workers: collections.Counter[str] = collections.Counter()
        self.worst = 0.0
        self.wrong = 0

    async def _client(self, numbers: collections.deque[int]) -> None:
        async with Client(self._url, deadline_s=60) as client:
            while numbers:
                number = numbers.popleft() % len(self.images)
                result = await client.infer({"image": self.images[number][None]})
                logits = result.outputs["logits"][0]
                expected = self.expected[number]
                self.worst = max(self.worst, float(numpy.abs(logits - expected).max()))
                self.wrong += int(logits.argmax() != expected.argmax())
                self.workers[result.worker] += 1
                self.answered += 1
                if self.answered >= PREDICTIONS // 10:
                    self.under_way.set()

    async def run(self, predictions: int) -> None:
        numbers = collections.deque(range(predictions))
        async with asyncio.timeout(240), asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(self._client(numbers))


async def test_every_answer_through_the_gateway_is_the_models_own(deployment: Deployment) -> None:
    assert deployment.run().returncode == 0
    load = Load(deployment.gateway_url, deployment.model)
    await load.run(PREDICTIONS)
    print(f"{load.answered} answers, worst difference {load.worst:.1e}, {dict(load.workers)}")
    assert load.answered == PREDICTIONS
    assert load.wrong == 0
    assert load.worst <= TOLERANCE
    assert set(load.workers) == {"gpu1:9005", "gpu1:9006"}


async def test_a_killed_worker_costs_no_answer_and_comes_back(deployment: Deployment) -> None:
    """SIGKILL under load: the gateway goes on through 9006, and 9005 is back on its own."""
    before = main_pids(deployment)
    load = Load(deployment.gateway_url, deployment.model)
    running = asyncio.create_task(load.run(PREDICTIONS))
    async with asyncio.timeout(60):
        await load.under_way.wait()
    await asyncio.to_thread(
        deployment.on, "gpu1", "systemctl", "kill", "-s", "KILL", "gpu-worker@9005"
    )
    await running
    assert load.answered == PREDICTIONS
    assert load.wrong == 0
    assert load.worst <= TOLERANCE
    assert load.workers["gpu1:9006"] > 0
    wait_for(
        lambda: (
            deployment.on("gpu1", "systemctl", "is-active", UNITS[0], check=False).strip()
            == "active"
        ),
        what="the killed worker is back",
    )
    after = main_pids(deployment)
    assert after[UNITS[0]] != before[UNITS[0]]
    assert after[UNITS[1]] == before[UNITS[1]]
    repaired = deployment.run()
    assert repaired.returncode == 0, repaired.output
    assert repaired.changed == {}
