"""One VM with SELinux enforcing for the session (`make test-selinux`): booted once, with nginx
deployed once, and set back to a snapshot before each test.

The VM is emulated and slow; snapshots are what makes this bearable. What stands for workers runs
in it on their ports (worker.py): whether nginx may connect is asked of the port alone.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import vm
from provision import rendering
from tests.deploy.conftest import CHECKOUT, Deployment

NAME = os.environ.get("GATEWAY_TEST_LAB", "selinuxtest")
PORTS = (9005, 9006)
# What the inventory reads settings from, beside `--data`: tests/hosts knows no other way.
SETTINGS = "GATEWAY_TEST_SETTINGS"
OTHER_PORT = 9007  # something listens there, too, and is no worker

UNIT = f"""\
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/worker.py {" ".join(map(str, (*PORTS, OTHER_PORT)))}

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Machine(Deployment):
    """The VM, and the command that deploys to it."""

    def command(self, *arguments: str, deploy: str = "deploy.py", **data: object) -> list[str]:
        return super().command("--limit", "gateways", *arguments, deploy=deploy, **data)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GATEWAY_LAB": NAME, "PYINFRA_PROGRESS": "off"}

    def on(self, host: str, *command: str, check: bool = True) -> str:
        # Building the policy anew takes a minute and more where the machine is busy.
        line = shlex.join(command)
        return vm.execute(vm.VmPaths.of(NAME), line, check=check, timeout_s=600).stdout

    def sh(self, text: str, *arguments: str, check: bool = True) -> str:
        """Output of a script in the VM, run by its bash."""
        return self.on(vm.HOST, "bash", "-c", text, "test", *arguments, check=check).strip()

    def put(self, path: str, content: bytes) -> None:
        """Write a file there; its label is the one that its place has in the policy."""
        self.sh('printf %s "$2" >"$1" && restorecon "$1"', path, content.decode())

    def handshake(self, probe: str = "8009") -> str:
        """Status line of the gateway's answer to a WebSocket handshake."""
        return self.sh(rendering.shell("handshake.sh") + 'handshake_status "$1"', probe)

    def nginx_domains(self) -> set[str]:
        """SELinux types that nginx's processes run as."""
        labels = self.sh("ps -C nginx -o label=").splitlines()
        return {label.split(":")[2] for label in labels}

    def nginx_users(self) -> set[str]:
        """Users of nginx's worker processes."""
        rows = self.sh("ps -C nginx -o user:32=,args=").splitlines()
        return {row.split()[0] for row in rows if "worker process" in row}

    def restore(self, tag: str) -> None:
        vm.restore(NAME, tag)

    def save(self, tag: str) -> None:
        vm.save(NAME, tag)

    def reboot(self) -> None:
        """Returns when nginx and the workers are up again."""
        vm.reboot(NAME)
        self.sh("systemctl is-system-running --wait || true")


@pytest.fixture(scope="session")
def fresh(trained: Path) -> Iterator[Machine]:
    """The VM as it first booted, and workers in it."""
    vm.down(NAME)
    vm.up(NAME, progress=print)
    try:
        machine = Machine(
            hosts={vm.HOST: vm.inventory(NAME)},
            gateway_url="",
            model=trained,
            inventory="tests/selinux/inventory.py",
        )
        machine.put("/usr/local/lib/worker.py", (CHECKOUT / "tests/selinux/worker.py").read_bytes())
        machine.put("/etc/systemd/system/worker.service", UNIT.encode())
        machine.sh("systemctl enable --now worker.service")
        yield machine
    finally:
        vm.down(NAME)


@pytest.fixture(scope="session")
def deployed(fresh: Machine) -> Machine:
    """The reference set-up, deployed once and saved as `deployed`: permissive, and it serves."""
    # rpm runs scriptlets in a domain that Debian's policy lacks, so none while it enforces.
    fresh.sh("setenforce 0")
    run = fresh.run(timeout_s=1800)
    assert run.returncode == 0, run.output
    fresh.save("deployed")
    return fresh


@pytest.fixture
def machine(deployed: Machine) -> Machine:
    """The reference set-up, as first deployed."""
    deployed.restore("deployed")
    return deployed
