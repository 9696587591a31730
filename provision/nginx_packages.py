"""Where nginx comes from, and in which version: the distribution's packages, a module stream of
dnf, or nginx.org's own, by dnf (Enterprise Linux 8 to 10) or apt (Debian, Ubuntu).

Installing replaces files only: what a live nginx runs is changed by `operations.run_nginx`, which
hands its sockets on. Enterprise Linux's packages do so themselves and leave it nothing to do;
Debian's would restart nginx, and are kept from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyinfra import host
from pyinfra.api import operation

from provision import facts, nginx_versions, record, rendering
from provision.facts import quoted, script
from provision.nginx_versions import Feature
from provision.operations import Commands, ManagedFile, ask, fail, stage, swap_in
from provision.preflight import RefusedError
from provision.rendering import CHECKOUT
from provision.settings import GatewaySettings

# The repository of nginx.org, as it is called in dnf.
REPOSITORY = "gateway-nginx"

DNF_REPOSITORY = f"/etc/yum.repos.d/{REPOSITORY}.repo"
DNF_KEY = f"/etc/pki/rpm-gpg/RPM-GPG-KEY-{REPOSITORY}"
APT_REPOSITORY = f"/etc/apt/sources.list.d/{REPOSITORY}.sources"
APT_KEY = f"/usr/share/keyrings/{REPOSITORY}.asc"

# What this module leaves on hosts, beside the package: only while nginx_source is "nginx.org". dnf
# imports the keys into rpm's database, too (rpm -q gpg-pubkey); `keys_go` takes them out.
FILES = (DNF_REPOSITORY, DNF_KEY, APT_REPOSITORY, APT_KEY)

# A server on port 80 with nginx's welcome page, which nginx.org's packages bring and the deploy's
# nginx.conf would include.
WELCOME = "/etc/nginx/conf.d/default.conf"
NO_WELCOME = "# Emptied by the gateway's deploy: the package has a server on port 80 here."
_EMPTIED = ManagedFile(path=WELCOME, content=f"{NO_WELCOME}\n".encode())
# dnf keeps it aside, apt where it is, when the package goes.
_WELCOME_GOES = """
text=$1
shift
for file; do [ "$(cat "$file" 2>/dev/null)" != "$text" ] || rm -f "$file"; done
"""

# KEYFILE ENTRY…: those of rpm's entries that are of its keys. rpm has the last eight digits of a
# key's id, or more, for a version.
_KEYS_GO = """
command -v gpg >/dev/null || exit 0
home=$(mktemp -d) && trap 'rm -rf "$home"' EXIT
ids=$(gpg --homedir "$home" --show-keys --with-colons "$1" 2>/dev/null |
    awk -F : '$1 == "pub" { print tolower(substr($5, 9)) }')
