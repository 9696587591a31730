"""Faults of a WebSocket gateway's nginx.conf that `nginx -t` accepts and clients pay for.

Pure: a configuration's text in, findings out. Runs on every rendering before a deploy begins, so
that a template changed by hand can't bring a known fault back; and on any file by hand:

    python -m provision.lint [--hardened] [--ping-interval SECONDS] FILE…
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crossplane

Directive = dict[str, Any]

# https://nginx.org/en/docs/http/ngx_http_upstream_module.html
BALANCING = ("least_conn", "ip_hash", "hash", "random", "least_time")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault: where it is, what it costs, what to write instead."""

    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message} [{self.rule}]"


class UnparsableError(Exception):
    """The text is no nginx configuration; says where it stops being one."""


# nginx's own, where nothing is said.
# https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_read_timeout
READ_TIMEOUT_S = 60.0


def lint(
    text: str, *, hardened: bool = False, ping_interval_s: float = 20.0, unit: str | None = None
) -> list[Finding]:
    """Every known fault of a configuration, in the order of its lines. Raises `UnparsableError`.

    `hardened`: whether nginx's worker processes must not be root. `ping_interval_s`: how often a
    socket that is alive shows it. `unit`: text of nginx.service's drop-in, whose LimitNOFILE is
    compared.
    """
    tree = _parse(text)
    findings = [
        *_upgrade_headers(tree),
        *_h2c(tree),
        *_methods_after_keepalive(tree),
        *_closing_maps(tree),
        *_http10_upstreams(tree),
        *_descriptors(tree),
        *_silences(tree, ping_interval_s),
        *(_root_workers(tree) if hardened else ()),
        *(_descriptors_granted(tree, unit) if unit is not None else ()),
    ]
    return sorted(findings, key=lambda finding: finding.line)


def _parse(text: str) -> list[Directive]:
    # crossplane reads files only.
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write(text)
        file.flush()
        payload = crossplane.parse(file.name, single=True, check_ctx=False, check_args=False)
    if payload["status"] != "ok":
        errors = [error["error"].replace(f" in {file.name}", "") for error in payload["errors"]]
        raise UnparsableError("; ".join(errors))
    directives: list[Directive] = payload["config"][0]["parsed"]
    return directives


def _all(tree: list[Directive], name: str) -> Iterator[Directive]:
    for directive in tree:
        if directive["directive"] == name:
            yield directive
        yield from _all(directive.get("block", []), name)


def _set_headers(tree: list[Directive], header: str) -> Iterator[Directive]:
    for directive in _all(tree, "proxy_set_header"):
        if directive["args"][0].lower() == header:
            yield directive


def _upgrade_headers(tree: list[Directive]) -> Iterator[Finding]:
    for directive in _set_headers(tree, "connection"):
        if directive["args"][1].lower() == "upgrade":
            yield Finding(
                line=directive["line"],
                rule="hard-coded-upgrade",
                message='Connection "upgrade" is sent with plain requests too, and defeats the '
                "upstream's keepalive; use a variable of a map over $http_upgrade",
            )


def _h2c(tree: list[Directive]) -> Iterator[Finding]:
    for directive in _set_headers(tree, "upgrade"):
        if directive["args"][1] == "$http_upgrade":
            yield Finding(
                line=directive["line"],
                rule="any-upgrade",
                message="forwards every upgrade, h2c among them, which carries requests past all "
                "rules; use a map that knows only websocket",
            )


def _methods_after_keepalive(tree: list[Directive]) -> Iterator[Finding]:
    for upstream in _all(tree, "upstream"):
        seen_keepalive = False
        for directive in upstream["block"]:
            seen_keepalive |= directive["directive"] == "keepalive"
            if directive["directive"] in BALANCING and seen_keepalive:
                yield Finding(
                    line=directive["line"],
                    rule="method-after-keepalive",
                    message=f"{directive['directive']} stands after keepalive, where nginx ignores "
                    "it with a warning; put it before",
                )


def _closing_maps(tree: list[Directive]) -> Iterator[Finding]:
    if not any(_all(tree, "keepalive")):
        return
    for table in _all(tree, "map"):
        if table["args"][0] != "$http_upgrade":
            continue
        for entry in table["block"]:
            if entry["directive"] == "" and entry["args"] == ["close"]:
                yield Finding(
                    line=entry["line"],
                    rule="close-without-upgrade",
                    message="`'' close` ends the upstream connection after every plain request, so "
                    "keepalive keeps none; map '' to ''",
                )


