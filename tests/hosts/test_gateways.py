"""A gateway, as it was declared: package, files, unit, port, user, and a handshake."""

from collections.abc import Callable

from testinfra.host import Host

from provision import certificates, facts, nginx_versions, rendering, selinux
from provision import gateway as declared
from provision.facts import CertificateState
from provision.services import Route, Site
from provision.settings import GatewaySettings
from tests.hosts.conftest import Target


def cores(target: Target) -> int:
    """CPU cores, as nginx counts them."""
    return int(target.host.check_output("getconf _NPROCESSORS_ONLN"))


def installed(target: Target) -> nginx_versions.Version:
    """The version of nginx on the host."""
    version = nginx_versions.parse(target.host.run("nginx -v").stderr)
    assert version is not None
    return version


def settled(target: Target) -> GatewaySettings:
    """The settings with what follows from the certificate on the host."""
    path = target.settings.tls_certificate
    found = CertificateState()
    if path:
        uri = target.host.run("openssl x509 -in %s -noout -ocsp_uri", path).stdout.strip()
        chain = target.host.run("grep -c 'BEGIN CERTIFICATE' %s", path).stdout.strip()
        found = CertificateState(ocsp=bool(uri), chain=int(chain or 0))
    return certificates.decided(target.settings, found)


def status_of(
    target: Target,
    path: str,
    upgrade: str = "",
    *,
    tls: bool | None = None,
    name: str | None = None,
) -> str:
    """Status line of the gateway's answer, by TLS where that is how clients come.

    `name`: the host name that is asked for.

    bash opens the socket itself: no client is needed there; for TLS it takes curl.
    """
    settings, host = target.settings, name or "localhost"
    headers = [f"Connection: {'Upgrade' if upgrade else 'close'}"]
    if upgrade:
        headers += [f"Upgrade: {upgrade}", "Sec-WebSocket-Version: 13"]
        headers += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    if settings.tls_only if tls is None else tls:
        # What curl says of its work comes at once; an answer, when the connection ends.
        script = (
            "url=$1 at=$2; shift 2; "
            'curl -skv --http1.1 -m 3 --resolve "$at" "${@/#/-H}" "$url" 2>&1 >/dev/null | '
            "sed -n '/^< HTTP/{s/^< //p;q}'"
        )
        place = f"{host}:{settings.tls_listen_port}"
        arguments = [f"https://{place}{path}", f"{place}:127.0.0.1", *headers]
    else:
        script = (
            'exec 3<>/dev/tcp/127.0.0.1/$1; shift; printf "%s\\r\\n" "$@" "" >&3; '
            'IFS= read -r -t 10 -u 3 line; printf "%s" "$line"'
        )
        arguments = [
            str(settings.listen_port),
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            *headers,
        ]
    places = " ".join(["%s"] * len(arguments))
    return str(target.host.check_output(f"bash -c %s request {places}", script, *arguments))


def asks_who_comes(target: Target) -> bool:
    """Whether this check, which has neither certificate nor credentials, is turned away."""
    return bool(target.settings.asks_for_certificates or target.settings.auth_request)


def test_nginx_is_installed_by_the_package_manager(gateway: Target) -> None:
    name = gateway.settings.nginx_package
    assert gateway.host.run("rpm -q %s", name).succeeded or gateway.host.package(name).is_installed


def test_nginx_is_of_the_declared_version_and_the_one_that_runs(gateway: Target) -> None:
    wanted = gateway.settings.nginx_version
    assert wanted is None or installed(gateway).is_in(wanted)
    running = gateway.host.check_output("readlink /proc/$(cat /run/nginx.pid)/exe")
    assert not running.endswith(" (deleted)")


def test_nginx_runs_and_starts_at_boot(gateway: Target) -> None:
    service = gateway.host.service("nginx")
    assert service.is_running
    assert service.is_enabled


