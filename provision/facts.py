"""What the deploy asks of a host. Each fact is one command, so one round trip.

Facts answer from the host's own truth (the running process, the file's bytes), never from a
note that an earlier run left, wherever such a truth exists.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

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


class _Answer:
    """Lets `pyinfra inventory.py fact provision.facts.X` print a fact's dataclass."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


class LineSet(FactBase[frozenset[str]]):
    """What a command prints, a line each, in no order."""

    @staticmethod
    @override
    def default() -> frozenset[str]:
        return frozenset()

    @override
    def process(self, output: list[str]) -> frozenset[str]:
        return frozenset(output)


class Lines(FactBase[tuple[str, ...]]):
    """What a command prints, a line each."""

    @staticmethod
    @override
    def default() -> tuple[str, ...]:
        return ()

    @override
    def process(self, output: list[str]) -> tuple[str, ...]:
        return tuple(output)


class Said(FactBase[bool]):
    """Whether a command prints `yes`."""

    @staticmethod
    @override
    def default() -> bool:
        return False

    @override
    def process(self, output: list[str]) -> bool:
        return "yes" in output


@dataclass(frozen=True)
class FileState(_Answer):
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
    """The text of a file, or None. To show or to look into, not to compare."""

    @override
    def command(self, path: str) -> StringCommand:
        return script('[ -f "$1" ] && cat "$1" || true', path)

    @override
    def process(self, output: list[str]) -> str:
        return "\n".join(output) + "\n"


class Account(FactBase[tuple[str, str] | None]):
    """Home and shell of a user; None where there is no such user."""

    @override
    def command(self, user: str) -> StringCommand:
        return script('getent passwd "$1" || true', user)

    @override
    def process(self, output: list[str]) -> tuple[str, str] | None:
        for line in output:
            *_, home, shell = line.split(":")
            return home, shell
        return None


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


class Paths(LineSet):
    """Which of the paths exist (links as themselves), with their targets as `path -> target`."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'for p; do if [ -L "$p" ]; then printf "%s -> %s\\n" "$p" "$(readlink "$p")"; '
            'elif [ -e "$p" ]; then printf "%s\\n" "$p"; fi; done; true',
            *paths,
        )


class SelinuxMode(StrEnum):
    """What `getenforce` says, in lower case; `absent` where there is no SELinux at all."""

    ENFORCING = "enforcing"
    PERMISSIVE = "permissive"
    DISABLED = "disabled"
    ABSENT = "absent"


@dataclass(frozen=True)
class SelinuxState(_Answer):
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


@dataclass(frozen=True)
class BooleanState(_Answer):
    """An SELinux boolean: what it is now, and whether it is on after the next boot, too."""

    active: bool
    permanent: bool


class SelinuxBooleans(FactBase[dict[str, BooleanState]]):
    """State of booleans; without SELinux, its tools, or that boolean, one is absent.

    `setsebool -P` keeps what it sets in the policy store's `booleans.local`, where it is read: what
    tells it otherwise, `semanage`, takes half a second and is not on every host.
    """

    @override
    def command(self, booleans: Iterable[str]) -> StringCommand:
        return script(
            'for b; do getsebool "$b" 2>/dev/null; done; '
            "type=$(sed -n 's/^SELINUXTYPE=//p' /etc/selinux/config 2>/dev/null | tail -n 1); "
            'cat "/var/lib/selinux/$type/active/booleans.local" 2>/dev/null; true',
            *booleans,
        )

    @staticmethod
    @override
    def default() -> dict[str, BooleanState]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, BooleanState]:
        active = dict(line.split(" --> ") for line in output if " --> " in line)
        kept = {line.strip() for line in output}
        return {
            name: BooleanState(active=value.strip() == "on", permanent=f"{name}=1" in kept)
            for name, value in active.items()
        }


@dataclass(frozen=True)
class PortRange(_Answer):
    """TCP ports to which SELinux's policy gives a type."""

    type: str
    first: int
    last: int


