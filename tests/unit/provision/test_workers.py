"""What a worker is made of: device, threads, wheels, settings file. No host is involved."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State
from pyinfra.api.exceptions import DeployError
from pyinfra.context import ctx_host, ctx_state

from gpu_service import settings as service_settings
from provision import wheelhouse, workers
from provision.facts import Hardware
from provision.models import Model
from provision.operations import ManagedFile, WorkerUnit
from provision.settings import Assignment, WorkerSettings
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
        nowhere = Path("/nonexistent")
        lock = f"{target.folder.name}\n"
        return Wheelhouse(folder=nowhere, lock=lock, installer=nowhere / "uv.whl")

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
    assert workers.threads(2, CPU_HOST) == 4
    assert workers.threads(2, Hardware(cpu_cores=1)) == 1


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
    found = fleet(gateway(), worker(**data))
    host = found.workers["gpu1"]
    planned = workers.Plan(
        hardware=hardware,
        environment=workers.choose_environment(host, hardware),
        release=workers.Release(content=b"", digest="cafe"),
        models={"": MODEL},
    )
    templates = workers.unit_files(host, found, planned)
    return workers.worker_units(host, found, planned, templates)


def units_text(**data: Any) -> tuple[str, str]:
    """The service unit's and the socket unit's text."""
    found = fleet(gateway(), worker(**data))
    planned = workers.Plan(
        hardware=CPU_HOST,
        environment=workers.choose_environment(found.workers["gpu1"], CPU_HOST),
        release=workers.Release(content=b"", digest="cafe"),
        models={"": MODEL},
    )
    service, socket = (
        managed.content for managed in workers.unit_files(found.workers["gpu1"], found, planned)
    )
    assert isinstance(service, bytes)
    assert isinstance(socket, bytes)
    return service.decode(), socket.decode()


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
    assert found["GPU_SERVICE_CONTROL"] == "/run/gpu-service-9006/control.sock"
    assert found["GPU_SERVICE_TRUSTED_PROXIES"] == "10.0.0.11"
    assert found["GPU_SERVICE_TOKENS_FILE"] == ""


def test_the_service_takes_all_that_a_settings_file_says() -> None:
    for unit in unit_of({"service_options": {"origins": "https://*.example.com", "cpus": "0-3,6"}}):
        service_settings.load({}, environment_of(unit))


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ({}, False),  # two workers: nginx turns to the other
        ({"worker_ports": [9005]}, True),
        ({"worker_ports": [9005], "socket_activation": "off"}, False),
        ({"socket_activation": "on"}, True),
    ],
)
def test_sockets_are_kept_where_there_is_no_other_worker_or_as_set(
    data: dict[str, Any], kept: bool
) -> None:
    for unit in unit_of(data):
        assert unit.keeps_socket is kept
        assert environment_of(unit)["GPU_WORKER_SOCKET"] == ("systemd" if kept else "worker")


def test_gateways_alone_reach_service_and_socket_and_the_collector_is_reached() -> None:
    service, socket = units_text(service_options={"otlp_endpoint": "http://10.0.0.99:4318"})
    for text in (service, socket):
        assert "IPAddressDeny=any\n" in text
        assert "IPAddressAllow=10.0.0.11\n" in text
    assert "IPAddressAllow=10.0.0.99\n" in service
    assert "10.0.0.99" not in socket


@pytest.mark.parametrize(
    ("listen", "stream"), [("0.0.0.0", "0.0.0.0:%i"), ("2001:db8::5", "[2001:db8::5]:%i")]
)
def test_a_socket_listens_where_the_worker_would(listen: str, stream: str) -> None:
    assert f"ListenStream={stream}\n" in units_text(worker_listen=listen)[1]


FOLDER = {
    "sha256sum": ["644 root root", "{}", "/etc/tmpfiles.d/gpu-workers.conf"],
    "%a %U %G %n": ["2750 gpu-service nginx /run/gpu-workers"],
}


def folder_commands(answers: Any, group: str = "nginx") -> list[str]:
    return run(workers.sockets_folder, answers, user="gpu-service", group=group)


def test_the_folder_of_sockets_lets_nginx_in_alone_and_is_left_where_it_is_right() -> None:
    line = "d /run/gpu-workers 2750 gpu-service nginx\n"
    digest = hashlib.sha256(line.encode()).hexdigest()
    right = {**FOLDER, "sha256sum": [f.format(digest) for f in FOLDER["sha256sum"]]}
    assert folder_commands(right) == []
    made = folder_commands({**right, "%a %U %G %n": []})
    assert len(made) == 1
    assert "systemd-tmpfiles --create" in made[0]
    changed = "\n".join(folder_commands(right, group="web"))
    assert "mv -fT" in changed
    assert "chgrp" in changed


def test_tokens_are_for_the_service_alone_and_restart_nothing(tmp_path: Path) -> None:
    listed = tmp_path / "tokens"
    listed.write_text(f"{'ab' * 32} ann\n")
    data = {"worker_tokens": str(listed)}
    before = unit_of(data)
    assert environment_of(before[0])["GPU_SERVICE_TOKENS_FILE"] == "/etc/gpu-service/tokens"
    placed = workers.tokens_file(Assignment(service="", settings=settings(**data)))
    assert (placed.mode, placed.user, placed.group) == ("640", "root", "gpu-service")
    assert placed.secret
    assert "abab" not in repr(placed)
    listed.write_text(f"{'cd' * 32} ben\n")
    changed = workers.tokens_file(Assignment(service="", settings=settings(**data)))
    assert changed.sha256 != placed.sha256
    assert unit_of(data)[0].deployment == before[0].deployment


def test_tokens_go_when_no_settings_file_names_them() -> None:
    there: Any = {"ls -1t": ["/etc/gpu-service/", "tokens-words", "worker-9005.env", "tokens"]}
    assert forgotten(there | {"worker-*.env": []}) == [
        f"rm -f -- {workers.TOKENS}",
        f"rm -f -- {workers.TOKENS}-words",
    ]
    assert forgotten(there | {"worker-*.env": [workers.TOKENS]}) == [
        f"rm -f -- {workers.TOKENS}-words"
    ]
    assert forgotten({"ls -1t": [], "worker-*.env": []}) == []


def forgotten(answers: Any, *, sockets_are_used: bool = False) -> list[str]:
    return run(workers.forget_unused, answers, sockets_are_used=sockets_are_used)


def test_the_folder_of_sockets_goes_when_nginx_has_moved_on() -> None:
    there = {"ls -1t": ["/etc/gpu-service/", "/etc/tmpfiles.d/", "gpu-workers.conf"]}
    assert forgotten(there) == ["rm -rf -- /run/gpu-workers /etc/tmpfiles.d/gpu-workers.conf"]
    assert forgotten(there, sockets_are_used=True) == []


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "mine-1.0-py3-none-any.whl"
    path.write_bytes(b"first")
    return path


def test_own_packages_have_a_wheelhouse_of_their_own_named_by_what_is_in_them(
    wheel: Path,
) -> None:
    def folder(*packages: str) -> str:
        wheelhouse._digest_of.cache_clear()
        return Target(build="cpu", python="3.11", machine="x86_64", packages=packages).folder.name

    plain, first = folder(), folder(str(wheel), "left==1.0")
    assert plain == "cpu-cp311-x86_64"
    assert first.startswith("cpu-cp311-x86_64-with-")
    wheel.write_bytes(b"second")
    assert len({plain, first, folder(str(wheel), "left==1.0"), folder(str(wheel))}) == 4


def test_a_missing_wheelhouse_of_own_packages_says_how_to_make_it(
    monkeypatch: pytest.MonkeyPatch, wheel: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(wheelhouse, "ROOT", Path("/nonexistent"))
    wheelhouse._digest_of.cache_clear()
    packages = [str(wheel), "left==1.0"]
    with pytest.raises(DeployError, match=rf"--package {wheel} --package left==1.0"):
        workers.choose_environment(settings(worker_packages=packages), CPU_HOST)


def test_own_packages_from_an_index_are_part_of_what_names_the_environment(wheel: Path) -> None:
    def chosen(*packages: str) -> workers.Environment:
        data = {"packages_from": "index", "worker_packages": packages}
        return workers.choose_environment(settings(**data), CPU_HOST)

    plain, own = chosen(), chosen(str(wheel), "left==1.0")
    assert [managed.path for managed in own.wheels] == [f"/opt/gpu-service/wheels/{wheel.name}"]
    assert own.requirements.decode().splitlines()[-2:] == [
        "left==1.0",
        f"/opt/gpu-service/wheels/{wheel.name}",
    ]
    wheel.write_bytes(b"second")
    digests = {plain.digest, own.digest, chosen(str(wheel), "left==1.0").digest}
    assert len(digests) == 3
    assert own.installer is None


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


def a_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Room for a wheelhouse that is found as on an operator's machine."""
    monkeypatch.undo()
    monkeypatch.setattr(wheelhouse, "ROOT", root)
    target = Target(build="cpu", python="3.11", machine="x86_64")
    target.folder.mkdir()
    return target


