"""The project's own pyinfra operations: files that are swapped in whole, nginx's activation,
workers restarted one after the other.

An operation's body runs at *prepare* (to see whether it would change something; skipped with
`-y`) and again at *execute*. So everything it decides on is asked of the host in the body, and
a body that yields nothing has changed nothing.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import io
import math
import posixpath
import re
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pyinfra import host, logger, state
from pyinfra.api import (
    FileDownloadCommand,
    FileUploadCommand,
    FunctionCommand,
    QuoteString,
    StringCommand,
    operation,
)
from pyinfra.api.arguments import CONNECTOR_ARGUMENT_KEYS
from pyinfra.api.host import Host
from pyinfra.api.state import State, StateStage
from pyinfra.connectors.util import CommandOutput

from provision import facts, foresight, nginx_versions, record, rendering
from provision.facts import quoted, script
from provision.nginx_versions import Version
from provision.rolling import Rollout
from provision.settings import unix_socket

Commands = Generator[
    StringCommand | FileUploadCommand | FileDownloadCommand | FunctionCommand, None, None
]


def fail(*lines: str) -> FunctionCommand:
    """A command that ends the operation on this host, saying why."""
    return FunctionCommand(_say_and_fail, (lines,), {})


def _say_and_fail(state: State, host: Host, lines: Iterable[str]) -> bool:
    for line in lines:
        host.log_styled(line, fg="red", log_func=logger.error)
    return False


Item = TypeVar("Item")


def each(items: Iterable[Item]) -> Iterator[Item]:
    """The items, for a loop with operations in it: pyinfra keeps them in order across hosts.

    So do the hosts' turns: pyinfra keeps its hosts in a set, so that even `_serial` takes them in
    an order that changes from run to run; in a loop over their names each has its turn.
    """
    yield from host.loop(items)  # type: ignore[no-untyped-call]


def executing() -> bool:
    """Whether the run is past prepare: only then do earlier operations show on the host."""
    return bool(state.current_stage == StateStage.Execute) and not foresight.rehearsing()


def ask(command: StringCommand, *, of: Host | None = None) -> tuple[bool, CommandOutput]:
    """Run a command that changes nothing now, as the current operation would (sudo and the like),
    whatever it says.

    `of`: another host than the current one.
    """
    arguments: dict[str, Any] = dict(host.current_op_global_arguments or {})
    as_operation = {key: arguments[key] for key in CONNECTOR_ARGUMENT_KEYS if key in arguments}
    return foresight.ask(of or host, command, **as_operation)


def beside(path: str, what: str) -> str:
    """The hidden name beside a file: the same file system, SELinux type and relative includes.

    `what`: `candidate`, or what files/nginx-trial.sh and files/take-certificate.sh leave there
    while they work, `incoming` and `outgoing`.
    """
    folder, name = posixpath.split(path)
    return posixpath.join(folder, f".{name}.{what}")


@dataclass(frozen=True, kw_only=True)
class ManagedFile:
    """A file that this project owns whole: its bytes, mode and owner."""

    path: str
    # A path is a file on the operator's machine, for large ones.
    content: bytes | Path = field(repr=False)
    mode: str = "644"
    user: str = "root"
    group: str = "root"
    secret: bool = False  # never shown in a diff

    @cached_property
    def sha256(self) -> str:
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        with self.content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def upload(self) -> FileUploadCommand | StringCommand:
        """Its bytes into the candidate.

        Those of a secret go by standard input: with `_sudo`, an upload lies in /tmp for a moment,
        for all to read.
        """
        if self.secret:
            return StringCommand(
                *("sh", "-c", QuoteString('umask 077; base64 -d >"$1"'), "upload"),
                QuoteString(self.candidate),
                _stdin=base64.b64encode(self._bytes).decode(),
            )
        source = io.BytesIO(self.content) if isinstance(self.content, bytes) else str(self.content)
        return FileUploadCommand(source, self.candidate)

    @property
    def _bytes(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @property
    def candidate(self) -> str:
        return beside(self.path, "candidate")

    def matches(self, found: facts.FileState | None) -> bool:
        return found == facts.FileState(
            mode=self.mode, user=self.user, group=self.group, sha256=self.sha256
        )


# What is uploaded before the next files are: small ones together, a large one alone, so that a run
# that is cut finds it there.
_TOGETHER_BYTES = 8 << 20


@operation()
def place_files(files: Iterable[ManagedFile], *, verified: bool = False) -> Commands:
    """Bring files to their declared bytes, mode and owner; each is swapped in by a rename.

    + files: what to place; the folders have to exist or are made (root, 755)
    + verified: compare what arrived with what was sent, by SHA-256 on the host; what arrived
      damaged replaces nothing

    Only files that differ are uploaded.
    """
    files = list(files)
    found = host.get_fact(facts.FileStates, paths=tuple(f.path for f in files))
    differing = [managed for managed in files if not managed.matches(found.get(managed.path))]
    _show_diffs(differing)
    for together in _by_size(differing):
        yield from swap_in(*together, verified=verified)


def _by_size(files: Iterable[ManagedFile]) -> Iterator[list[ManagedFile]]:
    together: list[ManagedFile] = []
    for managed in files:
        if together and sum(f.size for f in (*together, managed)) > _TOGETHER_BYTES:
            yield together
            together = []
        together.append(managed)
    if together:
        yield together


def swap_in(*files: ManagedFile, verified: bool = False) -> Commands:
    """Put files in their places, each by a rename, for an operation that has more to do."""
    yield from stage(*files)
    if verified:
        yield sha256_check(*files)
    yield script(
        'while [ $# -gt 0 ]; do mv -fT -- "$1" "$2" || exit 1; shift 2; done',
        *(path for managed in files for path in (managed.candidate, managed.path)),
    )


def stage(*files: ManagedFile) -> Commands:
    """Upload the candidates, in their final mode and owner, beside the files."""
    for managed in files:
        if not record.is_generated(managed.path):
            yield record.file(managed.path, managed.sha256)
    # Empty files of the final mode and owner first: a secret is never readable by others.
    yield script(
        'while [ $# -gt 0 ]; do mkdir -p "$(dirname "$1")" && rm -f "$1" && '
        'install -m "$2" -o "$3" -g "$4" /dev/null "$1" || exit 1; shift 4; done',
        *(
            word
            for managed in files
            for word in (managed.candidate, managed.mode, managed.user, managed.group)
        ),
    )
    for managed in files:
        yield managed.upload()


def _show_diffs(files: Iterable[ManagedFile]) -> None:
    """With `--diff`, the lines that differ, each behind a `|`; of a secret, only that it does.

    All at once and before the first command: at prepare, an operation ends at its first one.
    """
    if not state.config.DIFF:
        return
    for managed in files:
        for line in _diff(managed):
            host.log(f"| {line}")


def _diff(managed: ManagedFile) -> Iterable[str]:
    if managed.secret or isinstance(managed.content, Path):
        return [f"{managed.path}: differs (its content is not shown)"]
    current = host.get_fact(facts.FileText, path=managed.path) or ""
    return difflib.unified_diff(
        current.splitlines(),
        managed.content.decode().splitlines(),
        fromfile=f"{managed.path} (on the host)",
        tofile=f"{managed.path} (declared)",
        lineterm="",
    )


@operation()
def directories(paths: Mapping[str, tuple[str, str]]) -> Commands:
    """Make folders. `paths`: path -> (mode, owner); the group is the owner's name."""
    found = host.get_fact(facts.FolderStates, paths=tuple(paths))
    missing = [path for path in paths if path not in found and not record.is_generated(path)]
    if missing:
        yield record.folders(missing)
    for path, (mode, owner) in paths.items():
        if found.get(path) != (mode, owner, owner):
            yield quoted("install", "-d", "-m", mode, "-o", owner, "-g", owner, "--", path)


