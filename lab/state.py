"""What a lab is and how its hosts fare, as kept on disk; and the inventory made from it.

Pure but for reading the small files of `lab.paths` and /proc. Writers: see there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final, Self, TypedDict

from lab import names
from lab.errors import LabError, LabNotUp
from lab.paths import HostPaths, LabPaths, read_json
from lab.process import Process

FORMAT: Final = 1


class LabPhase(enum.Enum):
    """STARTING: a first `up` is at work, or was killed; what is there is then swept away by the
    next `up`. UP: the lab came up once, and further commands build on it."""

    STARTING = "starting"
    UP = "up"


class HostPhase(enum.Enum):
    """OFF --start--> BOOTING --ready--> RUNNING --reboot--> BOOTING; any --end--> OFF."""

    OFF = "off"
    BOOTING = "booting"
    RUNNING = "running"


_ALLOWED: Final = {
    HostPhase.OFF: {HostPhase.BOOTING},
    HostPhase.BOOTING: {HostPhase.RUNNING, HostPhase.BOOTING, HostPhase.OFF},
    HostPhase.RUNNING: {HostPhase.BOOTING, HostPhase.OFF},
}


@dataclass(frozen=True, kw_only=True)
class LabState:
    """One lab. `number`: the K of 127.77.K.x. `run_id`: new for each fresh start; a supervisor or
    relay that a killed `up` left on its way sees that it belongs to another run and ends."""

    name: str
    number: int
    run_id: str
    phase: LabPhase
    base: str
    gateway_port: int
    hosts: tuple[names.HostSpec, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "name": self.name,
            "number": self.number,
            "run_id": self.run_id,
            "phase": self.phase.value,
            "base": self.base,
            "gateway_port": self.gateway_port,
            "hosts": [
                {"name": host.name, "octet": host.octet, "layers": list(host.layers)}
                for host in self.hosts
            ],
        }

    @classmethod
    def read(cls, paths: LabPaths) -> Self | None:
        """None when the lab doesn't exist."""
        found = read_json(paths.state)
        if found is None:
            return None
        if found.get("format") != FORMAT:
            raise LabError(
                f"{paths.state} was written by another version of the lab; run: python -m lab down"
            )
        return cls(
            name=found["name"],
            number=found["number"],
            run_id=found["run_id"],
            phase=LabPhase(found["phase"]),
            base=found["base"],
            gateway_port=found["gateway_port"],
            hosts=tuple(
                names.HostSpec(**{**host, "layers": tuple(host.get("layers", ()))})
                for host in found["hosts"]
            ),
        )

    def host(self, name: str) -> names.HostSpec:
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise LabError(f"the lab {self.name!r} has no host {name!r}; it has {known}")


@dataclass(frozen=True, kw_only=True)
class HostState:
    """One host, as its supervisor last wrote it. `boots` counts from 1; `leader_pid` is the host's
    PID 1 as the machine sees it, known while RUNNING."""

    supervisor: Process
    phase: HostPhase
    boots: int
    leader_pid: int | None

    def to_json(self) -> dict[str, object]:
        return {
            "supervisor": process_to_json(self.supervisor),
            "phase": self.phase.value,
            "boots": self.boots,
            "leader_pid": self.leader_pid,
        }

    @classmethod
    def read(cls, paths: HostPaths) -> Self | None:
        """None when the host was never started. A supervisor that is gone left an OFF host."""
        found = read_json(paths.state)
        if found is None:
            return None
        supervisor = Process(**found["supervisor"])
        return cls(
            supervisor=supervisor,
            phase=HostPhase(found["phase"]) if supervisor.alive() else HostPhase.OFF,
            boots=found["boots"],
            leader_pid=found["leader_pid"],
        )

    def moved(self, phase: HostPhase, *, leader_pid: int | None = None) -> HostState:
        """The state after a step; raises ValueError for a step that can't happen."""
        if phase not in _ALLOWED[self.phase]:
            raise ValueError(f"a host can't go from {self.phase.value} to {phase.value}")
        return HostState(
            supervisor=self.supervisor,
            phase=phase,
            boots=self.boots + (phase is HostPhase.BOOTING),
            leader_pid=leader_pid,
        )


def process_to_json(process: Process) -> dict[str, object]:
    return {
        "pid": process.pid,
        "start_ticks": process.start_ticks,
        "boot_id": process.boot_id,
    }


def relay_process(paths: LabPaths) -> Process | None:
    """The lab's relay, if it runs."""
    found = read_json(paths.relay)
    if found is None:
        return None
    process = Process(**found["process"])
    return process if process.alive() else None


def relayed(paths: LabPaths) -> list[str]:
    """What the relay listens on, each as "ADDRESS:PORT"; empty when it doesn't run."""
    found: dict[str, Any] = read_json(paths.relay) or {}
    return list(found.get("listening", ())) if relay_process(paths) else []


class InventoryHost(TypedDict):
    """How to reach one host. The ssh_* keys are data keys of pyinfra's SSH connector."""

    name: str
    address: str
    ssh_hostname: str
    ssh_port: int
    ssh_user: str
    ssh_key: str
    ssh_known_hosts_file: str
    ssh_config_file: str
    ssh_strict_host_key_checking: str


def inventory(name: str = names.DEFAULT_LAB) -> dict[str, InventoryHost]:
    """The hosts of a running lab by name, in the order of their addresses.

    `address` is what the hosts use among each other; `ssh_hostname` and `ssh_port` lead there from
    a plain shell. Reads two small files and asks /proc once; nothing is started.

    Raises LabNotUp where the lab doesn't run.
    """
    paths = LabPaths.of(names.check_lab_name(name))
    state = LabState.read(paths)
    if state is None or state.phase is not LabPhase.UP or relay_process(paths) is None:
        raise LabNotUp(name)
    return {
        host.name: InventoryHost(
            name=host.name,
            address=host.address,
            ssh_hostname=host.loopback(number=state.number),
            ssh_port=names.SSH_PORT,
            ssh_user="root",
            ssh_key=str(paths.ssh_key),
            ssh_known_hosts_file=str(paths.known_hosts),
            ssh_config_file=str(paths.ssh_config),
            ssh_strict_host_key_checking="yes",
        )
        for host in sorted(state.hosts, key=lambda host: host.octet)
    }