def _http10_upstreams(tree: list[Directive]) -> Iterator[Finding]:
    for location in _all(tree, "location"):
        names = [directive["directive"] for directive in location.get("block", [])]
        if "proxy_pass" in names and "proxy_http_version" not in names:
            yield Finding(
                line=location["line"],
                rule="http-1.0-upstream",
                message="before 1.29.7 nginx speaks HTTP/1.0 to upstreams unless told, and a "
                "WebSocket handshake fails; set proxy_http_version 1.1",
            )


def _descriptors(tree: list[Directive]) -> Iterator[Finding]:
    limits = [int(directive["args"][0]) for directive in _all(tree, "worker_rlimit_nofile")]
    for directive in _all(tree, "worker_connections"):
        connections = int(directive["args"][0])
        if not limits or limits[-1] < 2 * connections:
            has = f"worker_rlimit_nofile is {limits[-1]}" if limits else "it is not set"
            yield Finding(
                line=directive["line"],
                rule="descriptors",
                message=f"{connections} connections may take {2 * connections} descriptors, but "
                f"{has}; set worker_rlimit_nofile to at least {2 * connections}",
            )


def _descriptors_granted(tree: list[Directive], unit: str) -> Iterator[Finding]:
    """systemd has to grant the master what nginx.conf hands on to its worker processes."""
    granted = re.findall(r"^LimitNOFILE=(\d+)$", unit, re.MULTILINE)
    for directive in _all(tree, "worker_rlimit_nofile"):
        wanted = int(directive["args"][0])
        if not granted or int(granted[-1]) < wanted:
            has = f"LimitNOFILE={granted[-1]}" if granted else "no LimitNOFILE"
            yield Finding(
                line=directive["line"],
                rule="descriptors-not-granted",
                message=f"worker processes are to have {wanted} descriptors, but nginx.service has "
                f"{has}; set it to at least {wanted}",
            )


def _silences(tree: list[Directive], ping_interval_s: float) -> Iterator[Finding]:
    for location, timeout in _tunnels(tree, READ_TIMEOUT_S):
        if timeout <= 2 * ping_interval_s:
            yield Finding(
                line=location["line"],
                rule="silent-socket",
                message=f"a socket that is silent for {timeout:g} s is closed, although one that "
                f"is alive shows a ping every {ping_interval_s:g} s only; set proxy_read_timeout "
                f"above {2 * ping_interval_s:g} s",
            )


def _tunnels(block: list[Directive], timeout: float) -> Iterator[tuple[Directive, float]]:
    """Locations that forward upgrades, each with the read time-out that it has or inherits."""
    for directive in block:
        if directive["directive"] == "proxy_read_timeout":
            timeout = _seconds(directive["args"][0])
    for directive in block:
        inner = directive.get("block", [])
        if directive["directive"] == "location" and _forwards_upgrades(inner):
            own = [d["args"][0] for d in inner if d["directive"] == "proxy_read_timeout"]
            yield directive, _seconds(own[-1]) if own else timeout
        yield from _tunnels(inner, timeout)


def _forwards_upgrades(block: list[Directive]) -> bool:
    return any(
        directive["directive"] == "proxy_set_header"
        and directive["args"][0].lower() == "upgrade"
        and directive["args"][1]
        for directive in block
    )


# https://nginx.org/en/docs/syntax.html
_UNITS = {
    "ms": 1e-3,
    "": 1,
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86_400,
    "w": 7 * 86_400,
    "M": 30 * 86_400,
    "y": 365 * 86_400,
}


def _seconds(text: str) -> float:
    return float(sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)(ms|[smhdwMy]?)", text)))


def _root_workers(tree: list[Directive]) -> Iterator[Finding]:
    for directive in tree:
        if directive["directive"] == "user" and directive["args"][0] == "root":
            yield Finding(
                line=directive["line"],
                rule="root-workers",
                message="worker processes read what clients send, and only the master needs root; "
                "use a user of their own, such as nginx",
            )


def main(arguments: Sequence[str]) -> int:
    """Lint files; 0 when none has a fault, 2 when one has, 1 when one could not be read."""
    parser = argparse.ArgumentParser(prog="python -m provision.lint", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--hardened", action="store_true", help="worker processes must not be root")
    parser.add_argument("--ping-interval", type=float, default=20.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    worst = 0
    for name in options.files:
        try:
            findings = lint(
                Path(name).read_text(),
                hardened=options.hardened,
                ping_interval_s=options.ping_interval,
            )
        except (OSError, UnicodeDecodeError, UnparsableError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        for finding in findings:
            print(f"{name}:{finding.line}: {finding.message} [{finding.rule}]")
            worst = 2
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