@operation()
def link(path: str, target: str) -> Commands:
    """Make `path` a symbolic link to `target` by one rename: never absent, never half-done."""
    if f"{path} -> {target}" in host.get_fact(facts.Paths, paths=(path,)):
        return
    candidate = f"{path}.candidate"
    yield quoted("ln", "-sfn", "--", target, candidate)
    yield quoted("mv", "-fT", "--", candidate, path)


@operation()
def units_run(files: Mapping[str, Iterable[str]]) -> Commands:
    """Units enabled, and running since their files are as they are.

    + files: unit -> what it reads when it starts
    """
    found = host.get_fact(facts.UnitStates, units=tuple(files))
    stale = host.get_fact(
        facts.StaleUnits, units=tuple((unit, tuple(read)) for unit, read in files.items())
    )
    states = {unit: found.get(unit, facts.UnitState()) for unit in files}
    for unit, state_of in states.items():
        if unit in stale or not state_of.enabled:
            yield record.unit(unit)
    if stale or any(state_of.needs_daemon_reload for state_of in states.values()):
        yield quoted("systemctl", "daemon-reload")
    for unit, state_of in states.items():
        if not state_of.enabled:
            yield quoted("systemctl", "enable", "--quiet", unit)
        if unit in stale:
            yield quoted("systemctl", "restart", unit)