shift
for entry; do
    id=${entry%-*}
    id=${id#"${id%????????}"}
    printf '%s\\n' "$ids" | grep -qxF -- "$id" || continue
    ! rpm -q "$entry" >/dev/null 2>&1 || rpm -e -- "$entry" || exit 1
done
"""

# Where dnf keeps which stream is enabled.
MODULE = "/etc/dnf/modules.d/nginx.module"

# What decides whether Debian's packages may start and stop services. There only while they are
# installed (files/apt-install.sh).
APT_POLICY = "/usr/sbin/policy-rc.d"

# Enterprise Linux 9 and 10 have the binary in a package of its own, which nginx.org's replaces;
# Debian's nginx wants nginx-common of exactly its version.
CORE, COMMON = "nginx-core", "nginx-common"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is declared. `needed`: setting -> what nginx has to be new enough for."""

    package: str
    source: str
    stream: str | None
    version: str | None
    mirror: str
    key: bytes
    needed: Mapping[str, Feature]

    @property
    def series(self) -> str | None:
        """The release, or the series, that is looked for; None: any."""
        return self.version or (self.stream if self.source == "module" else None)

    @property
    def by_choice(self) -> bool:
        """Whether not every version will do, so that one is looked for."""
        return bool(self.series or self.needed) or self.source == "nginx.org"


def wanted(settings: GatewaySettings) -> Wanted:
    """What the settings declare."""
    return Wanted(
        package=settings.nginx_package,
        source=settings.nginx_source,
        stream=settings.nginx_stream,
        version=settings.nginx_version,
        mirror=settings.nginx_mirror,
        key=_key(settings),
        needed=settings.needed_features,
    )


def refuse_incapable(declared: Wanted) -> None:
    """Raises `RefusedError` where the nginx that this host has, and would keep, cannot do what the
    settings ask for. A host is asked only where they ask for something."""
    if not declared.needed:
        return
    found = _found(declared)
    version = nginx_versions.parse(found.packages.get(declared.package, ""))
    if version and fits(declared, found):
        problems = nginx_versions.problems(version, declared.needed)
        if problems:
            raise RefusedError([f"{host.name}: {problem}" for problem in problems])


def _key(settings: GatewaySettings) -> bytes:
    if settings.nginx_source != "nginx.org":
        return b""
    return (CHECKOUT / settings.nginx_signing_key).read_bytes()


def _found(declared: Wanted) -> facts.PackageState:
    return host.get_fact(
        facts.Packages,
        names=(declared.package, CORE, COMMON),
        files=(*FILES, WELCOME, _EMPTIED.candidate),
    )


def _repository_of(found: facts.PackageState) -> list[str]:
    """What this module left of nginx.org's repository. Pure."""
    return [path for path in found.files if path in FILES]


def fits(declared: Wanted, found: facts.PackageState) -> bool:
    """Whether what is installed is what is declared. Pure."""
    installed = found.packages.get(declared.package, "")
    version = nginx_versions.parse(installed)
    if version is None or (declared.series and not version.is_in(declared.series)):
        return False
    if declared.source == "module":
        return found.stream == declared.stream
    if declared.source == "nginx.org":
        return is_of_nginx_org(installed)
    # A build that somebody else put there stays; one that came by this deploy's repository goes
    # with it.
    return not (_repository_of(found) and is_of_nginx_org(installed))


def is_of_nginx_org(package: str) -> bool:
    """By its release: `1.el9.ngx`, or `1~bookworm`. Pure."""
    return package.endswith(".ngx") or re.search(r"-\d+~[a-z]+$", package) is not None


@operation()
def nginx_installed(declared: Wanted) -> Commands:
    """nginx from the declared source in the declared version, whichever was there before.

    + declared: what `wanted` gives

    What fits stays as it is: nothing is upgraded because something newer is there.
    """
    found = _found(declared)
    if found.manager == "apt" and declared.source == "module":
        yield fail("nginx_source is 'module', which is dnf's; this host has apt")
        return
    if found.manager not in ("dnf", "apt"):
        yield fail("this host has neither dnf nor apt-get, so nginx cannot be installed on it")
        return
    yield from _repository(declared, found)
    # Staged before the package brings its own, so that a run that is cut is ended by the next; not
    # in its place, where package managers would keep theirs beside it.
    emptying = declared.source == "nginx.org" and _EMPTIED.candidate in found.files
    if not fits(declared, found):
        if found.manager == "dnf":
            yield from _module_stream(declared, found)
        by = _by_dnf if found.manager == "dnf" else _by_apt
        if declared.source == "nginx.org" and WELCOME not in found.files:
            emptying = True
            yield from stage(_EMPTIED)
        yield from record.installing([declared.package], by(declared, found))
    if emptying:
        yield quoted("mv", "-fT", "--", _EMPTIED.candidate, WELCOME)
    if declared.source != "nginx.org" and _repository_of(found):
        yield from _keys_of(found)
        yield quoted("rm", "-f", "--", *_repository_of(found))
        yield script(_WELCOME_GOES, NO_WELCOME, WELCOME, f"{WELCOME}.rpmsave", _EMPTIED.candidate)


@operation()
def keys_go() -> Commands:
    """Keys that dnf imported for this deploy's repository are gone; for `uninstall.py`, before the
    files are."""
    yield from _keys_of(host.get_fact(facts.Packages, names=("gpg-pubkey",), files=FILES))


def _keys_of(found: facts.PackageState) -> Commands:
    """Those that came here by a deploy: the operator may have had others of the same file."""
    if DNF_KEY not in found.files:
        return
    yield from record.ended()  # dnf takes keys first, and may then refuse the package
    came = host.get_fact(record.Journal).came.values()
    names = (name for kinds in came for kind in ("package", "key") for name in kinds.get(kind, ()))
    if entries := sorted({name for name in names if name.startswith("gpg-pubkey-")}):
        yield script(_KEYS_GO, DNF_KEY, *entries)


def _repository(declared: Wanted, found: facts.PackageState) -> Commands:
    if declared.source != "nginx.org":
        return
    files = repository_files(declared, found)
    states = host.get_fact(facts.FileStates, paths=tuple(managed.path for managed in files))
    for managed in files:
        if managed.matches(states.get(managed.path)):
            continue
        if managed.path == DNF_KEY:
            yield from _keys_of(found)
        yield from swap_in(managed)


def repository_files(declared: Wanted, found: facts.PackageState) -> list[ManagedFile]:
    """The key, and the repository that is believed by it alone. Pure but for the template."""
    dnf = found.manager == "dnf"
    folder = f"{declared.mirror}/mainline" if declared.stream == "mainline" else declared.mirror
    return [
        ManagedFile(path=DNF_KEY if dnf else APT_KEY, content=declared.key),
        ManagedFile(
            path=DNF_REPOSITORY if dnf else APT_REPOSITORY,
            content=rendering.render(
                "nginx.repo.j2" if dnf else "nginx.sources.j2",
                repository=REPOSITORY,
                folder=folder,
                key=DNF_KEY if dnf else APT_KEY,
                system=found.system,
                release=found.release,
                codename=found.codename,
            ),
        ),
    ]


def _by_dnf(declared: Wanted, found: facts.PackageState) -> Commands:
    if declared.source == "nginx.org":
        scope: tuple[str, ...] = ("--disablerepo=*", f"--enablerepo={REPOSITORY}")
    else:  # its file goes after the package
        scope = (f"--disablerepo={REPOSITORY}",) if DNF_REPOSITORY in found.files else ()
    if not declared.by_choice and not found.packages:
        yield quoted("dnf", "-y", "-q", *scope, "install", declared.package)
        return
    yield quoted("dnf", "-q", "--refresh", *scope, "makecache")
    _, output = ask(
        quoted(
            *("dnf", "-q", *scope, "repoquery", "--available"),
            *("--qf", "%{epoch}:%{version}-%{release}\n", declared.package),
        )
    )
    chosen, problems = choose(declared, output.stdout_lines)
    if problems or chosen is None:
        yield fail(*problems)
        return
    replaced = found.packages.get(declared.package, "")
    package = f"{declared.package}-{chosen}"
    if CORE in found.packages and is_of_nginx_org(chosen):
        yield quoted("dnf", "-y", "-q", "swap", CORE, package)
    elif replaced and is_of_nginx_org(replaced) != is_of_nginx_org(chosen):
        yield quoted("dnf", "-y", "-q", "install", "--allowerasing", package)
    else:
        yield quoted("dnf", "-y", "-q", "install", package)


def _module_stream(declared: Wanted, found: facts.PackageState) -> Commands:
    """The declared stream, and no other; one that somebody else enabled stays where none is."""
    if declared.source == "module" and found.stream != declared.stream:
        if found.stream:  # dnf does not go from one stream to another in one step
            yield quoted("dnf", "-y", "-q", "module", "reset", "nginx")
        yield record.file(MODULE)
        yield quoted("dnf", "-y", "-q", "module", "enable", f"nginx:{declared.stream}")
    elif declared.source == "distribution" and found.stream and _came_by_a_deploy(MODULE):
        # It would hide the distribution's other packages of nginx.
        yield quoted("dnf", "-y", "-q", "module", "reset", "nginx")


def _came_by_a_deploy(path: str) -> bool:
    return host.get_fact(record.Journal).of("file").get(path) == "absent"


def _by_apt(declared: Wanted, found: facts.PackageState) -> Commands:
    yield quoted("apt-get", "-qq", "update")
    _, output = ask(quoted("apt-cache", "madison", declared.package))
    offered = madison(output.stdout_lines, declared.mirror, ours=declared.source == "nginx.org")
    chosen, problems = choose(declared, offered)
    if problems or chosen is None:
        yield fail(*problems)
        return
    companions = () if is_of_nginx_org(chosen) else (f"{COMMON}={chosen}",)
    packages = (f"{declared.package}={chosen}", *companions)
    text = rendering.shell("apt-install.sh")
    yield quoted("sh", "-c", text, "apt-install", APT_POLICY, *packages)


def madison(lines: Iterable[str], mirror: str, *, ours: bool) -> list[str]:
    """Versions of `apt-cache madison` that come from the mirror, or from elsewhere. Pure."""
    place = mirror.replace("file:///", "file:/")  # as apt tells it
    rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    return [row[1] for row in rows if len(row) == 3 and row[2].startswith(f"{place}/") == ours]


def choose(declared: Wanted, offered: Iterable[str]) -> tuple[str | None, list[str]]:
    """Which of the offered package versions is installed; or why none is. Pure."""
    offered = [line.strip() for line in offered if nginx_versions.parse(line)]
    chosen = nginx_versions.newest(offered, declared.series)
    version = nginx_versions.parse(chosen or "")
    if version is not None:
        return chosen, nginx_versions.problems(version, declared.needed)
    place = {
        "distribution": "the distribution's repositories",
        "module": f"the module stream {declared.stream}",
        "nginx.org": declared.mirror,
    }[declared.source]
    there = sorted({found for line in offered if (found := nginx_versions.parse(line))})
    said = ", ".join(map(str, there)) or "none"
    series = f"nginx {declared.series}" if declared.series else declared.package
    return None, [f"{place}: no {series}; there: {said}. Set another nginx_version or nginx_source"]
