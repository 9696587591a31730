"""Every setting of the deploy: name, type, default, unit and meaning, in one place.

Pure: no pyinfra, no I/O. `parse_fleet` takes what an inventory says and gives back either a
checked `Fleet` or *all* problems at once, so that nothing is touched on a bad day.
`docs/settings.md` is generated from this module (`python -m provision.settings`).
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import itertools
import math
import posixpath
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from pydantic import Field, PrivateAttr, SecretStr, ValidationError, model_validator

from gpu_service import settings as service_settings
from gpu_service.training import settings as training_settings
from provision import nginx_versions, services
from provision.fields import (
    HOST_NAME,
    PER_GPU,
    AbsolutePath,
    Metric,
    Origin,
    Port,
    Record,
    Seconds,
    Token,
    WorkerPorts,
)
from provision.services import Route, ServiceName, ServiceSettings, Site, Upstream


class Group(StrEnum):
    """The groups of an inventory that mean something to this project."""

    GATEWAYS = "gateways"
    WORKERS = "workers"
    TRAINERS = "trainers"


class CommonSettings(Record):
    """Of every host."""

    _name: str = PrivateAttr(default="")

    address: str = Field(
        default="",
        description="IP address by which the *other hosts* reach this one. "
        "Empty: the host's name, which then has to resolve on the operator's machine.",
    )

    @model_validator(mode="after")
    def _address_is_an_ip(self) -> Self:
        if self.address:
            ipaddress.ip_address(self.address)
        return self

    @property
    def name(self) -> str:
        """The host's name in the inventory."""
        return self._name


class ServingSettings(CommonSettings):
    """Of hosts that clients are served by: gateways and workers."""

    services: dict[ServiceName, ServiceSettings] = Field(
        default_factory=dict,
        description="Several services (models) behind the same gateways, each by a name of its "
        'own: `{"digits": {"model": "models/digits", "path": "/digits"}, …}`; what one may say is '
        "told below. Said for all hosts, in `group_data/all.py`. Empty: one service, the workers' "
        "`model`, at `/`.",
    )


# What `profile = "hardened"` changes: defaults only, so that each can still be set alone.
HARDENED: Mapping[str, Any] = {
    "nginx_user": "nginx",
    "selinux_mode": "enforcing",
    "selinux_allow_connect": True,
    "selinux_allow_setrlimit": True,
    "tls_only": True,
    "hsts_max_age_s": 2 * 365 * 24 * 3600,  # Mozilla's
    "tls_stapling": "auto",
    "client_max_connections": 100,
    "client_handshakes_per_s": 10,
    "status_port": 8008,  # http_port_t in SELinux's policy, so nginx may listen on it
    "sandbox": True,
}

SELF_SIGNED_CERTIFICATE = "/etc/pki/gpu-gateway/self-signed.pem"
SELF_SIGNED_KEY = "/etc/pki/gpu-gateway/self-signed.key"

# What nginx serves of an ACME authority's, and where it looks for the answers to its challenges.
ACME_CERTIFICATE = "/etc/pki/gpu-gateway/acme.pem"
ACME_KEY = "/etc/pki/gpu-gateway/acme.key"
ACME_WEBROOT = "/var/www/gpu-gateway"

# Where systemd reads units of a host's own.
UNITS = "/etc/systemd/system"
# Models and training runs, on workers and trainers.
SERVICE_STATE = "/var/lib/gpu-service"

# Settings that name a file on the gateway, which somebody else put there.
_TLS_FILES = ("tls_certificate", "tls_certificate_key", "tls_trusted_chain", "tls_client_ca")

# What the sandbox of nginx.service does not see. https://www.freedesktop.org/software/systemd/man/systemd.exec.html#ProtectHome=
UNSEEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # noqa: S108


class _Scraped(CommonSettings):
    """Of hosts whose metrics somebody collects."""

    metrics_from: tuple[str, ...] = Field(
        default=(),
        description="IP addresses that may read this host's metrics, beside the host itself: those "
        "of Prometheus. On a worker that is its port with all that it serves.",
    )

    @model_validator(mode="after")
    def _collectors_are_addresses(self) -> Self:
        for address in self.metrics_from:
            ipaddress.ip_address(address)
        return self


