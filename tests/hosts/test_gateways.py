"""A gateway, as it was declared: package, files, unit, port, user, and a handshake."""

from collections.abc import Callable

from testinfra.host import Host

from provision import gateway as declared
from tests.hosts.conftest import Target

HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def status_of(target: Target, request: str) -> str:
    """Status line of the gateway's answer. bash opens the socket: no client is needed there."""
    script = (
        "exec 3<>/dev/tcp/127.0.0.1/$1; printf '%s' \"$2\" >&3; "
        'IFS= read -r -t 10 -u 3 line; printf "%s" "$line"'
    )
    return str(
        target.host.check_output(
            "bash -c %s request %s %s", script, str(target.settings.listen_port), request
        )
    )


def test_nginx_is_installed_by_the_package_manager(gateway: Target) -> None:
    name = gateway.settings.nginx_package.partition("=")[0]
    assert gateway.host.run("rpm -q %s", name).succeeded or gateway.host.package(name).is_installed


def test_nginx_runs_and_starts_at_boot(gateway: Target) -> None:
    service = gateway.host.service("nginx")
    assert service.is_running
    assert service.is_enabled


def test_every_managed_file_is_as_declared(gateway: Target) -> None:
    files = [
        declared.nginx_conf(gateway.settings, gateway.fleet),
        *declared.supporting_files(gateway.settings),
    ]
    for managed in files:
        file = gateway.host.file(managed.path)
        assert file.is_file, managed.path
        assert file.sha256sum == managed.sha256, managed.path
        assert oct(file.mode)[2:] == managed.mode, managed.path
        assert (file.user, file.group) == (managed.user, managed.group), managed.path


def test_no_candidate_is_left_behind(gateway: Target) -> None:
    assert gateway.host.check_output("find /etc/nginx -name '*.candidate'") == ""


def test_nginx_accepts_the_live_configuration(gateway: Target) -> None:
    assert gateway.host.run("nginx -t").rc == 0


def test_configuration_says_what_was_declared(gateway: Target) -> None:
    dump = gateway.host.check_output("nginx -T 2>/dev/null")
    assert f"user {gateway.settings.nginx_user};" in dump
    assert "map $http_upgrade" in dump
    assert f"keepalive {gateway.settings.upstream_keepalive};" in dump
    assert f"proxy_read_timeout {gateway.settings.proxy_read_timeout_s}s;" in dump
    assert f"listen {gateway.settings.listen_port} default_server" in dump
    for server in gateway.fleet.upstream_servers():
        assert f"server {server} " in dump


def test_public_port_is_listened_on_by_nginx(gateway: Target) -> None:
    port = gateway.settings.listen_port
    listening = gateway.host.check_output(f"ss -ltnpH 'sport = :{port}'")
    assert '"nginx"' in listening


def test_worker_processes_run_as_the_declared_user(gateway: Target) -> None:
    users = set(gateway.host.check_output("ps -C nginx -o user:32=,args=").splitlines())
    workers = {line.split()[0] for line in users if "worker process" in line}
    assert workers == {gateway.settings.nginx_user}


def test_descriptor_limit_holds_for_the_running_master(
    gateway: Target, systemd_property: Callable[[Host, str, str], str]
) -> None:
    assert systemd_property(gateway.host, "nginx", "LimitNOFILE") == str(
        gateway.settings.descriptors
    )


def test_selinux_mode(gateway: Target) -> None:
    wanted = gateway.settings.selinux_mode
    mode = gateway.host.run("getenforce")
    if mode.rc != 0 or wanted == "unmanaged":
        return  # this host has no SELinux, or it is not ours
    assert mode.stdout.strip().lower() == wanted
    config = gateway.host.file("/etc/selinux/config").content_string
    assert f"\nSELINUX={wanted}" in f"\n{config}"


def test_logs_are_rotated(gateway: Target) -> None:
    assert gateway.host.run("logrotate -d /etc/logrotate.d/nginx").rc == 0
    assert gateway.host.file("/var/log/nginx/access.log").exists


def test_firewalld_lets_clients_in_where_it_runs(gateway: Target) -> None:
    if not gateway.host.run("systemctl is-active --quiet firewalld").succeeded:
        return
    port = f"{gateway.settings.listen_port}/tcp"
    for mode in ("", "--permanent"):
        assert port in gateway.host.check_output(f"firewall-cmd {mode} --list-ports").split()


def test_handshake_is_answered_with_101(gateway: Target) -> None:
    assert " 101 " in status_of(gateway, HANDSHAKE.format(upgrade="websocket"))


def test_other_upgrades_are_refused(gateway: Target) -> None:
    assert " 400 " in status_of(gateway, HANDSHAKE.format(upgrade="h2c"))


def test_plain_requests_reach_a_worker(gateway: Target) -> None:
    request = "GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert " 200 " in status_of(gateway, request)


def test_metrics_of_workers_are_not_public(gateway: Target) -> None:
    request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert " 404 " in status_of(gateway, request)
