"""Disposable hosts that are deployed once a session, and the tools to look at what happened.

The lab is this process's own (`deploy`, `deploy0`, `deploy1`, or what GATEWAY_TEST_LAB names), so
that neither a lab of `make deploy` nor the other process of `make test` is disturbed. The
wheelhouse, the compiled service and the base image are cached; results never are.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lab
from lab import requirements
from lab.state import InventoryHost

CHECKOUT = Path(__file__).resolve().parents[2]
LAB = os.environ.get("GATEWAY_TEST_LAB") or "deploy" + (
    os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
)
BIN = Path(sys.executable).parent

# Everything of a host that a deploy could change: files with mode, owner and (in /etc) digest;
# packages, users, units, the firewall. Left out is what package manager and systemd keep for
# themselves, what ldconfig does, copies that useradd makes, and firewalld's own of a zone that was
# ever changed.
_LISTING = """
cd /
find etc opt usr/lib/systemd usr/lib64 usr/libexec usr/local usr/sbin usr/share/nginx var/lib \
    var/cache var/log/munge var/log/nginx var/log/slurm var/spool/slurm var/www \
    ! -path 'var/lib/dnf*' ! -path 'var/lib/rpm/*' ! -path 'var/cache/ldconfig/*' \
    ! -path 'var/cache/dnf*' ! -path 'var/lib/systemd*' ! -path 'var/lib/private*' \
    ! -path 'var/cache/private*' ! -path 'etc/*-' ! -path etc/.pwd.lock \
    ! -path 'var/lib/logrotate*' ! -path 'etc/firewalld/zones/*' \\
    -printf 'file %y %m %u %g %p %l\n' 2>/dev/null
find etc -type f ! -path 'etc/*-' ! -path etc/.pwd.lock ! -path etc/ld.so.cache \\
    ! -path 'etc/firewalld/zones/*' -exec sha256sum {} +
rpm -qa | sed 's/^/package /'
getent passwd
getent group
systemctl list-unit-files --no-legend --plain | grep -v transient
firewall-cmd --list-all | sed 's/^/firewall, now: /'
firewall-cmd --permanent --list-all | sed 's/^/firewall: /'
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of these need hosts. They run in file order: each leaves the hosts deployed."""
    problems = requirements.unmet()
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.lab)
        if problems:
            item.add_marker(pytest.mark.skip(reason=f"no lab here: {'; '.join(problems)}"))


@dataclass(frozen=True)
class Run:
    """What one run of pyinfra came to."""

    returncode: int
    output: str
    changed: dict[str, list[str]]  # host -> operations that changed it, or would with --dry


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The lab's hosts and the command that deploys to them."""

    hosts: dict[str, InventoryHost]
    gateway_url: str
    model: Path
    inventory: str = "inventory.py"

    def command(self, *arguments: str, deploy: str = "deploy.py", **data: object) -> list[str]:
        settings = {"model": str(self.model), **data}
        pairs = [f"--data={key}={as_argument(value)}" for key, value in settings.items()]
        return [str(BIN / "pyinfra"), *arguments, self.inventory, deploy, *pairs]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GATEWAY_LAB": LAB, "PYINFRA_PROGRESS": "off"}

    def run(
        self, *arguments: str, deploy: str = "deploy.py", timeout_s: float = 300, **data: object
    ) -> Run:
        """Deploy; settings by keyword. `changed` comes from pyinfra's own JSON."""
        result = subprocess.run(
            self.command("-y", "--json", *arguments, deploy=deploy, **data),
            cwd=CHECKOUT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Run(result.returncode, result.stdout + result.stderr, _changes(result.stdout))

    def on(self, host: str, *command: str, check: bool = True) -> str:
        """Output of a command on a host."""
        found = self.hosts[host]
        result = subprocess.run(
            ["ssh", "-F", found["ssh_config_file"], host, "--", shlex.join(command)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and result.returncode:
            raise AssertionError(f"{host}: {' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout

    def listing(self, host: str) -> frozenset[str]:
        """What of the host a deploy could change, a line each."""
        return frozenset(self.on(host, "bash", "-c", _LISTING).splitlines())


def as_argument(value: object) -> str:
    """A setting as `--data KEY=VALUE` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _changes(stdout: str) -> dict[str, list[str]]:
    try:
        report: dict[str, Any] = json.loads(stdout)
    except json.JSONDecodeError:
        return {}  # a run that failed prints no report
    dry = report["results"] is None
    operations = report["plan"] if dry else report["results"]["operations"]
    changed: dict[str, list[str]] = {}
    for operation in operations:
        for host in operation["hosts_with_change" if dry else "success"]:
            changed.setdefault(host, []).append(operation["name"])
    return changed


def lab_command(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "lab", "--name", LAB, *arguments],
        cwd=CHECKOUT,
        check=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def deployment(trained: Path) -> Iterator[Deployment]:
    """Two fresh hosts, not yet deployed."""
    for command in (["provision.wheelhouse", "build", "--if-missing"], ["provision.compiled"]):
        subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, check=True, timeout=900)
    lab_command("down")
    lab_command("up")
    try:
        hosts = lab.inventory(LAB)
        gateway = hosts["gw1"]["ssh_hostname"]
        yield Deployment(hosts=hosts, gateway_url=f"ws://{gateway}:8009", model=trained)
    finally:
        lab_command("down")