class GatewaySettings(ServingSettings, _Scraped):
    """Of hosts in `gateways`: nginx in front of the workers."""

    profile: Literal["reference", "hardened"] = Field(
        default="reference",
        description="`hardened` changes the defaults of other settings, each of which can still be "
        "set alone: "
        + ", ".join(f"`{name} = {value!r}`" for name, value in HARDENED.items())
        + ". It needs a certificate.",
    )
    nginx_package: Token = Field(
        default="nginx", description="Package that yum, or apt, installs to get nginx."
    )
    nginx_version: (
        Annotated[str, Field(strict=True, pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?$")] | None
    ) = Field(
        default=None,
        description='Version to have, in quotes: `"1.26.3"`, or `"1.26"` for the newest of that '
        "series. Another one is replaced, up or down, without closing a socket. None: what is "
        "installed stays; else the newest.",
    )
    nginx_source: Literal["distribution", "module", "nginx.org"] = Field(
        default="distribution",
        description="Where nginx comes from: the distribution's own packages; a module stream of "
        "dnf (`nginx_stream`); or nginx.org's repository, whose packages have to be signed.",
    )
    nginx_stream: Annotated[str, Field(strict=True, pattern=r"^[a-z0-9.]+$")] | None = Field(
        default=None,
        description='For `"module"`: the stream, in quotes, as `"1.24"`. For `"nginx.org"`: '
        '`"stable"`, which None is too, or `"mainline"`.',
    )
    nginx_mirror: Annotated[
        str, Field(pattern=r"^(https?|file)://[A-Za-z0-9._~:/@%+-]*[A-Za-z0-9._~-]$")
    ] = Field(
        default="https://nginx.org/packages",
        description="For `nginx.org`: address of its packages, or of a copy for hosts without "
        "internet; below it are `centos/9/x86_64/`, `debian/`, and `mainline/` with the same.",
    )
    nginx_signing_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$")] = Field(
        default="files/nginx_signing.key",
        description="For `nginx.org`: the public keys, on the operator's machine, that its "
        "packages have to be signed with. The file that ships has nginx's own.",
    )
    nginx_user: Token = Field(
        default="root",
        description="User of nginx's worker processes. `root` is the reference set-up; "
        "`nginx` is the safer choice (only the master needs root).",
    )
    selinux_mode: Literal["enforcing", "permissive", "disabled", "unmanaged"] = Field(
        default="permissive",
        description="SELinux mode of the running system and of the next boot. "
        "`unmanaged` leaves it alone. Hosts without SELinux are left as they are.",
    )
    selinux_allow_connect: bool = Field(
        default=False,
        description="Switch SELinux's `httpd_can_network_connect` on, for good: then nginx may "
        "connect to any port, so also to the workers' in enforcing mode. False leaves it as it is.",
    )
    selinux_label_ports: bool = Field(
        default=False,
        description="The narrower way to the same: label the workers' ports `http_port_t` and "
        "switch `httpd_can_network_relay` on, for good; then nginx may connect to web servers' "
        "ports and these. False leaves labels and boolean as they are.",
    )
    selinux_allow_setrlimit: bool = Field(
        default=False,
        description="Switch SELinux's `httpd_setrlimit` on, for good: without it, in enforcing "
        "mode, a running nginx takes a higher descriptor limit only when it is started anew. False "
        "leaves it as it is.",
    )
    listen_port: Port = Field(default=8009, description="Public port of the gateway.")
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*-]+( [A-Za-z0-9_.*-]+)*$")] = Field(
        default="localhost", description="nginx `server_name`; several are separated by a blank."
    )
    tls_certificate: AbsolutePath | None = Field(
        default=None,
        description="Certificate chain (PEM) on the gateway. Set together with "
        "`tls_certificate_key`, it switches the TLS server on.",
    )
    tls_certificate_key: AbsolutePath | None = Field(
        default=None, description="Private key (PEM) on the gateway."
    )
    tls_self_signed: bool = Field(
        default=False,
        description="Makes a certificate on the gateway, for a lab or behind something that does "
        f"not ask who signed it: `{SELF_SIGNED_CERTIFICATE}`, valid for 90 days, made anew by a "
        "deploy in its last 30.",
    )
    tls_acme: bool = Field(
        default=False,
        description="certbot gets the certificate from an ACME authority such as Let's Encrypt, "
        "and renews it. `acme_names` have to lead to this gateway, and the authority has to reach "
        "it on `acme_http_port`. On EL, certbot comes from EPEL.",
    )
    acme_directory: Annotated[
        str, Field(pattern=r"^https://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~/-]*)?$")
    ] = Field(
        default="https://acme-v02.api.letsencrypt.org/directory",
        description="The authority's ACME directory. To try, Let's Encrypt's staging one: "
        "`https://acme-staging-v02.api.letsencrypt.org/directory`.",
    )
    acme_terms_agreed: bool = Field(
        default=False,
        description="You have read the authority's terms of service and agree to them. "
        "`tls_acme` needs it.",
    )
    acme_email: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+@[A-Za-z0-9.-]+$")] | None = Field(
        default=None, description="Whom the authority may write to. None: nobody."
    )
    acme_names: tuple[Annotated[str, Field(pattern=HOST_NAME)], ...] = Field(
        default=(),
        description="Names that the certificate is for. Empty: those in `server_name` and of "
        "services.",
    )
    acme_http_port: Port = Field(
        default=80,
        description="Port on which the authority's challenge is answered. Authorities ask on 80.",
    )
    acme_ca: AbsolutePath | None = Field(
        default=None,
        description="Certificates (PEM, on the gateway) by which the authority's own server is "
        "trusted, for one inside your network. None: those of the system.",
    )
    acme_package: Token = Field(default="certbot", description="Package that has certbot.")
    tls_listen_port: Port = Field(
        default=8443, description="Port of the TLS server, when it is on."
    )
    http2: bool = Field(
        default=False,
        description="HTTP/2 on the TLS port, for plain requests: nginx takes WebSockets by "
        "HTTP/1.1 only, so that browsers open a connection of their own for each.",
    )
    tls_only: bool = Field(
        default=False,
        description="The plain port serves nobody: requests are sent to the TLS port (308), "
        "WebSocket handshakes are refused with 426, which says why.",
    )
    hsts_max_age_s: Annotated[int, Field(strict=True, ge=0, le=10 * 365 * 24 * 3600)] = Field(
        default=0,
        description="How long browsers remember to come by TLS only (Strict-Transport-Security). "
        "0: they are not told.",
    )
    tls_stapling: bool | Literal["auto"] = Field(
        default=False,
        description="OCSP stapling. `auto`: where the certificate in `tls_certificate` names a "
        "responder. Let's Encrypt's have named none since 2025, and others follow. True where it "
        "names none is refused.",
    )
    tls_trusted_chain: AbsolutePath | None = Field(
        default=None,
        description="Certificates (PEM, on the gateway) of the authority that issued "
        "`tls_certificate`, up to its root: what is stapled is checked against them first. None: "
        "it is passed on as it comes; the issuer's own certificate then has to stand in "
        "`tls_certificate`, behind the first.",
    )
    tls_resolver: str | None = Field(
        default=None,
        description="IP address of the DNS server that nginx asks where the OCSP responder is. "
        "None: it is looked up whenever nginx reads its configuration.",
    )
    tls_client_ca: AbsolutePath | None = Field(
        default=None,
        description="Certificates (PEM, on the gateway) of the authorities whose clients may "
        "connect by TLS. Workers are told the subject of the certificate (`X-Client-Name`), "
        "by which they count and log the client. None: clients need no certificate.",
    )
    tls_client_verify: Literal["on", "optional"] = Field(
        default="on",
        description="`on`: a client without a certificate of `tls_client_ca` gets 400. `optional`: "
        "it may come without one; one of somebody else is refused all the same.",
    )
    allowed_origins: tuple[Origin, ...] = Field(
        default=(),
        description="Origins whose pages may connect: exact, or `https://*.example.com` for all "
        "names below example.com. Others get 403. Programs send no Origin and are not asked. "
        "Empty: all.",
    )
    client_max_connections: Annotated[int, Field(strict=True, ge=1, le=65_535)] | None = Field(
        default=None,
        description="WebSockets that one client address may have open; more get 429. None: no "
        "bound.",
    )
    client_handshakes_per_s: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = Field(
        default=None,
        description="WebSocket handshakes of one client address in a second, and twice as many at "
        "once; more get 429. None: no bound.",
    )
    auth_request: (
        Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._~/-]*)?$")] | None
    ) = Field(
        default=None,
        description="Address that nginx asks about each request, with its headers and without its "
        "body: 2xx lets it pass, 401 and 403 are passed on.",
    )
    status_port: Port | None = Field(
        default=None,
        description="Port on the gateway's loopback address with nginx's counters (`stub_status`, "
        "at `/status`). None: none.",
    )
    metrics_port: Port | None = Field(
        default=None,
        description="Port with nginx's counters for Prometheus, at `/metrics`: usually 9113. On "
        "the loopback address alone, unless `metrics_from` names others. Needs `status_port`. "
        "None: no exporter.",
    )
    access_log_format: Literal["main", "json"] = Field(
        default="main",
        description="`main`: the usual format, and behind it what a WebSocket needs. `json`: one "
        "object a line, with the same and the upstream's timings.",
    )
    sandbox: bool = Field(
        default=False,
        description="systemd shows nginx no more of the host than it needs. Takes effect when "
        "nginx is started, which a deploy does not do to one that runs.",
    )
    worker_processes: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=1024)] = Field(
        default="auto", description="nginx worker processes; `auto` is one a core."
    )
    connections: Annotated[int, Field(strict=True, ge=1, le=10_000_000)] | None = Field(
        default=None,
        description="WebSockets that the gateway has to hold at once. The limits follow, and a "
        "host that cannot give them is refused (docs/sizing.md). None: `worker_connections` "
        "counts.",
    )
    worker_connections: Annotated[int, Field(strict=True, ge=64, le=1_000_000)] = Field(
        default=8192,
        description="Connections per nginx worker process. A proxied WebSocket takes two, and "
        "idle upstream connections count too. Not together with `connections`.",
    )
    upstream_balance: Literal["least_conn", "round_robin", "ip_hash"] = Field(
        default="least_conn",
        description="How a new connection finds its worker. `least_conn` suits sockets that "
        "live long; `ip_hash` keeps a client on one worker.",
    )
    upstream_sticky: Token | None = Field(
        default=None,
        description="Name of a cookie by which a client comes back to the worker that it had "
        "(`sticky`; nginx 1.29.6 and newer). It is for browsers: other clients hardly keep "
        "cookies. None: none.",
    )
    upstream_keepalive: Annotated[int, Field(strict=True, ge=1, le=100_000)] = Field(
        default=1000, description="Idle upstream connections kept per nginx worker process."
    )
    upstream_max_fails: Annotated[int, Field(strict=True, ge=0, le=1000)] = Field(
        default=1, description="Failed handshakes after which a worker is left out for a while."
    )
    upstream_fail_timeout_s: Seconds = Field(
        default=5, description="How long it is left out, and the window for `upstream_max_fails`."
    )
    proxy_connect_timeout_s: Seconds = Field(
        default=5, description="How long nginx waits for a worker to accept."
    )
    proxy_read_timeout_s: Seconds = Field(
        default=3600,
        description="How long a socket may be silent in both directions before nginx closes "
        "it. Keep it above twice the ping interval of the service.",
    )
    proxy_send_timeout_s: Seconds = Field(
        default=3600, description="How long a write to a worker may be stuck."
    )
    keepalive_timeout_s: Seconds = Field(
        default=65, description="How long an idle plain HTTP connection of a client is kept."
    )
    worker_shutdown_timeout_s: Annotated[int, Field(strict=True, ge=0, le=30 * 24 * 3600)] = Field(
        default=0,
        description="After a reload, old nginx worker processes stay until their last socket "
        "closes. A number > 0 cuts those sockets after that time.",
    )

    @model_validator(mode="after")
    def _enforcing_lets_nginx_connect(self) -> Self:
        allowed = self.selinux_allow_connect or self.selinux_label_ports
        if self.selinux_mode == "enforcing" and not allowed:
            raise ValueError(
                "selinux_mode 'enforcing' denies nginx every connection to a worker (13: "
                "Permission denied); set selinux_allow_connect = True (any port) or "
                "selinux_label_ports = True (the workers' ports only), or selinux_mode "
                "'unmanaged' if you allow it in a policy of your own"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _profile_gives_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("profile") == "hardened":
            return {**HARDENED, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._tls_problems(), *self._sandbox_problems(), *self._version_problems()]
        if self.metrics_port and not self.status_port:
            problems.append(
                "metrics_port needs nginx's counters; set status_port, too (8008 suits SELinux)"
            )
        if self.metrics_from and not self.metrics_port:
            problems.append(
                "metrics_from says who may read the metrics, and there are none; set metrics_port "
                "and status_port"
            )
        if self.connections is not None and "worker_connections" in self.model_fields_set:
            problems.append(
                "connections and worker_connections are both set, and the second follows from the "
                "first; take one out"
            )
        if self.profile == "hardened" and self.nginx_user == "root":
            problems.append(
                "nginx_user is root, which the hardened profile does not allow (workers read what "
                "clients send, only the master needs root); take it out, or the profile"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _tls_problems(self) -> Iterable[str]:
        if self.tls_resolver:
            ipaddress.ip_address(self.tls_resolver)
        if (self.tls_certificate is None) != (self.tls_certificate_key is None):
            yield "tls_certificate and tls_certificate_key go together: set both or none"
        sources = {
            "tls_certificate": self.tls_certificate,
            "tls_self_signed": self.tls_self_signed,
            "tls_acme": self.tls_acme,
        }
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            yield f"{' and '.join(given)} each give the certificate; choose one"
        if self.tls_acme:
            yield from self._acme_problems()
        if not self.tls:
            needing = [
                name
                for name in ("tls_only", "hsts_max_age_s", "tls_stapling", "tls_client_ca", "http2")
                if getattr(self, name)
            ]
            if needing:
                yield (
                    f"{', '.join(needing)}: there is no certificate; set tls_certificate and "
                    "tls_certificate_key, tls_acme = True, or tls_self_signed = True"
                )
        if self.tls_self_signed and self.tls_stapling is True:
            yield "tls_stapling: nobody answers for a self-signed certificate; take it out"
        if self.tls_trusted_chain and not self.tls_stapling:
            yield "tls_trusted_chain is for tls_stapling; set that as well, or take it out"
        if self.tls_client_verify == "optional" and not self.tls_client_ca:
            yield "tls_client_verify is for tls_client_ca; set that as well, or take it out"
        if self.asks_for_certificates and not self.tls_only:
            yield (
                "tls_client_ca asks clients for a certificate, and the plain port would let "
                "everybody in without; set tls_only = True"
            )

    def _acme_problems(self) -> Iterable[str]:
        if not self.acme_terms_agreed:
            yield (
                "tls_acme: the authority issues to those who agree to its terms of service; read "
                f"them ({self.acme_directory} names their address), and set acme_terms_agreed = "
                "True"
            )
        unfit = [name for name in self.certificate_domains if not _is_host_name(name)]
        if unfit:
            yield (
                f"tls_acme: nobody issues for {', '.join(unfit)} by the challenge that is used "
                "here; set acme_names (or server_name) to full names that lead to this gateway"
            )
        if self.acme_http_port == self.tls_listen_port:
            yield "acme_http_port and tls_listen_port are the same; the challenge comes without TLS"

    def _sandbox_problems(self) -> Iterable[str]:
        if not self.sandbox:
            return
        for name in _TLS_FILES:
            path = getattr(self, name)
            if path and path.startswith(UNSEEN):
                yield f"{name} is {path}, which nginx does not see in its sandbox; use /etc/pki"

    def _version_problems(self) -> Iterable[str]:
        if self.nginx_version:
            declared = nginx_versions.newest_of(self.nginx_version)
            for problem in nginx_versions.problems(declared, self.needed_features):
                yield f"nginx_version is {self.nginx_version}: {problem}"
        yield from self._source_problems()
        if self.upstream_sticky and self.upstream_balance == "ip_hash":
            yield (
                "upstream_sticky and upstream_balance 'ip_hash' both bind a client to a worker; "
                "choose one"
            )

    def _source_problems(self) -> Iterable[str]:
        stream, source = self.nginx_stream, self.nginx_source
        if source == "module" and (stream is None or not re.fullmatch(r"[0-9]+\.[0-9]+", stream)):
            yield (
                f"nginx_stream is {stream!r}; nginx_source 'module' needs the stream's version "
                'in quotes, as "1.24" (dnf module list nginx shows them)'
            )
        elif source == "module" and self.nginx_version and stream:
            if not f"{self.nginx_version}.".startswith(f"{stream}."):
                yield f"nginx_version {self.nginx_version} is not in the nginx_stream {stream}"
        elif source == "nginx.org" and stream not in (None, "stable", "mainline"):
            yield f"nginx_stream is {stream!r}; nginx.org has 'stable' and 'mainline'"
        elif source == "distribution" and stream is not None:
            yield (
                "nginx_stream means nothing to nginx_source 'distribution'; set nginx_source, or "
                "take it out"
            )

    @property
    def needed_features(self) -> dict[str, nginx_versions.Feature]:
        """Setting -> what nginx has to be new enough for."""
        return {"upstream_sticky": nginx_versions.Feature.STICKY} if self.upstream_sticky else {}

    @property
    def tls(self) -> bool:
        """Whether there is a TLS server."""
        return self.certificate is not None

    @property
    def asks_for_certificates(self) -> bool:
        """Whether a client without a certificate is turned away."""
        return bool(self.tls_client_ca) and self.tls_client_verify == "on"

    @property
    def certificate(self) -> str | None:
        """Path of the certificate chain on the gateway."""
        if self.tls_acme:
            return ACME_CERTIFICATE
        return SELF_SIGNED_CERTIFICATE if self.tls_self_signed else self.tls_certificate

    @property
    def certificate_key(self) -> str | None:
        """Path of its private key on the gateway."""
        if self.tls_acme:
            return ACME_KEY
        return SELF_SIGNED_KEY if self.tls_self_signed else self.tls_certificate_key

    @property
    def certificate_domains(self) -> list[str]:
        """Names that an ACME authority is asked for."""
        return list(self.acme_names) or self.all_names

    @property
    def all_names(self) -> list[str]:
        """Names under which clients come, those of single services among them."""
        of_services = (name for found in self.services.values() for name in found.server_names)
        return list(dict.fromkeys([*self.server_names, *of_services]))

    @property
    def listening_ports(self) -> list[int]:
        """Every port that nginx listens on."""
        tls = [self.tls_listen_port] if self.tls else []
        challenges = [self.acme_http_port] if self.tls_acme else []
        status = [self.status_port] if self.status_port else []
        return list(dict.fromkeys([self.listen_port, *tls, *challenges, *status]))

    @property
    def bracketed_resolver(self) -> str | None:
        return _bracketed(self.tls_resolver) if self.tls_resolver else None

    @property
    def metrics_listen(self) -> str:
        """Address that the exporter listens on."""
        if not self.metrics_from:
            return "127.0.0.1"
        return "::" if any(":" in address for address in self.metrics_from) else "0.0.0.0"  # noqa: S104  its unit admits those addresses only

    @property
    def server_names(self) -> list[str]:
        return self.server_name.split()

    @property
    def probed_port(self) -> str:
        """Where the deploy asks whether clients are served."""
        return f"tls:{self.tls_listen_port}" if self.tls_only else str(self.listen_port)

    @property
    def probe_refusals(self) -> list[str]:
        """Statuses with which nginx refuses the deploy, and shows by that what it runs."""
        # The deploy has no client's certificate, and nothing that names it.
        asked = {"400": self.asks_for_certificates, "403": self.auth_request}
        return [status for status, why in asked.items() if why]


class PythonSettings(CommonSettings):
    """Of hosts that run the gpu_service package: its interpreter, its packages, its user."""

    python_package: Token = Field(
        default="python3.11", description="Package that yum installs to get `python`."
    )
    python: AbsolutePath = Field(
        default="/usr/bin/python3.11",
        description="Interpreter of service and training, 3.11 or newer.",
    )
    packages_from: Literal["wheelhouse", "index"] = Field(
        default="wheelhouse",
        description="`wheelhouse`: wheels that the operator's machine prepared and uploads; the "
        "host needs no internet. `index`: pip on the host downloads.",
    )
    torch_build: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Build of torch; `auto` follows the device that is used."
    )
    index_url: SecretStr | None = Field(
        default=None, description="Package index for `packages_from = 'index'` (may hold a token)."
    )
    torch_index_url: SecretStr | None = Field(
        default=None, description="Extra index that has the wanted build of torch."
    )
    index_trusted_host: Token | None = Field(
        default=None,
        description="Host of an index that pip may use without TLS, on a network of your own.",
    )
    service_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,30}$")] = Field(
        default="gpu-service", description="System user that service and training run as."
    )
    keep_versions: Annotated[int, Field(strict=True, ge=1, le=100)] = Field(
        default=2,
        description="Releases, environments, bundles and training runs kept on the host. What a "
        "worker runs, or can go back to, is kept in any case.",
    )


