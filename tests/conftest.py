"""What several rooms of tests need: one real training run a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the README's training command writes: two ranks, real images."""
    models = tmp_path_factory.mktemp("models")
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    command += ["--nproc-per-node=2", "-m", "gpu_service.training", "--output", str(models)]
    result = subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (bundle,) = (models / "digits").iterdir()
    return bundle
