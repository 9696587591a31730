"""Real nginx of several releases, each with its own libraries in a folder to chroot into.

They are Debian's packages of several of its releases, from where this machine gets its packages;
unpacked, never installed, and kept in the lab's cache. Root only, for the chroot.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from lab import bootstrap, paths

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_LIBRARY_PATH = "/usr/lib/x86_64-linux-gnu:/lib/x86_64-linux-gnu"
_LIBRARIES = ("libc6", "libcrypt1", "zlib1g")

# Series of nginx -> the release of Debian that has it, and the packages that it needs to run.
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "1.18": ("bullseye", ("nginx-core", "nginx-common", "libpcre3", "libssl1.1")),
    "1.22": ("bookworm", ("nginx", "nginx-common", "libpcre2-8-0", "libssl3")),
    "1.26": ("trixie", ("nginx", "nginx-common", "libpcre2-8-0", "libssl3t64", "libzstd1")),
    "1.30": ("forky", ("nginx", "nginx-common", "libpcre2-8-0", "libssl3t64", "libzstd1")),
}


class UnavailableError(Exception):
    """A build that is not to be had here; says why."""


@dataclass(frozen=True)
class Build:
    """One nginx with its libraries; `packages` are what it was unpacked from."""

    root: Path
    packages: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        loader = ("/lib64/ld-linux-x86-64.so.2", "--library-path", _LIBRARY_PATH)
        return subprocess.run(
            ["chroot", str(self.root), *loader, "/usr/sbin/nginx", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def version(self) -> str:
        """What `nginx -v` says."""
        return self.run("-v").stderr

    def check(self, configuration: bytes) -> subprocess.CompletedProcess[str]:
        """`nginx -t` on it, where a host would have it."""
        (self.root / "etc/nginx/nginx.conf").write_bytes(configuration)
        return self.run("-t")


def build(series: str) -> Build:
    """The nginx of a series, fetched when it isn't there yet. Raises `UnavailableError`."""
    cache = paths.home() / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / f"nginx-{series}"
    with FileLock(cache / "nginx-builds.lock"):
        if not place.is_dir():
            partial = Path(tempfile.mkdtemp(prefix="fetching-nginx-", dir=cache))
            try:
                _fetch_missing(series, cache, partial)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Build(place / "root", place / "packages")


def _fetch_missing(wanted: str, cache: Path, partial: Path) -> None:
    """All that are missing, as most of the time goes into apt's lists. One that is not to be had
    is an error only when it is the wanted one."""
    apt = _Apt(partial / "apt")
    apt.run("update")
    for series in SOURCES:
        place = cache / f"nginx-{series}"
        if place.is_dir():
            continue
        try:
            _fetch(series, apt, partial / series)
        except UnavailableError:
            if series == wanted:
                raise
        else:
            (partial / series).rename(place)


def _fetch(series: str, apt: _Apt, place: Path) -> None:
    release, packages = SOURCES[series]
    folder, root = place / "packages", place / "root"
    folder.mkdir(parents=True)
    root.mkdir()
    apt.run("download", *(f"{name}/{release}" for name in (*packages, *_LIBRARIES)), cwd=folder)
    for package in folder.iterdir():
        subprocess.run(["dpkg-deb", "--extract", str(package), str(root)], check=True)
    _furnish(root)


class _Apt:
    """apt with lists of its own, from where this machine has its packages."""

    def __init__(self, place: Path) -> None:
        for folder in ("lists/partial", "archives/partial"):
            (place / folder).mkdir(parents=True)
        mirror = _mirror()
        (place / "sources.list").write_text(
            "".join(
                f"deb [signed-by={KEYRING}] {mirror} {release} main\n"
                for release, _ in SOURCES.values()
            )
        )
        (place / "apt.conf").write_text(
            f'Dir::Etc::SourceList "{place}/sources.list"; Dir::Etc::SourceParts "/dev/null";\n'
            f'Dir::State::Lists "{place}/lists"; Dir::Cache "{place}"; '
            'Dir::State::status "/dev/null";\nAcquire::Languages "none"; '
            'Acquire::Check-Valid-Until "false"; APT::Sandbox::User "root"; Acquire::Retries "3";\n'
        )
        self._environment = {**os.environ, "APT_CONFIG": str(place / "apt.conf")}

    def run(self, *arguments: str, cwd: Path | None = None) -> None:
        done = subprocess.run(
            ["apt-get", "-qq", *arguments],
            cwd=cwd,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise UnavailableError(f"apt-get {arguments[0]}: {done.stderr.strip()[-300:]}")


def _mirror() -> str:
    text = bootstrap.apt_sources().read_text()
    found = re.search(r"^(?:URIs: *|deb (?:\[[^]]*\] )?)(\S+/debian)/?(?: |$)", text, re.MULTILINE)
    if found is None:
        raise UnavailableError(f"no address of Debian's packages in {bootstrap.apt_sources()}")
    return found.group(1)


def _furnish(root: Path) -> None:
    """What nginx asks of a host, and what the configuration names."""
    if not (root / "lib64").exists():
        (root / "lib64").symlink_to("usr/lib64")
    (root / "etc/passwd").write_text("root:x:0:0::/:\nnginx:x:33:33::/:\n")
    (root / "etc/group").write_text("root:x:0:\nnginx:x:33:\n")
    for folder in ("run", "dev", "var/log/nginx", "var/lib/nginx", "etc/pki"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=gateway", "-days", "3650"),
            *("-keyout", str(root / "etc/pki/gw.key"), "-out", str(root / "etc/pki/gw.pem")),
        ],
        check=True,
        capture_output=True,
    )