class SelinuxPorts(FactBase[list[PortRange]]):
    """Which types SELinux's policy gives to TCP ports; empty without SELinux or `semanage`.

    `local`: what was given on this host alone, also where SELinux is switched off.
    """

    @override
    def command(self, local: bool = False) -> StringCommand:
        if local:
            return script("command -v semanage >/dev/null && semanage port -l -n -C; true")
        return script("selinuxenabled 2>/dev/null && semanage port -l -n; true")

    @staticmethod
    @override
    def default() -> list[PortRange]:
        return []

    @override
    def process(self, output: list[str]) -> list[PortRange]:
        # http_port_t                    tcp      80, 443, 8008-8010
        rows = (line.split(None, 2) for line in output)
        ranges = []
        for kind, protocol, ports in (row for row in rows if len(row) == 3):
            if protocol == "tcp":
                for part in ports.split(","):
                    first, _, last = part.strip().partition("-")
                    ranges.append(PortRange(type=kind, first=int(first), last=int(last or first)))
        return ranges


class LacksSemanage(Said):
    """Whether the host has SELinux, but not the tool that labels ports."""

    @override
    def command(self) -> StringCommand:
        return script(
            "selinuxenabled 2>/dev/null && ! command -v semanage >/dev/null && echo yes; true"
        )


class Lacks(Said):
    """Whether a program is missing, whichever package it would come from."""

    @override
    def command(self, program: str) -> StringCommand:
        return script('command -v "$1" >/dev/null || echo yes; true', program)


@dataclass(frozen=True)
class FirewalldState(_Answer):
    """Ports (`8009/tcp`) and rich rules of the default zone, now and at the next start.

    `notes`: the lines of the host's record that say which of them are ours (provision/record.py).
    """

    runtime: frozenset[str]
    permanent: frozenset[str]
    notes: tuple[str, ...] = ()


class Firewalld(FactBase[FirewalldState | None]):
    """What firewalld's default zone lets in; None where firewalld does not run.

    Asked over D-Bus: the same answers as `firewall-cmd`, which takes a quarter of a second of
    Python start-up for each. https://firewalld.org/documentation/man-pages/firewalld.dbus.html
    """

    @override
    def command(self) -> StringCommand:
        return script(
            "systemctl is-active --quiet firewalld || exit 0; "
            "name=org.fedoraproject.FirewallD1; path=/org/fedoraproject/FirewallD1; "
            'ask() { printf "%s " "$1"; shift; busctl call $name "$@"; }; '
            "quoted() { cut -d '\"' -f 2; }; "
            "zone=$(busctl call $name $path $name getDefaultZone | quoted); "
            "file=$(busctl call $name $path/config $name.config getZoneByName s $zone | quoted); "
            "ask runtime $path $name.zone getPorts s $zone; "
            "ask runtime $path $name.zone getRichRules s $zone; "
            "ask permanent $file $name.config.zone getPorts; "
            "ask permanent $file $name.config.zone getRichRules; "
            "grep -s '^firewall' /var/lib/gpu-gateway/record/journal; true"
        )

    @override
    def process(self, output: list[str]) -> FirewalldState:
        found: dict[str, set[str]] = {"runtime": set(), "permanent": set()}
        notes = tuple(line for line in output if line.startswith("firewall"))
        for line in output:
            mode, _, answer = line.partition(" ")
            if mode in found:
                found[mode] |= _ports_or_rules(answer)
        return FirewalldState(
            runtime=frozenset(found["runtime"]),
            permanent=frozenset(found["permanent"]),
            notes=notes,
        )


def _ports_or_rules(answer: str) -> set[str]:
    """From busctl: `aas 1 2 "8009" "tcp"` is a list of ports, `as 1 "rule …"` one of rules."""
    quoted_strings = re.findall(r'"((?:[^"\\]|\\.)*)"', answer)
    strings = [re.sub(r"\\(.)", r"\1", text) for text in quoted_strings]
    if answer.startswith("as "):
        return set(strings)
    return {
        f"{port}/{protocol}" for port, protocol in zip(strings[::2], strings[1::2], strict=True)
    }


