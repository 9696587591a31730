"""Many open connections: `python -m bench.connections`. Needs gcc and
Python's headers.

Opens 20,000 WebSockets through nginx to two workers, lets each ask once, and says what memory each
costs in nginx and workers together. Another client asks at a steady rate, with them and without
them in turns: what they cost it. Its p99 is the median of those of many short whiles, or one in
which somebody else had the machine would decide. All on the loopback interface of one machine.

In a third part of each turn as many files are open instead, of /dev/null: programs that watch a
machine look at each open descriptor, every second maybe, and this says what comes of that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import harness
from bench.gateway import descriptor_limit, gateway
from bench.harness import Server
from bench.results import Row, write
from gpu_service import bundle

# Of one client process.
MOST_HELD = 8000
ACTIVE_CONNECTIONS = 128  # enough for its rate when an answer takes 0.4 s

# nginx has two for each connection, a worker and a client one.
DESCRIPTORS_EACH = 4
SPARE_DESCRIPTORS = 64

_HOLDER = """
import os, sys
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[1]))]
print("open", flush=True)
sys.stdin.read()
"""

# How soon nginx and the workers shall have closed what clients left behind, but for a few.
CLOSED_S = 30
FEW_DESCRIPTORS = 128


class Fleet:
    """nginx, two workers and the programs that ask them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self._frame = folder / "frame"
        self._programs = {name: harness.built(name, folder) for name in ("load", "connections")}
        path = harness.model()
        spec = bundle.read_manifest(path).inputs[0]
        harness.write_frame(self._frame, spec.name, (1, *spec.shape))
        self.servers: list[Server] = []
        for _ in range(2):
            self.servers.append(harness.serve(path))
        ports = [server.port for server in self.servers]
        self.servers.append(gateway(folder / "nginx", ports, sockets=options.connections))
        self._port = str(self.servers[-1].port)

    @property
    def memory(self) -> int:
        """Bytes of all three, what their processes share counted once."""
        return sum(server.pss_bytes for server in self.servers)

    def active(self) -> list[float]:
        """p99 of a client that asks at a steady rate, in µs, of each while."""
        command = [str(self._programs["load"]), "ws", "127.0.0.1", self._port]
        command += [str(ACTIVE_CONNECTIONS), str(self.options.seconds), str(self._frame)]
        command += [str(self.options.rate)]
        return [
            json.loads(subprocess.check_output(command, text=True))["p99_us"]
            for _ in range(self.options.whiles)
        ]

    @contextlib.contextmanager
    def held(self) -> Iterator[Held]:
        """All connections open."""
        before = self._descriptors
        held = Held()
        command = [str(self._programs["connections"]), "hold", "127.0.0.1", self._port]
        try:
            for start in range(0, self.options.connections, MOST_HELD):
                count = min(MOST_HELD, self.options.connections - start)
                held.open([*command, str(count), str(self._frame)])
            yield held
        finally:
            held.close()
            self._until_closed(before)

    @property
    def _descriptors(self) -> int:
        return sum(server.descriptors for server in self.servers)

    def _until_closed(self, before: int) -> None:
        """Wait until as few descriptors are open as before the clients came."""
        deadline = time.monotonic() + CLOSED_S
        while self._descriptors > before + FEW_DESCRIPTORS:
            if time.monotonic() > deadline:
                sys.exit(f"connections were not closed within {CLOSED_S} s of their clients' end")
            time.sleep(0.1)


class Held:
    """Processes that hold connections, or files."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def open(self, command: list[str]) -> None:
        """One more process; returns when what it holds is open."""
        pipe = subprocess.PIPE
        self._processes.append(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        )
        self._expect(self._processes[-1], "open")

    def ask_all(self) -> None:
        """Let each connection ask once; returns when all are answered."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("ask\n")
        for process in self._processes:
            self._expect(process, "answered")

    def close(self) -> None:
        """End them, and so what they hold."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()

    def _expect(self, process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        if process.stdout.readline().strip() != word:
            sys.exit(f"a process that holds many connections or files did not get them {word}")


@contextlib.contextmanager
def open_files(count: int) -> Iterator[None]:
    """So many descriptors of /dev/null."""
    most = descriptor_limit() - SPARE_DESCRIPTORS
    held = Held()
    try:
        for start in range(0, count, most):
            held.open([sys.executable, "-c", _HOLDER, str(min(most, count - start))])
        yield
    finally:
        held.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.connections", description=__doc__)
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--whiles", type=int, default=5, help="of the active client, in each half")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each")
    parser.add_argument("--rate", type=float, default=300.0, help="its requests a second")
    options = parser.parse_args()
    if descriptor_limit() < options.connections // 2 + 1024:
        sys.exit("too few descriptors for a worker: raise the hard limit (ulimit -Hn)")
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), options)
        with harness.stopping(*fleet.servers):
            figures = measure(fleet)
    return 0 if write("serving", "python -m bench.connections", figures) else 1


def measure(fleet: Fleet) -> list[Row]:
    """The rows, of several turns."""
    options = fleet.options
    alone: list[float] = []
    beside_files: list[float] = []
    beside: list[float] = []
    opening: list[float] = []
    answering: list[float] = []
    memory_each = 0.0
    fleet.active()
    for turn in range(options.turns):
        before = fleet.memory
        alone += fleet.active()
        with open_files(options.connections * DESCRIPTORS_EACH):
            beside_files += fleet.active()
        started = time.monotonic()
        with fleet.held() as held:
            opening.append(time.monotonic() - started)
            held.ask_all()
            answering.append(time.monotonic() - started - opening[-1])
            if turn == 0:  # later ones find memory that the first one left
                memory_each = (fleet.memory - before) / options.connections
            beside += fleet.active()
    name = f"{options.connections:,} connections"
    p99_alone, p99_files, p99_beside = map(statistics.median, (alone, beside_files, beside))
    return [
        Row(name=f"{name}: memory of each", value=memory_each / 1024, unit="KiB", at_most=45.0),
        Row(
            name=f"{name}: another client's p99 by that without them",
            value=p99_beside / p99_alone,
            unit="",
            at_most=1.1,
        ),
        Row(
            name=f"{name}: another client's p99 by that beside as many open files",
            value=p99_beside / p99_files,
            unit="",
        ),
        Row(name=f"{name}: its p99 without them", value=p99_alone / 1e3, unit="ms"),
        Row(name=f"{name}: opened in", value=statistics.median(opening), unit="s"),
        Row(name=f"{name}: all answered in", value=statistics.median(answering), unit="s"),
    ]


if __name__ == "__main__":
    sys.exit(main())