@operation()
def firewalld(
    role: str,
    ports: Iterable[int] = (),
    ports_from: Mapping[int | str, Iterable[str]] | None = None,
    closes: bool = True,
) -> Commands:
    """Open ports where firewalld runs, now and for good; close what this opened before.

    + role: whose ports these are; one call says all that a role wants open
    + ports: open to everybody
    + ports_from: port, or a range like 1024-65535, -> addresses that may connect; nobody else may,
      but to what somebody opened within a range
    + closes: whether what the role had opened and no longer wants is closed

    What somebody else opened stays open, but for a port of `ports_from`, which is for those
    addresses alone. Where it is part of more that was opened, that is somebody's to decide: fails.
    """
    found = host.get_fact(facts.Firewalld)
    if found is None:
        host.noop("firewalld does not run on this host")
        return
    restricted = {place: list(addresses) for place, addresses in (ports_from or {}).items()}
    wanted = {f"{port}/tcp" for port in ports} | {
        _rich_rule(address, place) for place in restricted for address in restricted[place]
    }
    noted = record.parse(found.notes).firewall
    mine = noted.get(role, record.Firewall()).opened
    others = {e for name, of in noted.items() if name != role for e in of.opened}
    there = found.permanent | found.runtime
    wider = [
        (entry, place)
        for entry in sorted(there - wanted - mine - others)
        for place in restricted
        if _lets_in(entry, place) and not _is_for(entry, place)
    ]
    if wider:
        yield fail(*(_too_wide(entry, place) for entry, place in wider))
        return
    yield from _opened(role, wanted, found, mine=mine, ours=mine | others)
    intruders = {
        entry for entry in there - wanted if any(_is_for(entry, place) for place in restricted)
    }
    stale = mine - wanted if closes else frozenset()
    for entry in sorted(stale | intruders):
        if entry not in mine | others:
            yield record.firewall(role, "shut", entry)
        if entry not in others:
            yield from firewall_cmd("remove", entry, having=found)
        if entry in mine:
            yield record.firewall(role, "closed", entry)


def _opened(
    role: str,
    wanted: Iterable[str],
    found: facts.FirewalldState,
    *,
    mine: frozenset[str],
    ours: frozenset[str],
) -> Commands:
    for entry in sorted(wanted):
        is_open = entry in found.permanent and entry in found.runtime
        if entry not in mine and (entry in ours or not is_open):
            yield record.firewall(role, "opened", entry)
        yield from firewall_cmd("add", entry, lacking=found)


def _ports(text: str) -> tuple[int, int]:
    """First and last of a port, or of a range like 1024-65535."""
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def _admitted(entry: str) -> tuple[int, int] | None:
    """The TCP ports that an entry of firewalld lets in; None where it does not, or not by port."""
    if not entry.startswith("rule "):
        ports, _, protocol = entry.partition("/")
        return _ports(ports) if protocol == "tcp" else None
    found = re.search(r' port port="([0-9-]+)" protocol="tcp"', entry)
    accepts = "accept" in re.sub(r'"[^"]*"', "", entry).split()
    return _ports(found.group(1)) if found and accepts else None


def _is_for(entry: str, place: int | str) -> bool:
    """Whether it lets in just this port, or range."""
    return _admitted(entry) == _ports(str(place))


