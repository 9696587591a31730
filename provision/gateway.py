"""Gateway hosts: nginx installed, configured from `templates/nginx.conf.j2`, running.

Stages: install, SELinux, configure, firewall, activate.
"""

from __future__ import annotations

from pyinfra.api import deploy
from pyinfra.operations import yum

from provision import operations, rendering
from provision.operations import ManagedFile
from provision.settings import Fleet, GatewaySettings

ERROR_PAGES = "/usr/share/nginx/gateway"


@deploy("Gateway")
def gateway(settings: GatewaySettings, fleet: Fleet) -> None:
    """Bring one gateway host to its declared state."""
    yum.packages(name="nginx is installed", packages=[settings.nginx_package])
    # Before the mode: in enforcing mode, not a moment without it.
    if settings.selinux_allow_connect:
        operations.selinux_boolean(
            name="SELinux lets nginx connect", boolean="httpd_can_network_connect"
        )
    operations.selinux_mode(name=f"SELinux is {settings.selinux_mode}", mode=settings.selinux_mode)
    operations.firewalld(name="Public port is open", ports=public_ports(settings))
    configuration = nginx_conf(settings, fleet)
    operations.run_nginx(
        name="nginx runs this configuration",
        files=[configuration, *supporting_files(settings)],
        main=configuration,
        port=settings.listen_port,
    )


@deploy("Gateway rollback")
def previous() -> None:
    """Back to the configuration that the last change replaced."""
    operations.nginx_previous(name="nginx runs what it ran before")


def nginx_conf(settings: GatewaySettings, fleet: Fleet) -> ManagedFile:
    return ManagedFile(path="/etc/nginx/nginx.conf", content=rendering.nginx_conf(settings, fleet))


def supporting_files(settings: GatewaySettings) -> list[ManagedFile]:
    return [
        ManagedFile(path=f"{ERROR_PAGES}/404.html", content=rendering.static("404.html")),
        ManagedFile(path=f"{ERROR_PAGES}/50x.html", content=rendering.static("50x.html")),
        ManagedFile(path="/etc/logrotate.d/nginx", content=rendering.static("nginx.logrotate")),
        ManagedFile(
            path="/etc/systemd/system/nginx.service.d/gateway.conf",
            content=rendering.render("nginx-limits.conf.j2", gateway=settings),
        ),
    ]


def public_ports(settings: GatewaySettings) -> list[int]:
    return [
        settings.listen_port,
        *([settings.tls_listen_port] if settings.tls_certificate else []),
    ]
