"""What the service costs beside its model: `python -m bench.serving`. Needs gcc and picows.

The raw forward, the service, the same with a model that computes nothing, and picows' echo server
are measured in turns, several times, on one machine; ratios are of medians of one run. The load
client is built from `load.c`. `--against CHECKOUT` measures another version of the service in
the same turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from bench.results import Row, write
from bench.serving.servers import VALUES
from gpu_service import bundle
from gpu_service.protocol import Request, encode_request

CHECKOUT = Path(__file__).resolve().parents[2]
CONNECTIONS = 64
START_TIMEOUT_S = 60.0

# One torch thread everywhere, and no pool of another library beside it.
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Figures = dict[str, list[float]]


class Server:
    """A server process, on a port that was free."""

    def __init__(self, *arguments: str, checkout: Path, cores: set[int], port: int) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=checkout,
            env=ENVIRON,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.05)
        sys.exit(f"it did not start: {self.process.args!r}")

    @property
    def cpu_s(self) -> float:
        """CPU time of all its threads so far, from /proc."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Bench:
    """The servers, the load client and the figures of all turns."""

    def __init__(self, *, folder: Path, path: Path, seconds: float) -> None:
        self.folder = folder
        self.path = path
        self.seconds = seconds
        self.figures: Figures = defaultdict(list)
        self.servers: dict[str, Server] = {}
        self.cores = sorted(os.sched_getaffinity(0))
        self.load_program = folder / "load"
        source = Path(__file__).with_name("load.c")
        subprocess.run(["gcc", "-O2", "-o", str(self.load_program), str(source)], check=True)
        spec = bundle.read_manifest(path).inputs[0]
        self._frame("model", spec.name, (1, *spec.shape))
        self._frame("identity", "x", (1, VALUES))

    def _frame(self, name: str, tensor: str, shape: tuple[int, ...]) -> None:
        values = numpy.random.default_rng(0).random(shape, numpy.float32)
        request = Request(inputs={tensor: values}, id="1")
        (self.folder / name).write_bytes(encode_request(request))

    def start(self, name: str, *arguments: str, checkout: Path = CHECKOUT, on_one: bool) -> None:
        cores = {self.cores[0]} if on_one else set(self.cores)
        port = free_port()
        filled = [argument.format(port=port) for argument in arguments]
        self.servers[name] = Server(*filled, checkout=checkout, cores=cores, port=port)

    def raw(self, name: str, *, batch: int) -> None:
        """Samples a second of the model alone, and microseconds of one forward."""
        command = [sys.executable, "-m", "bench.serving.raw", str(self.path), str(batch)]
        result = subprocess.run(
            ["taskset", "-c", str(self.cores[0]), *command, str(self.seconds)],
            cwd=CHECKOUT,
            env=ENVIRON,
            check=True,
            capture_output=True,
            text=True,
        )
        rate, duration_s = map(float, result.stdout.split())
        self.figures[f"{name} rate"].append(rate)
        self.figures[f"{name} us"].append(duration_s * 1e6)

    def load(self, name: str, *, server: str, frame: str, connections: int) -> None:
        """Load on one server, from the last core alone."""
        at = self.servers[server]
        before_s = at.cpu_s
        frame_file = str(self.folder / frame)
        arguments = ["127.0.0.1", str(at.port), str(connections), str(self.seconds), frame_file]
        result = subprocess.run(
            ["taskset", "-c", str(self.cores[-1]), str(self.load_program), *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        got: dict[str, Any] = json.loads(result.stdout)
        self.figures[f"{name} rate"].append(got["requests"] / got["seconds"])
        self.figures[f"{name} cpu us"].append((at.cpu_s - before_s) / got["requests"] * 1e6)
        self.figures[f"{name} client us"].append(got["cpu_s"] / got["requests"] * 1e6)
        self.figures[f"{name} p50 us"].append(got["p50_us"])
        self.figures[f"{name} p99 us"].append(got["p99_us"])

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()


@contextlib.contextmanager
def opened(path: Path, seconds: float) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder=Path(folder), path=path, seconds=seconds)
        try:
            yield bench
        finally:
            bench.stop()


def one_turn(bench: Bench, versions: dict[str, Path]) -> None:
    bench.raw("raw", batch=CONNECTIONS)
    for name in versions:
        bench.load(f"direct{name}", server=f"model{name}", frame="model", connections=CONNECTIONS)
        bench.load(
            f"identity{name}", server=f"identity{name}", frame="identity", connections=CONNECTIONS
        )
        bench.load(f"idle{name}", server=f"model{name}", frame="model", connections=1)
    bench.load("echo", server="echo", frame="identity", connections=CONNECTIONS)
    bench.raw("single", batch=1)


def rows(bench: Bench, name: str = "") -> list[Row]:
    median = bench.median
    direct, identity, idle = f"direct{name}", f"identity{name}", f"idle{name}"
    return [
        Row(
            name=f"direct, share of the raw forward{name}",
            value=median(f"{direct} rate") / median("raw rate"),
            unit="",
            at_least=0.9,
        ),
        Row(name=f"direct{name}", value=median(f"{direct} rate"), unit="1/s"),
        Row(name=f"direct, p50{name}", value=median(f"{direct} p50 us") / 1e3, unit="ms"),
        Row(
            name=f"direct, p99 by p50{name}",
            value=median(f"{direct} p99 us") / median(f"{direct} p50 us"),
            unit="",
            at_most=1.5,
        ),
        Row(
            name=f"identity, share of the echo server{name}",
            value=median(f"{identity} rate") / median("echo rate"),
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
            name=f"one idle client, added at p50{name}",
            value=median(f"{idle} p50 us") - median("single us"),
            unit="µs",
            at_most=150.0,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another version")
    options = parser.parse_args()
    models = CHECKOUT / ("models/digits" if (CHECKOUT / "models/digits").is_dir() else "trained")
    path = bundle.find(models if models.name == "digits" else models / "tiny")
    versions = {"": CHECKOUT}
    if options.against:
        versions[" (other)"] = options.against.resolve()
    with opened(path, options.seconds) as bench:
        for name, checkout in versions.items():
            serve = ["gpu_service", "serve", "--bundle", str(path), "--threads", "1"]
            bench.start(
                f"model{name}",
                *[*serve, "--device", "cpu", "--port", "{port}"],
                checkout=checkout,
                on_one=False,
            )
            identity = ["bench.serving.servers", "identity", "{port}"]
            bench.start(f"identity{name}", *identity, checkout=checkout, on_one=True)
        bench.start("echo", "bench.serving.servers", "echo", "{port}", on_one=True)
        for _ in range(options.turns):
            one_turn(bench, versions)
        figures = [row for name in versions for row in rows(bench, name)]
        figures += [
            Row(name="raw forward, batches of 64", value=bench.median("raw rate"), unit="1/s"),
            Row(name="raw forward, one sample", value=bench.median("single us"), unit="µs"),
            Row(name="echo server (picows)", value=bench.median("echo rate"), unit="1/s"),
            Row(name="load client, CPU a request", value=bench.median("echo client us"), unit="µs"),
        ]
    return 0 if write("serving", "python -m bench.serving", figures) else 1


if __name__ == "__main__":
    sys.exit(main())
