"""Layers: what only some hosts need, over the base image; built when a lab first asks for it.

`python -m lab up --with slurm train1 train2`. A layer lies between the base image and a host's own
overlay. What is in this one is a second repository of RPMs, from which yum installs Slurm and
MUNGE under EPEL's names. The process that holds the layers' lock builds; the result is kept under
the SHA-256 of this recipe (this file and `layers/`) and of the base image that it was made on.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lab.bootstrap import SUITE, apt_sources
from lab.errors import LabError
from lab.paths import write_text
from lab.system import run
from lab.trash import discard

NAMES: Final = ("slurm",)
RECIPE: Final = Path(__file__).with_name("layers")
BUILD_TIMEOUT_S: Final = 300

_PACKAGES: Final = ("slurmctld", "slurmd", "slurm-client", "munge")
_REPOSITORY: Final = "usr/share/lab-slurm"

# Debian's name of a file -> Enterprise Linux's; Debian has several implementations to choose from.
_RENAMED: Final = {
    f"usr/sbin/{name}-wlm": f"usr/sbin/{name}" for name in ("slurmctld", "slurmd", "slurmstepd")
}

# What is taken of Debian's packages: programs, units, and what they are linked to.
_TAKEN: Final = re.compile(
    r"usr/s?bin/(munge\w*|unmunge|remunge|slurm(ctld|d|stepd)|s(acct|acctmgr|alloc|attach|batch|"
    r"bcast|cancel|control|diag|info|prio|queue|report|run|share|stat|trigger))"
    r"|usr/lib/systemd/system/(munge|slurmctld|slurmd)\.service"
    r"|usr/lib/[^/]+-linux-gnu/.*"
)
_PART: Final = (
    ("munge", re.compile(r"(?!.*/slurm-wlm/).*munge[^/]*")),
    ("slurm-slurmctld", re.compile(r".*/slurmctld(\.service)?")),
    ("slurm-slurmd", re.compile(r".*/(slurmd|slurmstepd)(\.service)?")),
    ("slurm", re.compile(r".*")),
)

# Run in namespaces of its own, so that all that it mounts ends with it.
_BUILD: Final = """
set -eu
base=$1 layer=$2 work=$3 root=$4; shift 4
mount -t overlay -o "lowerdir=$base,upperdir=$layer,workdir=$work" overlay "$root"
mount -t proc proc "$root/proc"
exec chroot "$root" env -i HOME=/root LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin sh -euc "$@"
"""
_MAKE_REPOSITORY: Final = """
rpmbuild -bb --quiet --define "munge_version $1" --define "slurm_version $2" \
    --define "tree /srv/build/tree" --define "lists /srv/build/lists" \
    --define "_topdir /srv/build/top" --define "_rpmdir /usr/share/lab-slurm" \
    --define "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
    /srv/build/slurm.spec
createrepo_c --quiet /usr/share/lab-slurm
dnf --quiet makecache
"""


def check(names: Iterable[str]) -> None:
    """Raises LabError for a name that is no layer's."""
    for name in names:
        if name not in NAMES:
            raise LabError(f"there is no layer {name!r}; there is {', '.join(NAMES)}")


def recipe_digest(base: Path) -> str:
    """SHA-256, in hex, of everything that decides what the layers over this base image hold."""
    total = hashlib.sha256(base.name.encode())
    for path in [Path(__file__), *sorted(RECIPE.iterdir())]:
        content = path.read_bytes()
        total.update(f"{path.name} {len(content)}\n".encode() + content)
    return total.hexdigest()


def layer_path(home: Path, name: str) -> Path:
    """Where the layer is of which a host says that it has it."""
    return home / "cache" / name


