"""A gateway that is changed while it serves: `python -m bench.changes` (root; lab hosts).

300 sockets stay open and ask every two seconds, and others do nothing but handshakes, while the
gateway's configuration is deployed 20 times, ten of them broken, each in another way. Each
configuration marks its answers with its number: nobody may ever be answered by a broken one.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import fleet
from bench.fleet import Hosts, count
from bench.results import Row, write

_TEMPLATE = "templates/nginx.conf.j2"
_ANCHOR = "    server_tokens off;\n"  # of the http block
_FOREIGN = "/etc/nginx/default.d/foreign.conf"
_CERTIFICATES = "/etc/pki/bench"
_SMALL = "/run/bench-kept"


@contextlib.contextmanager
def _as_it_is(_hosts: Hosts) -> Iterator[None]:
    yield


@dataclass(frozen=True, kw_only=True)
class Change:
    """One deploy: what is declared, what befalls the host meanwhile, and how it has to end."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    directive: str = ""  # in the http block of the template
    around: Callable[[Hosts], contextlib.AbstractContextManager[None]] = _as_it_is
    broken: bool = False
    cut: bool = False  # the deploy is killed when the gateway is at work on it


@contextlib.contextmanager
def _foreign_file(hosts: Hosts) -> Iterator[None]:
    hosts.on("gw1", f"echo 'return 418;' >{_FOREIGN}")
    try:
        yield
    finally:
        hosts.on("gw1", f"rm {_FOREIGN}")


