"""nginx's counters for Prometheus: an exporter of our own on each gateway, where a port is set.

Why not nginx-prometheus-exporter: no package of the EL family brings it, so each gateway would need
a Go binary from elsewhere, for seven numbers; and it does not see what long-lived sockets need told
most, the processes that a reload left behind. The names are the same, so dashboards fit; whoever
prefers it points it at `status_port`, and leaves `metrics_port` out.

`python -m provision.metrics inventory.py` names what a Prometheus has to ask (files/prometheus/).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from pyinfra import host
from pyinfra.api import operation

from provision import facts, operations, preflight, rendering
from provision.facts import quoted
from provision.operations import Commands, ManagedFile
from provision.settings import UNITS, Fleet, GatewaySettings

UNIT = "gateway-metrics.service"
UNIT_FILE = f"{UNITS}/{UNIT}"
SCRIPT = "/usr/local/libexec/gpu-gateway/nginx_exporter.py"


def files(settings: GatewaySettings) -> list[ManagedFile]:
    """The program and its unit."""
    unit = rendering.render("gateway-metrics.service.j2", gateway=settings, script=SCRIPT)
    return [
        ManagedFile(path=SCRIPT, content=rendering.static("nginx_exporter.py")),
        ManagedFile(path=UNIT_FILE, content=unit),
    ]


def exporter(settings: GatewaySettings) -> None:
    """The exporter running where it is wanted, and gone where it is not."""
    if settings.metrics_port is None:
        gone(name="No exporter of nginx's counters")
        return
    placed = files(settings)
    operations.place_files(name="Exporter of nginx's counters", files=placed)
    operations.units_run(name="It runs", files={UNIT: [managed.path for managed in placed]})


@operation()
def gone() -> Commands:
    """Stopped, and its files removed."""
    if UNIT_FILE not in host.get_fact(facts.Paths, paths=(UNIT_FILE,)):
        return
    yield quoted("systemctl", "disable", "--quiet", "--now", UNIT)
    yield quoted("rm", "-f", "--", UNIT_FILE, SCRIPT)
    yield quoted("systemctl", "daemon-reload")


def targets(fleet: Fleet) -> list[dict[str, Any]]:
    """Whom to scrape, for Prometheus' `file_sd_configs`: labels say what they are. Pure."""
    gateways = [
        _target(fleet, name, gateway.metrics_port, job="gateway")
        for name, gateway in fleet.gateways.items()
        if gateway.metrics_port
    ]
    workers = [
        _target(fleet, name, port, job="worker", service=found.service)
        for name, worker in fleet.workers.items()
        for found in fleet.assignments(worker)
        for port in found.settings.ports
    ]
    return [*gateways, *workers]


def _target(fleet: Fleet, name: str, port: int, **labels: str) -> dict[str, Any]:
    address = fleet.addresses[name]
    place = f"[{address}]" if ":" in address else address
    said = {key: value for key, value in labels.items() if value}
    return {"targets": [f"{place}:{port}"], "labels": {"host": name, **said}}


def main(arguments: Sequence[str]) -> int:
    """Print the targets of an inventory (default: inventory.py)."""
    try:
        fleet, _ = preflight.load(*(arguments or ["inventory.py"]))
    except preflight.RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(targets(fleet), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
