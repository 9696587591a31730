"""Takes away what deploys made of a host, by the record that they kept there (provision/record.py).

Pure functions compare what was found at first, what was written since and what is there now;
operations do what follows, and what stays is a `Left`, which says why. All of it is worked out anew
from the host each time, so a run that was cut is finished by the next.
"""

from __future__ import annotations

import posixpath
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pyinfra import host
from pyinfra.api import FactBase, StringCommand, deploy, operation
from typing_extensions import override

from provision import facts, nginx_packages, operations, record, selinux
from provision.facts import FileState, SelinuxMode, quoted, script
from provision.operations import Commands, executing, fail
from provision.record import Record
from provision.settings import SERVICE_STATE, UNITS

NGINX = "nginx.service"
NGINX_CONF = "/etc/nginx/nginx.conf"
TRAINING = "gpu-training.service"
RECORD = posixpath.basename(record.FOLDER)

# What nginx reads, so that it stays where nginx stays as it is.
_NGINX_READS = (
    "/etc/nginx/",
    "/usr/share/nginx/",
    "/etc/logrotate.d/nginx",
    f"{UNITS}/nginx.service.d/",
    "/etc/pki/gpu-gateway/",
)
# What a switch of a worker, or a run that was cut, leaves beside a file; copies of keys among it.
_BESIDE = ("{}.previous", "{}.rollback", "{}.candidate", "{}.log")
_HIDDEN = ("candidate", "incoming", "outgoing")


@dataclass(frozen=True, kw_only=True)
class Left:
    """Something that stays on the host, and why."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} stays: {self.why}"


class Do(StrEnum):
    """What becomes of a file."""

    RESTORE = "restore"  # its content from before the first deploy
    REMOVE = "remove"


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """What becomes of the files that were written."""

    steps: Mapping[str, Do]
    left: tuple[Left, ...]

    def those(self, do: Do) -> list[str]:
        return [path for path, step in self.steps.items() if step is do]


def plan_files(noted: Record, present: Mapping[str, FileState]) -> FilePlan:
    """Back to what was found, where it still is what was written. Pure."""
    steps: dict[str, Do] = {}
    left = []
    for path, found in noted.of("file").items():
        now = present.get(path)
        if now is None or _as_noted(now) == found:
            continue
        written = noted.wrote.get(("file", path))
        if written and now.sha256 not in written:
            left.append(Left(what=path, why="somebody changed it since the last deploy"))
        else:
            steps[path] = Do.REMOVE if found == "absent" else Do.RESTORE
    return FilePlan(steps=steps, left=tuple(left))


def _as_noted(state: FileState) -> str:
    return f"{state.mode} {state.user} {state.group} {state.sha256}"


class Fate(StrEnum):
    """What becomes of nginx."""

    UNTOUCHED = "untouched"  # no deploy ever changed it
    GONE = "gone"  # a deploy installed it
    AS_FOUND = "as found"  # with the configuration from before the first deploy
    LEFT = "left"  # as it is now: its configuration is somebody else's


def nginx_fate(noted: Record, plan: FilePlan, foreign: Iterable[str]) -> Fate:
    """`foreign`: configuration of nginx that neither a package nor a deploy placed. Pure."""
    ours = installed_nginx(noted)
    if not ours and NGINX_CONF not in noted.of("file") and NGINX not in noted.of("unit"):
        return Fate.UNTOUCHED
    if any(stays.what == NGINX_CONF for stays in plan.left):
        return Fate.LEFT
    return Fate.GONE if ours and not list(foreign) else Fate.AS_FOUND


def installed_nginx(noted: Record) -> bool:
    """Whether nginx came by a deploy, under the name that `nginx_package` had. Pure."""
    if any("nginx" in kinds.get("package", ()) for kinds in noted.came.values()):
        return True
    asked = [found for name, found in noted.of("package").items() if name.startswith("nginx")]
    return bool(asked) and all(found == "absent" for found in asked)


def is_nginx_s(path: str) -> bool:
    """Whether nginx reads a file."""
    return path.startswith(_NGINX_READS)


class ForeignConfiguration(facts.Lines):
    """Files that nginx includes and no package owns; those of `known` left out."""

    @override
    def command(self, known: Iterable[str]) -> StringCommand:
        return script(
            "for f in /etc/nginx/conf.d/*.conf /etc/nginx/default.d/*.conf "
            '/etc/nginx/sites-enabled/*; do [ -e "$f" ] || continue; '
            'for k; do [ "$k" != "$f" ] || continue 2; done; '
            'rpm -qf "$f" >/dev/null 2>&1 || dpkg -S "$f" >/dev/null 2>&1 || '
            'printf "%s\\n" "$f"; done; true',
            *known,
        )


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Packages of a list that are installed, with their versions; what else needs them."""

    installed: Mapping[str, str] = field(default_factory=dict)
    obstacles: tuple[str, ...] = ()


