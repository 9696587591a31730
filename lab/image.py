"""The base image: a Debian 12 root file system that looks like a host of the EL family, with a
repository of RPMs in it. All hosts of all labs share it, read-only, below an overlay of their own.

The process that holds the cache's lock builds; the result is kept under the SHA-256 of this
recipe (this file and `recipe/`), so a changed recipe is a new image.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from lab.bootstrap import bootstrap
from lab.paths import write_text
from lab.system import run
from lab.trash import discard

RECIPE: Final = Path(__file__).with_name("recipe")

_INCLUDE: Final = (
    # An operating system that boots and can be logged in to.
    *("systemd-sysv", "dbus", "libpam-systemd", "openssh-server", "sudo", "procps", "iproute2"),
    *("curl", "ca-certificates", "logrotate", "firewalld", "nftables", "netbase"),
    # EL's package manager, and what builds its repository.
    *("rpm", "dnf", "createrepo-c"),
    # What the service's virtual environment is made of, and what nginx is linked to.
    *("python3", "python3-venv", "libpcre2-8-0", "libssl3", "zlib1g", "libcrypt1"),
    # An ACME client, and an authority for tests that it can ask.
    *("certbot", "pebble"),
)

# Their packages are unpacked and repackaged as RPMs, never installed.
_UNPACK: Final = ("nginx", "nginx-common")

# What an EL host has from the start: name of the RPM -> Debian's package that is the real thing.
# The RPMs are empty; they make `rpm -q`, `yum install` and requirements answer as on EL.
PRESENT: Final[Mapping[str, str]] = {
    "bash": "bash",
    "ca-certificates": "ca-certificates",
    "coreutils": "coreutils",
    "createrepo_c": "createrepo-c",
    "curl": "curl",
    "dbus": "dbus",
    "dnf": "dnf",
    "findutils": "findutils",
    "firewalld": "firewalld",
    "glibc": "libc6",
    "grep": "grep",
    "gzip": "gzip",
    "iproute": "iproute2",
    "logrotate": "logrotate",
    "nftables": "nftables",
    "openssh-clients": "openssh-client",
    "openssh-server": "openssh-server",
    "procps-ng": "procps",
    "python3": "python3",
    "rpm": "rpm",
    "sed": "sed",
    "shadow-utils": "passwd",
    "sudo": "sudo",
    "systemd": "systemd",
    "tar": "tar",
    "util-linux": "util-linux",
    "yum": "dnf",
}

# What the lab's repository offers beside nginx. Debian's Python is in the image already; on EL 9
# the interpreter of this name comes with this package.
OFFERED: Final[Mapping[str, str]] = {
    "python3.11": "python3.11",
    "python3.11-pip": "python3.11",
    "certbot": "certbot",  # on EL it comes from EPEL
}

_PROVIDES: Final[Mapping[str, str]] = {
    "bash": "/bin/sh, /bin/bash, /usr/bin/sh, /usr/bin/bash",
    "python3": "/usr/bin/python3",
    "systemd": "systemd-units",
}

# Nothing in a container needs these, or they look for what EL hosts don't have.
_MASKED_UNITS: Final = (
    "console-getty.service",
    "container-getty@.service",
    "dnf-makecache.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@.service",
    "getty-static.service",
    "remote-fs.target",
    "systemd-pstore.service",
    "systemd-timesyncd.service",
    "systemd-udevd.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
)

# Debian's package manager: an EL host has none, and tools tell the families apart by it.
_REMOVED: Final = (
    "etc/apt",
    "etc/debian_version",
    "etc/dpkg",
    "usr/bin/apt*",
    "usr/bin/dpkg*",
    "usr/lib/apt",
    "usr/lib/dpkg",
    "usr/lib/systemd/system/apt*",
    "usr/lib/systemd/system/dpkg*",
    "usr/lib/systemd/system/timers.target.wants/apt*",
    "etc/systemd/system/timers.target.wants/*",
    "usr/sbin/dpkg*",
    "usr/share/dpkg",
    "usr/src/*",
    "var/cache/apt",
    "var/cache/debconf",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/log/*.log",
    "var/log/apt",
    "etc/ssh/ssh_host_*",
    "etc/hostname",
    "tmp/*",
)


def recipe_digest() -> str:
    """SHA-256, in hex, of everything that decides what the image holds."""
    total = hashlib.sha256()
    for path in [
        Path(__file__),
        Path(__file__).with_name("bootstrap.py"),
        *sorted(RECIPE.iterdir()),
    ]:
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode() + content)
    return total.hexdigest()


def base_path(home: Path, name: str | None = None) -> Path:
    """Where the image of this name is; without a name, where that of the present recipe is or
    will be."""
    return home / "cache" / (name or f"base-{recipe_digest()[:16]}")


def ensure_base(
    home: Path, *, in_use: Callable[[], set[str]], progress: Callable[[str], None]
) -> Path:
    """Return the image of the present recipe; build it where it isn't there yet.

    `in_use`: names of the images that labs run on; images of older recipes that are not among them
    are removed. Raises LabError with the place of the log when the build fails.
    """
    base = base_path(home)
    cache = base.parent
    if base.is_dir():
        return base
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache, progress=progress):
        if base.is_dir():
            return base
        for stale in cache.glob("building-*"):
            discard(stale, home=home)
        for old in cache.glob("base-*"):
            if old.name not in in_use():
                discard(old, home=home)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        root = building / "root"
        _install_packages(root, building=building, log_path=cache / "build.log", progress=progress)
        progress("  making the EL look and the RPM repository")
        _build_repository(root)
        _make_el_look(root)
        root.rename(base)
        shutil.rmtree(building)
    return base


@contextmanager
def _locked(cache: Path, *, progress: Callable[[str], None]) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another command is building the base image; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install_packages(
    root: Path, *, building: Path, log_path: Path, progress: Callable[[str], None]
) -> None:
    hook = building / "fetch"
    # mmdebstrap calls it with the new root; apt runs outside, configured for the inside.
    write_text(
        hook,
        "#!/bin/sh\nset -eu\n"
        'mkdir "$1/srv/unpack"\ncd "$1/srv/unpack"\nexport APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"\n'
        f"apt-get download {' '.join(_UNPACK)}\n",
        mode=0o755,
    )
    bootstrap(
        root, _INCLUDE, log_path=log_path, progress=progress, options=[f"--customize-hook={hook}"]
    )


def _chroot(root: Path, command: Sequence[str]) -> str:
    return run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            f"--mount-proc={root}/proc",
            *("chroot", str(root), "env", "-i", "HOME=/root", "LC_ALL=C.UTF-8"),
            *("PATH=/usr/sbin:/usr/bin", *command),
        ],
        timeout_s=180,
    )


def _versions(root: Path) -> dict[str, str]:
    """Upstream version of each Debian package in the root, fit for an RPM's version."""
    listing = run(
        [
            *("dpkg-query", f"--admindir={root}/var/lib/dpkg", "--show"),
            "--showformat=${Package} ${source:Upstream-Version}\n",
        ]
    )
    pairs = (line.split() for line in listing.splitlines())
    return {name: version.translate({ord("-"): "."}) for name, version in pairs}


