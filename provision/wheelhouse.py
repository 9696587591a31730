"""The wheelhouse: every wheel that a GPU host needs, prepared once on the operator's machine.

A host without internet gets its whole virtual environment from here. A wheelhouse is a folder
`.wheelhouse/BUILD-cp311-x86_64/` of wheels with a `requirements.lock` that pins each by version
and SHA-256; the lock is written last, so a folder without one is an interrupted build. One with
packages of your own (`worker_packages`) carries a digest of them behind its name. What installs
them on a host, uv, is in `.wheelhouse/installer-x86_64/`: it needs no pip there, and less time.

    python -m provision.wheelhouse build [--torch cpu|cuda] [--torch-index URL] [--package P …]
    python -m provision.wheelhouse data     what training reads its data from (trainers only)
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.utils import parse_wheel_filename

from provision.locks import locked
from provision.rendering import CHECKOUT

REQUIREMENTS = CHECKOUT / "requirements" / "service.txt"
DATA_REQUIREMENTS = CHECKOUT / "requirements" / "data.txt"
INSTALLER_REQUIREMENTS = CHECKOUT / "requirements" / "installer.txt"
ROOT = CHECKOUT / ".wheelhouse"
LOCK = "requirements.lock"


class WheelhouseError(Exception):
    """A wheelhouse is missing or could not be built; says what to run."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the wheels are for."""

    build: str  # cpu or cuda
    python: str  # "3.11"
    machine: str  # as `uname -m` says: x86_64 or aarch64
    packages: tuple[str, ...] = ()  # beside the service's own: wheels, or NAME==VERSION

    @property
    def folder(self) -> Path:
        name = f"{self.build}-cp{self.python.replace('.', '')}-{self.machine}"
        return ROOT / (f"{name}-with-{_digest_of(self.packages)}" if self.packages else name)

    @property
    def command(self) -> str:
        """What the operator types to build it."""
        own = "".join(f" --package {shlex.quote(package)}" for package in self.packages)
        return (
            f".venv/bin/python -m provision.wheelhouse build --torch {self.build} "
            f"--python {self.python} --machine {self.machine}{own}"
        )


@cache
def _digest_of(packages: tuple[str, ...]) -> str:
    """Of names and, where they are files, of what is in them. Raises `WheelhouseError`."""
    digest = hashlib.sha256()
    for package in packages:
        digest.update(f"{package}\0".encode())
        if package.endswith(".whl"):
            digest.update(_read(package))
    return digest.hexdigest()[:8]


