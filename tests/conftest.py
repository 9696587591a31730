"""What several rooms of tests need: one real training run a session."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bundle", metavar="FOLDER", help="deploy this bundle instead of training one first"
    )


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the README's training command writes: two ranks, real images."""
    if given := request.config.getoption("--bundle"):
        return Path(given).resolve()
    models = tmp_path_factory.mktemp("models")
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    command += ["--nproc-per-node=2", "-m", "gpu_service.training", "--output", str(models)]
    result = subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (bundle,) = (models / "digits").iterdir()
    return bundle
