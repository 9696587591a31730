"""Can this machine host a lab? Looks, tries in namespaces that end at once, and installs what apt
can install. Changes nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from lab.cgroup import hierarchies
from lab.errors import LabError
from lab.paths import home
from lab.system import run

# Command that must be there -> Debian's package that has it.
TOOLS: Final[Mapping[str, str]] = {
    "flock": "util-linux",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "setsid": "util-linux",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
}
_APT_TIMEOUT_S: Final = 300
_PROBE_STALE_S: Final = 60

WITHOUT_LAB: Final = (
    "Without the lab these still work: `make test-unit`, and deploying to hosts of your own "
    "(inventory.py shows their shape)."
)


def unmet() -> list[str]:
    """Why this machine can't host a lab, one sentence each; empty when it can.

    Tools that `setup` can install are not counted.
    """
    if not sys.platform.startswith("linux"):
        return [f"the hosts are Linux containers, and this is {sys.platform}"]
    found = []
    if os.geteuid() != 0:
        found.append("the hosts need root: namespaces, mounts and cgroups (use sudo)")
    if _os_release().get("VERSION_CODENAME") != "bookworm":
        found.append(
            "the base image is made from the apt sources of the machine, which must be Debian 12: "
            f"this is {_os_release().get('PRETTY_NAME', 'an unknown system')}"
        )
    if found:
        return found  # What follows needs root.
    return [sentence for probe in _PROBES if (sentence := probe())]


def missing_tools(tools: Mapping[str, str] = TOOLS) -> dict[str, str]:
    """Commands that are missing, with the packages that have them."""
    return {command: package for command, package in tools.items() if not shutil.which(command)}


def require() -> None:
    """Raises LabError, with all reasons and what works all the same, where no lab can run."""
    if reasons := unmet():
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise LabError(f"this machine can't host the lab:\n{lines}\n{WITHOUT_LAB}")


def install_tools(progress: Callable[[str], None], tools: Mapping[str, str] = TOOLS) -> None:
    """Install what is missing with apt-get. Raises LabError with apt's words when that fails."""
    missing = sorted(set(missing_tools(tools).values()))
    if not missing:
        return
    progress(f"installing {', '.join(missing)}")
    if not _has_package_lists():
        _apt(["update"])
    try:
        _apt(["install", *_pinned(missing)])
    except LabError:
        # Old lists name versions that the mirror has no more, and the pinned version with them.
        _apt(["update"])
        _apt(["install", *missing])
    if left := missing_tools(tools):
        raise LabError(f"still missing after the installation: {', '.join(left)}")


def _has_package_lists() -> bool:
    lists = Path("/var/lib/apt/lists")
    return any(lists.glob("*_Packages*")) or any(lists.glob("*InRelease"))


def _pinned(packages: list[str]) -> list[str]:
    """systemd-container in the version of the installed systemd, so that nothing is upgraded."""
    try:
        version = run(["dpkg-query", "--show", "--showformat=${Version}", "systemd"])
    except LabError:
        return packages  # No systemd on this machine.
    return [f"{p}={version}" if p == "systemd-container" else p for p in packages]


def _apt(arguments: list[str]) -> None:
    command = ["apt-get", "--yes", "--quiet", "--no-install-recommends", *arguments]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        timeout=_APT_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise LabError(f"failed: {' '.join(command)}\n{done.stdout.strip()[-2000:]}")


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key: value.strip().strip('"') for key, _, value in pairs}


def _try(command: list[str]) -> str | None:
    """None when the command succeeds, else what it said."""
    try:
        run(command, timeout_s=20)
    except LabError as error:
        return str(error)
    return None


def _probe_namespaces() -> str | None:
    said = _try(["unshare", "--mount", "--net", "--pid", "--fork", "--time", "true"])
    return said and f"the kernel refuses new mount, network, pid or time namespaces: {said}"


def _probe_cgroups() -> str | None:
    mounted = hierarchies()
    if not mounted:
        return "cgroup v2 is not mounted (expected at /sys/fs/cgroup or /sys/fs/cgroup/unified)"
    probe = mounted[0] / f"gateway-lab-probe-{os.getpid()}"
    try:
        probe.mkdir()
        can_kill = (probe / "cgroup.kill").exists()
        probe.rmdir()
    except OSError as error:
        return f"no cgroup can be made below {mounted[0]}: {error.strerror}"
    return None if can_kill else "the kernel is older than 5.14: its cgroups lack cgroup.kill"


def _probe_overlay() -> str | None:
    place = home()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{place} can't be made: {error.strerror}"
    for left in place.glob("probe-*"):
        # Of a command that was killed; one of now may be at work itself.
        if time.time() - left.stat().st_mtime > _PROBE_STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="probe-", dir=place) as directory:
        for name in ("lower", "upper", "work", "merged"):
            (Path(directory) / name).mkdir()
        options = (
            f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work,"
            "volatile"
        )
        said = _try(
            [
                *("unshare", "--mount", "mount", "-t", "overlay", "-o", options),
                *("overlay", f"{directory}/merged"),
            ]
        )
    return said and f"overlayfs can't be mounted in {place}: {said}"


def _probe_links() -> str | None:
    if not shutil.which("ip"):
        return None  # `setup` installs it, and `up` will say what fails.
    for kind in (["bridge"], ["veth", "peer", "name", "probe1"]):
        if said := _try(["unshare", "--net", "ip", "link", "add", "probe0", "type", *kind]):
            return f"the kernel can't make a network link of type {kind[0]}: {said}"
    return None


_PROBES: Final = (_probe_namespaces, _probe_cgroups, _probe_overlay, _probe_links)