# Folder of the Unix sockets on hosts that are gateway and worker.
SOCKETS = "/run/gpu-workers"


def unix_socket(port: int) -> str:
    """Where a worker listens for the nginx of its own host."""
    return f"{SOCKETS}/{port}.sock"


class WorkerSettings(ServingSettings, PythonSettings, _Scraped):
    """Of hosts in `workers`: the inference service."""

    _gpus: int = PrivateAttr(default=0)

    worker_ports: WorkerPorts = Field(
        default=(9005, 9006),
        description="One worker process per port. `'per-gpu'`: as many ports as the host has "
        "NVIDIA GPUs that its workers use, at least one, from `first_worker_port` on.",
    )
    first_worker_port: Port = Field(
        default=9005, description="First port where `worker_ports` is `'per-gpu'`."
    )
    model: str = Field(
        default="models/digits",
        description="Bundle to serve, relative to the checkout: a version's folder, or the "
        "model's folder for its newest version.",
    )
    min_metrics: dict[str, Metric] = Field(
        default_factory=dict,
        description="Least that the bundle's metrics may be, for example "
        '`{"test_accuracy": 0.98}`. A bundle that was measured worse, or not at all, is refused '
        "before anything is touched. `python -m gpu_service inspect BUNDLE` shows its metrics.",
    )
    max_metrics: dict[str, Metric] = Field(
        default_factory=dict,
        description='Most that they may be, for example `{"test_loss": 0.6}`.',
    )
    worker_compiled: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Whether what every request goes through runs as C, which `python -m "
        "provision.compiled` makes of the sources on the operator's machine, for hosts with the "
        "same Python: 1.5 times the requests with a model that computes nothing, 1.2 times with "
        "the example model. `auto`: where that is at hand. A host on which it does not load runs "
        "the sources.",
    )
    worker_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="`auto`: one NVIDIA GPU per worker where the host has them, else the CPU. "
        "`cuda` refuses a host without a GPU; `cpu` ignores the GPUs.",
    )
    weight: Annotated[int, Field(strict=True, ge=1, le=1000)] = Field(
        default=1,
        description="Share of the connections that each worker of this host gets, beside those of "
        "other hosts.",
    )
    backup: bool = Field(
        default=False,
        description="Workers of this host get connections only while all others are down.",
    )
    worker_listen: str = Field(
        default="0.0.0.0",  # noqa: S104  the firewall decides who may connect
        description="Address that the workers listen on.",
    )
    unix_sockets: bool = Field(
        default=False,
        description="On a host that is a gateway, too, its nginx reaches the workers by Unix "
        f"sockets (`{SOCKETS}/PORT.sock`), which only nginx may open: no ports are used up, and "
        "the way is shorter. Other gateways come by TCP as before.",
    )
    socket_activation: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether systemd holds the workers' listening sockets, so that connects wait "
        "while a worker restarts, instead of being refused. `auto`: only where this is the one "
        "worker of the inventory; with more, nginx turns to another at once (docs/runbook.md).",
    )
    worker_tokens: str | None = Field(
        default=None,
        description="File on the operator's machine with the SHA-256 of each token that may "
        "connect, one a line, a name behind it; relative to the checkout. None: anybody may. A "
        "change takes effect without a restart.",
    )
    worker_packages: tuple[str, ...] = Field(
        default=(),
        description="Packages for models of your own, beside the service's: paths of wheels, "
        "relative to the checkout, or `NAME==VERSION`. Bundles may use of them what the service's "
        "option `factories` names, or what is registered as `gpu_service.models`.",
    )
    service_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of `python -m gpu_service serve` by name, for example "
        '`{"max_batch": 128}`; see the service\'s own table.',
    )
    min_up: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Share of the workers' capacity (their weights) that a rolling restart leaves "
        "up. Workers restart one at a time in any case; with some of them down already, one that "
        "would lower the rest below this share is not touched, and the run fails.",
    )
    restart_timeout_s: Seconds = Field(
        default=120, description="How long a worker may take from its start until it is ready."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        ipaddress.ip_address(self.worker_listen)
        repeated = sorted({p for p in self.ports if self.ports.count(p) > 1})
        if repeated:
            problems.append(f"worker_ports names {', '.join(map(str, repeated))} more than once")
        problems += _service_problems(self.service_options)
        problems += [
            f"worker_packages: {p}" for p in map(_package_problem, self.worker_packages) if p
        ]
        problems += _collector_problems(self.service_options)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def ports(self) -> tuple[int, ...]:
        """`worker_ports` as numbers. Where they follow from the GPUs, the first one alone until
        the host was asked (`Fleet.with_gpus`).
        """
        if isinstance(self.worker_ports, tuple):
            return self.worker_ports
        count = max(1, self._gpus if self.worker_device != "cpu" else 0)
        return tuple(range(self.first_worker_port, self.first_worker_port + count))

    def service_option(self, name: str) -> Any:
        """Value of an option of the service: as set here, or its own default."""
        fields = {field.name: field for field in dataclasses.fields(service_settings.Settings)}
        return self.service_options.get(name, fields[name].default)

    @property
    def listens_everywhere(self) -> bool:
        """Whether the workers listen on every address of their host."""
        return ipaddress.ip_address(self.worker_listen).is_unspecified

    @property
    def bracketed_listen(self) -> str:
        """The address that the workers listen on, as it stands before a port."""
        return _bracketed(self.worker_listen)

    @property
    def wheels(self) -> tuple[str, ...]:
        """Those of `worker_packages` that are files."""
        return tuple(package for package in self.worker_packages if _is_wheel(package))

    @property
    def collector_address(self) -> str | None:
        """IP address that the workers send traces to; None: this host itself, or nowhere."""
        host = _collector_host(self.service_options)
        return None if host in (None, "localhost") else host

    @property
    def stop_timeout_s(self) -> int:
        """How long systemd lets a worker drain: longer than the service takes by itself."""
        return math.ceil(float(self.service_option("drain_timeout_s"))) + 15

    @property
    def descriptors(self) -> int:
        """File descriptors of a worker: one a connection, and what Python and torch hold open."""
        return int(self.service_option("max_connections")) + 1024


class TrainerSettings(PythonSettings):
    """Of hosts in `trainers`: the training, and a Slurm cluster of them if one is wanted."""

    train_options: dict[str, str | int | float | bool] = Field(
        default_factory=dict,
        description="Options of `python -m gpu_service.training` by name, for example "
        '`{"epochs": 10}`; see its own `--help`.',
    )
    train_device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="`auto`: all NVIDIA GPUs where the host has them, else the CPU. `cuda` "
        "refuses a host without a GPU; `cpu` ignores the GPUs.",
    )
    train_processes: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        default="auto",
        description="Processes on the host; `auto` is one a GPU, and one where there is none.",
    )
    train_threads: Literal["auto"] | Annotated[int, Field(strict=True, ge=1, le=1024)] = Field(
        default="auto",
        description="Threads of each process (`OMP_NUM_THREADS`); `auto` shares the host's cores "
        "among its processes.",
    )
    train_max_restarts: Annotated[int, Field(strict=True, ge=0, le=1000)] = Field(
        default=3, description="How often torchrun starts the processes again after a failure."
    )
    train_join_timeout_s: Seconds = Field(
        default=300,
        description="How long a host waits at the rendezvous until all trainers are there; one "
        "that lost the others gives up after it.",
    )
    rendezvous_port: Port = Field(
        default=29400, description="Port of the c10d rendezvous on the first trainer."
    )
    train_models: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$")] = Field(
        default="models",
        description="Folder on the operator's machine that gets NAME/VERSION/, relative to the "
        "checkout.",
    )
    slurm: bool = Field(
        default=False,
        description="Make the trainers a Slurm cluster, with the first as its controller. Training "
        "goes through Slurm where the first trainer reaches one, whoever installed it.",
    )
    slurm_packages: Annotated[tuple[Token, ...], Field(min_length=1)] = Field(
        default=("munge", "slurm", "slurm-slurmctld", "slurm-slurmd"),
        description="Packages that yum installs for Slurm: by default EPEL's names.",
    )
    slurm_uid: Annotated[int, Field(strict=True, ge=100, le=65533)] = Field(
        default=64030,
        description="User and group id of `slurm`; Slurm needs the same on all hosts.",
    )
    slurm_service_uid: Annotated[int, Field(strict=True, ge=100, le=65533)] = Field(
        default=64031,
        description="User and group id of `service_user` where `slurm` makes it; the same on all "
        "hosts, since jobs run as it.",
    )

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        if problems := _training_problems(self.train_options):
            raise ValueError("; ".join(problems))
        return self