def test_a_wheelhouse_of_other_requirements_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = a_folder(tmp_path, monkeypatch)
    (target.folder / wheelhouse.LOCK).write_text("# from requirements/service.txt 0000\n")
    with pytest.raises(wheelhouse.WheelhouseError, match="other requirements"):
        wheelhouse.find(target)


def test_a_wheelhouse_without_what_installs_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = a_folder(tmp_path, monkeypatch)
    (target.folder / wheelhouse.LOCK).write_text(wheelhouse._stamp(wheelhouse.REQUIREMENTS))
    with pytest.raises(wheelhouse.WheelhouseError, match=r"installer\.txt.*wheelhouse build"):
        wheelhouse.find(target)
    installer = tmp_path / "installer-x86_64"
    installer.mkdir()
    (installer / "uv-0-py3-none-any.whl").touch()
    lock = installer / wheelhouse.LOCK
    lock.write_text("# from requirements/installer.txt 0000\n")
    with pytest.raises(wheelhouse.WheelhouseError, match=r"installer\.txt"):
        wheelhouse.find(target)
    lock.write_text(wheelhouse._stamp(wheelhouse.INSTALLER_REQUIREMENTS))
    assert wheelhouse.find(target).installer == installer / "uv-0-py3-none-any.whl"


def test_an_environment_from_wheels_asks_no_index_and_one_from_an_index_asks_pip() -> None:
    offline = workers.choose_environment(settings(), CPU_HOST)
    assert offline.installer is not None
    commands = run(workers.install_environment, {}, environment=_without_files(offline))
    made, installed = (c for c in commands if "-m venv" in c or "pip install" in c)
    assert "--without-pip" in made
    assert "--no-index" in installed
    assert "UV_OFFLINE=1" in installed
    online = workers.choose_environment(settings(packages_from="index"), CPU_HOST)
    made, installed = (
        c
        for c in run(workers.install_environment, {}, environment=online)
        if "-m venv" in c or "pip install" in c
    )
    assert "--without-pip" not in made
    assert "UV_" not in installed
    assert "-m pip install" in installed


def _without_files(environment: workers.Environment) -> workers.Environment:
    """Wheels that are nowhere, as bytes."""
    installer = ManagedFile(path="/opt/gpu-service/wheels/uv.whl", content=b"")
    return dataclasses.replace(environment, wheels=(), installer=installer)


def test_training_compiles_what_serving_leaves_out_once() -> None:
    environment = workers.choose_environment(settings(packages_from="index"), CPU_HOST)
    (command,) = run(workers.compile_environment, {}, environment=environment)
    assert "sympy" not in command
    assert command.endswith(f"{environment.folder}/.compiled")
    there = {"readlink": f"{environment.folder}/.compiled"}
    assert run(workers.compile_environment, there, environment=environment) == []
