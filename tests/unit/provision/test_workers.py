"""What a worker is made of: device, threads, wheels, settings file. No host is involved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import DeployError
from pyinfra.context import ctx_host, ctx_state

from provision import wheelhouse, workers
from provision.facts import Hardware
from provision.models import Model
from provision.operations import WorkerUnit
from provision.settings import WorkerSettings
from provision.wheelhouse import Target, Wheelhouse
from tests.unit.provision.fleets import fleet, gateway, worker
from tests.unit.provision.test_operations import run

CPU_HOST = Hardware(cpu_cores=8)
GPU_HOST = Hardware(nvidia_gpus=2, cpu_cores=8, gpu_names=("NVIDIA H100", "NVIDIA H100"))
MODEL = Model(
    source=Path("models/digits/1"), name="digits", version="1", digest="ab" * 32, files=()
)


def settings(**data: Any) -> WorkerSettings:
    return fleet(gateway(), worker(**data)).workers["gpu1"]


@pytest.fixture(autouse=True)
def on_gpu1(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A host in context, as deploy code has; and a wheelhouse of each build."""

    def find(target: Target) -> Wheelhouse:
        return Wheelhouse(folder=Path("/nonexistent"), lock=f"{target.folder.name}\n")

    monkeypatch.setattr(wheelhouse, "find", find)
    state = State(Inventory((["gpu1"], {})), Config())
    with ctx_state.use(state), ctx_host.use(state.inventory.get_host("gpu1")):
        yield


def test_one_gpu_each_where_the_host_has_them_else_the_cpu() -> None:
    assert [workers.device(i, settings(), GPU_HOST) for i in range(3)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert workers.device(0, settings(), CPU_HOST) == "cpu"
    assert workers.device(0, settings(worker_device="cpu"), GPU_HOST) == "cpu"


def test_the_cores_are_shared_out() -> None:
    assert workers.threads(settings(), CPU_HOST) == 4
    assert workers.threads(settings(), Hardware(cpu_cores=1)) == 1


@pytest.mark.parametrize(
    ("hardware", "data", "build"),
    [
        (CPU_HOST, {}, "cpu"),
        (GPU_HOST, {}, "cuda"),
        (GPU_HOST, {"worker_device": "cpu"}, "cpu"),
        (CPU_HOST, {"torch_build": "cuda"}, "cuda"),
        (GPU_HOST, {"torch_build": "cpu"}, "cpu"),
    ],
)
def test_the_build_of_torch_follows_the_device_and_can_be_set(
    hardware: Hardware, data: dict[str, str], build: str
) -> None:
    chosen = workers.choose_environment(settings(**data), hardware)
    assert chosen.requirements.decode() == f"{build}-cp311-x86_64\n"


def test_cuda_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(DeployError, match=r"gpu1: worker_device is 'cuda', but no NVIDIA driver"):
        workers.choose_environment(settings(worker_device="cuda"), CPU_HOST)


def test_a_missing_wheelhouse_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(wheelhouse, "ROOT", Path("/nonexistent"))
    with pytest.raises(DeployError, match=r"gpu1 .cuda.: .*wheelhouse build --torch cuda"):
        workers.choose_environment(settings(), GPU_HOST)


def test_an_index_with_a_token_is_kept_out_of_everything_but_a_private_file() -> None:
    data = {"packages_from": "index", "index_url": "https://me:hunter2@example.invalid/simple"}
    chosen = workers.choose_environment(settings(**data), CPU_HOST)
    assert chosen.wheels == ()
    assert chosen.pip_conf is not None
    assert b"hunter2" in chosen.pip_conf
    assert b"hunter2" not in chosen.requirements
    assert "hunter2" not in repr(settings(**data))
    assert "hunter2" not in repr(chosen)


def unit_of(data: dict[str, Any], hardware: Hardware = CPU_HOST) -> list[WorkerUnit]:
    found = settings(**data)
    planned = workers.Plan(
        hardware=hardware,
        environment=workers.choose_environment(found, hardware),
        release=workers.Release(archive=b"", digest="cafe"),
        model=MODEL,
    )
    template = workers.unit_file(found, fleet(), planned)
    return workers.worker_units(found, planned, template)


def environment_of(unit: WorkerUnit) -> dict[str, str]:
    content = unit.settings.content
    assert isinstance(content, bytes)
    lines = content.decode().splitlines()
    return {line.partition("=")[0]: "".join(shlex.split(line.partition("=")[2])) for line in lines}


def test_a_settings_file_names_everything_by_its_version() -> None:
    first, second = unit_of({"service_options": {"max_batch": 32}}, GPU_HOST)
    assert (first.name, second.name) == ("gpu-worker@9005.service", "gpu-worker@9006.service")
    found = environment_of(second)
    assert found["GPU_SERVICE_PORT"] == "9006"
    assert found["GPU_SERVICE_DEVICE"] == "cuda:1"
    assert found["GPU_SERVICE_BUNDLE"] == "/var/lib/gpu-service/models/digits/1"
    assert found["GPU_SERVICE_MAX_BATCH"] == "32"
    assert found["GPU_SERVICE_WORKER"] == "gpu1:9006"
    assert found["GPU_SERVICE_DEPLOYMENT"] == second.deployment
    assert found["PYTHONPATH"] == "/opt/gpu-service/releases/cafe"
    assert found["GPU_WORKER_PYTHON"].startswith("/opt/gpu-service/venvs/")


def test_any_change_of_what_a_worker_is_made_of_changes_its_deployment() -> None:
    seen = {
        unit_of(data, hardware)[0].deployment
        for data, hardware in [
            ({}, CPU_HOST),
            ({}, GPU_HOST),
            ({"service_options": {"max_batch": 32}}, CPU_HOST),
            ({"restart_timeout_s": 99}, CPU_HOST),
        ]
    }
    assert len(seen) == 4
    assert unit_of({})[0].deployment == unit_of({})[0].deployment


def test_what_a_worker_runs_or_can_go_back_to_is_never_pruned() -> None:
    script = {
        "worker-*.env": [
            "/opt/gpu-service/releases/r1",
            "/opt/gpu-service/releases/r4",
            "/opt/gpu-service/venvs/v1/bin/python",
        ],
        "ls -1t": [
            *("/opt/gpu-service/releases/", "r4", "r3", "r2", "r1"),
            *("/opt/gpu-service/venvs/", "v2", "v1"),
        ],
    }
    folders = ["/opt/gpu-service/releases", "/opt/gpu-service/venvs"]

    def removed(keep: int) -> list[str]:
        commands = run(workers.prune, script, folders=folders, keep=keep)
        return [command.split("/")[-1] for command in commands if "rm -rf" in command]

    assert removed(keep=2) == ["r3", "r2"]
    assert removed(keep=3) == ["r2"]
    assert removed(keep=1) == ["r3", "r2", "v2"]


def test_equal_sources_give_equal_releases() -> None:
    first = workers.build_release()
    workers.build_release.cache_clear()
    assert workers.build_release() == first


def test_a_wheelhouse_of_other_requirements_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(wheelhouse, "ROOT", tmp_path)
    target = Target(build="cpu", python="3.11", machine="x86_64")
    target.folder.mkdir()
    (target.folder / wheelhouse.LOCK).write_text("# from requirements/service.txt 0000\n")
    with pytest.raises(wheelhouse.WheelhouseError, match="other requirements"):
        wheelhouse.find(target)
