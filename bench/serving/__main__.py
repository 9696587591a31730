"""What the service costs beside its model: `python -m bench.serving`. Needs gcc, Python's
headers and picows.

The raw forward, the service, the same through nginx and with a model that computes nothing, and
picows' echo server are measured in turns, many times, on one machine. What is compared is measured
one after the other, for a moment: a virtual machine that shares its cores is slower for seconds at
a time. Ratios and differences are medians of those of each turn. The raw forward is the faster one
of two sizes of batch. The load client is built from `load.c`. The service is the compiled one, as
hosts have it, and beside it the same from its sources; `--against CHECKOUT` measures another
version in their place, in the same turns.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import harness
from bench.gateway import gateway
from bench.harness import CHECKOUT, Server
from bench.results import Row, write
from bench.serving.raw import Raw
from bench.serving.servers import VALUES
from gpu_service import bundle

CONNECTIONS = 64

# Of batches of the raw forward; the faster one counts.
_RAW_SIZES = (CONNECTIONS, CONNECTIONS // 2)

# What a worker sleeps, about, between two requests of one client that waits for each answer.
_PAUSE_S = 0.0005


class Bench:
    """The servers, the load client and the figures of all turns."""

    def __init__(self, *, folder: Path, path: Path, seconds: float) -> None:
        self.folder = folder
        self.path = path
        self.seconds = seconds
        self.figures: dict[str, list[float]] = defaultdict(list)
        self.servers: dict[str, Server] = {}
        self._alone: Raw | None = None  # the peers' benchmark does not ask it
        self.program = harness.built("load", folder)
        spec = bundle.read_manifest(path).inputs[0]
        harness.write_frame(folder / "model", spec.name, (1, *spec.shape))
        harness.write_frame(folder / "identity", "x", (1, VALUES))

    def raw(self, name: str, *, batch: int, pause_s: float = 0.0) -> None:
        """Samples a second of the model alone, and microseconds of one forward."""
        self._alone = self._alone or Raw(self.path)
        rate, duration_s = self._alone.measure(batch=batch, seconds=self.seconds, pause_s=pause_s)
        self.figures[f"{name} rate"].append(rate)
        self.figures[f"{name} us"].append(duration_s * 1e6)

    def load(
        self,
        name: str,
        *,
        server: str,
        file: str,
        connections: int = CONNECTIONS,
        protocol: str = "ws",
    ) -> None:
        """Load on one server, from the last core alone."""
        at = self.servers[server]
        before_s = at.cpu_s
        command = [str(self.program), protocol, "127.0.0.1", str(at.port), str(connections)]
        result = subprocess.run(
            harness.on_last_core([*command, str(self.seconds), str(self.folder / file)]),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        got: dict[str, Any] = json.loads(result.stdout)
        self.figures[f"{name} rate"].append(got["requests"] / got["seconds"])
        for what, now_s, then_s in zip(("cpu", "kernel"), at.cpu_s, before_s, strict=True):
            self.figures[f"{name} {what} us"].append((now_s - then_s) / got["requests"] * 1e6)
        self.figures[f"{name} client us"].append(got["cpu_s"] / got["requests"] * 1e6)
        self.figures[f"{name} p50 us"].append(got["p50_us"])
        self.figures[f"{name} p99 us"].append(got["p99_us"])

    def close(self) -> None:
        """End all that was started."""
        if self._alone is not None:
            self._alone.close()
        for server in reversed(self.servers.values()):
            server.stop()

    def median(self, name: str) -> float:
        """Of all turns."""
        return statistics.median(self.figures[name])

    def difference(self, name: str, other: str) -> float:
        """The median of what they differ by in each turn."""
        return statistics.median([one - another for one, another in self._pairs(name, other)])

    def ratio(self, name: str, other: str) -> float:
        """The median of their ratios in each turn."""
        return statistics.median([one / another for one, another in self._pairs(name, other)])

    def _pairs(self, name: str, other: str) -> Iterator[tuple[float, float]]:
        return zip(self.figures[name], self.figures[other], strict=True)


@contextlib.contextmanager
def opened(path: Path, seconds: float) -> Iterator[Bench]:
    """A Bench whose servers are stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder=Path(folder), path=path, seconds=seconds)
        try:
            yield bench
        finally:
            bench.close()


def start(bench: Bench, versions: dict[str, Path]) -> None:
    for name, checkout in versions.items():
        bench.servers[f"model{name}"] = harness.serve(bench.path, checkout=checkout)
        bench.servers[f"identity{name}"] = harness.identity(checkout=checkout)
        bench.servers[f"second{name}"] = harness.serve(bench.path, checkout=checkout)
        ports = [bench.servers[f"{each}{name}"].port for each in ("model", "second")]
        for count in (1, 2):
            prefix = bench.folder / f"nginx{count}-{len(bench.servers)}"
            bench.servers[f"nginx{count}{name}"] = gateway(prefix, ports[:count])
    port = harness.free_port()
    echo = [sys.executable, "-m", "bench.serving.servers", "echo", str(port)]
    bench.servers["echo"] = Server(echo, port=port, on_one=True)
    bench.servers["nginx echo"] = gateway(bench.folder / "nginx-echo", [port])


