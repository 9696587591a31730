"""The service against other servers: `make bench-peers`, or `python -m bench.peers`.

Each peer serves the same traced forward on one torch thread, in batches of up to 64, over 64 HTTP
connections that stay open, with the same 3,136 bytes of input. The service takes fused kernels
where it finds them faster, so mosec is also measured with forwards that were fused for it. First
every peer is measured with some settings that decide its throughput, and its best one is kept; then
peers and service are measured in turns. All are started anew some times, since two processes of the
same server differ: five runs in two days gave 1.37 to 1.58 for mosec, each started once.
The environments are made on the first run, under `.bench/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
import torch

from bench import harness
from bench.harness import CACHE, CHECKOUT, ENVIRON, Server
from bench.results import Row, write
from bench.serving.__main__ import Bench, opened
from gpu_service import bundle, models

MAX_BATCH = 64

# Measurements of each setting, of which the best one counts.
_TRIES = 6

# Debian's own interpreter, which pytriton's Triton is built for.
_DEBIAN_PYTHON = "/usr/bin/python3.11"


class Peer:
    """One other server. `settings` are those to try; `start` takes one of them."""

    name: str
    title: str  # in the results
    program: str  # its environment, requirements and script
    python = sys.executable
    settings: Sequence[tuple[int, ...]]
    bar: float | None

    def __init__(self, *, bench: Bench, trace: Path) -> None:
        self.bench = bench
        self.trace = trace
        self.environment = CACHE / self.program

    def described(self, setting: tuple[int, ...]) -> str:
        """A setting in words."""
        raise NotImplementedError

    def start(self, setting: tuple[int, ...]) -> Server:
        """The running server; its requests are in the file `name`."""
        raise NotImplementedError

    def install(self) -> None:
        """Make its environment, unless there is one from the same requirements."""
        wanted = (CHECKOUT / "requirements" / f"bench-{self.program}.txt").read_text()
        made_from = self.environment / "made-from.txt"
        if made_from.exists() and made_from.read_text() == wanted:
            return
        if not Path(self.python).exists():
            sys.exit(f"{self.program} needs {self.python}, which is not here")
        print(f"==> installing {self.title} into .bench/{self.program}", flush=True)
        made = [self.python, "-m", "venv", "--clear", str(self.environment)]
        subprocess.run(made, check=True)
        pip = [self._python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        requirements = str(CHECKOUT / "requirements" / f"bench-{self.program}.txt")
        subprocess.run([*pip, "--requirement", requirements], check=True)
        made_from.write_text(wanted)

    def _python(self) -> str:
        return str(self.environment / "bin" / "python")

    def _request(self, path: str, body: bytes, **headers: str | int) -> None:
        """The HTTP request that all its clients send."""
        head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head += [f"Content-Length: {len(body)}", "", ""]
        (self.bench.folder / self.name).write_bytes("\r\n".join(head).encode() + body)

    def _server(
        self,
        arguments: Sequence[str | int],
        *,
        port: int,
        ready: str,
        variables: dict[str, str],
    ) -> Server:
        script = str(Path(__file__).with_name(f"{self.program}_server.py"))
        command = [self._python(), script, str(self.trace), *map(str, arguments)]
        return Server(
            command,
            port=port,
            environ={**ENVIRON, **variables},
            is_ready=lambda: _is_ok(f"http://127.0.0.1:{port}{ready}"),
        )


class Mosec(Peer):
    """Rust in front, one Python process with the model behind a unix socket."""

    name, title, program, bar = "mosec", "mosec 0.9.8", "mosec", 1.4
    # Largest batch; milliseconds that a batch waits for more, of which 1 is the least.
    settings = ((64, 1), (64, 10), (32, 1))
    fused = False

    def described(self, setting: tuple[int, ...]) -> str:
        """As in mosec's documentation."""
        return f"max_batch_size={setting[0]}, max_wait_time={setting[1]} ms"

    def start(self, setting: tuple[int, ...]) -> Server:
        """Bodies are the tensors' bytes, in and out."""
        port = harness.free_port()
        self._request("/inference", _image().tobytes(), Content_Type="application/octet-stream")
        variables = {
            "MOSEC_ADDRESS": "127.0.0.1",
            "MOSEC_PORT": str(port),
            "MOSEC_LOG_LEVEL": "warning",
            "MOSEC_PATH": str(self.bench.folder / f"mosec-{port}"),
        }
        arguments = (*setting, int(self.fused))
        return self._server(arguments, port=port, ready="/", variables=variables)


class FusedMosec(Mosec):
    """The same with the kernels that the service finds faster, as its user could choose them."""

    name, title, bar = "mosec-fused", "mosec 0.9.8 with fused kernels", None
    fused = True


