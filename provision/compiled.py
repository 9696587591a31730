"""The part of the service that every request goes through, as C: mypyc compiles it on this machine.

A release holds it beside the sources, where Python prefers it; a host on which it does not load
runs the sources. It is of one interpreter (`cp311-x86_64`) and of the sources that it was made
from, and lies in `.wheelhouse/compiled/`, named by both.

    python -m provision.compiled [--if-possible]        a minute

That takes gcc, Python's headers and requirements/dev.txt. So does finding it, which is by the
compiler's version: a machine with requirements/operator.txt alone deploys the sources.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from provision.locks import locked
from provision.rendering import CHECKOUT

# What runs for each message or batch. Not those whose Structs msgspec decodes into: mypyc drops the
# types of their annotations; nor those whose classes others inherit from.
MODULES = (
    "batching",
    "connection",
    "counts",
    "datatypes",
    "dispatch",
    "finished",
    "parameters",
    "protocol",
    "registry",
    "service",
    "session",
    "signature",
)

ROOT = CHECKOUT / ".wheelhouse" / "compiled"
_PACKAGE = CHECKOUT / "gpu_service"

# Run in a copy of the sources. What is not compiled is not looked at: torch alone would take
# minutes. The checkout's own types were checked by `make lint`.
_COMPILE = """
import sys
from mypyc.build import mypycify
from setuptools import setup
extensions = mypycify(
    [
        "--follow-imports=skip",
        "--no-warn-unused-ignores",
        "--no-warn-return-any",
        "--disable-error-code=no-redef",
        *sys.argv[1:],
    ],
    opt_level="3",
    debug_level="0",
    group_name="gpu_service.compiled",
)
setup(name="gpu_service", packages=[], ext_modules=extensions,
      script_args=["--quiet", "build_ext", "--inplace"])
"""


class CompilingError(Exception):
    """It could not be compiled here; says why."""


def tag(python: str, machine: str) -> str:
    """Which interpreters can load it: `python` as "3.11", `machine` as `uname -m` says."""
    return f"cp{python.replace('.', '')}-{machine}"


def has_compiler() -> bool:
    """Whether mypyc is installed here."""
    try:
        return bool(version("mypy"))
    except PackageNotFoundError:
        return False


@cache
def digest() -> str:
    """Of the sources and the compiler: the same where the same would be made."""
    found = hashlib.sha256(version("mypy").encode())
    for name in MODULES:
        found.update((_PACKAGE / f"{name}.py").read_bytes())
    return found.hexdigest()[:16]


def find(*, python: str, machine: str) -> Path | None:
    """The folder with what was compiled of these sources for such hosts; None if it is not here."""
    if not has_compiler():
        return None
    folder = ROOT / f"{tag(python, machine)}-{digest()}"
    return folder if folder.is_dir() else None


def is_outdated(*, python: str, machine: str) -> bool:
    """Whether what is here for such hosts was compiled of other sources, or by another compiler."""
    if not has_compiler() or find(python=python, machine=machine) is not None:
        return False
    return any(ROOT.glob(f"{tag(python, machine)}-*"))


def build() -> Path:
    """Compile for hosts with this machine's Python, unless that is done. Raises CompilingError."""
    python, machine = f"{sys.version_info.major}.{sys.version_info.minor}", os.uname().machine
    ROOT.mkdir(parents=True, exist_ok=True)
    with locked(ROOT.with_name(".compiled.lock")):
        if (found := find(python=python, machine=machine)) is not None:
            return found
        _check_tools()
        folder = ROOT / f"{tag(python, machine)}-{digest()}"
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".partial-") as name:
            _compile(Path(name))
            (Path(name) / "done").rename(folder)
        _forget_others(folder)
    return folder


def _check_tools() -> None:
    """What a compiler needs."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if has_compiler() else ["mypy (pip install -r requirements/dev.txt)"]
    missing += [] if shutil.which("gcc") or shutil.which("cc") else ["a C compiler (gcc)"]
    if not header.exists():
        missing.append(f"Python's headers ({header}; python3-dev on Debian, python3-devel on EL)")
    if missing:
        raise CompilingError(f"missing here: {', '.join(missing)}")


def _compile(folder: Path) -> None:
    """Leave what was compiled in `folder`/done."""
    package = folder / "gpu_service"
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    sources = [f"gpu_service/{name}.py" for name in MODULES]
    result = subprocess.run(
        [sys.executable, "-c", _COMPILE, *sources],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        raise CompilingError(f"mypyc failed:\n{result.stdout.strip()}")
    (folder / "done").mkdir()
    for path in package.glob("*.so"):
        shutil.copy(path, folder / "done")


def _forget_others(folder: Path) -> None:
    """Of the same interpreter, but of other sources."""
    kind, _, _ = folder.name.rpartition("-")
    for other in ROOT.glob(f"{kind}-*"):
        if other != folder:
            shutil.rmtree(other)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m provision.compiled", description=__doc__)
    parser.add_argument(
        "--if-possible", action="store_true", help="only say so if it cannot be compiled here"
    )
    options = parser.parse_args()
    try:
        folder = build()
    except CompilingError as error:
        note = "note: the service is not compiled, which makes it slower; the sources are deployed"
        print(f"{note if options.if_possible else 'compiled'}: {error}", file=sys.stderr)
        return 0 if options.if_possible else 1
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"compiled {folder.name}: {size / 1e6:.1f} MB, in .wheelhouse/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
