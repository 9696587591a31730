"""From one number, the connections wanted, to every limit on their way.

Pure arithmetic: what a gateway needs for so many WebSockets, and what a host that cannot give it
has to be told. Sources of the figures stand beside them; docs/sizing.md is generated from here
(`python -m provision.sizing`).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

# A proxied WebSocket is one connection to the client and one to the worker.
# https://nginx.org/en/docs/ngx_core_module.html#worker_connections
PER_SOCKET = 2

# nginx's processes do not take connections in equal numbers: whoever is awake first accepts. So
# each gets room for more than its share.
UNEVEN = 1.5

# Listeners, the channel between processes, logs, epoll.
SPARE_CONNECTIONS = 64

# A request may hold a temporary file beside its connections.
FILES_PER_CONNECTION = 2
SPARE_DESCRIPTORS = 512

# What each of 20,000 WebSockets that had asked once took, in nginx and its worker together
# (`python -m bench.connections`, 2026-12-01): 26 KiB. How it divides between the two was not
# measured, so each side is counted as if it took nearly all of it; the rest is for buffers in use.
MEASURED_BYTES = 26 * 1024
NGINX_BYTES = 24 * 1024
WORKER_BYTES = 48 * 1024

# All clients of a gateway that restarts come back at once. The kernel keeps those that nginx has
# not accepted yet; one in ten at the same moment is what the clients' jitter leaves.
BURST_SHARE = 0.1
SMALLEST_BACKLOG = 511  # nginx's own default
LARGEST_BACKLOG = 65535

# Idle connections to workers are counted here, too, and ports of connections that were closed
# stay taken for a minute (TIME_WAIT).
SPARE_PORTS = 0.1


@dataclass(frozen=True)
class Demand:
    """What is wanted of one gateway."""

    connections: int  # WebSockets that are open at once
    workers: int  # addresses (host and port) that nginx spreads them over
    processes: int  # nginx worker processes
    keepalive: int  # idle upstream connections a process


@dataclass(frozen=True)
class Capacity:
    """What a host gives, as its kernel says. Sizes in bytes."""

    memory: int
    first_port: int  # net.ipv4.ip_local_port_range
    last_port: int
    nr_open: int  # fs.nr_open: the most that any process may have open
    somaxconn: int  # net.core.somaxconn
    conntrack_max: int | None  # net.netfilter.nf_conntrack_max; None: nothing is tracked


@dataclass(frozen=True)
class Plan:
    """The limits that follow. Memory in bytes."""

    worker_connections: int  # of each nginx process
    descriptors: int  # of each nginx process, and LimitNOFILE
    per_worker: int  # connections that one worker gets, with one of the others down
    ports: int  # that connections to one address of a worker take
    backlog: int
    nginx_memory: int
    worker_memory: int  # of all workers together
    tracked: int  # entries of a firewall that tracks connections


def plan(demand: Demand) -> Plan:
    """The limits for `demand`."""
    share = math.ceil(demand.connections / demand.processes)
    if demand.processes > 1:
        share = min(demand.connections, math.ceil(share * UNEVEN))
    worker_connections = _rounded(PER_SOCKET * share + demand.keepalive + SPARE_CONNECTIONS)
    left = max(1, demand.workers - 1)
    per_worker = math.ceil(demand.connections / left)
    idle = demand.keepalive * demand.processes
    return Plan(
        worker_connections=worker_connections,
        descriptors=descriptors(worker_connections),
        per_worker=per_worker,
        ports=math.ceil((per_worker + idle) * (1 + SPARE_PORTS)),
        backlog=min(
            max(math.ceil(demand.connections * BURST_SHARE), SMALLEST_BACKLOG), LARGEST_BACKLOG
        ),
        nginx_memory=demand.connections * NGINX_BYTES,
        worker_memory=demand.connections * WORKER_BYTES,
        tracked=PER_SOCKET * demand.connections,
    )


def descriptors(worker_connections: int) -> int:
    """File descriptors that one nginx process with so many connections may need."""
    return FILES_PER_CONNECTION * worker_connections + SPARE_DESCRIPTORS


def problems(demand: Demand, capacity: Capacity) -> list[str]:
    """What a host cannot give, each with its arithmetic and the way out."""
    needed = plan(demand)
    ports = capacity.last_port - capacity.first_port + 1
    found = []
    if needed.descriptors > capacity.nr_open:
        found.append(
            f"{needed.descriptors} descriptors a process ({FILES_PER_CONNECTION} for each of "
            f"{needed.worker_connections} connections, and {SPARE_DESCRIPTORS}), but fs.nr_open is "
            f"{capacity.nr_open}: raise it to {needed.descriptors}, or use more nginx processes"
        )
    if needed.ports > ports:
        found.append(
            f"{needed.ports} ports to one worker ({demand.connections} connections over "
            f"{max(1, demand.workers - 1)} workers when one of {demand.workers} is down, and idle "
            f"ones), but net.ipv4.ip_local_port_range {capacity.first_port} {capacity.last_port} "
            f"has {ports}: set it to '1024 65535', or use more workers"
            + (
                f" (more than 64512 never fit one address: at least "
                f"{_workers_for(demand.connections)} workers)"
                if needed.ports > 64512
                else ""
            )
        )
    if needed.backlog > capacity.somaxconn:
        found.append(
            f"a backlog of {needed.backlog} (a tenth of {demand.connections} clients that come "
            f"back at once), but net.core.somaxconn is {capacity.somaxconn}: raise it"
        )
    if needed.nginx_memory > capacity.memory // 2:
        found.append(
            f"{_gib(needed.nginx_memory)} for nginx ({demand.connections} connections of "
            f"{NGINX_BYTES // 1024} KiB), which is more than half of the host's "
            f"{_gib(capacity.memory)}: more memory, or more gateways"
        )
    if capacity.conntrack_max is not None and needed.tracked > capacity.conntrack_max:
        found.append(
            f"{needed.tracked} tracked connections ({PER_SOCKET} for each WebSocket), but "
            f"net.netfilter.nf_conntrack_max is {capacity.conntrack_max}: raise it"
        )
    return found


def document() -> str:
    """docs/sizing.md."""
    return f"""# Sizing

