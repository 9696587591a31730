"""What the deploy asks of a host. Each fact is one command, so one round trip.

Facts answer from the host's own truth (the running process, the file's bytes), never from a
note that an earlier run left, wherever such a truth exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from pyinfra.api import FactBase, QuoteString, StringCommand
from typing_extensions import override


def quoted(*words: str) -> StringCommand:
    """The words as one shell command, each quoted."""
    return StringCommand(*(QuoteString(word) for word in words))


def script(text: str, *arguments: str) -> StringCommand:
    """A fixed shell script with data as its positional parameters, never spliced into it."""
    return StringCommand(
        "sh", "-c", QuoteString(text), "gateway", *(QuoteString(argument) for argument in arguments)
    )


@dataclass(frozen=True)
class FileState:
    """A file as it is on the host."""

    mode: str
    user: str
    group: str
    sha256: str


class FileStates(FactBase[dict[str, FileState]]):
    """Mode, owner and SHA-256 of regular files; a path that is no file is absent."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'for p; do [ -f "$p" ] && [ ! -L "$p" ] || continue; '
            'stat -c "%a %U %G" "$p" && sha256sum <"$p" && printf "%s\\n" "$p"; done; true',
            *paths,
        )

    @staticmethod
    @override
    def default() -> dict[str, FileState]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, FileState]:
        states = {}
        for stat, digest, path in zip(output[0::3], output[1::3], output[2::3], strict=True):
            mode, user, group = stat.split()
            states[path] = FileState(mode=mode, user=user, group=group, sha256=digest.split()[0])
        return states


class FileText(FactBase[str | None]):
    """The text of a file, or None. For diffs only."""

    @override
    def command(self, path: str) -> StringCommand:
        return script('[ -f "$1" ] && cat "$1" || true', path)

    @override
    def process(self, output: list[str]) -> str:
        return "\n".join(output) + "\n"


class FolderStates(FactBase[dict[str, tuple[str, str, str]]]):
    """Mode, user and group of folders."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'for p; do [ -d "$p" ] && [ ! -L "$p" ] && stat -c "%a %U %G %n" "$p"; done; true',
            *paths,
        )

    @staticmethod
    @override
    def default() -> dict[str, tuple[str, str, str]]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, tuple[str, str, str]]:
        folders = {}
        for line in output:
            mode, user, group, path = line.split(" ", 3)
            folders[path] = (mode, user, group)
        return folders


class Paths(FactBase[frozenset[str]]):
    """Which of the paths exist (links as themselves), with their targets as `path -> target`."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'for p; do if [ -L "$p" ]; then printf "%s -> %s\\n" "$p" "$(readlink "$p")"; '
            'elif [ -e "$p" ]; then printf "%s\\n" "$p"; fi; done; true',
            *paths,
        )

    @staticmethod
    @override
    def default() -> frozenset[str]:
        return frozenset()

    @override
    def process(self, output: list[str]) -> frozenset[str]:
        return frozenset(output)


class SelinuxMode(StrEnum):
    """What `getenforce` says, in lower case; `absent` where there is no SELinux at all."""

    ENFORCING = "enforcing"
    PERMISSIVE = "permissive"
    DISABLED = "disabled"
    ABSENT = "absent"


@dataclass(frozen=True)
class SelinuxState:
    """Mode of the running system, and the one that /etc/selinux/config sets for the next boot."""

    running: SelinuxMode
    configured: SelinuxMode


class Selinux(FactBase[SelinuxState]):
    """SELinux mode, now and at the next boot.

    pyinfra's own `server.Selinux` tells enabled from disabled only.
    """

    @override
    def command(self) -> StringCommand:
        return script(
            "if command -v getenforce >/dev/null 2>&1; then getenforce; else echo absent; fi; "
            "sed -n 's/^SELINUX=//p' /etc/selinux/config 2>/dev/null | tail -n 1; true"
        )

    @staticmethod
    @override
    def default() -> SelinuxState:
        return SelinuxState(running=SelinuxMode.ABSENT, configured=SelinuxMode.ABSENT)

    @override
    def process(self, output: list[str]) -> SelinuxState:
        modes = [SelinuxMode(line.strip().lower()) for line in output if line.strip()]
        absent = SelinuxMode.ABSENT
        return SelinuxState(
            running=modes[0] if modes else absent,
            configured=modes[1] if len(modes) > 1 else absent,
        )


class FirewalldRunning(FactBase[bool]):
    """Whether firewalld filters on this host now."""

    @override
    def command(self) -> str:
        return "systemctl is-active --quiet firewalld && echo running || true"

    @staticmethod
    @override
    def default() -> bool:
        return False

    @override
    def process(self, output: list[str]) -> bool:
        return output == ["running"]