def _lets_in(entry: str, place: int | str) -> bool:
    """Whether it lets in all of this port or range, and maybe more."""
    admitted, (first, last) = _admitted(entry), _ports(str(place))
    return admitted is not None and admitted[0] <= first and last <= admitted[1]


def _too_wide(entry: str, place: int | str) -> str:
    what = "rich-rule" if entry.startswith("rule ") else "port"
    option = shlex.quote(f"--remove-{what}={entry}")
    return (
        f"firewalld lets in {entry}, and by that {place}/tcp, which is for some addresses only; "
        f"open what else is needed of it by itself, and take it away: firewall-cmd {option}, and "
        f"the same with --permanent"
    )


def firewall_cmd(
    verb: str,
    entry: str,
    *,
    having: facts.FirewalldState | None = None,
    lacking: facts.FirewalldState | None = None,
) -> Commands:
    """`firewall-cmd` for a port or a rule, for good and now, where it is (or is not) there."""
    kind = "rich-rule" if entry.startswith("rule ") else "port"
    for mode, flag in (("permanent", ("--permanent",)), ("runtime", ())):
        if (having and entry in getattr(having, mode)) or (
            lacking and entry not in getattr(lacking, mode)
        ):
            yield quoted("firewall-cmd", "--quiet", *flag, f"--{verb}-{kind}={entry}")


def _rich_rule(address: str, port: int | str) -> str:
    # As firewall-cmd prints it back, so that a second run finds it.
    family = "ipv6" if ":" in address else "ipv4"
    return (
        f'rule family="{family}" source address="{address}" '
        f'port port="{port}" protocol="tcp" accept'
    )


def sha256_check(*files: ManagedFile) -> StringCommand:
    """Compare what arrived with what was sent, on the host."""
    return script(
        'while [ $# -gt 0 ]; do found=$(sha256sum <"$1" | cut -d " " -f 1); '
        'if [ "$found" != "$2" ]; then rm -f "$1"; '
        'echo "$1 arrived damaged (SHA-256 $found, expected $2); run again" >&2; exit 1; fi; '
        "shift 2; done",
        *(word for managed in files for word in (managed.candidate, managed.sha256)),
    )


APPLIED = "/var/lib/gpu-gateway/applied"
MANAGED = "/var/lib/gpu-gateway/managed"  # paths, a line each


@operation()
def run_nginx(
    files: Iterable[ManagedFile],
    main: Callable[[Version], ManagedFile],
    probe: str,
    oldest: Version = nginx_versions.OLDEST,
) -> Commands:
    """nginx enabled, running, and running *this* configuration; or what it ran before.

    + files: everything that belongs to it beside nginx.conf
    + main: nginx.conf, for the version that is installed
    + probe: where clients are served, as files/handshake.sh reads it
    + oldest: the oldest version that can do what is declared

    All candidates are staged beside the live files. One script does the rest, holding a lock, and
    ends what it began even if the connection is lost (files/nginx-activate.sh): the candidates are
    checked by this host's `nginx -t` and tried beside the live configuration
    (files/nginx-trial.sh), swapped in together, nginx reloaded, and a handshake tried. What
    nginx last took over is noted as a digest, so a run that was cut is repaired by the next,
    and one that changes nothing reloads nothing: a reload costs old worker processes that live
    as long as their sockets. Where another nginx was installed than the one that runs, it takes
    over with the configuration, and the listening sockets are handed on. Files that were among
    `files` once and are not any more go.
    """
    nginx = host.get_fact(facts.Nginx)
    version = nginx_versions.parse(nginx.told)
    if version is None and executing():
        yield fail(f"nginx does not say which version it is: {nginx.told or 'it is not installed'}")
        return
    # At prepare it may not be installed yet, or be one that this run will upgrade: a configuration
    # for the oldest that will do shows the rest.
    configuration = main(version if version and executing() else max(version or oldest, oldest))
    files = [configuration, *files]
    digest = hashlib.sha256("".join(f.path + f.sha256 for f in files).encode()).hexdigest()
    found = host.get_fact(facts.FileStates, paths=tuple(f.path for f in files))
    differing = [managed for managed in files if not managed.matches(found.get(managed.path))]
    unit = host.get_fact(facts.UnitStates, units=("nginx.service",)).get(
        "nginx.service", facts.UnitState()
    )
    _show_diffs(differing)
    if not unit.enabled:
        yield record.unit("nginx.service")
        yield quoted("systemctl", "enable", "--quiet", "nginx.service")
    applied = host.get_fact(facts.FileText, path=APPLIED) or ""
    settled = unit.active == "active" and not unit.needs_daemon_reload and not nginx.outdated
    if settled and not differing and applied.strip() == digest:
        return
    managed_before = (host.get_fact(facts.FileText, path=MANAGED) or "").split("\n")
    if gone := sorted({*managed_before} - {"", *(managed.path for managed in files)}):
        host.log(f"no longer declared, so it goes: {', '.join(gone)}")
    # What a run that was cut may have staged is not part of this one.
    yield quoted("rm", "-f", "--", *(managed.candidate for managed in files))
    for managed in differing:
        yield from stage(managed)
    yield record.unit("nginx.service")
    declared = (word for managed in files for word in (managed.sha256, managed.path))
    yield _nginx_activate(probe, digest, *declared)