def _full(folder: str) -> Callable[[Hosts], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def full(hosts: Hosts) -> Iterator[None]:
        hosts.on(
            "gw1",
            f"set -e; rm -f {folder}/.*.candidate; cp -a {folder} {_SMALL}; "
            f"size=$(du -sk {_SMALL} | cut -f 1); mount -t tmpfs -o size=$((size + 64))k tmpfs "
            f"{folder}; cp -a {_SMALL}/. {folder}; rm -rf {_SMALL}; "
            f"cat /dev/zero >{folder}/filler 2>/dev/null || true",
        )
        try:
            yield
        finally:
            hosts.on("gw1", f"umount {folder}")

    return full


@contextlib.contextmanager
def _mismatched(hosts: Hosts) -> Iterator[None]:
    hosts.on(
        "gw1",
        f"mkdir -p {_CERTIFICATES} && cd {_CERTIFICATES} && for n in a b; do openssl req -x509 "
        "-newkey rsa:2048 -nodes -days 2 -subj /CN=$n -keyout $n.key -out $n.pem 2>/dev/null; done",
    )
    yield


_WRONG_PAIR = {
    "tls_certificate": f"{_CERTIFICATES}/a.pem",
    "tls_certificate_key": f"{_CERTIFICATES}/b.key",
}

BROKEN = (
    Change(name="a template that does not render", directive="{{ gateway.nothing }}"),
    Change(name="refused by nginx alone", directive="proxy_cache nowhere;"),
    Change(name="a key of another certificate", data=_WRONG_PAIR, around=_mismatched),
    Change(name="nobody is let in", directive="deny all;"),
    Change(name="no way to the workers", directive="proxy_bind 192.0.2.1;"),
    Change(name="a port that is taken", data={"listen_port": 22}),
    Change(name="a file of somebody else", around=_foreign_file),
    Change(name="no space beside nginx.conf", around=_full("/etc/nginx")),
    Change(name="no space for the way back", around=_full("/var/lib/gpu-gateway")),
    Change(name="the connection is lost", directive="deny all;", cut=True),
)

GOOD = (
    Change(name="a time-out", data={"keepalive_timeout_s": 61}),
    Change(name="another log", data={"access_log_format": "json"}),
    Change(name="a counters' port", data={"status_port": 8008}),
    Change(name="another balance", data={"upstream_balance": "round_robin"}),
    Change(name="a bound on clients", data={"client_max_connections": 60_000}),
    Change(name="origins", data={"allowed_origins": ["https://app.example.com"]}),
    Change(name="more connections", data={"worker_connections": 4096}),
    Change(name="another name", data={"server_name": "localhost gateway.example.com"}),
    Change(name="fewer idle connections upstream", data={"upstream_keepalive": 100}),
    Change(name="another directive", directive="client_header_timeout 30s;"),
)


class Changes:
    """The deploys, each from a copy of the checkout with a template of its own."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts = hosts
        self._checkout = fleet.copied_checkout(folder)
        self._template = (self._checkout / _TEMPLATE).read_text()
        if _ANCHOR not in self._template:
            sys.exit(f"{_TEMPLATE} has no line {_ANCHOR.strip()!r} any more, which is marked here")
        self.right = 0

    def apply(self, number: int, change: Change, *, broken: bool) -> None:
        """One change; says what came of it."""
        mark = f"{_ANCHOR}    add_header X-Change {number} always;\n    {change.directive}\n"
        (self._checkout / _TEMPLATE).write_text(self._template.replace(_ANCHOR, mark))
        started = time.monotonic()
        with change.around(self._hosts):
            failed = self._cut(change) if change.cut else self._run(change)
        self.right += failed is broken
        wanted = "" if failed is broken else ", WHICH IS WRONG"
        took = time.monotonic() - started
        verdict = "refused" if failed else "applied"
        print(f"  {number:>2} {change.name}: {verdict}{wanted} ({took:.0f} s)", flush=True)

    def _run(self, change: Change) -> bool:
        return self._hosts.run(checkout=self._checkout, **change.data).returncode != 0

    def _cut(self, change: Change) -> bool:
        before = self._live()
        deploy = self._hosts.start(checkout=self._checkout, **change.data)
        self._hosts.on(
            "gw1", "until pgrep -f 'nginx-activate [0-9t]' >/dev/null; do sleep 0.05; done"
        )
        deploy.kill()
        deploy.communicate()
        self._hosts.on("gw1", "flock /run/gpu-gateway/lock true")
        return self._live() == before

    def _live(self) -> str:
        return self._hosts.on("gw1", "sha256sum /etc/nginx/nginx.conf")


def measure(hosts: Hosts, folder: Path, sockets: int) -> list[Row]:
    """The rows, of broken and good changes in turns."""
    changes = Changes(hosts, folder)
    changes.apply(0, Change(name="as it is"), broken=False)
    with hosts.traffic(sockets=sockets, connectors=2) as seen:
        for number, (bad, good) in enumerate(zip(BROKEN, GOOD, strict=True)):
            changes.apply(2 * number + 1, bad, broken=True)
            changes.apply(2 * number + 2, good, broken=False)
    counts, handshakes = seen["counts"], seen["handshakes"]
    print(f"  handshakes: {handshakes}\n  errors: {seen['errors']}", flush=True)
    marks = {key: key.rpartition(" ")[2] for key in handshakes}
    bad_marks = {str(2 * number + 1) for number in range(len(BROKEN))}
    total = sum(handshakes.values())
    served = sum(n for key, n in handshakes.items() if key.startswith("101 "))
    name = f"{sockets} sockets, {len(BROKEN) + len(GOOD)} changes"
    return [
        count(f"{name}: that ended as they had to", changes.right - 1, at_least=20),
        count(f"{name}: sockets closed", counts.get("sockets closed", 0), at_most=0),
        count(
            f"{name}: requests lost",
            counts["requests sent"] - counts["requests answered"],
            at_most=0,
        ),
        count(
            f"{name}: handshakes by a broken configuration",
            sum(n for key, n in handshakes.items() if marks[key] in bad_marks),
            at_most=0,
        ),
        count(f"{name}: handshakes not answered with 101", total - served, at_most=0),
        count(f"{name}: requests answered", counts["requests answered"]),
        count(f"{name}: handshakes", total),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.changes", description=__doc__)
    parser.add_argument("--sockets", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fleet.hosts("gw1", "gpu1") as hosts:
        rows = measure(hosts, Path(folder), options.sockets)
    return 0 if write("deploy", "python -m bench.changes", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