class FirewalldPorts(FactBase[dict[str, frozenset[str]]]):
    """Ports and rich rules of the default zone: `runtime` and `permanent`."""

    @override
    def command(self) -> StringCommand:
        return script(
            'for mode in "" --permanent; do firewall-cmd $mode --list-ports | tr " " "\\n"; '
            "firewall-cmd $mode --list-rich-rules; echo --; done"
        )

    @staticmethod
    @override
    def default() -> dict[str, frozenset[str]]:
        return {"runtime": frozenset(), "permanent": frozenset()}

    @override
    def process(self, output: list[str]) -> dict[str, frozenset[str]]:
        split = output.index("--")
        return {
            "runtime": frozenset(line.strip() for line in output[:split] if line.strip()),
            "permanent": frozenset(
                line.strip() for line in output[split + 1 :] if line.strip() not in ("", "--")
            ),
        }


@dataclass(frozen=True)
class UnitState:
    """A systemd unit as PID 1 sees it; `deployment` is what the *running process* was told."""

    active: str = "inactive"
    sub: str = "dead"
    enabled: bool = False
    needs_daemon_reload: bool = False
    main_pid: int = 0
    deployment: str = ""


class UnitStates(FactBase[dict[str, UnitState]]):
    """State of systemd units.

    `deployment` is read from the environment of the main process, so it tells what runs, not
    what was last written to disk.
    """

    @override
    def command(self, units: Iterable[str]) -> StringCommand:
        return script(
            'for u; do echo "unit=$u"; systemctl show "$u" '
            "-p ActiveState -p SubState -p UnitFileState -p NeedDaemonReload -p MainPID; "
            'pid=$(systemctl show "$u" -p MainPID --value); '
            '[ "$pid" -gt 0 ] 2>/dev/null && [ -r "/proc/$pid/environ" ] && '
            "tr '\\0' '\\n' <\"/proc/$pid/environ\" | grep '^GPU_SERVICE_DEPLOYMENT='; done; true",
            *units,
        )

    @staticmethod
    @override
    def default() -> dict[str, UnitState]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, UnitState]:
        units: dict[str, dict[str, str]] = {}
        current: dict[str, str] = {}
        for line in output:
            key, _, value = line.partition("=")
            if key == "unit":
                current = units.setdefault(value, {})
            else:
                current[key] = value
        return {name: _unit_state(values) for name, values in units.items()}


def _unit_state(values: dict[str, str]) -> UnitState:
    return UnitState(
        active=values.get("ActiveState", "inactive"),
        sub=values.get("SubState", "dead"),
        enabled=values.get("UnitFileState") == "enabled",
        needs_daemon_reload=values.get("NeedDaemonReload") == "yes",
        main_pid=int(values.get("MainPID", "0") or 0),
        deployment=values.get("GPU_SERVICE_DEPLOYMENT", ""),
    )


class WorkerUnits(FactBase[list[str]]):
    """Names of all `gpu-worker@PORT` instances that are enabled, running or failed."""

    @override
    def command(self) -> str:
        return (
            "{ systemctl list-units --all --plain --no-legend 'gpu-worker@*.service'; "
            "ls /etc/systemd/system/multi-user.target.wants/ 2>/dev/null "
            "| grep '^gpu-worker@'; } | awk '{print $1}' | sort -u"
        )

    @staticmethod
    @override
    def default() -> list[str]:
        return []

    @override
    def process(self, output: list[str]) -> list[str]:
        return [line for line in output if re.fullmatch(r"gpu-worker@\d+\.service", line)]


@dataclass(frozen=True)
class Hardware:
    """What decides device, threads and wheels."""

    nvidia_gpus: int = 0
    cpu_cores: int = 1
    machine: str = "x86_64"
    gpu_names: tuple[str, ...] = field(default=())


class HostHardware(FactBase[Hardware]):
    """NVIDIA GPUs whose driver is loaded, CPU cores, machine type.

    Counts `/proc/driver/nvidia/gpus/*`: what the kernel driver serves, whatever tools are
    installed. https://download.nvidia.com/XFree86/Linux-x86_64/525.60.11/README/procinterface.html
    """

    @override
    def command(self) -> StringCommand:
        return script(
            'echo "cores=$(nproc)"; echo "machine=$(uname -m)"; '
            "for f in /proc/driver/nvidia/gpus/*/information; do "
            '[ -r "$f" ] && sed -n \'s/^Model:[[:space:]]*/gpu=/p\' "$f"; done; true'
        )

    @staticmethod
    @override
    def default() -> Hardware:
        return Hardware()

    @override
    def process(self, output: list[str]) -> Hardware:
        pairs = [line.partition("=")[::2] for line in output]
        named = dict(pairs)
        gpus = tuple(value for key, value in pairs if key == "gpu")
        return Hardware(
            nvidia_gpus=len(gpus),
            cpu_cores=int(named.get("cores", "1")),
            machine=named.get("machine", "x86_64"),
            gpu_names=gpus,
        )


class NewestFirst(FactBase[list[str]]):
    """Names in a folder, the one that was changed last first; partial ones left out."""

    @override
    def command(self, path: str) -> StringCommand:
        return script('ls -1t -- "$1" 2>/dev/null || true', path)

    @staticmethod
    @override
    def default() -> list[str]:
        return []

    @override
    def process(self, output: list[str]) -> list[str]:
        return [name for name in output if not name.startswith(".")]
