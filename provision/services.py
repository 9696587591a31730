"""Services: which model is served at which path or name, by which hosts and ports.

Owns what `services` may say, what of it cannot be together, and how a gateway routes to it. Pure.

Each service has worker processes of its own, one a GPU or port, rather than a share in one process
that serves all models: so each has its own upstream, whose connections nginx can count, and its
own queue, limits, tokens and restarts; a model that is changed, or that fails, stops no other.
"""

from __future__ import annotations

import difflib
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from provision.fields import Metric, Origin, Port, Record, WorkerPorts

# In names of nginx's variables, of files and of units.
ServiceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")]

HostName = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]

_SEGMENT = r"[A-Za-z0-9_~.-]+"
Path = Annotated[str, Field(pattern=rf"^/({_SEGMENT}(/{_SEGMENT})*)?$")]

# What a worker answers itself below its path, and what each of nginx's servers keeps to itself.
OF_WORKERS = ("/metrics", "/v2")
OF_NGINX = ("/404.html", "/50x.html", "/_authorize", "/.well-known")


class ServiceSettings(Record):
    """One entry of `services`. What it leaves out is as the hosts' own settings say."""

    model: str = Field(
        description="Bundle to serve, relative to the checkout: a version's folder, or the "
        "model's folder for its newest version. Needed."
    )
    path: Path = Field(
        default="/",
        description="Where clients find it: `/digits` for `ws://GATEWAY:8009/digits`. The workers "
        "see what stands behind it, so health is at `/digits/v2/health/ready`.",
    )
    server_names: tuple[HostName, ...] = Field(
        default=(),
        description="Host names under which clients find it, exact or `*.example.com`. Empty: "
        "under every name that no other service has.",
    )
    workers: tuple[str, ...] = Field(
        default=(), description="Hosts of the group `workers` that run it. Empty: all."
    )
    worker_ports: WorkerPorts | None = Field(
        default=None,
        description="Its ports on each of its hosts, or `'per-gpu'`. None: the host's "
        "`worker_ports`, which one service of a host can have.",
    )
    first_worker_port: Port | None = Field(
        default=None, description="As the setting of the workers, for `'per-gpu'`."
    )
    service_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Beside those of the workers; what both say counts as it is here.",
    )
    worker_tokens: str | None = Field(
        default=None, description="As the setting of the workers. Empty: anybody may connect."
    )
    min_metrics: dict[str, Metric] | None = Field(
        default=None, description="As the setting of the workers."
    )
    max_metrics: dict[str, Metric] | None = Field(
        default=None, description="As the setting of the workers."
    )
    allowed_origins: tuple[Origin, ...] | None = Field(
        default=None, description="As the setting of the gateways. Empty: all."
    )
    client_max_connections: Annotated[int, Field(strict=True, ge=0, le=65_535)] | None = Field(
        default=None,
        description="As the setting of the gateways, counted for this service alone. 0: no bound.",
    )
    client_handshakes_per_s: Annotated[int, Field(strict=True, ge=0, le=10_000)] | None = Field(
        default=None,
        description="As the setting of the gateways, counted for this service alone. 0: no bound.",
    )

    @model_validator(mode="after")
    def _path_is_plain(self) -> Self:
        if posixpath.normpath(self.path) != self.path:
            raise ValueError(f"path {self.path!r} has . or .. in it, which clients take out")
        return self

    def overrides(self) -> dict[str, Any]:
        """What it says instead of a worker host's own settings, but for `service_options`."""
        said = {name: getattr(self, name) for name in _OF_WORKERS}
        said = {name: value for name, value in said.items() if value is not None}
        if said.get("worker_tokens") == "":
            said["worker_tokens"] = None
        return {"model": self.model, **said}


_OF_WORKERS = ("worker_ports", "first_worker_port", "worker_tokens", "min_metrics", "max_metrics")


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A worker, as nginx spreads connections over it."""

    address: str  # address:port, or unix:PATH
    weight: int
    backup: bool


@dataclass(frozen=True, kw_only=True)
class Route:
    """A service as one gateway offers it. `service` is empty where there is only one."""

    service: str
    path: str
    upstreams: Sequence[Upstream]
    allowed_origins: Sequence[str]
    client_max_connections: int | None
    client_handshakes_per_s: int | None

    @property
    def suffix(self) -> str:
        """Of its names in nginx's configuration."""
        return f"_{self.service}" if self.service else ""

    @property
    def prefix(self) -> str:
        """Its path as what stands before another: empty for `/`."""
        return self.path.rstrip("/")

    @property
    def prefix_pattern(self) -> str:
        """The same as a regular expression."""
        return re.escape(self.prefix).replace(r"\-", "-").replace(r"\~", "~")

    @property
    def origin_patterns(self) -> list[tuple[str, int]]:
        """Keys of nginx's map over the Origin, the most exact first, each with 0: not refused."""
        return origin_patterns(self.allowed_origins)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One of nginx's servers: its names, and the services that it offers."""

    server_names: Sequence[str]
    routes: Sequence[Route]
    is_default: bool

    @property
    def has_root(self) -> bool:
        """Whether a service is at `/`."""
        return any(route.path == "/" for route in self.routes)

    @property
    def probed_name(self) -> str | None:
        """A host name that leads to it; None where any other does."""
        return None if self.is_default else self.server_names[0].replace("*", "probe")


