"""What each host was like before the first deploy changed it, kept on the host itself, so that
`uninstall.py` (provision/removal.py) can leave it as it was found.

The record is `/var/lib/gpu-gateway/record/`, for root alone: a journal (files/record.sh) and, below
`found/`, copies of the files that were replaced. It is written by the operations themselves, just
before each first change; an operation that changes nothing notes nothing and costs no round trip.

How a concern registers what it changes:

* **A file**: nothing to do where it goes through `operations.place_files` or `run_nginx`: they note
  what lay there and the digests of what they write. What a script writes by itself:
  `yield record.file(path)` before it does; such a file counts as ours whatever it holds.
* **Folders** made on the way to files are noted with them; `operations.directories` notes its own.
  They go when they are empty. A folder whose whole content this project generates belongs into
  `TREES`, and needs no note.
* **Packages**: `record.packages(name=…, packages=[…])` in place of `yum.packages`; around another
  way of installing, `yield from record.installing([…], commands)`. What comes with them
  (dependencies, users) is noted too. What their daemons write is in `DAEMONS`.
* **A user or group**: `record.user(…)`, `record.group(…)`, with the arguments of `server.user`.
* **A unit** of somebody else's that is enabled, started or stopped: `yield record.unit(name)`
  before. Instances of `gpu-worker@` and units whose file is placed by us are stopped anyway.
* **SELinux**: `yield record.found("boolean", name, "off")`, `yield record.found("port",
  "http_port_t tcp 9005", "absent")` before it is changed. The mode is noted by `selinux.mode`.
* **firewalld**: `operations.firewalld(role=…)` knows by the record which ports are its own.

What is not registered stays on the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyinfra import host
from pyinfra.api import FactBase, StringCommand, operation
from pyinfra.facts.rpm import RpmPackages
from pyinfra.operations import apt, server, yum
from typing_extensions import override

from provision import facts, rendering
from provision.facts import script
from provision.settings import ACME_WEBROOT, SERVICE_STATE

if TYPE_CHECKING:
    from provision.operations import Commands

STATE = "/var/lib/gpu-gateway"
FOLDER = f"{STATE}/record"
JOURNAL = f"{FOLDER}/journal"
PENDING = f"{FOLDER}/before.asked"  # there while something is being installed

# Folders that hold nothing but what this project generates, and what that is. They go whole, also
# from hosts that were deployed before there was a record; so does all in `STATE` but the record.
TREES: Mapping[str, str] = {
    "/opt/gpu-service": "environments and packages",
    "/var/cache/gpu-service": "caches of the workers",
    "/run/gpu-workers": "sockets of the workers",
    "/run/gpu-gateway": "trials of nginx's configurations",
    ACME_WEBROOT: "answers to an ACME authority",
}

# The same, for folders that the operator may want to keep.
KEPT_TREES: Mapping[str, str] = {SERVICE_STATE: "models and training runs"}


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """Folders that the daemons of a package fill, and that tell nobody else anything."""

    state: tuple[str, ...] = ()
    logs: tuple[str, ...] = ()


# By the package's name, or its first word. They go when the package does.
DAEMONS: Mapping[str, Daemon] = {
    "nginx": Daemon(logs=("/var/log/nginx",)),
    "munge": Daemon(state=("/var/lib/munge",), logs=("/var/log/munge",)),
    "slurm": Daemon(state=("/var/spool/slurm",), logs=("/var/log/slurm",)),
}
LOGS = tuple(path for daemon in DAEMONS.values() for path in daemon.logs)


def is_generated(path: str) -> bool:
    """Whether it goes with a whole folder, so that nothing has to be noted of it."""
    return any(f"{path}/".startswith(f"{tree}/") for tree in (*TREES, *KEPT_TREES, STATE))


def _note(verb: str, *words: str) -> StringCommand:
    return script(rendering.shell("record.sh"), verb, *words)


def file(path: str, sha256: str = "") -> StringCommand:
    """Before a file is written: what lies there; `sha256` is that of what will."""
    return _note("file", path, sha256)


def folders(paths: Iterable[str]) -> StringCommand:
    """Before folders are made: those that are missing, and those above them."""
    return _note("folders", *paths)


def unit(name: str) -> StringCommand:
    """Before a unit is enabled, started or stopped: whether it was."""
    return _note("unit", name)


def found(kind: str, key: str, value: str) -> StringCommand:
    """What was found of something that `removal` knows how to put back. The first note counts."""
    return _note("found", kind, key, value)


def wrote(kind: str, key: str, value: str) -> StringCommand:
    """What it was set to: where it is something else later, that was somebody else."""
    return _note("wrote", kind, key, value)


def firewall(role: str, change: str, entry: str) -> StringCommand:
    """A port or rule that was `opened`, or `closed` again, or one of somebody else's that was
    `shut`.
    """
    return _note("append", "firewall", role, change, entry)


def before(note: StringCommand, commands: Commands) -> Commands:
    """The commands, and before the first of them the note; nothing where there are none."""
    for number, command in enumerate(commands):
        if number == 0:
            yield note
        yield command


def installing(packages: Iterable[str], commands: Commands) -> Commands:
    """Commands that install packages, between two looks at what is installed; nothing where there
    are none.

    None of the commands may note anything itself: a run that is cut between the two leaves the
    first look, and the next note is the second one.
    """
    names = [package.partition("=")[0] for package in packages]
    changed = False
    for command in before(_note("packages", *names), commands):
        changed = True
        yield command
    if changed:
        yield _note("came", names[0])


def daemons(packages: Iterable[str]) -> list[Daemon]:
    """Those of `DAEMONS` that come with packages, or go with them. Pure."""
    families = {package.partition("-")[0] for package in packages}
    return [daemon for name, daemon in DAEMONS.items() if name in families]


def by_manager(package: str, manager: str) -> Commands:
    """A package, by the package manager that the host has: `apt`, or `dnf`."""
    if manager == "apt":
        commands = apt.packages._inner(packages=[package], update=True, cache_time=86400)
    else:
        commands = yum.packages._inner(packages=[package])
    yield from installing([package], commands)


def ended() -> Commands:
    """What came with an installation is noted, where it failed or was cut before it could be."""
    if PENDING in host.get_fact(facts.Paths, paths=(PENDING,)):
        yield _note("ended")


@operation()
def installation_ended() -> Commands:
    """As `ended`."""
    yield from ended()


@operation()
def packages(packages: Iterable[str]) -> Commands:
    """As `yum.packages`, which asks the repositories also where all is there."""
    wanted = list(packages)
    if host.get_fact(RpmPackages).keys() >= set(wanted):
        host.noop(f"there already: {', '.join(wanted)}")
        return
    commands = installing(wanted, yum.packages._inner(packages=wanted))
    state = [path for daemon in daemons(wanted) for path in daemon.state]
    yield from before(folders(state), commands) if state else commands


# What decides whether a user is as declared; with `uid` and the like, pyinfra compares.
_ASKED = frozenset({"home", "shell", "system", "ensure_home"})


@operation()
def user(user: str, **arguments: Any) -> Commands:
    """As `server.user`, which asks for every user of the host; here, once for this one."""
    wanted = arguments.get("home"), arguments.get("shell")
    if arguments.keys() <= _ASKED and host.get_fact(facts.Account, user=user) == wanted:
        host.noop(f"user {user} is as declared")
        return
    commands = server.user._inner(user=user, **arguments)
    # useradd makes the group of the same name.
    yield from before(_note("account", "group", user), before(_account("user", user), commands))


@operation()
def group(group: str, **arguments: Any) -> Commands:
    """As `server.group`."""
    commands = server.group._inner(group=group, **arguments)
    yield from before(_account("group", group), commands)


def _account(kind: str, name: str) -> StringCommand:
    return _note("account", kind, name)


@dataclass(frozen=True, kw_only=True)
class Firewall:
    """Ports (`port 8009/tcp`) and rules of one role: what it opened and did not close again, and
    what it shut of somebody else's.
    """

    opened: frozenset[str] = frozenset()
    shut: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The journal of one host. Keys are as they were noted, in that order."""

    found: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # kind -> key -> value
    wrote: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    # What an installation brought: the package that was asked for -> package, user, group -> names;
    # or key, where it failed.
    came: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    firewall: Mapping[str, Firewall] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[str, str]:
        """What was found of a kind, by key."""
        return self.found.get(kind, {})

    @property
    def is_late(self) -> bool:
        """Whether the host had been deployed before its record began."""
        return "late" in self.of("run")