# What `train.py` decides itself.
MANAGED_TRAINING_OPTIONS = frozenset({"output", "version", "snapshots"})


def _training_problems(options: Mapping[str, Any]) -> list[str]:
    """Options that the training has not, or that the launcher decides."""
    known = {option.name for option in dataclasses.fields(training_settings.Settings)}
    problems = [
        f"train_options.{name} is decided by train.py; take it out"
        for name in sorted(MANAGED_TRAINING_OPTIONS & set(options))
    ]
    for name in sorted(set(options) - known - MANAGED_TRAINING_OPTIONS):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(f"train_options.{name}: the training has no such option{hint}")
    return problems


# What the deploy decides itself, worker by worker.
MANAGED_SERVICE_OPTIONS = frozenset(
    {
        "bundle",
        "host",
        "port",
        "device",
        "threads",
        "worker",
        "deployment",
        "control",
        "unix_socket",
        "tokens_file",
        "trusted_proxies",
    }
)


def _service_problems(options: Mapping[str, Any]) -> list[str]:
    """What the service itself would refuse, and what the deploy decides for each worker."""
    problems = [
        f"service_options.{name} is decided by the deploy; take it out"
        for name in sorted(MANAGED_SERVICE_OPTIONS & set(options))
    ]
    known = {field.name for field in dataclasses.fields(service_settings.Settings)}
    for name in sorted(set(options) - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(f"service_options.{name}: the service has no such option{hint}")
    given = {name: str(value) for name, value in options.items() if name in known}
    try:
        service_settings.load({"bundle": "/", **given}, {})
    except service_settings.SettingsError as error:
        problems += [f"service_options: {problem}" for problem in error.problems]
    return problems


def _is_wheel(package: str) -> bool:
    return package.endswith(".whl")


def _package_problem(package: str) -> str | None:
    """What is wrong with an entry of `worker_packages`; whether its file exists, preflight asks."""
    try:
        if _is_wheel(package):
            parse_wheel_filename(posixpath.basename(package))
            return None
        wanted = Requirement(package)
    except (InvalidWheelFilename, InvalidRequirement) as error:
        return f"{package!r}: {error}".replace("\n", " ")
    pins = [pin for pin in wanted.specifier if pin.operator == "==" and "*" not in pin.version]
    if wanted.url or len(pins) != 1 or len(wanted.specifier) != 1:
        # Or two hosts with the same settings would get different packages.
        return f"{package!r} is not pinned; write NAME==VERSION, or the path of a wheel"
    return None


def _collector_host(options: Mapping[str, Any]) -> str | None:
    return urllib.parse.urlsplit(str(options.get("otlp_endpoint", ""))).hostname


def _collector_problems(options: Mapping[str, Any]) -> list[str]:
    host = _collector_host(options)
    if host in (None, "localhost"):
        return []
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return [
            f"service_options.otlp_endpoint: {host} is a name; the workers' units admit addresses "
            "only (IPAddressAllow=), so write its IP address, or localhost for a collector on "
            "each host"
        ]
    return []


MODELS: dict[Group, type[CommonSettings]] = {
    Group.GATEWAYS: GatewaySettings,
    Group.WORKERS: WorkerSettings,
    Group.TRAINERS: TrainerSettings,
}


@dataclass(frozen=True, kw_only=True)
class HostInput:
    """What an inventory says of one host: its groups and its merged data."""

    name: str
    groups: frozenset[str]
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one host runs of one service: the host's settings, with what the service says instead.

    `service` is empty where there is only one.
    """

    service: str
    settings: WorkerSettings


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """All hosts, checked. Keys are host names, in inventory order."""

    gateways: Mapping[str, GatewaySettings]
    workers: Mapping[str, WorkerSettings]
    trainers: Mapping[str, TrainerSettings]
    addresses: Mapping[str, str]

    @property
    def services(self) -> Mapping[str, ServiceSettings]:
        """As declared; empty where there is one service only, that of the workers' `model`."""
        hosts: Iterator[ServingSettings] = itertools.chain(
            self.gateways.values(), self.workers.values()
        )
        return next((host.services for host in hosts), {})

    @property
    def service_names(self) -> list[str]:
        """Of all services; the empty name where there is one only."""
        return list(self.services) or [""]

    def assignments(self, worker: WorkerSettings) -> list[Assignment]:
        """What a worker host runs, service by service."""
        if not self.services:
            return [Assignment(service="", settings=worker)]
        return [
            Assignment(service=name, settings=_as_said(worker, service))
            for name, service in self.services.items()
            if not service.workers or worker.name in service.workers
        ]

    def ports(self, worker: WorkerSettings) -> list[int]:
        """All ports of a worker host, service by service."""
        return [port for found in self.assignments(worker) for port in found.settings.ports]

    def asked_for_gpus(self) -> list[str]:
        """Worker hosts whose ports follow from their GPUs."""
        return [
            name
            for name, worker in self.workers.items()
            if any(found.settings.worker_ports == PER_GPU for found in self.assignments(worker))
        ]

    def with_gpus(self, gpus: Mapping[str, int]) -> Fleet:
        """The same fleet, of which so many NVIDIA GPUs are known by their host's name.

        Raises `InvalidFleetError` where the ports that follow clash.
        """
        workers = {name: worker.model_copy() for name, worker in self.workers.items()}
        for name, count in gpus.items():
            workers[name]._gpus = count
        fleet = dataclasses.replace(self, workers=workers)
        problems = [
            f"{name}: {len(fleet.ports(worker))} ports from first_worker_port on end above 65535"
            for name, worker in workers.items()
            if max(fleet.ports(worker), default=0) > 65535
        ]
        if problems := [*problems, *_clashes(fleet)]:
            raise InvalidFleetError(problems)
        return fleet

    def local_gateway(self, worker: WorkerSettings) -> GatewaySettings | None:
        """The gateway that reaches the workers of a host by Unix sockets, being the same host."""
        return self.gateways.get(worker.name) if worker.unix_sockets else None

    def upstreams(self, service: str = "", of: GatewaySettings | None = None) -> list[Upstream]:
        """Every worker of a service, host by host, port by port: as the gateway `of` reaches it, or
        else as other hosts do.
        """
        return [
            Upstream(
                address=f"unix:{unix_socket(port)}"
                if of is not None and of.name == name and worker.unix_sockets
                else f"{_bracketed(self.addresses[name])}:{port}",
                weight=worker.weight,
                backup=worker.backup,
            )
            for name, worker in self.workers.items()
            for found in self.assignments(worker)
            if found.service == service
            for port in found.settings.ports
        ]

    def upstream_servers(self) -> list[str]:
        """`address:port` of every worker, service by service."""
        return [u.address for service in self.service_names for u in self.upstreams(service)]

    def routes(self, gateway: GatewaySettings) -> list[Route]:
        """Every service, as a gateway offers it."""
        return [self._route(gateway, service) for service in self.service_names]

    def _route(self, gateway: GatewaySettings, name: str) -> Route:
        service = self.services.get(name)

        def said(setting: str) -> Any:
            value = None if service is None else getattr(service, setting)
            return getattr(gateway, setting) if value is None else value

        return Route(
            service=name,
            path="/" if service is None else service.path,
            upstreams=self.upstreams(name, gateway),
            allowed_origins=said("allowed_origins"),
            client_max_connections=said("client_max_connections"),
            client_handshakes_per_s=said("client_handshakes_per_s"),
        )

    def sites(self, gateway: GatewaySettings) -> list[Site]:
        """A gateway's servers, the default one first."""
        return services.sites(self.routes(gateway), self.services, gateway.server_names)

    def probe(self, gateway: GatewaySettings) -> str:
        """How the deploy asks whether clients are served, as files/handshake.sh reads it."""
        return " ".join([",".join(self.places(gateway).values()), *gateway.probe_refusals])

    def places(self, gateway: GatewaySettings) -> dict[str, str]:
        """Where each service is served by a gateway, as files/handshake.sh reads it."""
        return services.places(self.sites(gateway), gateway.probed_port)

    @property
    def lead_trainer(self) -> str:
        """Name of the trainer that holds the rendezvous, or controls the Slurm cluster."""
        return next(iter(self.trainers))

    def trainer_addresses(self) -> list[str]:
        return [self.addresses[name] for name in self.trainers]

    def gateway_addresses(self) -> list[str]:
        return [self.addresses[name] for name in self.gateways]

    def keeps_sockets(self, assignment: Assignment) -> bool:
        """Whether systemd holds the listening sockets of the worker processes."""
        if assignment.settings.socket_activation == "auto":
            # With another worker there, a refused connect is the faster way to it.
            return len(self.upstreams(assignment.service)) == 1
        return assignment.settings.socket_activation == "on"


def _as_said(worker: WorkerSettings, service: ServiceSettings) -> WorkerSettings:
    """A host's settings, with what a service says instead."""
    options = {**worker.service_options, **service.service_options}
    return worker.model_copy(update={**service.overrides(), "service_options": options})


# Groups that have to have members: for serving, and for training.
SERVING = (Group.GATEWAYS, Group.WORKERS)
TRAINING = (Group.TRAINERS,)


class InvalidFleetError(Exception):
    """Every problem that was found in an inventory, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def parse_fleet(
    hosts: Iterable[HostInput],
    *,
    resolve: Mapping[str, str],
    foreign_keys: frozenset[str] = frozenset(),
    needed: Iterable[Group] = SERVING,
) -> Fleet:
    """Check what an inventory says of all its hosts.

    `resolve` gives the IP address of host names that the operator's machine could resolve.
    `foreign_keys` are data keys that belong to pyinfra (its connectors and global arguments).
    `needed` are the groups that must not be empty.
    Raises `InvalidFleetError` with every problem, not only the first.
    """
    hosts = list(hosts)
    problems: list[str] = []
    parsed: dict[Group, dict[str, CommonSettings]] = {group: {} for group in Group}
    addresses: dict[str, str] = {}

    for host in hosts:
        groups = [group for group in Group if group in host.groups]
        own_keys = {key for group in groups for key in MODELS[group].model_fields}
        problems += _unknown_keys(host, groups, own_keys | foreign_keys)
        for group in groups:
            settings, found = _parse(MODELS[group], host)
            problems += found
            if settings is not None:
                parsed[group][host.name] = settings
        if groups:
            address, found = _address(host, resolve)
            problems += found
            addresses[host.name] = address

    fleet = Fleet(
        gateways=_of_type(parsed[Group.GATEWAYS], GatewaySettings),
        workers=_of_type(parsed[Group.WORKERS], WorkerSettings),
        trainers=_of_type(parsed[Group.TRAINERS], TrainerSettings),
        addresses=addresses,
    )
    problems += _group_problems(hosts, needed)
    problems += _differences(fleet)
    problems += _service_conflicts(fleet)
    problems += _clashes(fleet)
    problems += _same_names(fleet)
    problems += _silences(fleet)
    problems += _backups(fleet)
    if problems:
        raise InvalidFleetError(dict.fromkeys(problems))
    return fleet


AnySettings = TypeVar("AnySettings", bound=CommonSettings)


def _of_type(
    settings: Mapping[str, CommonSettings], kind: type[AnySettings]
) -> dict[str, AnySettings]:
    return {name: value for name, value in settings.items() if isinstance(value, kind)}


def _parse(model: type[CommonSettings], host: HostInput) -> tuple[CommonSettings | None, list[str]]:
    data = {key: value for key, value in host.data.items() if key in model.model_fields}
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        return None, [f"{_whose(host, detail)}{_readable(detail)}" for detail in error.errors()]
    found._name = host.name
    return found, []


def _whose(host: HostInput, detail: Any) -> str:
    """What is said for all hosts at once is reported once."""
    return "" if detail["loc"][:1] == ("services",) else f"{host.name}: "


def _readable(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"] if part != "function-after")
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return str(message)
    # The value itself is shown, except where it may be a secret.
    shown = "" if "url" in where else f" (it is {detail['input']!r})"
    return f"{where}: {message}{shown}"


def _unknown_keys(host: HostInput, groups: list[Group], known: set[str]) -> list[str]:
    problems = []
    elsewhere = {key for model in MODELS.values() for key in model.model_fields}
    for key in sorted(set(host.data) - known):
        if key in elsewhere:
            # Another group's setting: group_data/all.py may say it for everybody.
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; see docs/settings.md"
        problems.append(f"{host.name}: unknown setting {key}{hint}")
    if not groups:
        problems.append(
            f"{host.name}: is in none of the groups {', '.join(Group)}; "
            "put it into one, or take it out of the inventory"
        )
    return problems


def _address(host: HostInput, resolve: Mapping[str, str]) -> tuple[str, list[str]]:
    given = host.data.get("address")
    if given:
        return str(given), []
    try:
        return str(ipaddress.ip_address(host.name)), []
    except ValueError:
        pass
    if host.name in resolve:
        return resolve[host.name], []
    return "", [
        f"{host.name}: address is not set and the name does not resolve on this machine; set "
        "address to the IP address by which the other hosts reach it"
    ]


_EMPTY = {
    Group.GATEWAYS: "the group is empty; name at least one host in the inventory",
    Group.WORKERS: "the group is empty, so the gateway would have no upstream; "
    "name at least one host in the inventory",
    Group.TRAINERS: "the group is empty; name at least one host in the inventory",
}


def _group_problems(hosts: list[HostInput], needed: Iterable[Group]) -> list[str]:
    named = {group for host in hosts for group in Group if group in host.groups}
    return [f"{group}: {_EMPTY[group]}" for group in needed if group not in named]


# What only makes sense when all trainers say the same.
_SHARED_BY_TRAINERS = (
    *("train_options", "train_max_restarts", "train_join_timeout_s", "rendezvous_port"),
    *("train_models", "slurm", "slurm_packages", "slurm_uid", "slurm_service_uid", "service_user"),
)


def _differences(fleet: Fleet) -> list[str]:
    if not fleet.trainers:
        return []
    lead = fleet.trainers[fleet.lead_trainer]
    return [
        f"{name}: {key} differs from that of {fleet.lead_trainer}; all trainers need the same, so "
        "set it in group_data/trainers.py"
        for name, trainer in fleet.trainers.items()
        for key in _SHARED_BY_TRAINERS
        if getattr(trainer, key) != getattr(lead, key)
    ]


def _clashes(fleet: Fleet) -> list[str]:
    problems = []
    owners: dict[tuple[str, int], str] = {}
    for host, port, purpose in _listeners(fleet):
        place = (fleet.addresses.get(host) or host, port)
        claim = f"{host} {purpose}"
        if place in owners:
            clash = f"port {port} on {place[0]}: wanted by {owners[place]} and by {claim}"
            several = " of service " in owners[place] and " of service " in claim
            hint = "; give one of the two worker_ports of its own" if several else ""
            problems.append(f"{clash}{hint}")
        owners.setdefault(place, claim)
    return problems


def _service_conflicts(fleet: Fleet) -> list[str]:
    hosts: list[tuple[str, ServingSettings]] = [*fleet.gateways.items(), *fleet.workers.items()]
    problems = [
        f"{name}: services differs from that of {hosts[0][0]}; all gateways and workers need the "
        "same, so set it in group_data/all.py"
        for name, host in hosts
        if host.services != hosts[0][1].services
    ]
    own_names = {name: gateway.server_names for name, gateway in fleet.gateways.items()}
    problems += services.problems(fleet.services, list(fleet.workers), own_names)
    for worker in fleet.workers.values():
        local = fleet.local_gateway(worker)
        if local is not None and local.selinux_mode == "enforcing":
            problems.append(
                f"{worker.name}: selinux_mode 'enforcing' denies nginx the workers' Unix sockets, "
                "whatever selinux_allow_connect says; take unix_sockets out, or set selinux_mode "
                "'unmanaged' and allow it in a policy of your own (docs/runbook.md)"
            )
        for found in fleet.assignments(worker) if fleet.services else []:
            problems += [
                f"services.{found.service}: {problem}"
                for problem in _service_problems(found.settings.service_options)
            ]
    return problems


def _same_names(fleet: Fleet) -> list[str]:
    """An authority's challenge reaches one gateway, and only the one that asked can answer it."""
    owners: dict[str, str] = {}
    problems = []
    for host, gateway in fleet.gateways.items():
        for name in gateway.certificate_domains if gateway.tls_acme else []:
            if name in owners:
                problems.append(
                    f"{host}: tls_acme asks for {name}, and so does {owners[name]}, but a "
                    "challenge reaches one of them only; set acme_names of each to its own, or "
                    "tls_certificate to a certificate that you bring to both"
                )
            owners.setdefault(name, host)
    return problems


def _silences(fleet: Fleet) -> list[str]:
    """A socket that is idle but alive shows a ping now and then; nginx must wait for two."""
    problems = []
    for gateway_name, gateway in fleet.gateways.items():
        for worker in fleet.workers.values():
            for found in fleet.assignments(worker):
                least = 2 * found.settings.service_option("ping_interval_s")
                if gateway.proxy_read_timeout_s <= least:
                    problems.append(
                        f"{gateway_name}: proxy_read_timeout_s is {gateway.proxy_read_timeout_s}, "
                        f"so nginx would close idle sockets of {worker.name}; it has to be above "
                        f"twice the service's ping_interval_s, which makes {least:g}"
                    )
    return problems


def _backups(fleet: Fleet) -> list[str]:
    """What nginx refuses or ignores, said before it is asked."""
    backups = [name for name, worker in fleet.workers.items() if worker.backup]
    if not backups:
        return []
    problems = [
        f"{name}: upstream_balance is ip_hash, which knows no backup workers, and "
        f"{', '.join(backups)} has them; use least_conn, or take backup out"
        for name, gateway in fleet.gateways.items()
        if gateway.upstream_balance == "ip_hash"
    ]
    for service in fleet.service_names:
        upstreams = fleet.upstreams(service)
        if upstreams and all(upstream.backup for upstream in upstreams):
            whose = f"service {service}" if service else ", ".join(backups)
            problems.append(
                f"{whose}: all workers are backups, so there is nothing that they are "
                "backups of; take backup out for one host"
            )
    return problems


def _listeners(fleet: Fleet) -> Iterable[tuple[str, int, str]]:
    for name, gateway in fleet.gateways.items():
        yield name, gateway.listen_port, "listen_port"
        if gateway.tls:
            yield name, gateway.tls_listen_port, "tls_listen_port"
        if gateway.tls_acme and gateway.acme_http_port != gateway.listen_port:
            yield name, gateway.acme_http_port, "acme_http_port"
        if gateway.status_port:
            yield name, gateway.status_port, "status_port"
        if gateway.metrics_port:
            yield name, gateway.metrics_port, "metrics_port"
    for name, worker in fleet.workers.items():
        for found in fleet.assignments(worker):
            of = f" of service {found.service}" if found.service else ""
            for port in dict.fromkeys(found.settings.ports):
                yield name, port, f"worker_ports{of}"


def _is_host_name(name: str) -> bool:
    # An address, a wildcard and nginx's `_` are none.
    return re.match(HOST_NAME, name) is not None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def reference() -> str:
    """The settings as a Markdown document (docs/settings.md)."""
    lines = [
        "# Settings",
        "",
        "Generated from `provision/settings.py` by `make docs`; a test keeps it true.",
        "Set them for all hosts of a group in `group_data/GROUP.py`, or for one host in the",
        "inventory. Anything unknown, of the wrong type or clashing is refused, all problems in",
        "one list, before the first connection.",
    ]
    for group, model in MODELS.items():
        lines += ["", f"## `{group}`", ""]
        lines += ["| setting | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = list(default) if isinstance(default, tuple) else default
            lines.append(f"| `{name}` | `{shown!r}` | {field.description} |")
    lines += ["", "## `services`", "", *services.reference()]
    lines += ["", "## `service_options`", "", service_settings.reference(), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