class LeavingPackages(FactBase[Leaving]):
    """What would become of packages if they went together."""

    @override
    def command(self, packages: Iterable[str]) -> StringCommand:
        return script(
            "if command -v dnf >/dev/null || command -v yum >/dev/null; then "
            'set -- $(for p; do rpm -q --queryformat "%{NAME}\\n" -- "$p" 2>/dev/null | '
            'sed "s/^gpg-pubkey$/$p/" | grep -xF -- "$p"; done | sort -u); '
            "[ $# -gt 0 ] || exit 0; "
            'for p; do rpm -q --queryformat "+$p %{VERSION}-%{RELEASE}\\n" -- "$p"; done; '
            'rpm -e --test -- "$@" 2>&1 | grep "is needed by"; true; else '
            'set -- $(dpkg-query --show --showformat "\\${db:Status-Abbrev} \\${Package}\\n" '
            "-- \"$@\" 2>/dev/null | sed -n 's/^ii *//p'); [ $# -gt 0 ] || exit 0; "
            'dpkg-query --show --showformat "+\\${Package} \\${Version}\\n" -- "$@"; '
            'dpkg --dry-run --remove -- "$@" 2>&1 | grep " depends on "; true; fi',
            *packages,
        )

    @staticmethod
    @override
    def default() -> Leaving:
        return Leaving()

    @override
    def process(self, output: list[str]) -> Leaving:
        pairs = (line[1:].partition(" ") for line in output if line.startswith("+"))
        return Leaving(
            installed={name: version for name, _, version in pairs},
            obstacles=tuple(" ".join(line.split()) for line in output if line[:1] != "+"),
        )


# Exactly these: what the package manager thinks is no longer needed stays. Debian's nginx would
# take its logs along.
_UNINSTALL = """
if command -v dnf >/dev/null || command -v yum >/dev/null; then
    for name; do
        shift
        case $name in
            gpg-pubkey-*) rpm -e -- "$name" || exit 1 ;;
            *) set -- "$@" "$name" ;;
        esac
    done
    [ $# -gt 0 ] || exit 0
    exec yum remove -y --setopt=clean_requirements_on_remove=False -- "$@"
fi
logs=/var/log/nginx
[ ! -d $logs ] || mv -T $logs $logs.kept || exit 1
DEBIAN_FRONTEND=noninteractive apt-get purge -y --quiet --no-auto-remove -- "$@"
status=$?
[ ! -d $logs.kept ] || { rm -rf $logs && mv -T $logs.kept $logs; }
exit $status
"""


class Accounts(facts.LineSet):
    """Which of the words `user:NAME` and `group:NAME` exist on the host itself."""

    @override
    def command(self, accounts: Iterable[str]) -> StringCommand:
        return script(
            "for a; do case $a in user:*) f=/etc/passwd ;; *) f=/etc/group ;; esac; "
            'cut -d : -f 1 "$f" | grep -qxF -- "${a#*:}" && printf "%s\\n" "$a"; done; true',
            *accounts,
        )


def _noted() -> Record:
    return host.get_fact(record.Journal)


def _files(noted: Record) -> FilePlan:
    present = host.get_fact(facts.FileStates, paths=tuple(noted.of("file")))
    return plan_files(noted, present)


def _fate(noted: Record, plan: FilePlan) -> tuple[Fate, tuple[str, ...]]:
    foreign = host.get_fact(ForeignConfiguration, known=tuple(noted.of("file")))
    return nginx_fate(noted, plan, foreign), foreign


def _say(lines: Iterable[object]) -> None:
    """What an operation does, before it does it: at prepare it ends with its first command."""
    for line in lines:
        host.log(f"| {line}")