# Who a certificate made here says that it is from; no other is ever replaced.
SELF_SIGNED_BY = "gpu-gateway self-signed"
SELF_SIGNED_DAYS = 90
SELF_SIGNED_RENEWED_S = 30 * 24 * 3600
NO_OPENSSL = (
    "openssl is missing on this host, which makes the certificate; install the package openssl"
)

# Both beside the old ones, then renamed: a run that was cut leaves a pair that does not match at
# worst, which the next one sees and makes anew.
_SELF_SIGNED = """
set -eu
mkdir -p "$(dirname "$1")"
umask 077
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$3" \
    -subj "/O=$4/CN=$5" -addext "subjectAltName=$6" -addext extendedKeyUsage=serverAuth \
    -addext basicConstraints=critical,CA:FALSE \
    -keyout "$2.candidate" -out "$1.candidate" 2>"$1.log" || { cat "$1.log" >&2; exit 1; }
rm -f "$1.log" "$7"
chmod 644 "$1.candidate"
mv -fT "$2.candidate" "$2"
mv -fT "$1.candidate" "$1"
"""


@operation()
def self_signed_certificate(certificate: str, key: str, names: Iterable[str]) -> Commands:
    """A certificate that this host made for itself; made anew before it ends.

    + certificate, key: where they lie
    + names: what it is for, as `DNS:NAME` or `IP:ADDRESS`

    One of somebody else is never replaced. nginx takes a new one over: what it last took over is
    forgotten.
    """
    wanted = list(dict.fromkeys(names))
    found = host.get_fact(
        facts.Certificate, certificate=certificate, key=key, seconds=SELF_SIGNED_RENEWED_S
    )
    ours = SELF_SIGNED_BY in found.issuer
    if found.exists and found.issuer and not ours:
        yield fail(
            f"{certificate} was not made by this deploy (issuer: {found.issuer}), so it stays; "
            "move it away, or name it as tls_certificate instead of tls_self_signed"
        )
        return
    if found.matches and found.lasts and found.names == frozenset(wanted):
        return
    if not found.openssl:
        yield fail(NO_OPENSSL)
        return
    reasons = {
        "its key is not its own, or one of the two is missing": not found.matches,
        f"it ends within {SELF_SIGNED_RENEWED_S // 86400} days": not found.lasts,
        f"it is for other names than {', '.join(wanted)}": found.names != frozenset(wanted),
    }
    if found.exists and executing():
        why = next(reason for reason, true in reasons.items() if true)
        host.log(f"{certificate} is made anew: {why}")
    yield from make_self_signed(certificate, key, wanted)


def make_self_signed(certificate: str, key: str, names: list[str]) -> Commands:
    """Make a certificate and its key; nginx takes it over with the next `run_nginx`."""
    yield record.file(certificate)
    yield record.file(key)
    yield script(
        _SELF_SIGNED,
        certificate,
        key,
        str(SELF_SIGNED_DAYS),
        SELF_SIGNED_BY,
        names[0].partition(":")[2][:64],
        ",".join(names),
        APPLIED,
    )