Generated from `provision/sizing.py` by `python -m provision.sizing`; a test keeps it true.

`connections = 20000` in `group_data/gateways.py` says how many WebSockets a gateway has to hold at
once. The limits on their way follow from that number and the host: `worker_connections`,
`worker_rlimit_nofile`, systemd's `LimitNOFILE`, and the backlog of the public ports. What the host
cannot give is refused before anything is touched, with the arithmetic. Without `connections`,
`worker_connections` counts (8,192 for each nginx process, of which a WebSocket takes two), and
nothing is asked of the host.

{table()}
Each gateway has to hold all of its connections while one of the workers is down; hence the column
of ports, which are those of one source address to one address of a worker. With several `services`,
all connections may be those of the one with the fewest workers, and idle ones are kept for each.

| from | follows | because |
|---|---|---|
| `worker_connections` | {PER_SOCKET} for each WebSocket of a process, the idle upstream \
connections, {SPARE_CONNECTIONS} | one to the client, one to the worker; processes accept \
unevenly, so each has room for {UNEVEN:g} times its share |
| descriptors | {FILES_PER_CONNECTION} for each connection, {SPARE_DESCRIPTORS} | its socket, and \
a temporary file |
| backlog | a tenth of the connections, {SMALLEST_BACKLOG} to {LARGEST_BACKLOG} | after a restart \
all clients come back, and the kernel keeps those that nginx has not accepted yet |
| ports | {SPARE_PORTS:.0%} more than the connections and idle ones of a worker | closed ones stay \
taken for a minute |
| memory | {NGINX_BYTES // 1024} KiB of nginx, {WORKER_BYTES // 1024} KiB of its worker for each | \
see below |
| conntrack | {PER_SOCKET} entries for each WebSocket | both connections pass the firewall |

Asked of the host: MemTotal (nginx may have half), `fs.nr_open`, `net.core.somaxconn`,
`net.ipv4.ip_local_port_range`, `net.netfilter.nf_conntrack_max` where connections are tracked.

## Measured

20,000 WebSockets through nginx to two workers, each after one request of its own, took \
{MEASURED_BYTES // 1024} KiB each, in nginx and worker together, what processes share counted once
(`python -m bench.connections`, 2026-12-01; loopback, 2 cores). The table reserves \
{(NGINX_BYTES + WORKER_BYTES) // 1024} KiB, which is \
{(NGINX_BYTES + WORKER_BYTES) / MEASURED_BYTES:.2g} times that: messages in both directions fill
buffers that idle connections don't have. The other columns are arithmetic, not measurements.
"""


def table() -> str:
    """Plans for round numbers, as Markdown."""
    lines = [
        "| connections | workers | nginx processes | worker_connections | descriptors | "
        "ports to a worker | backlog | memory, nginx | memory, workers |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for connections, workers, processes in (
        (500, 2, 2),
        (2_000, 2, 2),
        (10_000, 2, 4),
        (20_000, 2, 4),
        (50_000, 4, 8),
        (100_000, 4, 16),
        (500_000, 16, 32),
    ):
        demand = Demand(
            connections=connections, workers=workers, processes=processes, keepalive=1000
        )
        needed = plan(demand)
        cells = [
            *(f"{number:,}" for number in (connections, workers, processes)),
            f"{needed.worker_connections:,}",
            f"{needed.descriptors:,}",
            f"{needed.ports:,}",
            f"{needed.backlog:,}",
            _gib(needed.nginx_memory),
            _gib(needed.worker_memory),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _workers_for(connections: int) -> int:
    return math.ceil(connections * (1 + SPARE_PORTS) / 64512) + 1


def _rounded(number: int) -> int:
    """Up to a whole 1,024: numbers that people recognise."""
    return math.ceil(number / 1024) * 1024


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.stdout.write(document())