def test_every_managed_file_is_as_declared(gateway: Target) -> None:
    settings = settled(gateway)
    files = [
        declared.nginx_conf(settings, gateway.fleet, cores(gateway), installed(gateway)),
        *declared.supporting_files(settings, gateway.fleet, cores(gateway)),
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
    for route in gateway.fleet.routes(gateway.settings):
        for upstream in route.upstreams:
            assert f"server {upstream.address} " in dump


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
    limits = rendering.limits(gateway.settings, gateway.fleet, cores(gateway))
    assert systemd_property(gateway.host, "nginx", "LimitNOFILE") == str(limits.descriptors)


def test_selinux_mode(gateway: Target) -> None:
    wanted = gateway.settings.selinux_mode
    mode = gateway.host.run("getenforce")
    if mode.rc != 0 or wanted == "unmanaged":
        return  # this host has no SELinux, or it is not ours
    assert mode.stdout.strip().lower() == wanted
    config = gateway.host.file("/etc/selinux/config").content_string
    assert f"\nSELINUX={wanted}" in f"\n{config}"


def test_selinux_lets_nginx_do_what_was_declared(gateway: Target) -> None:
    if gateway.host.run("selinuxenabled").rc != 0:
        return  # this host has no SELinux
    policy = selinux.Policy.of(gateway.settings, gateway.fleet)
    for boolean in policy.booleans:
        # Now, and at the next boot.
        assert gateway.host.check_output("getsebool %s", boolean) == f"{boolean} --> on"
        kept = gateway.host.check_output("cat /var/lib/selinux/*/active/booleans.local")
        assert f"{boolean}=1" in kept.splitlines()
    if policy.web_ports:
        ranges = facts.SelinuxPorts().process(
            gateway.host.check_output("semanage port -l -n").splitlines()
        )
        for port in policy.web_ports:
            assert selinux.port_type(ranges, port) == selinux.WEB_PORT, port


def test_nginx_runs_confined_where_there_is_selinux(gateway: Target) -> None:
    if gateway.host.run("selinuxenabled").rc != 0:
        return
    labels = gateway.host.check_output("ps -C nginx -o label=").split()
    assert {label.split(":")[2] for label in labels} == {"httpd_t"}


def test_logs_are_rotated(gateway: Target) -> None:
    assert gateway.host.run("logrotate -d /etc/logrotate.d/nginx").rc == 0
    assert gateway.host.file("/var/log/nginx/access.log").exists


def test_firewalld_lets_clients_in_where_it_runs(gateway: Target) -> None:
    if not gateway.host.run("systemctl is-active --quiet firewalld").succeeded:
        return
    for port in declared.public_ports(gateway.settings):
        for mode in ("", "--permanent"):
            assert (
                f"{port}/tcp"
                in gateway.host.check_output(f"firewall-cmd {mode} --list-ports").split()
            )


def services_of(gateway: Target) -> list[tuple[Site, Route]]:
    """Each service of a gateway, at each of its servers."""
    sites = gateway.fleet.sites(gateway.settings)
    return [(site, route) for site in sites for route in site.routes]


def test_handshakes_are_answered_by_a_worker_of_each_service(gateway: Target) -> None:
    answered = ("101", "401", *gateway.settings.probe_refusals)
    for site, route in services_of(gateway):
        status = status_of(gateway, route.path, "websocket", name=site.probed_name)
        assert any(f" {code} " in status for code in answered), (route.path, status)


def test_the_plain_port_serves_nobody_where_tls_is_asked_for(gateway: Target) -> None:
    if not gateway.settings.tls_only:
        return
    assert " 426 " in f"{status_of(gateway, '/', 'websocket', tls=False)} "
    assert " 308 " in status_of(gateway, "/v2", tls=False)


def test_other_upgrades_are_refused(gateway: Target) -> None:
    assert " 400 " in status_of(gateway, "/", "h2c")


def test_plain_requests_reach_a_worker_of_each_service(gateway: Target) -> None:
    for site, route in [] if asks_who_comes(gateway) else services_of(gateway):
        path = f"{route.prefix}/v2/health/ready"
        assert " 200 " in status_of(gateway, path, name=site.probed_name), path


def test_metrics_of_workers_are_not_public(gateway: Target) -> None:
    for site, route in [] if asks_who_comes(gateway) else services_of(gateway):
        for path in (f"{route.prefix}/metrics", f"{route.prefix}/metrics/"):
            assert " 404 " in status_of(gateway, path, name=site.probed_name), path


def test_counters_of_nginx_are_on_loopback_alone(gateway: Target) -> None:
    port = gateway.settings.status_port
    if port is None:
        return
    listening = gateway.host.check_output(f"ss -ltnH 'sport = :{port}'").splitlines()
    assert [line.split()[3] for line in listening] == [f"127.0.0.1:{port}"]


def test_prometheus_gets_the_counters_where_it_is_to(gateway: Target) -> None:
    port = gateway.settings.metrics_port
    if port is None:
        return
    text = gateway.host.check_output(f"curl -s http://localhost:{port}/metrics")
    assert "\nnginx_up 1\n" in text


def test_key_of_a_self_signed_certificate_is_roots_alone(gateway: Target) -> None:
    if not gateway.settings.tls_self_signed:
        return
    file = gateway.host.file(gateway.settings.certificate_key)
    assert (oct(file.mode), file.user) == ("0o600", "root")


def test_the_certificate_is_right_and_does_not_end_soon(gateway: Target) -> None:
    settings = gateway.settings
    if not settings.tls:
        return
    certificate, key = settings.certificate, settings.certificate_key
    if gateway.host.run("command -v openssl").failed:
        return  # nothing on this host can tell
    of_key = gateway.host.check_output("openssl pkey -in %s -pubout", key)
    assert gateway.host.check_output("openssl x509 -in %s -noout -pubkey", certificate) == of_key
    week = "604800"
    still = gateway.host.run("openssl x509 -in %s -noout -checkend %s", certificate, week)
    assert still.succeeded, gateway.host.check_output(
        "openssl x509 -in %s -noout -enddate", certificate
    )


def test_the_certificate_is_renewed_by_a_timer(gateway: Target) -> None:
    if not gateway.settings.tls_acme:
        return
    timer = gateway.host.service("gateway-certificate.timer")
    assert timer.is_enabled
    assert timer.is_running
    # As the last renewal left it.
    assert gateway.host.run("systemctl is-failed --quiet gateway-certificate.service").failed


def test_the_sandbox_is_declared(
    gateway: Target, systemd_property: Callable[[Host, str, str], str]
) -> None:
    declared_as = "strict" if gateway.settings.sandbox else "no"
    assert systemd_property(gateway.host, "nginx", "ProtectSystem") == declared_as
