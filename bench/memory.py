"""Whether a worker's memory stays as it is: `python -m bench.memory`. Needs gcc and
Python's headers.

Two workers, one with the example model and one with a model that computes nothing, each answer
1,000,000 requests and see 50,000 clients come and go, in rounds. What is resident after the last
round is compared with what is after a warm-up of the same kind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import harness
from bench.harness import Server
from bench.results import Row, write
from bench.serving.servers import VALUES
from gpu_service import bundle

CONNECTIONS = 64
ROUNDS = 10


class Bench:
    """The load clients."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self._options = options
        self._programs = {name: harness.built(name, folder) for name in ("load", "connections")}

    def flatness(self, name: str, server: Server) -> list[Row]:
        """Rows of one worker; its message is in the file `name`."""
        self._round(name, server)
        before = server.rss_bytes
        answered = sum(self._round(name, server) for _ in range(ROUNDS))
        after = server.rss_bytes
        growth = (after - before) / before * 100
        about = f"memory, {name} model"
        return [
            Row(name=f"{about}: growth", value=growth, unit="%", at_most=2.0, counted=True),
            Row(name=f"{about}: resident at the end", value=after / 2**20, unit="MiB"),
            Row(name=f"{about}: requests answered", value=answered, unit=""),
            Row(name=f"{about}: connects and closes", value=self._options.connects, unit=""),
        ]

    def _round(self, name: str, server: Server) -> int:
        """A part of the requests and connects; returns how many requests were answered."""
        answered = 0
        while answered < self._options.requests / ROUNDS:
            answered += self._load(name, server)
        count = str(self._options.connects // ROUNDS)
        command = [str(self._programs["connections"]), "churn", "127.0.0.1", str(server.port)]
        subprocess.run(
            [*command, count, str(self.folder / name)], check=True, stdout=subprocess.DEVNULL
        )
        return answered

    def _load(self, name: str, server: Server) -> int:
        command = [str(self._programs["load"]), "ws", "127.0.0.1", str(server.port)]
        result = subprocess.run(
            [*command, str(CONNECTIONS), "1", str(self.folder / name)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        requests: int = json.loads(result.stdout)["requests"]
        return requests


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--connects", type=int, default=50_000)
    options = parser.parse_args()
    path = harness.model()
    spec = bundle.read_manifest(path).inputs[0]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        harness.write_frame(bench.folder / "identity", "x", (1, VALUES))
        harness.write_frame(bench.folder / "example", spec.name, (1, *spec.shape))
        identity, example = harness.identity(), harness.serve(path)
        with harness.stopping(identity, example):
            figures = bench.flatness("identity", identity) + bench.flatness("example", example)
    return 0 if write("serving", "python -m bench.memory", figures) else 1


if __name__ == "__main__":
    sys.exit(main())