def parse(lines: Iterable[str]) -> Record:
    """What a journal says. A line that a crash cut short is left out. Pure."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    wrote: dict[tuple[str, str], set[str]] = defaultdict(set)
    came: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    firewall: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for line in lines:
        words = line.split("\t")
        if len(words) != 4:
            continue
        kind, key, aspect, value = words
        if kind == "firewall":
            firewall[key].append((aspect, value))
        elif aspect == "found":
            found[kind].setdefault(key, value)
        elif aspect == "wrote":
            wrote[kind, key].add(value)
        elif aspect.startswith("came-"):
            came[key][aspect.removeprefix("came-")].append(value)
    return Record(
        found=dict(found),
        wrote={key: frozenset(values) for key, values in wrote.items()},
        came={
            package: {kind: tuple(names) for kind, names in kinds.items()}
            for package, kinds in came.items()
        },
        firewall={role: _firewall(changes) for role, changes in firewall.items()},
    )


def _firewall(changes: Iterable[tuple[str, str]]) -> Firewall:
    opened: set[str] = set()
    shut: set[str] = set()
    steps: Mapping[str, Callable[[str], None]] = {
        "opened": opened.add,
        "closed": opened.discard,
        "shut": shut.add,
    }
    for change, entry in changes:
        steps.get(change, _ignored)(entry)
    return Firewall(opened=frozenset(opened), shut=frozenset(shut))


def _ignored(_: str) -> None:
    """A word of a later release."""


class Journal(FactBase[Record]):
    """The record of a host; empty where nothing was ever noted."""

    @override
    def command(self) -> StringCommand:
        return script('cat "$1" 2>/dev/null || true', JOURNAL)

    @staticmethod
    @override
    def default() -> Record:
        return Record()

    @override
    def process(self, output: list[str]) -> Record:
        return parse(output)
