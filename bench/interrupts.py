"""Deploys that are killed: `python -m bench.interrupts` (root; lab hosts).

A deploy that changes the gateway and restarts both workers gets SIGKILL at a random moment, 20
times over; each time, the same deploy is run again, and must leave exactly what is declared. All
the while clients call through the gateway, and others do nothing but handshakes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from typing import Any

from bench import fleet
from bench.fleet import Hosts, count
from bench.results import Row, write


def _declared(turn: int) -> dict[str, Any]:
    """Another configuration and other settings of the workers, each time."""
    return {
        "keepalive_timeout_s": 60 + turn % 20,
        "service_options": {"max_batch": 32 + turn % 20},
    }


class Interrupts:
    """Killed deploys, and those that repair."""

    def __init__(self, hosts: Hosts, *, seed: int) -> None:
        self._hosts = hosts
        self._random = random.Random(seed)  # noqa: S311  moments, not secrets
        self.killed = 0
        self.repaired = 0

    def turn(self, number: int, longest_s: float) -> None:
        """One deploy that is killed, and the next one, which has to repair."""
        declared = _declared(number)
        moment = self._random.uniform(0.0, longest_s)
        deploy = self._hosts.start(**declared)
        try:
            deploy.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            deploy.kill()
            deploy.communicate()
            self.killed += 1
        repair = self._hosts.run(**declared)
        left = self._hosts.run("--dry", **declared)
        is_right = repair.returncode == 0 and left.returncode == 0 and not left.changed
        self.repaired += is_right
        verdict = "repaired" if is_right else f"NOT REPAIRED\n{repair.output}\n{left.output}"
        print(f"  {number:>2} killed after {moment:.1f} s: {verdict}", flush=True)


def measure(hosts: Hosts, *, kills: int, seed: int) -> list[Row]:
    interrupts = Interrupts(hosts, seed=seed)
    longest_s = hosts.run(**_declared(0)).seconds
    with hosts.traffic(clients=4, connectors=2) as seen:
        for number in range(1, kills + 1):
            interrupts.turn(number, longest_s)
    counts, handshakes = seen["counts"], seen["handshakes"]
    print(f"  handshakes: {handshakes}\n  errors: {seen['errors']}", flush=True)
    total = sum(handshakes.values())
    served = sum(n for key, n in handshakes.items() if key.startswith("101 "))
    name = f"{kills} deploys with SIGKILL"
    return [
        count(f"{name}: repaired by the next", interrupts.repaired, at_least=kills),
        count(f"{name}: handshakes not answered with 101", total - served, at_most=0),
        count(f"{name}: failed calls", counts.get("calls failed", 0), at_most=0),
        count(f"{name}: killed before their end", interrupts.killed),
        count(f"{name}: handshakes", total),
        count(f"{name}: calls", counts["calls"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.interrupts", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261128)
    options = parser.parse_args()
    with fleet.hosts("gw1", "gpu1") as hosts:
        rows = measure(hosts, kills=options.kills, seed=options.seed)
    return 0 if write("deploy", "python -m bench.interrupts", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