@deploy("Uninstall")
def host_as_found(keep: frozenset[str]) -> None:
    """Everything but the workers, which have stopped. `keep`: `models`, `logs`."""
    record.installation_ended(name="What came here is noted")
    nginx_as_found(name="nginx is as it was found")
    units_stop(name="Units that were placed here have stopped")
    firewall_as_found(name="The firewall is as it was found")
    selinux_as_found(name="SELinux is as it was found")
    nginx_packages.keys_go(name="Keys of nginx.org's repository are gone")
    files_as_found(name="Files are as they were found")
    folders_go(name="Folders that were made here are gone", keep=keep)
    packages_go(name="Packages that were installed here are gone")
    accounts_go(name="Users that were made here are gone")
    record_goes(name="What is left, and why", keep=keep)


@operation()
def idle() -> Commands:
    """Refuse a host that trains, or holds a trained model that nobody fetched."""
    unit = host.get_fact(facts.UnitStates, units=(TRAINING,)).get(TRAINING, facts.UnitState())
    if unit.active in ("inactive", "failed"):
        return
    state = "has ended and was not fetched" if unit.sub == "exited" else "is under way"
    yield fail(
        f"a training run {state} here; nothing was touched. `pyinfra inventory.py train.py` "
        "follows and fetches it, `--data train=stop` ends and forgets it"
    )


@operation()
def workers_stop() -> Commands:
    """All worker instances: drained, stopped, disabled."""
    units = [
        f"gpu-worker@{port}.{kind}"
        for port in host.get_fact(facts.WorkerPorts)
        for kind in ("socket", "service")
    ]
    if units:
        _say(f"stops {unit}" for unit in units)
        yield quoted("systemctl", "disable", "--quiet", "--now", *units)
        yield script('systemctl reset-failed "$@" 2>/dev/null; true', *units)


@operation()
def nginx_as_found() -> Commands:
    """Stopped where a deploy installed it; else it runs with what it was found with.

    Its old configuration is checked by nginx before it is swapped in; where that is refused,
    nginx goes on with the present one, and the run ends saying so.
    """
    noted = _noted()
    plan = _files(noted)
    fate, foreign = _fate(noted, plan)
    unit = host.get_fact(facts.UnitStates, units=(NGINX,)).get(NGINX, facts.UnitState())
    if fate is Fate.GONE:
        if unit.active != "inactive" or unit.enabled:
            _say([f"stops {NGINX}"])
            yield quoted("systemctl", "disable", "--quiet", "--now", NGINX)
        return
    if fate is not Fate.AS_FOUND:
        return
    # Somebody's servers run in the nginx that came with a deploy.
    was = "enabled active" if foreign else noted.of("unit").get(NGINX, "")
    steps = [path for path in plan.those(Do.RESTORE) if is_nginx_s(path)]
    gone = [path for path in plan.those(Do.REMOVE) if is_nginx_s(path)]
    _say([*(f"restores {path}" for path in steps), *(f"removes {path}" for path in gone)])
    yield from _put_back(steps, check=NGINX_CONF)
    if steps or gone:
        verb = "stop" if was.endswith(" inactive") else "reload-or-restart"
        if unit.active == "active":
            yield quoted("systemctl", verb, NGINX)
        if gone:
            yield quoted("rm", "-f", "--", *gone)
        yield quoted("systemctl", "daemon-reload")
    elif was.endswith(" inactive") and unit.active == "active":
        yield quoted("systemctl", "stop", NGINX)
    if was.startswith("disabled") and unit.enabled:
        yield quoted("systemctl", "disable", "--quiet", NGINX)


def _put_back(paths: Iterable[str], *, check: str = "") -> Commands:
    """Files from their copies, all staged before the first is swapped in."""
    paths = list(paths)
    for path in paths:
        yield script(
            'cp -a "$1" "$2.partial" && mv -fT "$2.partial" "$2"',
            f"{record.FOLDER}/found{path}",
            operations.beside(path, "candidate"),
        )
    if check in paths:
        yield operations.nginx_check(operations.beside(check, "candidate"))
    for path in paths:
        yield quoted("mv", "-fT", "--", operations.beside(path, "candidate"), path)


def remains_of(paths: Iterable[str]) -> list[str]:
    """Where runs may have left something beside files that they wrote. Pure."""
    return [
        other
        for path in paths
        for other in (
            *(operations.beside(path, what) for what in _HIDDEN),
            *(pattern.format(path) for pattern in _BESIDE),
        )
    ]


def placed_units(noted: Record) -> list[str]:
    """Units whose file a deploy placed where there was none; instances of templates apart. Pure."""
    return [
        posixpath.basename(path)
        for path, found in noted.of("file").items()
        if posixpath.dirname(path) == UNITS and found == "absent" and "@" not in path
    ]


