"""Lab hosts with a deployment on them, for measurements of deploys.

A lab of its own (`bench`), which is deployed at the beginning and removed at the end; or the one
that GATEWAY_LAB names, which is used as it is, and stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lab
from bench import harness, results
from bench.harness import CHECKOUT
from bench.results import Row
from lab.cgroup import Cgroup
from lab.state import InventoryHost

_OWN = "bench"
_PORT = 8009

# What a deploy reads of a checkout, and what it only needs to find there.
_COPIED = ("provision", "templates", "files", "group_data", "gpu_service", "lab", "requirements")
_COPIED_FILES = ("deploy.py", "inventory.py", "rollback.py", "pyproject.toml")
_LINKED = ("models", ".wheelhouse", ".venv")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of pyinfra came to."""

    returncode: int
    output: str
    changed: frozenset[str]  # hosts that it changed, or would with --dry
    seconds: float


def shell() -> dict[str, str]:
    """The environment; modules are compiled once, as on an operator's machine."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The lab's hosts, and how they are deployed to: from this checkout, or from a copy of it."""

    lab: str
    found: Mapping[str, InventoryHost]
    model: Path = field(default_factory=harness.model)

    @property
    def url(self) -> str:
        """The first gateway, as the lab's own network knows it."""
        return f"ws://{self.found['gw1']['address']}:{_PORT}"

    def command(self, *arguments: str, deploy: str = "deploy.py", **data: Any) -> list[str]:
        pyinfra = str(Path(sys.executable).with_name("pyinfra"))
        settings = {"model": str(self.model), **data}
        pairs = [
            f"--data={key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in settings.items()
        ]
        return [pyinfra, *arguments, "inventory.py", deploy, *pairs]

    @property
    def environment(self) -> dict[str, str]:
        return {**shell(), "GATEWAY_LAB": self.lab, "PYINFRA_PROGRESS": "off"}

    def run(
        self, *arguments: str, checkout: Path = CHECKOUT, deploy: str = "deploy.py", **data: Any
    ) -> Outcome:
        """A deploy; settings by keyword."""
        started = time.perf_counter()
        # With -y, changes are not looked for before they are made.
        how = ["--json"] if "--dry" in arguments else ["-y", "--json"]
        result = subprocess.run(
            self.command(*how, *arguments, deploy=deploy, **data),
            cwd=checkout,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return Outcome(
            returncode=result.returncode,
            output=result.stdout + result.stderr,
            changed=_changed(result.stdout),
            seconds=time.perf_counter() - started,
        )

    def start(self, *, checkout: Path = CHECKOUT, **data: Any) -> subprocess.Popen[str]:
        """The same, under way, to be killed."""
        return subprocess.Popen(
            self.command("-y", **data),
            cwd=checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def on(self, host: str, script: str) -> str:
        """What a shell script says on a host."""
        config = self.found[host]["ssh_config_file"]
        command = ["ssh", "-F", config, host, "--", script]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @contextlib.contextmanager
    def traffic(self, **options: int) -> Iterator[dict[str, Any]]:
        """Clients on the hosts' network (bench/traffic.py); at the end, what they have seen."""
        seen: dict[str, Any] = {}
        command = [sys.executable, "-m", "lab", "--name", self.lab, "run", sys.executable]
        command += ["-m", "bench.traffic", self.url, "--model", str(self.model)]
        command += [f"--{name}={count}" for name, count in options.items()]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=CHECKOUT, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline().strip() != "open":
                sys.exit("the clients could not connect; is the lab deployed?")
            try:
                yield seen
            finally:
                process.stdin.close()
                seen.update(json.loads(process.stdout.read() or "{}"))


def count(name: str, value: float, **bar: float) -> Row:
    """A row of something counted; `bar`: at_most or at_least."""
    return Row(name=name, value=value, unit="", counted=True, **bar)


def _changed(stdout: str) -> frozenset[str]:
    try:
        report = json.loads(stdout)
    except json.JSONDecodeError:
        return frozenset()  # a run that failed prints no report
    dry = report["results"] is None
    operations = report["plan"] if dry else report["results"]["operations"]
    key = "hosts_with_change" if dry else "success"
    return frozenset(host for operation in operations for host in operation[key])


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[Hosts]:
    """Hosts of these names, deployed."""
    given = os.environ.get("GATEWAY_LAB")
    name = given or _OWN
    before_s = _cpu_s(name)
    _lab(name, "up", *names)
    try:
        found = _found(name, names)
        print(f"==> deploying to {', '.join(names)}", flush=True)
        first = found.run()
        if first.returncode:
            sys.exit(first.output)
        yield found
    finally:
        results.count_as_own(_cpu_s(name) - before_s)
        if not given:
            _lab(name, "down")


@contextlib.contextmanager
def fresh(*names: str) -> Iterator[Hosts]:
    """Hosts that nobody has deployed to yet, always of the lab `bench`."""
    _lab(_OWN, "down")
    _lab(_OWN, "up", *names)
    try:
        yield _found(_OWN, names)
    finally:
        results.count_as_own(_cpu_s(_OWN))
        _lab(_OWN, "down")


def _cpu_s(name: str) -> float:
    """CPU seconds of all processes of a lab, whoever started them; 0 before there is one."""
    for folder in Cgroup(name).directories:
        with contextlib.suppress(OSError):
            said = dict(map(str.split, (folder / "cpu.stat").read_text().splitlines()))
            return int(said["usage_usec"]) / 1e6
    return 0.0


def _found(name: str, names: Iterable[str]) -> Hosts:
    known = lab.inventory(name)
    return Hosts(lab=name, found={host: known[host] for host in names})


def _lab(name: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "lab", "--name", name, *arguments]
    subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)


def copied_checkout(folder: Path) -> Path:
    """A copy of what a deploy reads, to be edited."""
    for name in _COPIED:
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, folder / name, ignore=skipped)
    for name in _COPIED_FILES:
        shutil.copy2(CHECKOUT / name, folder / name)
    for name in _LINKED:
        (folder / name).symlink_to(CHECKOUT / name)
    return folder