@operation(is_idempotent=False)
def nginx_previous() -> Commands:
    """The configuration that the last change replaced, live again; the same checks apply."""
    yield _nginx_activate("--previous")


def _nginx_activate(*arguments: str) -> StringCommand:
    parts = ("handshake.sh", "nginx-trial.sh", "nginx-activate.sh")
    text = "".join(rendering.shell(part) for part in parts)
    return quoted("bash", "-c", text, "nginx-activate", *arguments)


def nginx_check(path: str) -> StringCommand:
    """`nginx -t` of the target on a configuration, which leaves no pid file behind.

    `nginx -t` creates the pid file; made from a shell while nginx is stopped, it carries the
    wrong SELinux type and the next start fails with 13 (nginx/nginx#816).
    """
    return script(
        'had=$(test -e /run/nginx.pid && echo yes); nginx -t -q -c "$1"; status=$?; '
        '[ -n "$had" ] || rm -f /run/nginx.pid; '
        '[ $status -eq 0 ] || echo "refused by nginx -t of this host; the live configuration '
        'is as it was. Refused was $1" >&2; exit $status',
        path,
    )


@operation()
def barrier() -> Commands:
    """What stands below in deploy.py begins when every host has done what stands above.

    pyinfra orders operations per host only: without one that all hosts share, gateways would be
    configured while workers are still being installed. A host that failed above stops the
    others here, so that a gateway never learns of workers that did not come up.
    """
    failed = sorted(host.name for host in state.failed_hosts)
    if executing() and failed:
        yield fail(f"left as it is from here on, because this failed before: {', '.join(failed)}")


@operation()
def report() -> Commands:
    """Says for this host what the run came to. Changes nothing."""
    if executing():
        metas = [data.operation_meta for data in state.ops[host].values()]
        changed = sum(meta.is_complete() and meta.did_change() for meta in metas)
        count = "1 operation" if changed == 1 else f"{changed} operations"
        host.log(f"{count} changed it" if changed else "nothing was changed")
    yield from ()


@dataclass(frozen=True, kw_only=True)
class WorkerUnit:
    """One worker: its unit, the settings file that switches it, and the digest in that file.

    `keeps_socket`: systemd holds the listening socket, so that connects wait during a restart.
    `worker`: what it calls itself, HOST:PORT; `weight`: its share of the capacity of `service`.
    """

    name: str
    settings: ManagedFile
    deployment: str
    keeps_socket: bool
    worker: str = ""
    service: str = ""
    weight: int = 1

    @property
    def socket(self) -> str:
        return f"{self.name.removesuffix('.service')}.socket"

    @property
    def settings_to_switch(self) -> tuple[str, ...]:
        """What files/worker-switch.sh is told, once the settings are staged."""
        return self.name, self.settings.path, self.settings.candidate, self.settings.sha256

    def runs(self, service: facts.UnitState, socket: facts.UnitState) -> bool:
        """Whether what was declared is what runs, listening on the socket that was declared."""
        as_declared = service.is_up and service.deployment == self.deployment
        return as_declared and (socket.active == "active") == self.keeps_socket


@dataclass(frozen=True, kw_only=True)
class Roll:
    """What a rolling restart has to keep to, and whom it asks.

    `capacity`: service -> worker (HOST:PORT) -> weight; `gateways`: host name -> service -> where
    its clients are served, as files/handshake.sh reads it.
    """

    min_up: float = 0.0
    capacity: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    gateways: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fail_timeout_s: int = 0