class PyTriton(Peer):
    """NVIDIA's Triton in front, one Python process with the model behind its Python backend."""

    name, title, program, bar = "pytriton", "pytriton 0.7.0", "pytriton", 3.5
    python = _DEBIAN_PYTHON
    # Microseconds that a batch waits for more; threads of its HTTP server.
    settings = ((0, 8), (1000, 8), (5000, 8), (1000, 2))

    def described(self, setting: tuple[int, ...]) -> str:
        """As in Triton's documentation."""
        delay, threads = setting
        return f"max_queue_delay_microseconds={delay}, http_thread_count={threads}"

    def start(self, setting: tuple[int, ...]) -> Server:
        """Bodies are the Open Inference Protocol with its binary extension, in and out."""
        port, grpc, metrics = (harness.free_port() for _ in range(3))
        image = _image()
        tensor = {
            "name": "image",
            "datatype": "FP32",
            "shape": image.shape,
            "parameters": {"binary_data_size": image.nbytes},
        }
        output = {"name": "logits", "parameters": {"binary_data": True}}
        header = json.dumps({"inputs": [tensor], "outputs": [output]}).encode()
        self._request(
            "/v2/models/digits/infer",
            header + image.tobytes(),
            Content_Type="application/octet-stream",
            Inference_Header_Content_Length=len(header),
        )
        return self._server(
            (MAX_BATCH, *setting, port, grpc, metrics),
            port=port,
            ready="/v2/models/digits/ready",
            variables={"PYTRITON_HOME": str(CACHE / "pytriton-home")},
        )


PEERS: dict[str, Callable[..., Peer]] = {
    "mosec": Mosec,
    "mosec-fused": FusedMosec,
    "pytriton": PyTriton,
}


def _image() -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]:
    return numpy.random.default_rng(0).random((1, 1, 28, 28), numpy.float32)


def _is_ok(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as response:  # noqa: S310
        return int(response.status) == 200
    return False


def write_trace(path: Path, file: Path) -> None:
    """The forward that the service runs, as a file that other environments load."""
    model = models.load_model(path)
    example = torch.rand(MAX_BATCH, *bundle.read_manifest(path).inputs[0].shape)
    with torch.no_grad():
        trace = torch.jit.trace(model, (example,))  # type: ignore[no-untyped-call]
        trace.save(str(file))


def load(bench: Bench, peer: Peer, name: str) -> None:
    """Add a measurement of the peer's running server as `name`."""
    bench.load(name, server=peer.name, file=peer.name, protocol="http")


def best_setting(bench: Bench, peer: Peer) -> tuple[int, ...]:
    """With what the peer answers most."""
    rates = {}
    for setting in peer.settings:
        bench.servers[peer.name] = server = peer.start(setting)
        load(bench, peer, "warm-up")
        name = f"{peer.name}: {peer.described(setting)}"
        for _ in range(_TRIES):
            load(bench, peer, name)
        rates[setting] = max(bench.figures[f"{name} rate"])
        print(f"{name:<84} {rates[setting]:>10.0f} 1/s", flush=True)
        server.stop()
    return max(rates, key=rates.__getitem__)


@contextlib.contextmanager
def started(bench: Bench, best: dict[Peer, tuple[int, ...]]) -> Iterator[None]:
    """The service and the peers, all of them new and warm."""
    bench.servers["model"] = harness.serve(bench.path)
    bench.load("warm-up", server="model", file="model")
    for peer, setting in best.items():
        bench.servers[peer.name] = peer.start(setting)
        load(bench, peer, "warm-up")
    names = ["model", *(peer.name for peer in best)]
    with harness.stopping(*(bench.servers[name] for name in names)):
        yield


def rows(bench: Bench, peer: Peer) -> list[Row]:
    """The peer's figures of all turns, beside those of the service."""
    name = peer.title
    rate = bench.median(f"{peer.name} rate")
    p50, p99 = f"{peer.name} p50 us", f"{peer.name} p99 us"
    return [
        Row(
            name=f"requests a second against {name}",
            value=bench.ratio("direct rate", f"{peer.name} rate"),
            unit="",
            at_least=peer.bar,
        ),
        Row(name=name, value=rate, unit="1/s"),
        Row(name=f"{name}, p50", value=bench.median(p50) / 1e3, unit="ms"),
        Row(name=f"{name}, p99 by p50", value=bench.ratio(p99, p50), unit=""),
        Row(
            name=f"{name}, load client's CPU a request",
            value=bench.median(f"{peer.name} client us"),
            unit="µs",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only this one")
    parser.add_argument("--starts", type=int, default=5, help="of each server")
    parser.add_argument("--turns", type=int, default=4, help="of each start")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    options = parser.parse_args()
    names = options.peer or list(PEERS)
    path = harness.model()
    with opened(path, options.seconds) as bench:
        trace = bench.folder / "trace.pt"
        write_trace(path, trace)
        peers = [PEERS[name](bench=bench, trace=trace) for name in names]
        for peer in peers:
            peer.install()
        best = {peer: best_setting(bench, peer) for peer in peers}
        for _ in range(options.starts):
            with started(bench, best):
                for _ in range(options.turns):
                    bench.load("direct", server="model", file="model")
                    for peer in peers:
                        load(bench, peer, peer.name)
        figures = [row for peer in peers for row in rows(bench, peer)]
        spread = bench.ratio("direct p99 us", "direct p50 us")
        figures += [
            Row(name="beside the peers: requests", value=bench.median("direct rate"), unit="1/s"),
            Row(name="beside the peers: p99 by p50", value=spread, unit="", at_most=1.5),
        ]
    for peer, setting in best.items():
        print(f"{peer.name}: best with {peer.described(setting)}")
    some = [] if options.peer is None else [f"--peer {name}" for name in names]
    return 0 if write("serving", " ".join(["python -m bench.peers", *some]), figures) else 1


if __name__ == "__main__":
    sys.exit(main())
