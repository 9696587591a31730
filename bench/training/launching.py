"""Start the ranks of a program on this machine, one thread each, and wait for them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def launch(world_size: int, module: str, *arguments: str, timeout_s: float = 300) -> None:
    """Run `python -m module` on so many ranks. RuntimeError if one fails or all take too long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=CHECKOUT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    try:
        codes = [process.wait(timeout_s) for process in ranks]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{world_size} ranks of {module} took over {timeout_s:g} s") from None
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise RuntimeError(f"{world_size} ranks of {module} ended with {codes}")
