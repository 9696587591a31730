"""How a training run is started on a host, and what one look at it means. No host is involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.exceptions import DeployError

from provision import slurm, trainers
from provision.facts import Hardware
from provision.settings import (
    TRAINING,
    Fleet,
    HostInput,
    InvalidFleetError,
    TrainerSettings,
    parse_fleet,
)
from provision.trainers import Job, Phase, Sighting
from provision.workers import Environment, Release

CPU_HOST = Hardware(cpu_cores=8)
GPU_HOST = Hardware(nvidia_gpus=4, cpu_cores=8)


def trainer(name: str, address: str, **data: Any) -> HostInput:
    return HostInput(name=name, groups=frozenset({"trainers"}), data={"address": address, **data})


def fleet(**data: Any) -> Fleet:
    hosts = [trainer("train1", "10.0.0.31", **data), trainer("train2", "10.0.0.32", **data)]
    return parse_fleet(hosts, resolve={}, needed=TRAINING)


def problems(*hosts: HostInput) -> list[str]:
    with pytest.raises(InvalidFleetError) as caught:
        parse_fleet(hosts, resolve={}, needed=TRAINING)
    return caught.value.problems


def planned(hardware: Hardware = CPU_HOST) -> trainers.Plan:
    return trainers.Plan(
        hardware=hardware,
        environment=Environment(
            python="/usr/bin/python3.11",
            digest="env",
            installer=None,
            wheels=(),
            requirements=b"",
            pip_conf=None,
        ),
        release=Release(content=b"", digest="rel"),
        data=trainers.Data(wheels=(), digest="dat"),
    )


def launched(*, through_slurm: bool = False, hardware: Hardware = CPU_HOST, **data: Any) -> Any:
    found = fleet(**data)
    return trainers.launch(
        found.trainers["train2"], found, planned(hardware), through_slurm=through_slurm
    )


def test_training_needs_trainers_and_nothing_else() -> None:
    assert list(fleet().trainers) == ["train1", "train2"]
    assert problems() == ["trainers: the group is empty; name at least one host in the inventory"]


def test_an_option_that_the_training_has_not_is_refused_with_the_likely_one() -> None:
    found = problems(trainer("train1", "10.0.0.31", train_options={"epoch": 3, "output": "x"}))
    assert any("no such option; did you mean epochs?" in line for line in found)
    assert any("train_options.output is decided by train.py" in line for line in found)


def test_trainers_that_would_train_differently_are_refused() -> None:
    found = problems(
        trainer("train1", "10.0.0.31", train_options={"epochs": 3}),
        trainer("train2", "10.0.0.32", train_options={"epochs": 4}),
    )
    assert any(
        line.startswith("train2: train_options differs from that of train1") for line in found
    )


@pytest.mark.parametrize(
    ("hardware", "data", "count"),
    [
        (CPU_HOST, {}, 1),
        (GPU_HOST, {}, 4),
        (GPU_HOST, {"train_device": "cpu"}, 1),
        (GPU_HOST, {"train_processes": 2}, 2),
        (CPU_HOST, {"train_processes": 2}, 2),
    ],
)
def test_one_process_a_gpu_and_one_where_there_is_none(
    hardware: Hardware, data: dict[str, Any], count: int
) -> None:
    assert trainers.processes(TrainerSettings(**data), hardware) == count


def test_a_folder_that_cannot_hold_the_bundle_is_refused_before_the_training(
    tmp_path: Path,
) -> None:
    assert trainers.unfit_folder(tmp_path / "not" / "yet") is None
    (tmp_path / "file").touch()
    assert f"{tmp_path}/file is no folder" in (trainers.unfit_folder(tmp_path / "file/x") or "")


def test_threads_are_those_that_are_set_else_the_scripts_to_choose() -> None:
    assert launched(train_threads=1).environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in launched().environment


def test_every_host_meets_at_the_first_under_the_name_of_the_run() -> None:
    text = launched().settings_file("20260101-000000").content.decode()
    assert "MASTER_ADDR=10.0.0.31\n" in text
    assert "RDZV_ID=20260101-000000\n" in text
    assert "NNODES=2\n" in text
    assert "GPU_WORKER_PYTHON=/opt/gpu-service/venvs/env/bin/python\n" in text


def test_with_slurm_the_first_host_is_slurms_to_choose() -> None:
    slurmed = launched(through_slurm=True)
    assert "MASTER_ADDR" not in slurmed.environment
    assert slurmed.command[-2:] == (
        "/opt/gpu-service/training/slurm-job.sh",
        "/opt/gpu-service/training/train.sbatch",
    )


def test_gpus_are_hidden_from_a_training_that_shall_not_use_them() -> None:
    assert launched(hardware=GPU_HOST, train_device="cpu").environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in launched(hardware=GPU_HOST).environment


def test_the_unit_outlives_its_end_so_that_its_result_can_be_fetched() -> None:
    command = launched(train_options={"epochs": 3}).systemd_run("v1")
    assert "--remain-after-exit" in command
    assert "--property=User=gpu-service" in command
    assert "--setenv=GPU_TRAINING_VERSION=v1" in command
    arguments = command[command.index("/opt/gpu-service/training/torchrun_script.sh") + 1 :]
    assert "--epochs=3" in arguments
    assert "--version=v1" in arguments
    assert "--output=/var/lib/gpu-service/training/v1/models" in arguments


def test_switches_become_flags() -> None:
    assert trainers._option("sync_batch_norm", True) == ["--sync-batch-norm"]
    assert trainers._option("compile", False) == ["--no-compile"]


@pytest.mark.parametrize(
    ("active", "sub", "phase"),
    [
        ("active", "running", Phase.RUNNING),
        ("activating", "start", Phase.RUNNING),
        ("deactivating", "stop-sigterm", Phase.RUNNING),
        ("active", "exited", Phase.DONE),
        ("failed", "failed", Phase.FAILED),
        ("inactive", "dead", Phase.ABSENT),
    ],
)
def test_what_systemd_says_of_the_run(active: str, sub: str, phase: Phase) -> None:
    lines = [
        f"ActiveState={active}",
        f"SubState={sub}",
        "Environment=GPU_TRAINING_VERSION=v1",
        "Lines=2",
        "epoch 1  loss=0.5",
        "Lines=a line of the training itself",
    ]
    assert trainers.parse_sighting(lines) == Sighting(
        phase=phase, version="v1", seen=2, lines=tuple(lines[4:])
    )


def job(**phases: Phase) -> Job:
    found = Job()
    for name, phase in phases.items():
        version = "" if phase is Phase.ABSENT else "v1"
        found.found[name] = Sighting(phase=phase, version=version)
    found.decide()
    return found


def test_a_run_that_is_there_is_attached_to() -> None:
    running = job(train1=Phase.RUNNING, train2=Phase.RUNNING)
    assert running.version == "v1"
    assert not running.wants_start("train1")


def test_a_host_that_was_rebooted_joins_the_run_of_the_others() -> None:
    halved = job(train1=Phase.RUNNING, train2=Phase.ABSENT)
    assert halved.wants_start("train2")
    assert not halved.wants_start("train1")


@pytest.mark.parametrize("ended", [Phase.DONE, Phase.FAILED])
def test_nothing_is_started_beside_a_run_that_ended_and_was_not_told(ended: Phase) -> None:
    assert not job(train1=ended, train2=Phase.ABSENT).wants_start("train2")


def test_a_new_run_has_one_version_on_all_hosts() -> None:
    fresh = job(train1=Phase.ABSENT, train2=Phase.ABSENT)
    version = fresh.version
    fresh.decide()
    assert version
    assert fresh.version == version


def test_two_different_runs_are_refused() -> None:
    mixed = Job()
    mixed.found = {
        "train1": Sighting(phase=Phase.RUNNING, version="v1"),
        "train2": Sighting(phase=Phase.RUNNING, version="v2"),
    }
    with pytest.raises(DeployError, match="train=stop"):
        mixed.decide()


def test_the_programs_own_words_come_before_tracebacks() -> None:
    lines = ["W1124 agent noise", "training: the training images are missing", "Traceback …"]
    assert trainers.telling(lines) == ["training: the training images are missing"]
    assert trainers.telling(["a", "", "b"]) == ["a", "b"]


def node(name: str, address: str, **data: Any) -> slurm.Node:
    size = {"cpu_cores": 8, "memory_mb": 1000, "gpus": 0, **data}
    return slurm.Node(hostname=name, address=address, **size)


def texts(*members: slurm.Node) -> dict[str, str]:
    files = slurm.config_files(list(members), of=members[-1])
    return {Path(f.path).name: f.content.decode() for f in files if isinstance(f.content, bytes)}


def test_slurm_names_every_host_with_its_address() -> None:
    found = texts(node("train1", "10.0.0.31"), node("train2", "10.0.0.32", cpu_cores=4))
    lines = found["slurm.conf"].splitlines()
    assert "SlurmctldHost=train1(10.0.0.31)" in lines
    assert "NodeName=train2 NodeAddr=10.0.0.32 CPUs=4 RealMemory=1000 State=UNKNOWN" in lines
    assert (
        "PartitionName=trainers Nodes=train1,train2 Default=YES MaxTime=INFINITE State=UP" in lines
    )
    assert "gres.conf" not in found
    assert "GresTypes" not in found["slurm.conf"]


def test_slurm_learns_of_the_gpus_that_were_found() -> None:
    members = (node("train1", "10.0.0.31", gpus=4), node("train2", "10.0.0.32", gpus=1))
    found = texts(*members, node("train3", "10.0.0.33"))
    lines = found["slurm.conf"].splitlines()
    assert "GresTypes=gpu" in lines
    assert any(line.startswith("NodeName=train1 ") and " Gres=gpu:4 " in line for line in lines)
    assert "Gres" not in next(line for line in lines if line.startswith("NodeName=train3 "))
    assert found["gres.conf"].splitlines()[1:] == [
        "NodeName=train1 Name=gpu File=/dev/nvidia[0-3]",
        "NodeName=train2 Name=gpu File=/dev/nvidia0",
    ]


def test_cgroups_are_those_of_the_host() -> None:
    found = texts(node("train1", "10.0.0.31"), node("train2", "10.0.0.32", cgroup=1))
    assert found["cgroup.conf"] == "CgroupPlugin=cgroup/v1\n"