def one_turn(bench: Bench, versions: dict[str, Path]) -> None:
    for name in versions:
        for size in _RAW_SIZES:
            bench.raw(f"raw {size}{name}", batch=size)
        bench.load(f"direct{name}", server=f"model{name}", file="model")
        bench.load(f"through{name}", server=f"nginx1{name}", file="model")
        bench.load(f"through two{name}", server=f"nginx2{name}", file="model")
        bench.load(f"echo{name}", server="echo", file="identity")
        bench.load(f"identity{name}", server=f"identity{name}", file="identity")
        bench.raw(f"single{name}", batch=1)
        bench.load(f"idle through{name}", server=f"nginx1{name}", file="model", connections=1)
        bench.load(f"idle{name}", server=f"model{name}", file="model", connections=1)
    bench.load("echo idle", server="echo", file="identity", connections=1)
    bench.load("echo idle through", server="nginx echo", file="identity", connections=1)
    bench.raw("woken", batch=1, pause_s=_PAUSE_S)
    with last_core_busy():
        bench.raw("beside", batch=32)


@contextlib.contextmanager
def last_core_busy() -> Iterator[None]:
    """Something computes on the load client's core, and does nothing else."""
    process = subprocess.Popen(harness.on_last_core([sys.executable, "-c", "while True: pass"]))
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rows(bench: Bench, name: str = "") -> list[Row]:
    median = bench.median
    direct, through, identity = f"direct{name}", f"through{name}", f"identity{name}"
    raw = max((f"raw {size}{name} rate" for size in _RAW_SIZES), key=median)
    return [
        Row(
            name=f"direct, share of the raw forward{name}",
            value=bench.ratio(f"{direct} rate", raw),
            unit="",
            at_least=0.9,
        ),
        Row(
            name=f"through nginx, share of the raw forward{name}",
            value=bench.ratio(f"{through} rate", raw),
            unit="",
            at_least=0.85,
        ),
        Row(name=f"direct{name}", value=median(f"{direct} rate"), unit="1/s"),
        Row(name=f"through nginx{name}", value=median(f"{through} rate"), unit="1/s"),
        Row(
            name=f"through nginx, two workers{name}",
            value=median(f"through two{name} rate"),
            unit="1/s",
        ),
        Row(name=f"direct, p50{name}", value=median(f"{direct} p50 us") / 1e3, unit="ms"),
        Row(
            name=f"direct, p99 by p50{name}",
            value=bench.ratio(f"{direct} p99 us", f"{direct} p50 us"),
            unit="",
            at_most=1.5,
        ),
        Row(
            name=f"identity, share of the echo server{name}",
            value=bench.ratio(f"{identity} rate", f"echo{name} rate"),
            unit="",
            at_least=0.6,
        ),
        Row(name=f"identity{name}", value=median(f"{identity} rate"), unit="1/s"),
        Row(
            name=f"identity, server CPU a request{name}",
            value=median(f"{identity} cpu us"),
            unit="µs",
            at_most=15.0,
        ),
        Row(
            name=f"identity, of that the kernel's{name}",
            value=median(f"{identity} kernel us"),
            unit="µs",
        ),
        Row(
            name=f"one idle client through nginx, added at p50{name}",
            value=bench.difference(f"idle through{name} p50 us", f"single{name} us"),
            unit="µs",
            at_most=150.0,
        ),
        Row(
            name=f"one idle client, added at p50{name}",
            value=bench.difference(f"idle{name} p50 us", f"single{name} us"),
            unit="µs",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another version")
    options = parser.parse_args()
    versions = {"": harness.release()}
    if options.against:
        versions[" (other)"] = options.against.resolve()
    else:
        versions[" (not compiled)"] = CHECKOUT
    with opened(harness.model(), options.seconds) as bench:
        start(bench, versions)
        for _ in range(options.turns):
            one_turn(bench, versions)
        figures = rows(bench)
        figures += [
            dataclasses.replace(row, at_least=None, at_most=None)
            for name in versions
            if name
            for row in rows(bench, name)
        ]
        figures += [
            Row(name="raw forward, batches of 64", value=bench.median("raw 64 rate"), unit="1/s"),
            Row(name="raw forward, batches of 32", value=bench.median("raw 32 rate"), unit="1/s"),
            Row(
                name="raw forward, batches of 32, while another core computes",
                value=bench.median("beside rate"),
                unit="1/s",
            ),
            Row(name="raw forward, one sample", value=bench.median("single us"), unit="µs"),
            Row(
                name="raw forward, one sample, after a sleep of 0.5 ms",
                value=bench.median("woken us"),
                unit="µs",
            ),
            Row(name="echo server (picows)", value=bench.median("echo rate"), unit="1/s"),
            Row(
                name="echo server, CPU a request",
                value=bench.median("echo cpu us"),
                unit="µs",
            ),
            Row(
                name="echo server, of that the kernel's",
                value=bench.median("echo kernel us"),
                unit="µs",
            ),
            Row(
                name="echo server, one idle client",
                value=bench.median("echo idle p50 us"),
                unit="µs",
            ),
            Row(
                name="echo server through nginx, one idle client",
                value=bench.median("echo idle through p50 us"),
                unit="µs",
            ),
            Row(name="load client, CPU a request", value=bench.median("echo client us"), unit="µs"),
        ]
    return 0 if write("serving", "python -m bench.serving", figures) else 1


if __name__ == "__main__":
    sys.exit(main())