def base_spec(versions: Mapping[str, str]) -> str:
    """Text of the spec whose RPMs stand for what EL hosts have, or can have, by name.

    `versions`: Debian package -> upstream version.
    """
    parts = [
        "%global debug_package %{nil}\n"
        "Name: lab-release\nVersion: 9\nRelease: 1.lab.el9\nSummary: Lab Linux\nLicense: MIT\n"
        "BuildArch: noarch\nAutoReqProv: no\n"
        "Provides: system-release = 9, redhat-release = 9, system-release(releasever) = 9\n"
        "%description\nWhat makes a host a host of the lab.\n%files\n"
    ]
    for name, package in {**PRESENT, **OFFERED}.items():
        provides = f"Provides: {_PROVIDES[name]}\n" if name in _PROVIDES else ""
        parts.append(
            f"%package -n {name}\nVersion: {versions[package]}\nSummary: {name} of the base image\n"
            f"AutoReqProv: no\n{provides}"
            f"%description -n {name}\nStands for Debian's {package}.\n%files -n {name}\n"
        )
    return "\n".join(parts)


def _build_repository(root: Path) -> None:
    """Build the RPMs with the root's own rpmbuild, and install those that EL hosts start with."""
    (root / "etc/rpm").mkdir(exist_ok=True)
    write_text(root / "etc/rpm/macros", "%_dbpath /var/lib/rpm\n")
    repository = root / "usr/share/lab-repository"
    build = root / "srv/build"
    recipe = build / "recipe"
    shutil.copytree(RECIPE, recipe)
    tree = build / "tree"
    tree.mkdir()
    packages = sorted((root / "srv/unpack").glob("*.deb"))
    for package in packages:
        run(["dpkg-deb", "--extract", str(package), str(tree)])
    version = run(["dpkg-deb", "--field", str(packages[0]), "Version"]).split("-")[0]
    write_text(build / "lab.spec", base_spec(_versions(root)))
    for spec in ("/srv/build/lab.spec", "/srv/build/recipe/nginx.spec"):
        _chroot(
            root,
            [
                *("rpmbuild", "-bb", "--quiet"),
                *("--define", f"nginx_version {version}"),
                *("--define", "tree /srv/build/tree", "--define", "recipe /srv/build/recipe"),
                *("--define", "_topdir /srv/build/top", "--define", "_rpmdir /srv/build/rpms"),
                *("--define", "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm"),
                spec,
            ],
        )
    (build / "rpms").rename(repository)
    offered = {f"{name}-" for name in OFFERED} | {"nginx-"}
    present = [
        f"/usr/share/lab-repository/{path.name}"
        for path in sorted(repository.iterdir())
        if not any(path.name.startswith(prefix) for prefix in offered)
    ]
    _chroot(root, ["createrepo_c", "--quiet", "/usr/share/lab-repository"])
    _chroot(root, ["rpm", "--initdb"])
    _chroot(root, ["rpm", "--install", "--nosignature", *present])
    (root / "etc/yum.repos.d").mkdir(exist_ok=True)
    shutil.copy(RECIPE / "lab.repo", root / "etc/yum.repos.d/lab.repo")
    (root / "etc/dnf/vars").mkdir(exist_ok=True)
    write_text(root / "etc/dnf/vars/releasever", "9\n")
    (root / "usr/bin/yum").symlink_to("dnf-3")
    (root / "etc/yum.conf").symlink_to("dnf/dnf.conf")
    _chroot(root, ["dnf", "--quiet", "makecache"])
    shutil.rmtree(build)
    shutil.rmtree(root / "srv/unpack")


