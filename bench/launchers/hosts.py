"""The two hosts, and runs of the training on them: started, watched, disturbed, compared."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import lab
from gpu_service import bundle

CHECKOUT = Path(__file__).resolve().parents[2]
NAMES = ("train1", "train2")
SCRIPTS = "/opt/gpu-service/training"
TASKS = "/opt/bench-tasks"
RUNS = "/var/lib/gpu-service/bench"
USER = "gpu-service"
WAIT_S = 900.0

_TASK = "bench/training/tiny.py"

# What the last run was started with on the first host, without what was its own.
_PROLOGUE = f"""
set -eu
set -a; . {TASKS}/training.env; set +a
unset GPU_TRAINING_VERSION RDZV_ID MASTER_ADDR MASTER_PORT NNODES NPROC_PER_NODE
export PYTHONPATH=$PYTHONPATH:{TASKS} OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCHRUN_SCRIPT={SCRIPTS}/torchrun_script.sh MAX_RESTARTS=3
cd "$1"; export HOME=$1; shift
"""


def wait_for(condition: Callable[[], bool], what: str) -> float:
    """Seconds until the condition holds; TimeoutError when it does not for a quarter of an hour."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > WAIT_S:
            raise TimeoutError(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - started


class Hosts:
    """train1 and train2 of a lab of this program's own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.addresses: dict[str, str] = {}

    def up(self, *, bare: bool) -> None:
        if bare:
            self.lab("down")
        self.lab("up", "--with", "slurm", *NAMES)
        found = lab.inventory(self._name)
        self.addresses = {host: found[host]["address"] for host in NAMES}
        self._config = found[NAMES[0]]["ssh_config_file"]

    def lab(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "lab", "--name", self._name, *arguments]
        subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)

    def ssh(self, host: str, script: str, *arguments: str) -> list[str]:
        """The command that runs a script on a host as root."""
        words = shlex.join(["bash", "-c", script, "script", *arguments])
        return ["ssh", "-F", self._config, host, "--", words]

    def on(self, host: str, script: str, *arguments: str, given: bytes = b"") -> bytes:
        """What a script on a host prints. RuntimeError where it fails."""
        result = subprocess.run(
            self.ssh(host, script, *arguments), input=given, capture_output=True, timeout=WAIT_S
        )
        if result.returncode:
            raise RuntimeError(f"{host}: {script}\n{(result.stdout + result.stderr).decode()}")
        return result.stdout

    def train(self, models: Path, **data: object) -> float:
        """Seconds that `pyinfra inventory.py train.py` takes with these settings."""
        settings = {"train_models": str(models), "train_threads": 1, **data}
        words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
        started = time.monotonic()
        result = subprocess.run(
            [
                *(str(Path(sys.executable).with_name("pyinfra")), "-y", "inventory.py", "train.py"),
                *(f"--data={key}={value}" for key, value in words.items()),
            ],
            cwd=CHECKOUT,
            env={**os.environ, "GATEWAY_LAB": self._name, "PYINFRA_PROGRESS": "off"},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
        return time.monotonic() - started

    def prepare(self) -> None:
        """What the runs by hand need beside it: Slurm, a task of their own, each other's names."""
        with tempfile.TemporaryDirectory() as name:
            self.train(Path(name), slurm=True, train_options={"epochs": 1, "batch_size": 1000})
        environment = self.on(NAMES[0], "cat /etc/gpu-service/training.env")
        task = (CHECKOUT / _TASK).read_bytes()
        known = "".join(f"{address} {host}\n" for host, address in self.addresses.items())
        for host in NAMES:
            self.on(host, 'install -D /dev/stdin "$1"', f"{TASKS}/training.env", given=environment)
            self.on(host, 'install -D /dev/stdin "$1"', f"{TASKS}/{_TASK}", given=task)
            self.on(host, 'grep -qF "$1" /etc/hosts || printf %s "$1" >>/etc/hosts', known)
            self.on(host, f"rm -rf {RUNS}")


@dataclass
class Run:
    """One run of the training, in a folder of its own on each host."""

    hosts: Hosts
    name: str
    epochs: int
    started: float = field(default_factory=time.monotonic)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _logs: dict[str, IO[bytes]] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{RUNS}/{self.name}"

    @property
    def options(self) -> str:
        """Of the training, for a shell."""
        options = {
            "task": "bench.training.tiny:long",
            "version": "v",
            "epochs": self.epochs,
            "batch-size": 40,
            "uneven": "keep",
            "ema": 0.99,
            "output": f"{self.folder}/models",
            "snapshots": f"{self.folder}/snapshots",
            "snapshot-steps": 10,
        }
        return shlex.join([*(f"--{k}={v}" for k, v in options.items()), "--deterministic"])

    def start(self, command: str, *on: str) -> None:
        """Start a command, which may hold `{options}`, as the service's user on these hosts."""
        for host in NAMES:
            self.hosts.on(host, 'install -d -o "$2" -g "$2" "$1"', self.folder, USER)
        script = _PROLOGUE + "exec " + command.replace("{options}", self.options)
        as_user = 'folder=$1; exec runuser -u "$2" -- bash -c "$3" script "$folder"'
        for host in on:
            log = self._logs[host] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as this object
            self.processes[host] = subprocess.Popen(
                self.hosts.ssh(host, as_user, self.folder, USER, script),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def said(self) -> str:
        """All that its processes printed so far."""
        texts = []
        for log in self._logs.values():
            texts.append(os.pread(log.fileno(), 1 << 24, 0).decode(errors="replace"))
        return "".join(texts)

    def wait_until_in(self, epoch: int) -> None:
        """Wait until so many epochs are done. RuntimeError when it ends before."""
        mark = f"epoch {epoch:3}/{self.epochs} "

        def reached() -> bool:
            if all(process.poll() is not None for process in self.processes.values()):
                raise RuntimeError(f"{self.name} ended early:\n{self.said()}")
            return mark in self.said()

        wait_for(reached, f"{self.name}: {mark}")

    def end(self) -> float:
        """Wait for its processes; seconds since its start. RuntimeError where one failed."""
        for host, process in self.processes.items():
            if process.wait(WAIT_S):
                raise RuntimeError(f"{self.name} failed on {host}:\n{self.said()}")
        return time.monotonic() - self.started

    def weights(self) -> str:
        """SHA-256 of the weights in its bundle, of which there has to be one."""
        path = f"{self.folder}/models/tiny/v/{bundle.WEIGHTS}"
        found = [self.hosts.on(host, 'cat "$1" 2>/dev/null || true', path) for host in NAMES]
        (content,) = filter(None, found)
        return hashlib.sha256(content).hexdigest()

    def curve(self) -> list[Any]:
        """A row per epoch, as its bundle tells."""
        path = f"{self.folder}/models/tiny/v/{bundle.MANIFEST}"
        found = [self.hosts.on(host, 'cat "$1" 2>/dev/null || true', path) for host in NAMES]
        (content,) = filter(None, found)
        rows: list[Any] = json.loads(content)["training"]["curve"]
        return rows


@contextmanager
def running(hosts: Hosts, name: str, epochs: int) -> Iterator[Run]:
    """A run; what is left of it at the end is ended."""
    run = Run(hosts, name, epochs)
    try:
        yield run
    finally:
        for process in run.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