@dataclass(frozen=True)
class UnitState(_Answer):
    """A systemd unit as PID 1 sees it; `deployment` is what the *running process* was told, `up_s`
    for how many seconds it has been active at least, None where it is not.
    """

    active: str = "inactive"
    sub: str = "dead"
    enabled: bool = False
    needs_daemon_reload: bool = False
    main_pid: int = 0
    deployment: str = ""
    up_s: float | None = None

    @property
    def is_up(self) -> bool:
        """Whether it runs; one that reloads goes on serving meanwhile."""
        return self.active in ("active", "reloading")


class UnitStates(FactBase[dict[str, UnitState]]):
    """State of systemd units.

    `deployment` is read from the environment of the main process, so it tells what runs, not
    what was last written to disk.
    """

    @override
    def command(self, units: Iterable[str]) -> StringCommand:
        return script(
            # One call for all: each takes as long as all the rest. Empty lines are between units.
            "now=$(date +%s); "
            "TZ=UTC LC_ALL=C systemctl show -p ActiveState -p SubState -p UnitFileState "
            '-p NeedDaemonReload -p MainPID -p ActiveEnterTimestamp -- "$@" | '
            '{ echo "unit=$1"; echo "now=$now"; while IFS= read -r line; do case $line in '
            '"") shift; echo "unit=$1"; echo "now=$now" ;; '
            'MainPID=*) echo "$line"; environ=/proc/${line#MainPID=}/environ; '
            "[ ! -r \"$environ\" ] || tr '\\0' '\\n' <\"$environ\" | "
            "grep '^GPU_SERVICE_DEPLOYMENT=' ;; "
            '*) echo "$line" ;; esac; done; true; }',
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
        up_s=_up_s(values),
    )