def ensure(
    name: str,
    *,
    home: Path,
    base: Path,
    in_use: Callable[[], set[str]],
    progress: Callable[[str], None],
) -> str:
    """The folder's name of the layer `name` over `base`; it is built where it isn't there yet.

    `in_use`: names of the layers that hosts have; older ones that are not among them are removed.
    """
    cache = home / "cache"
    folder = f"{name}-{recipe_digest(base)[:16]}"
    final = layer_path(home, folder)
    if final.is_dir():
        return folder
    with _locked(cache / "layers.lock", progress=progress):
        if final.is_dir():
            return folder
        for left in [*cache.glob("layering-*"), *cache.glob(f"{name}-*")]:
            if left.name not in in_use():
                discard(left, home=home)
        progress(f"building the layer {name} (once; half a minute)")
        building = Path(tempfile.mkdtemp(prefix="layering-", dir=cache))
        _build(building, base=base)
        (building / "layer").rename(final)
        shutil.rmtree(building)
    return folder


@contextmanager
def _locked(path: Path, *, progress: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another command is building a layer; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(building: Path, *, base: Path) -> None:
    packages = building / "packages"
    _extract_packages(packages)
    layer = building / "layer"
    inside = layer / "srv/build"
    tree = inside / "tree"
    tree.mkdir(parents=True)
    files = _take(packages, tree, base=base)
    lists = inside / "lists"
    lists.mkdir()
    for part, wanted in split(files).items():
        write_text(lists / part, "".join(f'"/{path}"\n' for path in wanted))
    shutil.copy(RECIPE / "slurm.spec", inside)
    (layer / "etc/yum.repos.d").mkdir(parents=True)
    shutil.copy(RECIPE / "slurm.repo", layer / "etc/yum.repos.d/lab-slurm.repo")
    (layer / _REPOSITORY).mkdir(parents=True)
    for name in ("work", "root"):
        (building / name).mkdir()
    versions = [_version(packages, package) for package in ("munge", "slurmd")]
    run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _BUILD, "build"),
            *map(str, (base, layer, building / "work", building / "root")),
            *(_MAKE_REPOSITORY, "repository", *versions),
        ],
        timeout_s=BUILD_TIMEOUT_S,
    )
    shutil.rmtree(layer / "srv")


def _extract_packages(root: Path) -> None:
    """Debian's packages and all that they depend on, unpacked and not installed."""
    run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("mmdebstrap", "--mode=root", "--format=directory", "--variant=extract", "--quiet"),
            "--skip=check/empty,cleanup/apt",
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=Acquire::Check-Date "false"',
            "--aptopt=Acquire::Retries 3",
            f"--include={','.join(_PACKAGES)}",
            *(SUITE, str(root), str(apt_sources())),
        ],
        timeout_s=BUILD_TIMEOUT_S,
    )


def _version(root: Path, package: str) -> str:
    """Upstream version of a package that was extracted there."""
    (found,) = (root / "var/cache/apt/archives").glob(f"{package}_*.deb")
    version = run(["dpkg-deb", "--field", str(found), "Version"])
    return version.strip().partition(":")[2 if ":" in version else 0].rpartition("-")[0]


def _take(packages: Path, tree: Path, *, base: Path) -> list[str]:
    """Copy what hosts need and the base image has not; paths as they are on the host."""
    taken = []
    for source in sorted(packages.rglob("*")):
        if source.is_dir() and not source.is_symlink():
            continue
        path = on_host(source.relative_to(packages).as_posix())
        if not _TAKEN.fullmatch(path) or (base / path).exists() or (base / path).is_symlink():
            continue
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
        taken.append(path)
    return taken


def on_host(path: str) -> str:
    """Where a file of a Debian package lies on a host, which has /usr merged and EL's names."""
    merged = re.sub(r"^(bin|sbin|lib)/", r"usr/\1/", path)
    return _RENAMED.get(merged, merged)


def split(files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each RPM: a file belongs to the first part that claims it."""
    parts: dict[str, list[str]] = {part: [] for part, _ in _PART}
    for path in files:
        parts[next(part for part, pattern in _PART if pattern.fullmatch(path))].append(path)
    return parts
