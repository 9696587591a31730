"""Labs for tests: `labtest` is brought up once for a session, beside the operator's own lab."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import requirements
from lab.paths import LabPaths

CHECKOUT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run from a plain shell, in the checkout. With `check`, a failure shows what was printed."""
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def run_lab(name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "lab", "--name", name, *arguments, check=check)


@pytest.fixture(scope="session")
def can_host_lab() -> None:
    if reasons := requirements.unmet():
        pytest.skip(f"this machine can't host a lab: {'; '.join(reasons)}")


@pytest.fixture(scope="session")
def running_lab(can_host_lab: None) -> Iterator[str]:
    """Name of a lab with gw1 and gpu1."""
    name = "labtest"
    run_lab(name, "down")
    run_lab(name, "up", "gw1", "gpu1")
    yield name
    run_lab(name, "down")


@pytest.fixture(scope="session")
def shell() -> Run:
    """Run a command from a plain shell: shell("ip", "route")."""
    return run


@pytest.fixture(scope="session")
def cli() -> Run:
    """Run the lab's command line: cli(NAME, "up", "gw1")."""
    return run_lab


@pytest.fixture
def on(running_lab: str) -> Run:
    """Run a command on a host, by plain ssh: on("gw1", "hostname")."""
    config = LabPaths.of(running_lab).ssh_config

    def execute(host: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run("ssh", "-F", str(config), host, *command, check=check)

    return execute