@operation()
def roll_workers(
    workers: Iterable[WorkerUnit],
    rollout: Rollout,
    roll: Roll | None = None,
) -> Commands:
    """Workers enabled and running what was declared: switched one after the other.

    + workers: in the order in which they are switched
    + rollout: shared by all hosts of the run; host after host, in an order that does not change
    + roll: how much stays up, and which gateways have to see a worker before the next one goes

    Each worker's settings file is swapped in with its restart, under the same lock, so one whose
    turn has not come would, crashing, come back as it was. `systemctl restart` drains
    the worker, which takes no connection any more from then on (nginx turns to another), and
    returns when it is ready (`Type=notify`). One that does not become ready gets its previous
    settings back, and no other is touched (files/worker-switch.sh). Compared is what
    the *running process* was started with, so nothing is restarted twice, and nothing is
    forgotten when a run is cut.
    """
    workers = list(workers)
    roll = roll or Roll()
    found = _unit_states(workers)
    files = host.get_fact(facts.FileStates, paths=tuple(worker.settings.path for worker in workers))
    _show_diffs(
        worker.settings
        for worker in workers
        if not worker.settings.matches(files.get(worker.settings.path))
    )
    yield from _units_read(found)
    for worker in workers:
        service, socket = found[worker.name], found[worker.socket]
        _noted(worker, service, rollout)
        in_place = worker.settings.matches(files.get(worker.settings.path))
        yield from _enabled(worker, service, socket)
        if worker.runs(service, socket) and in_place:
            continue
        if executing():
            reason = _reason_to_wait(worker, service, socket, rollout, roll)
            if reason:
                rollout.begin(f"{worker.name} on {host.name}")
                yield fail(f"{worker.name} is as it was: {reason}")
                return
        if worker.runs(service, socket):
            yield from swap_in(worker.settings)  # only the file had drifted
            continue
        yield from stage(worker.settings)
        yield from _switched([worker], rollout)


@operation()
def start_workers(workers: Iterable[WorkerUnit], rollout: Rollout) -> Commands:
    """Workers that do not run, enabled and running what was declared: all at once, on all hosts,
    since that costs nobody anything.

    + workers, rollout: as for `roll_workers`
    """
    workers = list(workers)
    found = _unit_states(workers)
    for worker in workers:
        _noted(worker, found[worker.name], rollout)
    down = [worker for worker in workers if not found[worker.name].is_up]
    if not down:
        return
    yield from _units_read(found)
    for worker in down:
        yield from _enabled(worker, found[worker.name], found[worker.socket])
    yield from stage(*(worker.settings for worker in down))
    yield from _switched(down, rollout)


def _unit_states(workers: Iterable[WorkerUnit]) -> dict[str, facts.UnitState]:
    units = tuple(unit for worker in workers for unit in (worker.name, worker.socket))
    found = host.get_fact(facts.UnitStates, units=units)
    return {unit: found.get(unit, facts.UnitState()) for unit in units}


def _units_read(found: Mapping[str, facts.UnitState]) -> Commands:
    if any(unit.needs_daemon_reload for unit in found.values()):
        yield quoted("systemctl", "daemon-reload")


def _noted(worker: WorkerUnit, service: facts.UnitState, rollout: Rollout) -> None:
    if executing():
        weight = worker.weight if service.is_up else 0
        rollout.note(worker.worker, weight=weight, up_s=service.up_s, now=time.monotonic())


def _enabled(worker: WorkerUnit, service: facts.UnitState, socket: facts.UnitState) -> Commands:
    if not service.enabled:
        yield quoted("systemctl", "enable", "--quiet", worker.name)
    if socket.enabled != worker.keeps_socket:
        verb = "enable" if worker.keeps_socket else "disable"
        yield quoted("systemctl", verb, "--quiet", worker.socket)


def _switched(workers: list[WorkerUnit], rollout: Rollout) -> Commands:
    """Those whose settings are staged run them. Never ends if that fails, since the generator is
    not resumed then.
    """
    what = f"{', '.join(worker.name for worker in workers)} on {host.name}"
    if executing():
        rollout.begin(what)
    yield _switch_workers(worker.settings_to_switch for worker in workers)
    if executing():
        now = time.monotonic()
        rollout.end(what, {worker.worker: worker.weight for worker in workers}, now=now)


def _reason_to_wait(
    worker: WorkerUnit,
    service: facts.UnitState,
    socket: facts.UnitState,
    rollout: Rollout,
    roll: Roll,
) -> str | None:
    """Why a worker must not be restarted; returns when the gateways know of those before it."""
    if rollout.failed_on:
        return f"{rollout.failed_on} failed before it"
    if worker.runs(service, socket):
        return None  # it goes on
    failed = {found.name for found in state.failed_hosts}
    for other in roll.capacity.get(worker.service, {}):
        if other.rpartition(":")[0] in failed:
            rollout.lose(other)
    refused = rollout.refusal(
        worker.worker, min_up=roll.min_up, capacity=roll.capacity.get(worker.service, {})
    )
    if refused is None and service.is_up:
        _until_seen(rollout, roll)
    return refused


