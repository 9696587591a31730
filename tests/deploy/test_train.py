"""From bare trainers to a served model: `train.py`, then `deploy.py`, nothing copied by hand.

The trainers are hosts of a lab of their own. The same training runs twice: by torchrun on bare
hosts, then through Slurm, which the deploy makes of them; that one is interrupted and attached to.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lab
from gpu_service import bundle
from tests.deploy.conftest import CHECKOUT, LAB, Deployment

TRAINERS = f"{LAB}t"
# A few seconds of work, and the same bits however often they are computed.
TRAINING = {
    "train_options": {"epochs": 2, "batch_size": 256, "deterministic": True},
    "train_threads": 1,  # the hosts share this machine's cores
}
KEY = "/etc/munge/munge.key"


@dataclass(frozen=True, kw_only=True)
class Trainers(Deployment):
    """The hosts that train, and what they were like; `models` is where their bundles arrive."""

    models: Path
    found: dict[str, frozenset[str]]

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "GATEWAY_LAB": TRAINERS}

    def bundles(self) -> list[Path]:
        return sorted((self.models / "digits").glob("[0-9]*"))


def lab_command(*arguments: str) -> None:
    command = [sys.executable, "-m", "lab", "--name", TRAINERS, *arguments]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=600)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainers]:
    """Two bare hosts, on which yum could install Slurm."""
    for what in (("build", "--if-missing"), ("data", "--if-missing")):
        command = [sys.executable, "-m", "provision.wheelhouse", *what]
        subprocess.run(command, cwd=CHECKOUT, check=True, timeout=900)
    lab_command("down")
    lab_command("up", "--with", "slurm", "train1", "train2")
    try:
        hosts = lab.inventory(TRAINERS)
        fresh = Trainers(
            hosts=hosts,
            gateway_url="",
            model=Path("models/digits"),
            models=tmp_path_factory.mktemp("trained"),
            found={},
        )
        yield dataclasses.replace(fresh, found={host: fresh.listing(host) for host in hosts})
    finally:
        lab_command("down")


def interrupted(trainers: Trainers, at: str, **data: object) -> str:
    """Output of a `train.py` that gets Ctrl-C as soon as it tells a line with `at`."""
    said = []
    with subprocess.Popen(
        trainers.command("-y", "-vvv", deploy="train.py", **data),
        cwd=CHECKOUT,
        env=trainers.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if at in line:
                process.send_signal(signal.SIGINT)
                at = "\0"  # once
    return "".join(said)


def test_trainers_train_with_torchrun_and_as_a_slurm_cluster_and_the_result_serves(
    trainers: Trainers, deployment: Deployment
) -> None:
    data = {**TRAINING, "train_models": str(trainers.models)}
    by_torchrun = trainers.run(deploy="train.py", timeout_s=600, **data)
    assert by_torchrun.returncode == 0, by_torchrun.output
    assert "[train1] epoch   2/2" in by_torchrun.output  # rank 0 was heard
    (first,) = trainers.bundles()

    said = interrupted(trainers, "world size 2", slurm=True, **data)
    assert "verified: Slurm has 2 nodes that take jobs" in said
    assert "Exiting upon user request" in said
    assert trainers.bundles() == [first]
    keys = {trainers.on(host, "base64", "-w", "0", KEY) for host in trainers.hosts}
    (key,) = keys
    assert key not in said
    for host in trainers.hosts:
        assert trainers.on(host, "stat", "-c", "%U %a", KEY) == "munge 400\n"

    attached = trainers.run(deploy="train.py", timeout_s=600, slurm=True, **data)
    assert attached.returncode == 0, attached.output
    assert "attached to the run" in attached.output
    of_the_run = {"Training | The bundle is on this machine", "Training | The run is complete"}
    assert {name for names in attached.changed.values() for name in names} == of_the_run
    (_, second) = trainers.bundles()
    assert second.joinpath(bundle.WEIGHTS).read_bytes() == (
        first.joinpath(bundle.WEIGHTS).read_bytes()
    )
    assert trainers.on("train1", "squeue", "--noheader") == ""

    refused = deployment.run(model=str(second), min_metrics={"test_accuracy": 1.0})
    assert refused.returncode != 0
    assert "min_metrics wants at least 1" in refused.output
    deployed = deployment.run(model=str(second))
    assert deployed.returncode == 0, deployed.output
    assert f"gpu1:9005 serves digits {second.name}" in deployed.output


def test_nothing_is_left_of_training_and_its_slurm(trainers: Trainers) -> None:
    gone = trainers.run(deploy="uninstall.py", slurm=True, keep="nothing")
    assert gone.returncode == 0, gone.output
    for host, before in trainers.found.items():
        left = before ^ trainers.listing(host)
        assert not left, "\n".join([host, *sorted(left)])
