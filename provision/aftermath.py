"""What a gateway's reloads leave behind, and what nginx reads beside the managed files: counted,
named and told at every deploy, never touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyinfra import host
from pyinfra.api import operation

from provision import facts
from provision.nginx_packages import NO_WELCOME
from provision.operations import Commands, executing
from provision.settings import UNITS

# Folders whose files nginx, or its unit, takes in by their mere presence.
_READ = ("/etc/nginx/conf.d", "/etc/nginx/default.d", f"{UNITS}/nginx.service.d")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Client sockets of each nginx process of an earlier configuration; files that nginx reads."""

    sockets: tuple[int, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, lines: Iterable[str]) -> Seen:
        pairs = [line.partition(" ")[::2] for line in lines]
        return cls(
            sockets=tuple(int(value) for key, value in pairs if key == "process"),
            files=tuple(value for key, value in pairs if key == "file"),
        )


@operation()
def tell(ports: Iterable[int], managed: Iterable[str], shutdown_timeout_s: int) -> Commands:
    """Say what is left of earlier configurations, and what else nginx reads. Changes nothing.

    + ports: the public ones
    + managed: paths of the files that the deploy owns
    + shutdown_timeout_s: as declared
    """
    listening = " or ".join(f"sport = :{port}" for port in ports)
    found = host.get_fact(
        facts.NginxLeftovers, ports=f"( {listening} )", empty=NO_WELCOME, folders=_READ
    )
    lines = messages(Seen.of(found), managed=managed, shutdown_timeout_s=shutdown_timeout_s)
    for line in lines if executing() else ():
        host.log(line)
    yield from ()


def messages(seen: Seen, *, managed: Iterable[str], shutdown_timeout_s: int) -> list[str]:
    """What to tell, if anything. Pure."""
    lines = []
    if seen.sockets:
        processes = "1 process" if len(seen.sockets) == 1 else f"{len(seen.sockets)} processes"
        consequence = (
            f"they are cut {shutdown_timeout_s} s after their reload "
            "(by processes that were started under this worker_shutdown_timeout_s)"
            if shutdown_timeout_s
            else "they stay until they close (worker_shutdown_timeout_s = 0 cuts none)"
        )
        lines.append(
            f"nginx: {processes} of earlier configurations with {sum(seen.sockets)} sockets of "
            f"clients; {consequence}"
        )
    owned = frozenset(managed)
    foreign = [path for path in seen.files if path not in owned]
    if foreign:
        lines.append(f"read by nginx, not managed here, left alone: {', '.join(foreign)}")
    return lines
