"""What the nginx.conf on a gateway says of itself: where clients are served, and on which ports.

After a rollback that is not what is declared. Pure: text in, answers out. files/nginx-activate.sh
reads the same lines.
"""

from __future__ import annotations

import re

from provision.settings import UNITS

NGINX_CONF = "/etc/nginx/nginx.conf"
NGINX_DROP_IN = f"{UNITS}/nginx.service.d/gateway.conf"

# The first words of templates/nginx.conf.j2.
_OURS = "# Written by the gateway's deploy"
_PROBE = re.compile(r"^ *(?:# Probed by the deploy: (.+)|listen ([0-9]+) default_server.*)$", re.M)
_LISTEN = re.compile(r"^ *listen ([0-9]+)[ ;]", re.M)


def is_ours(text: str) -> bool:
    """Whether a deploy wrote it; that of the package, or of an operator, says nothing here."""
    return text.startswith(_OURS)


def probe(text: str) -> str | None:
    """Where it serves clients, as files/handshake.sh reads it; None if it is not ours."""
    found = _PROBE.search(text) if is_ours(text) else None
    return (found[1] or found[2]) if found else None


def ports(text: str) -> list[int]:
    """Ports on which it listens for everybody; none if it is not ours."""
    return list(dict.fromkeys(map(int, _LISTEN.findall(text)))) if is_ours(text) else []


def is_sandboxed(drop_in: str) -> bool:
    """Whether nginx, started with this drop-in, sees the host read-only."""
    return "\nProtectSystem=strict\n" in f"\n{drop_in}\n"