def _until_seen(rollout: Rollout, roll: Roll) -> None:
    """Wait until every gateway sends clients to the workers that were restarted before.

    One that cannot be asked, as it is not part of this run or failed in it, does so when nginx
    tries them by itself.
    """
    reached = {found.name: found for found in state.inventory.get_active_hosts()}
    all_told = True
    for name, places in roll.gateways.items():
        for service, place in places.items():
            unseen, seconds = _unseen(rollout, roll)
            waiting = [worker for worker in unseen if worker in roll.capacity.get(service, {})]
            if waiting:
                command = ("bash", "-c", rendering.shell("worker-seen.sh"), "worker-seen", place)
                asking = quoted(*command, str(math.ceil(seconds)), *waiting)
                told = name in reached and ask(asking, of=reached[name])[0]
                all_told = all_told and told
    if not all_told:
        time.sleep(_unseen(rollout, roll)[1])
    rollout.all_seen()


def _unseen(rollout: Rollout, roll: Roll) -> tuple[list[str], float]:
    return rollout.unseen(fail_timeout_s=roll.fail_timeout_s, now=time.monotonic())


def _switch_worker(*arguments: str) -> StringCommand:
    return quoted("bash", "-c", rendering.shell("worker-switch.sh"), "worker-switch", *arguments)


# $1: worker-switch; then four words for each worker.
_SWITCH_ALL = """
text=$1 failed=
shift
while [ $# -gt 0 ]; do
    bash -c "$text" worker-switch "$1" "$2" "$3" "$4" &
    switching="$switching $!"
    shift 4
done
for process in $switching; do wait "$process" || failed=yes; done
[ -z "$failed" ]
"""


def _switch_workers(settings: Iterable[tuple[str, ...]]) -> StringCommand:
    """Workers switched at the same time, each as if alone."""
    each = list(settings)
    if len(each) == 1:
        return _switch_worker(*each[0])
    words = (word for arguments in each for word in arguments)
    text = rendering.shell("worker-switch.sh")
    return quoted("bash", "-c", _SWITCH_ALL, "worker-switches", text, *words)


@operation(is_idempotent=False)
def previous_workers(units: Mapping[str, str], rollout: Rollout, roll: Roll) -> Commands:
    """Each worker back to what it ran before its last change, one after the other.

    + units: unit -> path of its settings file
    + rollout, roll: as for `roll_workers`
    """
    found = host.get_fact(facts.UnitStates, units=tuple(units))
    workers = {u: f"{host.name}:{u.partition('@')[2].removesuffix('.service')}" for u in units}
    if executing():
        for unit, state_of in found.items():
            now = time.monotonic()
            rollout.note(workers[unit], weight=int(state_of.is_up), up_s=state_of.up_s, now=now)
    for unit, settings in units.items():
        if executing():
            if rollout.failed_on:
                yield fail(f"{unit} is as it was: {rollout.failed_on} failed before it")
                return
            _until_seen(rollout, roll)
            rollout.begin(f"{unit} on {host.name}")
        yield _switch_worker("--previous", unit, settings)
        if executing():
            rollout.end(f"{unit} on {host.name}", {workers[unit]: 1}, now=time.monotonic())


@operation()
def retire_workers(keep: Iterable[int], settings_file: Callable[[int], str]) -> Commands:
    """Worker instances that are no longer declared: drained, stopped, disabled, forgotten.

    + keep: ports that stay
    + settings_file: port -> path of its settings
    """
    kept = set(keep)
    retired = [port for port in host.get_fact(facts.WorkerPorts) if port not in kept]
    if not retired:
        return
    for port in retired:
        units = (f"gpu-worker@{port}.socket", f"gpu-worker@{port}.service")
        yield quoted("systemctl", "disable", "--quiet", "--now", *units)
        path = settings_file(port)
        left = (path, f"{path}.previous", f"{path}.rollback", unix_socket(port))
        yield quoted("rm", "-f", "--", *left)