def _make_el_look(root: Path) -> None:
    for pattern in _REMOVED:
        for path in root.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    with suppress(FileNotFoundError):
        (root / "etc/os-release").unlink()
    shutil.copy(RECIPE / "os-release", root / "usr/lib/os-release")
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    for name in ("redhat-release", "system-release"):
        write_text(root / "etc" / name, "Lab Linux release 9 (EL layout)\n")
    for name in ("machine-id", "resolv.conf"):
        write_text(root / "etc" / name, "")
    (root / "etc/sysconfig").mkdir()
    nsswitch = root / "etc/nsswitch.conf"
    # There is no name server: with "dns" each lookup of an unknown name waits 10 s for one.
    lines = ["hosts: files" if line.startswith("hosts:") else line for line in _lines(nsswitch)]
    write_text(nsswitch, "\n".join(lines) + "\n")
    for unit in _MASKED_UNITS:
        path = root / "etc/systemd/system" / unit
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    timers = root / "etc/systemd/system/timers.target.wants"
    (timers / "logrotate.timer").symlink_to("/usr/lib/systemd/system/logrotate.timer")
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/usr/lib/systemd/system/multi-user.target")
    # EL starts nothing of itself that it installs.
    write_text(
        root / "usr/lib/systemd/system-preset/00-lab.preset",
        "enable sshd.service\nenable firewalld.service\ndisable *\n",
    )
    # Debian's pam_env complains at each login when there is none.
    write_text(root / "etc/default/locale", "LANG=C.UTF-8\n")
    # A console that is a pipe: messages, no control sequences.
    (root / "etc/systemd/system.conf.d").mkdir()
    write_text(
        root / "etc/systemd/system.conf.d/lab.conf",
        "[Manager]\nLogColor=no\nStatusUnitFormat=name\nDefaultTimeoutStopSec=20s\n",
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
