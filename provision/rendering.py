"""Turns settings into the text of files. Pure: templates in, bytes out, no host involved.

Templates hold no logic that belongs in `settings.py`; an undefined name is an error that says
file and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from provision import lint, nginx_versions, sizing
from provision.nginx_versions import Version
from provision.settings import (
    ACME_WEBROOT,
    SOCKETS,
    Fleet,
    GatewaySettings,
    WorkerSettings,
)

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = CHECKOUT / "templates"
FILES = CHECKOUT / "files"
STATIC_FILES = (
    "404.html",
    "50x.html",
    "nginx.logrotate",
    "apt-install.sh",
    "handshake.sh",
    "nginx-trial.sh",
    "nginx-activate.sh",
    "nginx_exporter.py",
    "record.sh",
    "worker-switch.sh",
    "take-certificate.sh",
    "gateway-certificate.timer",
    "worker-seen.sh",
)


class RenderError(Exception):
    """A template that cannot be used: file, line and reason."""


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  configuration files, not HTML; settings are typed tokens
    )


def render(template: str, **values: Any) -> bytes:
    """The template's text, UTF-8. Raises `RenderError` naming file and line."""
    try:
        return _environment().get_template(template).render(**values).encode()
    except jinja2.TemplateSyntaxError as error:
        where = f"templates/{error.name or template}:{error.lineno}"
        raise RenderError(f"{where}: {error.message}") from None
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"templates/{error.name}: no such template; restore it") from None
    except jinja2.TemplateError as error:
        where = f"templates/{template}:{_line_of(error, template)}"
        raise RenderError(f"{where}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RenderError(f"templates/{template}: cannot be read: {error}") from None


def _line_of(error: jinja2.TemplateError, template: str) -> int:
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.endswith(template):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def static(name: str) -> bytes:
    """A file of `files/`, as it is. Raises `RenderError`."""
    try:
        return (FILES / name).read_bytes()
    except OSError as error:
        raise RenderError(f"files/{name}: cannot be read: {error.strerror}; restore it") from None


def shell(name: str) -> str:
    """A script of `files/`, for `bash -c`. Raises `RenderError`."""
    return static(name).decode()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one nginx process may have open, and how many clients may wait. None: nginx's own."""

    worker_connections: int
    descriptors: int
    backlog: int | None


def demand(gateway: GatewaySettings, fleet: Fleet, cores: int) -> sizing.Demand | None:
    """What is wanted of a gateway with so many CPU cores; None where no number says it."""
    if gateway.connections is None:
        return None
    processes = gateway.worker_processes
    # All of the connections may be those of one service, of that with the fewest workers even;
    # idle ones are kept for each.
    services = fleet.service_names
    return sizing.Demand(
        connections=gateway.connections,
        workers=min(len(fleet.upstreams(service)) for service in services),
        processes=cores if processes == "auto" else processes,
        keepalive=gateway.upstream_keepalive * len(services),
    )


def limits(gateway: GatewaySettings, fleet: Fleet, cores: int = 1) -> Limits:
    """The limits of nginx on a host with so many CPU cores."""
    wanted = demand(gateway, fleet, cores)
    if wanted is None:
        return Limits(
            worker_connections=gateway.worker_connections,
            descriptors=sizing.descriptors(gateway.worker_connections),
            backlog=None,
        )
    plan = sizing.plan(wanted)
    return Limits(
        worker_connections=plan.worker_connections,
        descriptors=plan.descriptors,
        backlog=plan.backlog,
    )


def nginx_conf(
    gateway: GatewaySettings,
    fleet: Fleet,
    cores: int = 1,
    *,
    version: Version = nginx_versions.OLDEST,
) -> bytes:
    """nginx.conf of one gateway with so many CPU cores (they count where `connections` is set).

    `version`: the nginx that will read it. One for the oldest is good for all, but newer ones may
    warn of what is deprecated. Raises `RenderError` where it cannot do what the settings say.
    """
    problems = nginx_versions.problems(version, gateway.needed_features)
    if problems:
        raise RenderError("; ".join(problems))
    return render(
        "nginx.conf.j2",
        gateway=gateway,
        can=nginx_versions.abilities(version),
        acme_webroot=ACME_WEBROOT,
        routes=fleet.routes(gateway),
        sites=fleet.sites(gateway),
        probe=fleet.probe(gateway),
        limits=limits(gateway, fleet, cores),
    )


def nginx_unit(gateway: GatewaySettings, fleet: Fleet, cores: int = 1) -> bytes:
    """The drop-in of nginx.service."""
    return render("nginx-unit.conf.j2", gateway=gateway, limits=limits(gateway, fleet, cores))


def check_all(fleet: Fleet) -> None:
    """Render everything that the deploy would render, so that a fault shows before it begins."""
    ping_interval_s = max(
        (
            found.settings.service_option("ping_interval_s")
            for worker in fleet.workers.values()
            for found in fleet.assignments(worker)
        ),
        default=0,
    )
    passed = set()  # most versions, and most gateways, get the same
    for name, gateway in fleet.gateways.items():
        for version in _versions(gateway):
            text = nginx_conf(gateway, fleet, version=version).decode()
            unit = nginx_unit(gateway, fleet).decode()
            hardened = gateway.profile == "hardened"
            if (text, unit, hardened) not in passed:
                _lint(name, text, unit=unit, hardened=hardened, ping_interval_s=ping_interval_s)
                passed.add((text, unit, hardened))
    for worker in fleet.workers.values():
        values = {**unit_placeholders(), **unit_values(worker, fleet)}
        render("gpu-worker@.service.j2", **values)
        render("gpu-worker@.socket.j2", **values)
    for name in STATIC_FILES:
        static(name)


def _versions(gateway: GatewaySettings) -> list[Version]:
    """Versions that make a difference for this gateway: which one it has, only its host knows."""
    return [
        version
        for version in nginx_versions.MILESTONES
        if not nginx_versions.problems(version, gateway.needed_features)
    ]


def _lint(host: str, text: str, *, unit: str, hardened: bool, ping_interval_s: float) -> None:
    try:
        found = lint.lint(text, hardened=hardened, ping_interval_s=ping_interval_s, unit=unit)
        faults = [str(finding) for finding in found]
    except lint.UnparsableError as error:
        faults = [str(error)]
    if faults:
        where = f"templates/nginx.conf.j2, as rendered for {host}"
        raise RenderError(f"{where}: {'; '.join(faults)}")


def unit_values(worker: WorkerSettings, fleet: Fleet) -> dict[str, Any]:
    """What the units of a host's workers are told: one unit for all of its services."""
    found = [assignment.settings for assignment in fleet.assignments(worker)]
    return {
        "worker": worker,
        "sockets": SOCKETS,
        "sockets_of": local.nginx_user if (local := fleet.local_gateway(worker)) else None,
        "descriptors": max((settings.descriptors for settings in found), default=0),
        "stop_timeout_s": max((settings.stop_timeout_s for settings in found), default=0),
    }


def unit_placeholders() -> dict[str, Any]:
    """Stand-ins for what is known only on the host, for a trial rendering."""
    return {
        "settings_dir": "/nonexistent",
        "allowed_addresses": ["192.0.2.1"],
        "has_gpu": False,
    }
