"""A rolling restart under load: `python -m bench.rolling` (root; lab hosts).

Two hosts with two workers each serve the project's clients through one gateway, while a setting of
the service is changed, which restarts all four. How much of the capacity is up is asked of the
workers' own metrics, all the time, from the gateway.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench import fleet
from bench.fleet import Hosts, count
from bench.results import Row, write

_PORTS = (9005, 9006)
# One line a look: how many of the workers say that they take requests.
_SAMPLER = """
while :; do
    up=0
    for worker; do
        curl -s -m 2 "http://$worker/metrics" | grep -q '^gpu_service_ready 1' && up=$((up + 1))
    done
    echo "$up"
done
"""


class Sampler:
    """Looks at all workers from a gateway, until it is stopped."""

    def __init__(self, hosts: Hosts) -> None:
        self._workers = [
            f"{host['address']}:{port}"
            for name, host in hosts.found.items()
            if name.startswith("gpu")
            for port in _PORTS
        ]
        config = hosts.found["gw1"]["ssh_config_file"]
        command = ["ssh", "-tt", "-F", config, "gw1", "--", f"set -- {' '.join(self._workers)}"]
        self._process = subprocess.Popen(
            [*command[:-1], f"{command[-1]}; {_SAMPLER}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def stop(self) -> list[float]:
        """The share of the workers that was up, look by look."""
        self._process.terminate()
        output = self._process.communicate()[0]
        looks = [int(line) for line in output.split() if line.isdigit()]
        return [up / len(self._workers) for up in looks]


def measure(hosts: Hosts, clients: int) -> list[Row]:
    sampler = Sampler(hosts)
    with hosts.traffic(clients=clients) as seen:
        rolled = hosts.run(service_options={"max_batch": 48})
    shares = sampler.stop()
    if rolled.returncode or not {"gpu1", "gpu2"} <= rolled.changed or not shares:
        sys.exit(f"the workers were not restarted, or not looked at:\n{rolled.output}")
    counts = seen["counts"]
    print(f"  {len(shares)} looks; errors: {seen['errors']}", flush=True)
    name = "rolling restart of 2 x 2 workers"
    return [
        count(f"{name}: failed calls", counts.get("calls failed", 0), at_most=0),
        count(f"{name}: least share of the capacity that was up", min(shares), at_least=0.5),
        count(f"{name}: calls", counts["calls"]),
        count(f"{name}: times a client came back", counts.get("reconnects", 0)),
        count(f"{name}: looks at the workers", len(shares)),
        Row(name=f"{name}: took", value=rolled.seconds, unit="s"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with fleet.hosts("gw1", "gpu1", "gpu2") as hosts:
        rows = measure(hosts, options.clients)
    return 0 if write("deploy", "python -m bench.rolling", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
