"""A worker host, as it was declared: user, environment, model, units, ports, a prediction."""

import json
from collections.abc import Callable

import pytest
from testinfra.host import Host

from provision import models, workers
from provision.settings import SOCKETS, unix_socket
from tests.hosts.conftest import Target

Property = Callable[[Host, str, str], str]


def units(target: Target) -> list[str]:
    return [workers.unit(port) for port in target.fleet.ports(target.settings)]


def test_service_user_is_a_system_user_without_a_shell(worker: Target) -> None:
    user = worker.host.user(worker.settings.service_user)
    assert user.exists
    assert user.uid < 1000
    assert user.shell.endswith("nologin")


def test_workers_run_and_start_at_boot(worker: Target) -> None:
    for unit in units(worker):
        service = worker.host.service(unit)
        assert service.is_running, unit
        assert service.is_enabled, unit


def test_units_are_notified_watched_and_restarted(
    worker: Target, systemd_property: Property
) -> None:
    for unit in units(worker):
        assert systemd_property(worker.host, unit, "Type") == "notify"
        assert systemd_property(worker.host, unit, "Restart") == "always"
        assert systemd_property(worker.host, unit, "WatchdogUSec") == "30s"
        assert systemd_property(worker.host, unit, "NeedDaemonReload") == "no"


def test_nothing_but_declared_workers_runs(worker: Target) -> None:
    listed = worker.host.check_output(
        "systemctl list-units --plain --no-legend 'gpu-worker@*.service'"
    )
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(units(worker))


def test_each_port_is_listened_on_by_the_service_user(
    worker: Target, systemd_property: Property
) -> None:
    for port in worker.fleet.ports(worker.settings):
        listening = worker.host.check_output(f"ss -ltnpH 'sport = :{port}'")
        pid = systemd_property(worker.host, workers.unit(port), "MainPID")
        assert f"pid={pid}," in listening
        user = worker.host.check_output("ps -o user:32= -p %s", pid).strip()
        assert user == worker.settings.service_user


def test_sockets_are_held_by_systemd_where_that_was_declared(
    worker: Target, systemd_property: Property
) -> None:
    for assignment in worker.fleet.assignments(worker.settings):
        kept = worker.fleet.keeps_sockets(assignment)
        for port in assignment.settings.ports:
            socket = f"gpu-worker@{port}.socket"
            active = systemd_property(worker.host, socket, "ActiveState") == "active"
            enabled = systemd_property(worker.host, socket, "UnitFileState") == "enabled"
            assert (active, enabled) == (kept, kept), socket


def test_the_control_socket_is_for_the_service_and_root(
    worker: Target, systemd_property: Property
) -> None:
    for port in worker.fleet.ports(worker.settings):
        folder = worker.host.file(f"/run/gpu-service-{port}")
        assert (oct(folder.mode), folder.user) == ("0o700", worker.settings.service_user)
        socket = worker.host.file(f"/run/gpu-service-{port}/control.sock")
        assert socket.is_socket
        assert oct(socket.mode) == "0o600"


def test_sockets_for_nginx_are_for_it_and_the_service(worker: Target) -> None:
    local = worker.fleet.local_gateway(worker.settings)
    if local is None:
        assert not worker.host.file(SOCKETS).exists
        return
    folder = worker.host.file(SOCKETS)
    owners = (worker.settings.service_user, local.nginx_user)
    assert (oct(folder.mode), folder.user, folder.group) == ("0o2750", *owners)
    for port in worker.fleet.ports(worker.settings):
        socket = worker.host.file(unix_socket(port))
        assert socket.is_socket
        assert (oct(socket.mode), socket.user, socket.group) == ("0o660", *owners)


def test_tokens_are_for_the_service_alone(worker: Target) -> None:
    for assignment in worker.fleet.assignments(worker.settings):
        if not assignment.settings.worker_tokens:
            continue
        file = worker.host.file(workers.tokens_path(assignment.service))
        found = (oct(file.mode), file.user, file.group)
        assert found == ("0o640", "root", worker.settings.service_user)


def test_service_cannot_write_to_its_own_code_or_model(worker: Target) -> None:
    for folder in (workers.OPT, models.ROOT):
        found = worker.host.check_output(
            r"find %s ! -type l \( -perm -o=w -o ! -user root \) -print -quit", folder
        )
        assert found == "", folder


def test_settings_files_carry_the_deployment_that_runs(
    worker: Target, systemd_property: Property
) -> None:
    for port in worker.fleet.ports(worker.settings):
        file = worker.host.file(f"{workers.ETC}/worker-{port}.env")
        assert (oct(file.mode), file.user) == ("0o644", "root")
        pid = systemd_property(worker.host, workers.unit(port), "MainPID")
        running = worker.host.file(f"/proc/{pid}/environ").content_string
        declared = file.content_string.rsplit("GPU_SERVICE_DEPLOYMENT=", 1)[1].strip()
        assert f"GPU_SERVICE_DEPLOYMENT={declared}\0" in running


def test_models_are_current_and_intact(worker: Target) -> None:
    links = worker.host.check_output("ls -d %s/*/current", models.ROOT).split()
    assert links
    for link in links:
        folder = worker.host.check_output("readlink -f %s", link)
        manifest = json.loads(worker.host.file(f"{folder}/manifest.json").content_string)
        assert folder.endswith(f"/{manifest['name']}/{manifest['version']}")
        for name, entry in manifest["files"].items():
            assert worker.host.file(f"{folder}/{name}").sha256sum == entry["sha256"], name


def test_every_worker_is_ready(worker: Target) -> None:
    for port in worker.fleet.ports(worker.settings):
        url = f"http://127.0.0.1:{port}/v2/health/ready"
        code = worker.host.check_output("curl -s -o /dev/null -w %%{http_code} %s", url)
        assert code == "200", url


@pytest.mark.parametrize("kind", ["runtime", "permanent"])
def test_firewalld_admits_who_is_declared_only(worker: Target, kind: str) -> None:
    if not worker.host.run("systemctl is-active --quiet firewalld").succeeded:
        return
    flag = "--permanent" if kind == "permanent" else ""
    ports = worker.host.check_output(f"firewall-cmd {flag} --list-ports").split()
    rules = worker.host.check_output(f"firewall-cmd {flag} --list-rich-rules")
    for port, addresses in workers.admitted(worker.settings, worker.fleet).items():
        assert f"{port}/tcp" not in ports
        admitted = {
            line.split('source address="')[1].split('"')[0]
            for line in rules.splitlines()
            if f'port port="{port}"' in line
        }
        assert admitted == set(addresses)
