"""How the tests of training start ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Launch = Callable[..., "list[subprocess.Popen[str]]"]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Without a trace of an outer torchrun, one thread each, `gpu_service` importable."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def launch(environment: dict[str, str]) -> Iterator[Launch]:
    """Start `world_size` ranks (or those named) of a program, as torchrun's agent would."""
    started: list[subprocess.Popen[str]] = []

    def start(
        world_size: int, *program: str, ranks: Any = None, cwd: Path = CHECKOUT
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = [
            subprocess.Popen(
                [sys.executable, *program],
                cwd=cwd,
                env=environment
                | dict(
                    zip(
                        VARIABLES, (f"{r}", f"{world_size}", f"{r}", "127.0.0.1", port), strict=True
                    )
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in (range(world_size) if ranks is None else ranks)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.communicate()
