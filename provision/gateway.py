"""Gateway hosts: nginx installed, configured from `templates/nginx.conf.j2`, running.

Stages: install, SELinux, what the new configuration needs beside it (ports, a certificate),
activate; then what only the former one needed goes.
"""

from __future__ import annotations

import ipaddress
from functools import partial

from pyinfra import host
from pyinfra.api import deploy, operation

from provision import (
    acme,
    aftermath,
    certificates,
    facts,
    live,
    metrics,
    nginx_packages,
    nginx_versions,
    operations,
    record,
    rendering,
    selinux,
    sizing,
)
from provision.nginx_versions import Version
from provision.operations import Commands, ManagedFile
from provision.preflight import RefusedError
from provision.settings import (
    SELF_SIGNED_CERTIFICATE,
    SELF_SIGNED_KEY,
    Fleet,
    GatewaySettings,
)

ERROR_PAGES = "/usr/share/nginx/gateway"


@deploy("Gateway")
def gateway(settings: GatewaySettings, fleet: Fleet) -> None:
    """Bring one gateway host to its declared state. Raises `RefusedError`, touching nothing."""
    cores = sized(settings, fleet)
    settings = certificates.settled(settings)
    install(settings)
    if "tls:" in fleet.probe(settings):
        curl(name="curl is installed")
    selinux.configure(settings, fleet)
    # Clients come by the former port until nginx runs this configuration, which it may refuse.
    operations.firewalld(
        name="Public port is open", role="gateway", ports=public_ports(settings), closes=False
    )
    if settings.tls_self_signed:
        operations.self_signed_certificate(
            name="Certificate of its own",
            certificate=SELF_SIGNED_CERTIFICATE,
            key=SELF_SIGNED_KEY,
            names=certificate_names(settings, fleet.addresses[host.name]),
        )
    if settings.tls_acme:
        acme.certbot(name="certbot is installed", package=settings.acme_package)
        acme.prepare(
            name="Challenges can be answered",
            names=certificate_names(settings, fleet.addresses[host.name]),
        )
    files = supporting_files(settings, fleet, cores)
    operations.run_nginx(
        name="nginx runs this configuration",
        files=files,
        main=partial(nginx_conf, settings, fleet, cores),
        probe=fleet.probe(settings),
        oldest=nginx_versions.oldest_with(settings.needed_features.values()),
    )
    operations.firewalld(
        name="No other public port is open",
        role="gateway",
        ports=public_ports(settings),
        ports_from={settings.metrics_port: settings.metrics_from} if settings.metrics_port else {},
    )
    if settings.tls_acme:
        acme.certificate(name="Certificate of the ACME authority", settings=settings)
    else:
        acme.retire(name="No renewal of a certificate that is not served")
    if settings.certificate and settings.certificate_key:
        certificates.tell_end(
            name="End of the certificate",
            certificate=settings.certificate,
            key=settings.certificate_key,
        )
    metrics.exporter(settings)
    aftermath.tell(
        name="Earlier configurations, and files of others",
        ports=public_ports(settings),
        managed=[managed.path for managed in files],
        shutdown_timeout_s=settings.worker_shutdown_timeout_s,
    )


def install(settings: GatewaySettings) -> None:
    """nginx itself, and with it its user: what workers need that it reaches by Unix sockets."""
    declared = nginx_packages.wanted(settings)
    nginx_packages.refuse_incapable(declared)
    nginx_packages.nginx_installed(name="nginx is installed", declared=declared)


@operation()
def curl() -> Commands:
    """curl is there, by which handshakes through TLS are tried; in whichever package it came."""
    if host.get_fact(facts.Lacks, program="curl"):
        manager = host.get_fact(facts.Packages, names=("curl",), files=()).manager
        yield from record.by_manager("curl", manager)


@deploy("Gateway rollback")
def previous() -> None:
    """Back to the configuration that the last change replaced."""
    operations.nginx_previous(name="nginx runs what it ran before")
    live_ports(name="Its public ports are open")
    acme.follow(name="Its certificate is renewed, or is none to renew")


@operation()
def live_ports() -> Commands:
    """The public ports of the configuration that is live are open; none is closed, since the next
    deploy knows which are declared.
    """
    text = host.get_fact(facts.FileText, path=live.NGINX_CONF) or ""
    yield from operations.firewalld._inner(role="gateway", ports=live.ports(text), closes=False)


def sized(settings: GatewaySettings, fleet: Fleet) -> int:
    """CPU cores of the current host, which has to give what `connections` needs.

    Raises `RefusedError` with every limit that is too low. A host is asked only where it matters.
    """
    if settings.connections is None:
        return 1
    found = host.get_fact(facts.HostLimits)
    wanted = rendering.demand(settings, fleet, found.cores)
    capacity = sizing.Capacity(
        memory=found.memory,
        first_port=found.first_port,
        last_port=found.last_port,
        nr_open=found.nr_open,
        somaxconn=found.somaxconn,
        conntrack_max=found.conntrack_max,
    )
    problems = sizing.problems(wanted, capacity) if wanted else []
    if problems:
        raise RefusedError(
            [f"{host.name}: connections = {settings.connections} needs {p}" for p in problems]
        )
    return found.cores


def certificate_names(settings: GatewaySettings, address: str) -> list[str]:
    """What a self-signed certificate is for: the server's names, its address, this host itself."""
    names = [f"DNS:{name}" for name in settings.all_names]
    addresses = [f"IP:{ipaddress.ip_address(found)}" for found in (address, "127.0.0.1")]
    return list(dict.fromkeys([*names, "DNS:localhost", *addresses]))


def nginx_conf(
    settings: GatewaySettings, fleet: Fleet, cores: int, version: Version
) -> ManagedFile:
    """nginx.conf for the nginx that is installed on the host."""
    return ManagedFile(
        path=live.NGINX_CONF,
        content=rendering.nginx_conf(settings, fleet, cores, version=version),
    )


def supporting_files(settings: GatewaySettings, fleet: Fleet, cores: int = 1) -> list[ManagedFile]:
    return [
        ManagedFile(path=f"{ERROR_PAGES}/404.html", content=rendering.static("404.html")),
        ManagedFile(path=f"{ERROR_PAGES}/50x.html", content=rendering.static("50x.html")),
        ManagedFile(path="/etc/logrotate.d/nginx", content=rendering.static("nginx.logrotate")),
        ManagedFile(
            path=live.NGINX_DROP_IN,
            content=rendering.nginx_unit(settings, fleet, cores),
        ),
        *acme.files(settings),
    ]


def public_ports(settings: GatewaySettings) -> list[int]:
    by_tls = [settings.tls_listen_port] if settings.tls else []
    challenges = [settings.acme_http_port] if settings.tls_acme else []
    return list(dict.fromkeys([settings.listen_port, *by_tls, *challenges]))