def _read(wheel: str) -> bytes:
    try:
        return (CHECKOUT / wheel).read_bytes()
    except OSError as error:
        raise WheelhouseError(f"the wheel {wheel} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, kw_only=True)
class Wheelhouse:
    """A complete wheelhouse."""

    folder: Path
    lock: str
    installer: Path | None = None  # the wheel of uv

    @property
    def wheels(self) -> list[Path]:
        return sorted(self.folder.glob("*.whl"))

    @property
    def digest(self) -> str:
        """Names the environment that is installed from it."""
        return hashlib.sha256(self.lock.encode()).hexdigest()[:16]


def find(target: Target) -> Wheelhouse:
    """The wheelhouse for a host. Raises `WheelhouseError` where it is missing or stale."""
    lock = target.folder / LOCK
    if not lock.is_file():
        raise WheelhouseError(f"no wheelhouse for it here; make one with: {target.command}")
    text = lock.read_text()
    if _stamp(REQUIREMENTS) not in text:
        raise WheelhouseError(
            f"the wheelhouse {target.folder.name} was made from other requirements than "
            f"requirements/service.txt holds now; make it again with: {target.command}"
        )
    installer = _complete(_installer_folder(target), INSTALLER_REQUIREMENTS)
    if installer is None:
        raise WheelhouseError(
            "what installs the wheels is not here, or of another version than "
            f"requirements/installer.txt says; get it with: {target.command}"
        )
    return Wheelhouse(folder=target.folder, lock=text, installer=installer.wheels[0])


def find_data() -> Wheelhouse:
    """The wheels that hold training data. Raises `WheelhouseError` where they are missing."""
    found = _complete(ROOT / "data", DATA_REQUIREMENTS)
    if found is None:
        raise WheelhouseError(
            "the wheels of requirements/data.txt are not here, or of another state of it; get "
            "them with: .venv/bin/python -m provision.wheelhouse data"
        )
    return found


def _complete(folder: Path, requirements: Path) -> Wheelhouse | None:
    """The wheels of a folder, where all are there and of what the requirements say now."""
    lock = folder / LOCK
    if not lock.is_file() or _stamp(requirements) not in lock.read_text():
        return None
    return Wheelhouse(folder=folder, lock=lock.read_text())


def _installer_folder(target: Target) -> Path:
    return ROOT / f"installer-{target.machine}"


def build_data() -> Wheelhouse:
    """Download them, without what they depend on: only their data is used."""
    _build_alone(ROOT / "data", DATA_REQUIREMENTS)
    return find_data()


def _build_alone(folder: Path, requirements: Path, *platform: str) -> None:
    """Download the wheels of one file of requirements, without what they depend on."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", *platform]
    command += ["--no-deps", "--dest", str(partial), "--requirement", str(requirements)]
    _pip(command, dict(os.environ), what=f"of requirements/{requirements.name}")
    (partial / LOCK).write_text(_lock_of(partial, requirements))
    _swap(partial, folder)


def build(target: Target, *, torch_index: str | None = None) -> Wheelhouse:
    """Download every wheel for `target` and lock them. Written beside, then swapped in.

    pip's own configuration decides where wheels come from (PIP_INDEX_URL, pip.conf);
    `torch_index` adds the index that holds the wanted build of torch.
    """
    partial = target.folder.with_name(f".{target.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _download(partial, target, torch_index)
    _check_torch(partial, target)
    (partial / LOCK).write_text(_lock_of(partial, REQUIREMENTS))
    if _complete(_installer_folder(target), INSTALLER_REQUIREMENTS) is None:
        _build_alone(_installer_folder(target), INSTALLER_REQUIREMENTS, *_platform(target))
    _swap(partial, target.folder)
    return find(target)


def _swap(partial: Path, folder: Path) -> None:
    previous = folder.with_name(f".{folder.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _download(folder: Path, target: Target, torch_index: str | None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    command += [str(CHECKOUT / p) if p.endswith(".whl") else p for p in target.packages]
    command += _platform(target)
    environment = dict(os.environ)
    if torch_index:  # by environment: an address may hold a token, and arguments are public
        extra = environment.get("PIP_EXTRA_INDEX_URL", "")
        environment["PIP_EXTRA_INDEX_URL"] = f"{extra} {torch_index}".strip()
    _pip(command, environment, what=f"for {target.folder.name}")


def _pip(command: list[str], environment: dict[str, str], *, what: str) -> None:
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise WheelhouseError(f"pip could not download the wheels {what}:\n{result.stderr.strip()}")


def _platform(target: Target) -> list[str]:
    """pip's options for wheels of another machine or Python than this one."""
    if _is_this_machine(target):
        return []
    # Oldest glibc first: torch 2.13 asks for 2.28, which EL 8 and all later have.
    glibcs = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_5")
    names = [*(f"manylinux_{glibc}" for glibc in glibcs), "manylinux2014"]
    options = ["--python-version", target.python, "--implementation", "cp"]
    return options + [word for n in names for word in ("--platform", f"{n}_{target.machine}")]


def _is_this_machine(target: Target) -> bool:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return target.python == python and target.machine == os.uname().machine


def _check_torch(folder: Path, target: Target) -> None:
    wheels = list(folder.glob("torch-*.whl"))
    if len(wheels) != 1:
        raise WheelhouseError(f"expected one torch wheel for {target.folder.name}, got {wheels}")
    is_cpu = "+cpu" in wheels[0].name
    if target.build == "cuda" and is_cpu:
        raise WheelhouseError(
            f"pip found the CPU build of torch ({wheels[0].name}); say where the CUDA build is: "
            f"{target.command} --torch-index URL (pytorch.org shows the address under Get Started)"
        )
    if target.build == "cpu" and not is_cpu and target.machine == "x86_64":
        print(
            f"note: {wheels[0].name} is the CUDA build. It runs on CPUs as well, but is "
            "gigabytes larger; --torch-index URL takes the CPU build (pytorch.org shows the "
            "address under Get Started).",
            file=sys.stderr,
        )


def _stamp(requirements: Path) -> str:
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    return f"# from requirements/{requirements.name} {digest}"


def _lock_of(folder: Path, requirements: Path) -> str:
    lines = [_stamp(requirements)]
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return "\n".join(lines) + "\n"


def _size(folder: Path) -> str:
    return f"{sum(wheel.stat().st_size for wheel in folder.glob('*.whl')) / 1e6:.0f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m provision.wheelhouse", description=__doc__)
    parser.add_argument("action", choices=["build", "data"])
    parser.add_argument("--torch", choices=["cpu", "cuda"], default="cpu", help="build of torch")
    parser.add_argument("--python", default="3.11", help="Python of the hosts (default 3.11)")
    parser.add_argument("--machine", default=os.uname().machine, help="machine type of the hosts")
    parser.add_argument("--torch-index", help="extra index with the wanted build of torch")
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="WHEEL|NAME==VERSION",
        help="one of worker_packages, in their order; once for each",
    )
    parser.add_argument("--if-missing", action="store_true", help="do nothing if it is there")
    options = parser.parse_args()
    target = Target(
        build=options.torch,
        python=options.python,
        machine=options.machine,
        packages=tuple(options.package),
    )
    ROOT.mkdir(exist_ok=True)
    with locked(ROOT / ".lock"):  # two at once would write the same folder beside
        return _make(options, target)


def _make(options: argparse.Namespace, target: Target) -> int:
    try:
        if options.if_missing:
            try:
                find_data() if options.action == "data" else find(target)
                return 0
            except WheelhouseError:
                pass
        if options.action == "data":
            wheels = build_data()
            print(f"training data: {len(wheels.wheels)} wheels, {_size(wheels.folder)}")
            return 0
        print(f"wheelhouse {target.folder.name}: downloading …", flush=True)
        wheelhouse = build(target, torch_index=options.torch_index)
    except WheelhouseError as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 1
    print(
        f"wheelhouse {target.folder.name}: {len(wheelhouse.wheels)} wheels, "
        f"{_size(target.folder)}, in .wheelhouse/"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