@operation()
def units_stop() -> Commands:
    """Units of our own: stopped and disabled. Those of others: enabled and active as found."""
    noted = _noted()
    placed = placed_units(noted)
    others = [name for name in noted.of("unit") if name not in {NGINX, *placed}]
    now = host.get_fact(facts.UnitStates, units=(*placed, *others))
    # Timers and sockets first, or they start what was just stopped.
    for name in sorted(placed, key=lambda unit: unit.endswith(".service")):
        unit = now.get(name, facts.UnitState())
        if unit.active not in ("inactive", "failed") or unit.enabled:
            _say([f"stops {name}"])
            yield quoted("systemctl", "disable", "--quiet", "--now", name)
    for name in others:
        enabled, _, active = noted.of("unit")[name].partition(" ")
        unit = now.get(name, facts.UnitState())
        if enabled != "enabled" and unit.enabled:
            yield quoted("systemctl", "disable", "--quiet", name)
        if active != "active" and unit.active == "active":
            yield quoted("systemctl", "stop", name)


@operation()
def firewall_as_found() -> Commands:
    """Ports that a deploy opened are closed, those that it shut are open again."""
    found = host.get_fact(facts.Firewalld)
    if found is None:
        return
    noted = record.parse(found.notes).firewall.values()
    opened = {entry for role in noted for entry in role.opened}
    shut = {entry for role in noted for entry in role.shut} - opened
    there = found.permanent | found.runtime
    _say(f"closes {entry}" for entry in sorted(opened & there))
    for entry in sorted(opened):
        yield from operations.firewall_cmd("remove", entry, having=found)
    for entry in sorted(shut):
        yield from operations.firewall_cmd("add", entry, lacking=found)


@operation()
def selinux_as_found() -> Commands:
    """Mode, booleans and ports, where they still are what a deploy made of them."""
    noted = _noted()
    was, wrote = noted.of("selinux").get("mode"), noted.wrote.get(("selinux", "mode"), frozenset())
    if was is not None:
        running, _, configured = was.partition(" ")
        now = host.get_fact(facts.Selinux)
        if now.configured != configured and now.configured in wrote:
            yield selinux.configured(configured)
        live = (SelinuxMode.ENFORCING, SelinuxMode.PERMISSIVE)
        if now.running != running and now.running in live and now.running in wrote:
            yield quoted("setenforce", "1" if running == SelinuxMode.ENFORCING else "0")
    booleans = noted.of("boolean")
    states = host.get_fact(facts.SelinuxBooleans, booleans=tuple(booleans)) if booleans else {}
    for boolean, value in booleans.items():
        if boolean in states and states[boolean].active != (value == "on"):
            _say([f"switches {boolean} {value}"])
            yield quoted("setsebool", "-P", boolean, value)
    ports = list(noted.of("port"))
    given = host.get_fact(facts.SelinuxPorts, local=True) if ports else []
    labelled = {f"{found.type} tcp {found.first}" for found in given if found.first == found.last}
    if stale := [port for port in ports if port in labelled]:
        _say(f"takes the label {port.split()[0]} from port {port.split()[2]}" for port in stale)
        yield script(
            'printf "%s\\n" "$@" | semanage import',
            *(f"port -d -p {port.split()[1]} {port.split()[2]}" for port in stale),
        )


@operation()
def files_as_found() -> Commands:
    """What is not changed back with nginx. Where nginx stays as it is, what it reads does too."""
    noted = _noted()
    plan = _files(noted)
    fate, _ = _fate(noted, plan)
    settled = fate in (Fate.LEFT, Fate.UNTOUCHED)
    paths = [path for path in plan.steps if not (settled and is_nginx_s(path))]
    changed = {stays.what for stays in plan.left}
    remains = host.get_fact(
        facts.Paths,
        paths=tuple(remains_of(path for path in noted.of("file") if path not in changed)),
    )
    _say(f"{plan.steps[path]}s {path}" for path in paths)
    yield from _put_back(path for path in paths if plan.steps[path] is Do.RESTORE)
    gone = [*(path for path in paths if plan.steps[path] is Do.REMOVE), *sorted(remains)]
    if gone:
        yield quoted("rm", "-f", "--", *gone)
    if any(path.startswith(UNITS) for path in paths):
        yield quoted("systemctl", "daemon-reload")