def _up_s(values: dict[str, str]) -> float | None:
    """Since it became active, by the host's own clock; at least, as both moments are in seconds."""
    if values.get("ActiveState") not in ("active", "reloading"):
        return None
    try:
        text = values.get("ActiveEnterTimestamp", "")
        since = datetime.strptime(text, "%a %Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
        return max(0.0, int(values.get("now", "")) - since.timestamp() - 1)
    except ValueError:
        return None


@dataclass(frozen=True)
class NginxState(_Answer):
    """nginx as it lies on the host and as it runs.

    `told`: what `nginx -v` says, empty where there is none. `outdated`: whether what runs was
    started from another file than the one that is installed now.
    """

    told: str = ""
    outdated: bool = False


class Nginx(FactBase[NginxState]):
    """Which nginx is installed, and whether it is the one that runs."""

    @override
    def command(self) -> StringCommand:
        return script(
            "binary=$(command -v nginx) || exit 0; nginx -v 2>&1; "
            # The master's pid; a file that was replaced is still the one that it runs.
            "pid=$(cat /run/nginx.pid 2>/dev/null); "
            '[ -z "$pid" ] || [ ! -e "/proc/$pid/exe" ] || [ "/proc/$pid/exe" -ef "$binary" ] || '
            "echo outdated; true"
        )

    @staticmethod
    @override
    def default() -> NginxState:
        return NginxState()

    @override
    def process(self, output: list[str]) -> NginxState:
        told = [line for line in output if line.startswith("nginx version:")]
        return NginxState(told="".join(told), outdated="outdated" in output)


@dataclass(frozen=True)
class PackageState(_Answer):
    """Packages and files that a host has, and whom it gets packages from."""

    manager: str = ""  # dnf or apt
    system: str = ""  # debian, rocky
    release: str = ""  # 9
    codename: str = ""  # bookworm
    stream: str = ""  # of dnf's module nginx, where one is enabled
    packages: Mapping[str, str] = field(default_factory=dict)  # name -> version
    files: tuple[str, ...] = ()  # of those asked for, the ones that are there


class Packages(FactBase[PackageState]):
    """Which of the packages are installed, in which version, and which of the files are there."""

    @override
    def command(self, names: Iterable[str], files: Iterable[str]) -> StringCommand:
        return script(
            '( . /etc/os-release; echo "system=$ID"; echo "release=${VERSION_ID%%.*}"; '
            'echo "codename=$VERSION_CODENAME" ) 2>/dev/null; '
            'until [ "$1" = -- ]; do [ ! -e "$1" ] || echo "file=$1"; shift; done; shift; '
            "if command -v dnf >/dev/null; then echo manager=dnf; "
            "rpm -q --qf 'package=%{NAME} %|EPOCH?{%{EPOCH}}:{0}|:%{VERSION}-%{RELEASE}\\n' "
            '"$@" | grep ^package=; '
            "sed -n 's/^stream *= */stream=/p' /etc/dnf/modules.d/nginx.module 2>/dev/null; "
            "elif command -v apt-get >/dev/null; then echo manager=apt; "
            "dpkg-query -W -f='${db:Status-Status} package=${Package} ${Version}\\n' "
            "\"$@\" 2>/dev/null | sed -n 's/^installed //p'; fi; true",
            *files,
            "--",
            *names,
        )

    @staticmethod
    @override
    def default() -> PackageState:
        return PackageState()

    @override
    def process(self, output: list[str]) -> PackageState:
        pairs = [line.partition("=")[::2] for line in output]
        said = dict(pairs)
        packages = [value.partition(" ")[::2] for key, value in pairs if key == "package"]
        return PackageState(
            manager=said.get("manager", ""),
            system=said.get("system", ""),
            release=said.get("release", ""),
            codename=said.get("codename", ""),
            stream=said.get("stream", ""),
            packages=dict(packages),
            files=tuple(value for key, value in pairs if key == "file"),
        )


class WorkerPorts(FactBase[list[int]]):
    """Ports of all `gpu-worker@PORT` instances, services and sockets, that are enabled, running or
    failed.
    """

    @override
    def command(self) -> str:
        return (
            "{ systemctl list-units --all --plain --no-legend 'gpu-worker@*'; "
            "cd /etc/systemd/system && ls multi-user.target.wants/ sockets.target.wants/ "
            "2>/dev/null | grep '^gpu-worker@'; } | awk '{print $1}' | sort -u"
        )

    @staticmethod
    @override
    def default() -> list[int]:
        return []

    @override
    def process(self, output: list[str]) -> list[int]:
        matches = (re.fullmatch(r"gpu-worker@(\d+)\.(service|socket)", line) for line in output)
        return sorted({int(match.group(1)) for match in matches if match})


@dataclass(frozen=True)
class Hardware(_Answer):
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


@dataclass(frozen=True)
class Node(_Answer):
    """A host as a scheduler names and counts it; `memory_mb` leaves a twentieth to the system.

    `cgroup`: the version of control groups, 1 or 2; a host that mounts both counts as 1.
    """

    hostname: str
    memory_mb: int
    cgroup: int = 2


class NodeSize(FactBase[Node]):
    """Short host name, memory in MiB, version of control groups."""

    @override
    def command(self) -> StringCommand:
        return script(
            "hostname -s; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; "
            # One line, of the hierarchy 0, where there is version 2 alone.
            "if grep -qv ^0: /proc/self/cgroup; then echo 1; else echo 2; fi"
        )

    @override
    def process(self, output: list[str]) -> Node:
        hostname, total_kib, cgroup = output
        return Node(
            hostname=hostname, memory_mb=int(total_kib) // 1024 * 19 // 20, cgroup=int(cgroup)
        )


class SlurmAnswers(Said):
    """Whether a Slurm controller answers on this host."""

    @override
    def command(self) -> StringCommand:
        return script(
            "command -v scontrol >/dev/null && "
            "scontrol ping 2>/dev/null | grep -q UP && echo yes; true"
        )


class StaleUnits(LineSet):
    """Units that do not run, or run since before one of their files was written.

    + units: (unit, files that it reads when it starts)
    """

    @override
    def command(self, units: Iterable[tuple[str, Iterable[str]]]) -> StringCommand:
        words = [word for unit, files in units for word in (f"unit={unit}", *files)]
        return script(
            "since=0; unit=; for w; do case $w in unit=*) unit=${w#unit=}; since=0; "
            'systemctl is-active --quiet "$unit" && '
            'since=$(date -d "$(systemctl show "$unit" -p ActiveEnterTimestamp --value)" +%s); '
            '[ "$since" -gt 0 ] || echo "$unit" ;; '
            '*) [ "$(stat -c %Y "$w" 2>/dev/null || echo 0)" -le "$since" ] || echo "$unit" ;; '
            "esac; done | sort -u",
            *words,
        )


class NewestFirst(FactBase[dict[str, list[str]]]):
    """Names in each folder, the one that was changed last first; hidden ones left out."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'for p; do printf "%s/\\n" "$p"; ls -1t -- "$p" 2>/dev/null; done; true', *paths
        )

    @staticmethod
    @override
    def default() -> dict[str, list[str]]:
        return {}

    @override
    def process(self, output: list[str]) -> dict[str, list[str]]:
        folders: dict[str, list[str]] = {}
        names: list[str] = []
        for line in output:
            if line.endswith("/"):
                names = folders.setdefault(line.removesuffix("/"), [])
            else:
                names.append(line)
        return folders


class WorkerPaths(LineSet):
    """Paths of environments, packages, bundles and tokens that settings files of workers, and of
    a training, name.

    The current ones, and those kept to go back to.
    """

    @override
    def command(self, folder: str) -> StringCommand:
        return script(
            'cat "$1"/worker-*.env* "$1"/training.env 2>/dev/null | sed -n -E '
            "'s/^(GPU_WORKER_PYTHON|PYTHONPATH|GPU_SERVICE_(BUNDLE|TOKENS_FILE))=//p' | "
            "tr : '\\n' | sort -u",
            folder,
        )


@dataclass(frozen=True)
class Limits(_Answer):
    """What the kernel gives a gateway. Memory in bytes."""

    cores: int
    memory: int
    first_port: int
    last_port: int
    nr_open: int
    somaxconn: int
    conntrack_max: int | None  # None: connections are not tracked


class HostLimits(FactBase[Limits]):
    """CPU cores as nginx counts them (`worker_processes auto`), memory, and kernel limits."""

    @override
    def command(self) -> StringCommand:
        return script(
            'echo "cores $(getconf _NPROCESSORS_ONLN)"; '
            "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/memory_kib \\1/p' /proc/meminfo; cd /proc/sys; "
            "for f in net/ipv4/ip_local_port_range fs/nr_open net/core/somaxconn "
            'net/netfilter/nf_conntrack_max; do [ ! -r "$f" ] || echo "${f##*/} $(cat "$f")"; '
            "done; true"
        )

    @override
    def process(self, output: list[str]) -> Limits:
        found = {name: list(map(int, numbers)) for name, *numbers in map(str.split, output)}
        first, last = found["ip_local_port_range"]
        return Limits(
            cores=found["cores"][0],
            memory=found["memory_kib"][0] * 1024,
            first_port=first,
            last_port=last,
            nr_open=found["nr_open"][0],
            somaxconn=found["somaxconn"][0],
            conntrack_max=found.get("nf_conntrack_max", [None])[0],
        )


@dataclass(frozen=True)
class CertificateState(_Answer):
    """A certificate and its key, as they lie on the host."""

    exists: bool = False  # one of the two files at least
    openssl: bool = True  # whether the host has the program
    matches: bool = False  # the certificate is one, and the key is its
    issuer: str = ""
    lasts: bool = False  # longer than was asked
    names: frozenset[str] = frozenset()  # DNS:… and IP:…
    ends: str = ""  # as openssl prints it: Feb 26 14:03:21 2027 GMT
    ocsp: bool = False  # it names a responder
    unresolved: str = ""  # the responder's host, where this one does not find its address
    chain: int = 0  # certificates in its file


class Certificate(FactBase[CertificateState]):
    """State of a certificate; `lasts` is whether it is valid for so many seconds more."""

    @override
    def command(self, certificate: str, key: str, seconds: int) -> StringCommand:
        return script(
            "command -v openssl >/dev/null || echo missing; "
            '[ -e "$1" ] || [ -e "$2" ] || exit 0; echo exists; '
            'of=$(openssl x509 -in "$1" -noout -pubkey 2>/dev/null); '
            '[ -n "$of" ] && [ "$of" = "$(openssl pkey -in "$2" -pubout 2>/dev/null)" ] && '
            "echo matches; "
            'openssl x509 -in "$1" -noout -checkend "$3" >/dev/null 2>&1 && echo lasts; '
            'responder=$(openssl x509 -in "$1" -noout -ocsp_uri 2>/dev/null | head -n 1 | '
            "sed -E 's,^https?://([^/:]+).*,\\1,'); "
            '[ -z "$responder" ] || { echo ocsp; getent ahosts "$responder" >/dev/null || '
            'echo "unresolved=$responder"; }; '
            'echo "chain=$(grep -c "BEGIN CERTIFICATE" "$1" 2>/dev/null)"; '
            'openssl x509 -in "$1" -noout -enddate -issuer -ext subjectAltName 2>/dev/null; true',
            certificate,
            key,
            str(seconds),
        )

    @staticmethod
    @override
    def default() -> CertificateState:
        return CertificateState()

    @override
    def process(self, output: list[str]) -> CertificateState:
        told = dict(line.split("=", 1) for line in output if "=" in line)
        names = {
            name.strip().replace("IP Address:", "IP:")
            for line in output
            if line.startswith((" ", "\t"))
            for name in line.split(",")
        }
        return CertificateState(
            exists="exists" in output,
            openssl="missing" not in output,
            matches="matches" in output,
            issuer=told.get("issuer", ""),
            lasts="lasts" in output,
            names=frozenset(names),
            ends=told.get("notAfter", ""),
            ocsp="ocsp" in output,
            unresolved=told.get("unresolved", ""),
            chain=int(told.get("chain") or 0),
        )


class NginxRoot(FactBase[str]):
    """How the running nginx has the root file system mounted (`ro,…` in its sandbox, where the
    whole host is read-only but for a few folders); empty where it does not run.
    """

    @override
    def command(self) -> StringCommand:
        return script(
            'pid=$(cat /run/nginx.pid 2>/dev/null) && [ -r "/proc/$pid/mountinfo" ] || exit 0; '
            """awk '$5 == "/" { found = $6 } END { print found }' "/proc/$pid/mountinfo" """
        )

    @staticmethod
    @override
    def default() -> str:
        return ""


class NginxDescriptors(Lines):
    """The descriptors that nginx.conf wants (`wanted N`), those that each worker process may open
    (`has N`), and SELinux's mode (`selinux MODE`).
    """

    @override
    def command(self) -> StringCommand:
        return script(
            "sed -n 's/^ *worker_rlimit_nofile  *\\([0-9]*\\);.*/wanted \\1/p' "
            "/etc/nginx/nginx.conf 2>/dev/null; "
            'for pid in $(pgrep -P "$(cat /run/nginx.pid 2>/dev/null)" 2>/dev/null); do '
            "grep -aq 'shutting down' \"/proc/$pid/cmdline\" || "
            """awk '/^Max open files/ { print "has", $4 }' "/proc/$pid/limits"; done; """
            'echo "selinux $(getenforce 2>/dev/null || echo absent)"'
        )


class NginxLeftovers(Lines):
    """What reloads left behind: `process N` for each nginx process of an earlier configuration,
    with its number of client sockets; and `file PATH` for each file of `folders` that nginx reads.

    + ports: the public ones, as a filter of ss
    + empty: the text of a file that the deploy itself emptied, which does not count
    """

    @override
    def command(self, ports: str, empty: str, folders: Iterable[str]) -> StringCommand:
        return script(LEFTOVERS, ports, empty, *folders)


# After a reload, processes of the former configuration say in their title what they wait for.
LEFTOVERS = r"""
sockets=$(ss -tnpH state established "$1" 2>/dev/null)
for pid in $(pgrep -f '^nginx: worker process is shutting down'); do
    printf 'process %s\n' "$(printf '%s\n' "$sockets" | grep -c "pid=$pid,")"
done
text=$2
shift 2
for folder; do
    for file in "$folder"/*.conf; do
        [ ! -e "$file" ] || [ "$(cat "$file" 2>/dev/null)" = "$text" ] || printf 'file %s\n' "$file"
    done
done
"""