def origin_patterns(allowed: Iterable[str]) -> list[tuple[str, int]]:
    """Keys of nginx's map over the Origin, the most exact first, each with 0: not refused."""
    allowed = list(allowed)
    exact = [f'"{o}"' for o in allowed if "*" not in o]
    below = [
        '"~^' + o.replace(".", r"\.").replace(r"*\.", "(?:[a-z0-9_-]+" + r"\." + ")+") + '$"'
        for o in allowed
        if "*" in o
    ]
    return [(key, 0) for key in dict.fromkeys([*exact, *below])]


def sites(
    routes: Iterable[Route], services: Mapping[str, ServiceSettings], own_names: Sequence[str]
) -> list[Site]:
    """nginx's servers, the default one first: it answers to `own_names`, and to all others.

    Names with the same services share a server.
    """
    default: list[Route] = []
    named: dict[str, list[Route]] = {}
    for route in routes:
        names = services[route.service].server_names if route.service else ()
        for name in names:
            named.setdefault(name, []).append(route)
        if not names:
            default.append(route)
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, found in named.items():
        shared.setdefault(tuple(route.service for route in found), []).append(name)
    return [
        Site(server_names=tuple(own_names), routes=tuple(default), is_default=True),
        *(
            Site(server_names=tuple(names), routes=tuple(named[names[0]]), is_default=False)
            for names in shared.values()
        ),
    ]


def places(found: Iterable[Site], port: str) -> dict[str, str]:
    """A place of each service, as files/handshake.sh reads it: `[tls:]PORT[@NAME][/PATH]`."""
    places: dict[str, str] = {}
    for site in found:
        name = f"@{site.probed_name}" if site.probed_name else ""
        for route in site.routes:
            places.setdefault(route.service, f"{port}{name}{route.prefix}")
    return places


def problems(
    services: Mapping[str, ServiceSettings],
    worker_hosts: Sequence[str],
    own_names: Mapping[str, Sequence[str]],
) -> Iterable[str]:
    """What cannot be together.

    `worker_hosts`: names of the group `workers`. `own_names`: each gateway's `server_name`s.
    """
    yield from _same_place(services)
    for name, service in services.items():
        yield from _unknown_hosts(name, service, worker_hosts)
        yield from _hidden(name, service, services)
        yield from _taken_names(name, service, own_names)
    if services:
        runs = {host for s in services.values() for host in s.workers or worker_hosts}
        for host in worker_hosts:
            if host not in runs:
                yield f"{host}: runs no service; name it in workers of one, or take it out"


def _same_place(services: Mapping[str, ServiceSettings]) -> Iterable[str]:
    owners: dict[tuple[str, str], str] = {}
    for name, service in services.items():
        for host in service.server_names or ("",):
            owner = owners.setdefault((host, service.path), name)
            if owner != name:
                where = f"{host}{service.path}" if host else service.path
                yield (
                    f"services {owner} and {name} are both at {where}; give one of them another "
                    "path, or server_names of its own"
                )


def _unknown_hosts(
    name: str, service: ServiceSettings, worker_hosts: Sequence[str]
) -> Iterable[str]:
    for host in service.workers:
        if host not in worker_hosts:
            close = difflib.get_close_matches(host, worker_hosts, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"services.{name}.workers: the group workers has no host {host}{hint}"


def _hidden(
    name: str, service: ServiceSettings, services: Mapping[str, ServiceSettings]
) -> Iterable[str]:
    """A path that nginx, or another service's workers, answer themselves."""
    for own in OF_NGINX:
        if _is_below(service.path, own):
            yield f"services.{name}.path: {own} is answered by nginx itself; choose another"
    for other_name, other in services.items():
        for own in OF_WORKERS:
            taken = other.path.rstrip("/") + own
            if other_name != name and _is_below(service.path, taken):
                yield (
                    f"services.{name}.path: {taken} is answered by the workers of {other_name}; "
                    "choose another"
                )


def _is_below(path: str, other: str) -> bool:
    return f"{path}/".startswith(f"{other}/")


def _taken_names(
    name: str, service: ServiceSettings, own_names: Mapping[str, Sequence[str]]
) -> Iterable[str]:
    for gateway, names in own_names.items():
        for taken in sorted(set(names) & set(service.server_names)):
            yield (
                f"services.{name}.server_names: {taken} is server_name of {gateway}, under which "
                "services without server_names are found; leave it out"
            )


def reference() -> list[str]:
    """The settings of a service as lines of Markdown."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in ServiceSettings.model_fields.items():
        needed = field.is_required()
        default = None if needed else field.get_default(call_default_factory=True)
        shown = list(default) if isinstance(default, tuple) else default
        cell = "(needed)" if needed else f"`{shown!r}`"
        lines.append(f"| `{name}` | {cell} | {field.description} |")
    return lines