def installed_here(noted: Record, fate: Fate) -> dict[str, tuple[str, ...]]:
    """Package that was asked for -> it and those that came with it, where they are to go; in the
    order in which they came. Pure.
    """
    brought = {name: kinds.get("package", ()) for name, kinds in noted.came.items()}
    absent = {name: () for name, found in noted.of("package").items() if found == "absent"}
    return {
        name: (*dict.fromkeys((name, *names)),)
        for name, names in {**absent, **brought}.items()
        if fate is Fate.GONE or not name.startswith("nginx")
    }


def _leaving(noted: Record, fate: Fate) -> dict[str, Leaving]:
    """Package that was asked for -> what is installed of it, the last one first.

    What came later may need what came before, so it goes first; each is asked about together with
    those that go before it.
    """
    found = {}
    going: list[str] = []
    for asked, names in reversed(installed_here(noted, fate).items()):
        told = host.get_fact(LeavingPackages, packages=(*going, *names))
        own = {name: version for name, version in told.installed.items() if name in names}
        found[asked] = Leaving(installed=own, obstacles=told.obstacles if own else ())
        if not told.obstacles:
            going += names
    return found


def _free(noted: Record) -> list[str]:
    """What deploys installed and nothing else needs, gone already or not."""
    fate, _ = _fate(noted, _files(noted))
    leaving = _leaving(noted, fate)
    brought = installed_here(noted, fate)
    return [name for asked in brought if not leaving[asked].obstacles for name in brought[asked]]


@operation()
def packages_go() -> Commands:
    """Packages that a deploy installed, with what came with them, unless something else needs them.

    Nothing beyond the list goes: what the package manager thinks is no longer needed stays.
    """
    noted = _noted()
    fate, _ = _fate(noted, _files(noted))
    going = [
        leaving.installed
        for leaving in _leaving(noted, fate).values()
        if leaving.installed and not leaving.obstacles
    ]
    _say(f"uninstalls {name}" for names in going for name in names)
    for names in going:
        yield script(_UNINSTALL, *names)


def replaced_packages(noted: Record, installed: Mapping[str, str]) -> list[Left]:
    """Packages that were there in another version, which a deploy replaced. Pure."""
    return [
        Left(
            what=f"package {name} {installed[name]}",
            why=f"it was {found} before the first deploy; put that back with your package manager",
        )
        for name, found in noted.of("package").items()
        if found not in ("absent", installed.get(name))
        and installed.get(name) in noted.wrote.get(("package", name), ())
    ]


def packages_left(leaving: Leaving, *, gone: bool) -> list[Left]:
    """Packages that something needs; or, when those that can go are `gone`, all that are there.
    Pure.
    """
    reasons = leaving.obstacles[:3]
    if gone and leaving.installed and not reasons:
        reasons = ("it came by a deploy, and the package manager did not take it away",)
    return [Left(what=f"package {', '.join(leaving.installed)}", why=why) for why in reasons]


