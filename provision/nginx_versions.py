"""What an nginx version is and what it can do. Pure: text in, answers out.

The template follows the version that is installed on the host: `abilities` is what it asks.
docs/nginx-versions.md is generated from the table here (`python -m provision.nginx_versions`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

_NUMBERS = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, order=True)
class Version:
    """A release of nginx, as in `nginx/1.26.3`."""

    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    def is_in(self, wanted: str) -> bool:
        """Whether this is the release, or of the series, that `wanted` names: 1.26.3, or 1.26."""
        mine = (self.major, self.minor, self.patch)
        numbers = tuple(int(number) for number in wanted.split("."))
        return mine[: len(numbers)] == numbers


def parse(text: str) -> Version | None:
    """The version that `nginx -v` tells, or that of a package (`1:1.26.3-1.el9.ngx`).

    Builds of others tell nginx's version, too: `openresty/1.27.1.2` is 1.27.1. None where there is
    none.
    """
    told = re.search(r"[^\s/]+/(\d.*)", text)  # nginx version: NAME/VERSION (Ubuntu)
    # An epoch stands before a colon.
    found = _NUMBERS.match(told.group(1) if told else text.rpartition(":")[2].strip())
    return Version(*(int(number or 0) for number in found.groups())) if found else None


def newest_of(wanted: str) -> Version:
    """The newest release that `wanted` (1.26.3, or 1.26) may turn out to be."""
    numbers = [int(number) for number in wanted.split(".")]
    return Version(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else 10_000)


class Feature(StrEnum):
    """What not every supported version has. The value is the name that the template uses."""

    PROXY_SOCKET_KEEPALIVE = "proxy_socket_keepalive"
    UPSTREAM_BYTES_SENT = "upstream_bytes_sent"
    HTTP2_DIRECTIVE = "http2_directive"
    RESOLVE = "resolve"
    STICKY = "sticky"
    HTTP11_BY_DEFAULT = "http11_by_default"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Since when a feature is there, and what the gateway does with it, and without."""

    since: Version
    what: str
    used: str
    before: str
    link: str


_DOCS = "https://nginx.org/en/docs/http/"

ARRIVALS: Mapping[Feature, Arrival] = {
    Feature.PROXY_SOCKET_KEEPALIVE: Arrival(
        since=Version(1, 15, 6),
        what="`proxy_socket_keepalive`",
        used="on: TCP notices a worker's host that vanished",
        before="left out; `proxy_read_timeout_s` and the service's pings notice it later",
        link=f"{_DOCS}ngx_http_proxy_module.html#proxy_socket_keepalive",
    ),
    Feature.UPSTREAM_BYTES_SENT: Arrival(
        since=Version(1, 15, 8),
        what="`$upstream_bytes_sent`",
        used="in the JSON log (`upstream_sent`)",
        before="left out of the JSON log",
        link=f"{_DOCS}ngx_http_upstream_module.html#var_upstream_bytes_sent",
    ),
    Feature.HTTP2_DIRECTIVE: Arrival(
        since=Version(1, 25, 1),
        what="`http2 on;`",
        used="where `http2 = True`",
        before="`listen … http2`, which newer versions call deprecated",
        link=f"{_DOCS}ngx_http_v2_module.html#http2",
    ),
    Feature.RESOLVE: Arrival(
        since=Version(1, 27, 3),
        what="`server … resolve` in an upstream",
        used="not used: upstreams are addresses",
        before="not used",
        link=f"{_DOCS}ngx_http_upstream_module.html#resolve",
    ),
    Feature.STICKY: Arrival(
        since=Version(1, 29, 6),
        what="`sticky` in an upstream (before: commercial)",
        used="where `upstream_sticky` is set",
        before="`upstream_sticky` is refused; `upstream_balance = 'ip_hash'` is what there is",
        link=f"{_DOCS}ngx_http_upstream_module.html#sticky",
    ),
    Feature.HTTP11_BY_DEFAULT: Arrival(
        since=Version(1, 29, 7),
        what="HTTP/1.1 and `keepalive 32` to upstreams by default (before: HTTP/1.0, none)",
        used="said all the same, so that every version does the same",
        before="said, or no handshake would succeed",
        link=f"{_DOCS}ngx_http_proxy_module.html#proxy_http_version",
    ),
}

# What Enterprise Linux 8 has by default. The template knows none that is older.
OLDEST = Version(1, 14, 0)

# One release on either side of each change: where a template can be right or wrong.
MILESTONES = tuple(
    sorted({OLDEST, Version(1, 20, 1), *(arrival.since for arrival in ARRIVALS.values())})
)


def abilities(version: Version) -> dict[str, bool]:
    """Feature -> whether the version has it."""
    return {str(feature): version >= arrival.since for feature, arrival in ARRIVALS.items()}


def oldest_with(features: Iterable[Feature]) -> Version:
    """The oldest version that has all of them."""
    return max([OLDEST, *(ARRIVALS[feature].since for feature in features)])


def problems(version: Version, needed: Mapping[str, Feature]) -> list[str]:
    """What a version cannot do of what settings need (setting -> feature), a sentence each."""
    found = []
    if version < OLDEST:
        found.append(f"nginx {version} is older than {OLDEST}, which is the oldest that is known")
    for setting, feature in needed.items():
        arrival = ARRIVALS[feature]
        if version < arrival.since:
            found.append(
                f"{setting} needs nginx {arrival.since} or newer ({arrival.what}), and this is "
                f"{version}; take it out, or have a newer one (nginx_version, nginx_source)"
            )
    return found


# Each starts with a run of digits or of letters; what stands between does not count.
_PARTS = re.compile(r"\d+|[A-Za-z]+|~")


def _package_order(text: str) -> tuple[tuple[int, int, str], ...]:
    """Orders package versions of the same nginx: 2.el9.ngx is newer than 1.el9.ngx."""
    parts = [part if part != "~" else "" for part in _PARTS.findall(text)]
    ranked = [
        (2, int(part), "") if part.isdigit() else (0 if not part else 1, 0, part) for part in parts
    ]
    return (*ranked, (0, 1, ""))  # the end is newer than a tilde, and older than anything else


def newest(candidates: Iterable[str], wanted: str | None) -> str | None:
    """The newest package version (`1:1.26.3-1.el9`) of those that `wanted` allows; None: none.

    By nginx's version, not by the epoch: that of one source says nothing about another's.
    """
    allowed = [
        (version, _package_order(text.rpartition(":")[2]), text)
        for text in candidates
        if (version := parse(text)) and (wanted is None or version.is_in(wanted))
    ]
    return max(allowed)[2] if allowed else None


def reference() -> str:
    """The table of docs/nginx-versions.md."""
    lines = [
        "# nginx's versions",
        "",
        "Generated from `provision/nginx_versions.py` by `make docs`; a test keeps it true.",
        "",
        f"The template follows the nginx that is installed on each host, from {OLDEST} on. How to "
        "get another",
        'one: [runbook.md](runbook.md), "nginx from elsewhere".',
        "",
        "| since | what came | what the gateway does with it | and before |",
        "|---|---|---|---|",
    ]
    for arrival in sorted(ARRIVALS.values(), key=lambda arrival: arrival.since):
        lines.append(
            f"| {arrival.since} | [{arrival.what}]({arrival.link}) | {arrival.used} "
            f"| {arrival.before} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(reference(), end="")
