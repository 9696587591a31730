"""What several rooms of tests need: one real training run, and who may run beside whom.

`make test` runs two processes at once (pytest-xdist). What shares hosts is one group, which one
process runs in order; else each file is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

CHECKOUT = Path(__file__).resolve().parents[1]

# By file, else by folder. Deploys wait more than they compute: two groups of them run beside each
# other, each on hosts of its own (tests/deploy/conftest.py). Training wants all cores for itself.
_GROUPS = {
    "deploy": "hosts",
    "hosts": "hosts",
    "lab": "hosts",
    "deploy/test_services.py": "more hosts",
    "deploy/test_sockets.py": "more hosts",
    "deploy/test_tls.py": "more hosts",
    "deploy/test_train.py": "more hosts",
    "deploy/test_worker_settings.py": "more hosts",
    "deploy/test_zero_left.py": "more hosts",
    "training": "training",
}

# No test counts seconds: a machine may stand still for one.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bundle", metavar="FOLDER", help="deploy this bundle instead of training one first"
    )


class _ByGroup(LoadScopeScheduling):
    """Gives one process all tests of a group, or of a file, in their order; the longest first."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # deploys come first, as they are collected

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        place = Path(file).relative_to("tests")
        return _GROUPS.get(str(place)) or _GROUPS.get(place.parts[0], file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByGroup:
    return _ByGroup(config, log)


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the README's training command writes: two ranks, real images."""
    if given := request.config.getoption("--bundle"):
        return Path(given).resolve()
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # one for all processes
    models = shared / "models"
    with FileLock(shared / "models.lock"):
        if not models.exists():
            _train(models)
    (bundle,) = (models / "digits").iterdir()
    return bundle


def _train(models: Path) -> None:
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