def folders_of(
    noted: Record, keep: frozenset[str], packages: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """Folders that go whole, and those that go where they are empty, the deepest first. Pure.

    `packages`: those that go, or have gone. What their daemons wrote goes with them: logs, which
    may be older, where they are not to be kept, and state where it came by a deploy.
    """
    daemons = record.daemons(packages)
    found = noted.of("folder")
    whole = list(record.TREES)
    whole += [path for path in record.KEPT_TREES if "models" not in keep]
    whole += [path for daemon in daemons for path in daemon.state if path in found]
    whole += [path for daemon in daemons for path in daemon.logs if "logs" not in keep]
    kept = (*whole, *(record.LOGS if "logs" in keep else ()))
    made = sorted(found, key=lambda path: path.count("/"), reverse=True)
    return whole, [
        path
        for path in made
        if not record.is_generated(path)
        and not any(f"{path}/".startswith(f"{folder}/") for folder in kept)
    ]


@operation()
def folders_go(keep: frozenset[str]) -> Commands:
    """Folders of ours; with what is in them where all of it was generated."""
    noted = _noted()
    whole, made = folders_of(noted, keep, _free(noted))
    of_gateway = host.get_fact(facts.NewestFirst, paths=(record.STATE,)).get(record.STATE, [])
    whole += [f"{record.STATE}/{name}" for name in of_gateway if name != RECORD]
    there = host.get_fact(facts.Paths, paths=tuple(whole))
    present = [path for path in whole if path in there]
    if present:
        _say(f"removes {path}" for path in present)
        yield quoted("rm", "-rf", "--", *present)
    empty = host.get_fact(EmptyFolders, paths=tuple(made))
    if empty:
        _say(f"removes {path}" for path in empty)
        yield script('for p; do rmdir -- "$p" || exit 1; done', *empty)


class EmptyFolders(facts.Lines):
    """Which folders would be empty, one after the other, when those before them are gone."""

    @override
    def command(self, paths: Iterable[str]) -> StringCommand:
        return script(
            'gone=; for p; do [ -d "$p" ] || continue; '
            'for c in "$p"/* "$p"/.[!.]*; do { [ -e "$c" ] || [ -L "$c" ]; } || continue; '
            'case "$gone" in *"|$c|"*) ;; *) continue 2 ;; esac; done; '
            'gone="$gone|$p|"; printf "%s\\n" "$p"; done; true',
            *paths,
        )


def accounts_of(noted: Record, going: Container[str]) -> list[str]:
    """`user:NAME` and `group:NAME` that deploys, or packages that they installed, made. Pure.

    `going`: packages that were asked for, of which nothing stays; what stays keeps its accounts.
    """
    found = [
        f"{kind}:{name}"
        for kind in ("user", "group")
        for name, was in noted.of(kind).items()
        if was == "absent"
    ]
    came = [
        f"{kind}:{name}"
        for package, kinds in noted.came.items()
        for kind in ("user", "group")
        for name in kinds.get(kind, ())
        if package in going
    ]
    return sorted({*found, *came}, reverse=True)  # users before groups


# Files that stay (logs, models) go to root: nobody else may get them with the number.
_USERDEL = """
user=$1
shift
pkill -KILL -u "$user" 2>/dev/null
for kept; do
    [ ! -d "$kept" ] || find "$kept" -user "$user" -exec chown -h root:root {} +
done
userdel "$user"
"""


@operation()
def accounts_go() -> Commands:
    """Users and groups that were made here. What stays of their files becomes root's."""
    noted = _noted()
    fate, _ = _fate(noted, _files(noted))
    going = [
        asked
        for asked, leaving in _leaving(noted, fate).items()
        # Before the packages went: those that will.
        if not leaving.obstacles and not (executing() and leaving.installed)
    ]
    wanted = accounts_of(noted, going)
    there = host.get_fact(Accounts, accounts=tuple(wanted))
    _say(f"removes {account.replace(':', ' ')}" for account in wanted if account in there)
    for account in wanted:
        kind, _, name = account.partition(":")
        if account not in there:
            continue
        if kind == "user":
            yield script(_USERDEL, name, *record.LOGS, SERVICE_STATE)
        else:  # userdel took it where it was the user's own
            yield script('! grep -q "^$1:" /etc/group || groupdel "$1"', name)


def left_on(noted: Record, keep: frozenset[str]) -> list[Left]:
    """What somebody changed since, or still needs, so that the record of it has to stay."""
    plan = _files(noted)
    fate, foreign = _fate(noted, plan)
    left = list(plan.left)
    if fate is Fate.LEFT:
        left.append(Left(what="nginx", why=f"{NGINX_CONF} is not what a deploy wrote"))
    if foreign and installed_nginx(noted):
        left.append(Left(what="nginx", why=f"it serves {', '.join(foreign)}"))
    for leaving in _leaving(noted, fate).values():
        left += packages_left(leaving, gone=executing())
    now = host.get_fact(LeavingPackages, packages=tuple(noted.of("package")))
    left += replaced_packages(noted, now.installed)
    if not executing():  # what is in the folders now goes first
        return left
    _, made = folders_of(noted, keep)
    there = host.get_fact(facts.FolderStates, paths=tuple(made))
    left += [
        Left(what=path, why="there are files in it that no deploy placed")
        for path in made
        if path in there
    ]
    return left


@operation()
def record_goes(keep: frozenset[str]) -> Commands:
    """Say what stays. The record goes last, and only where nothing is left that it tells of."""
    noted = _noted()
    left = left_on(noted, keep)
    kept = {SERVICE_STATE: "models", **dict.fromkeys(record.LOGS, "logs")}
    there = host.get_fact(facts.FolderStates, paths=(record.STATE, *kept))
    _say(left)
    _say(
        f"{path} stays: {what} are kept"
        for path, what in kept.items()
        if what in keep and path in there
    )
    if noted.is_late:
        since = noted.of("run").get("first", "")
        _say([f"what deploys changed before {since} was not recorded, and stays"])
    if left:
        _say([f"{record.FOLDER} stays: it tells what was found, with copies of the files"])
    elif record.STATE in there:
        yield quoted("rm", "-rf", "--", record.STATE)
