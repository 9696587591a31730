"""What the operator's machine needs: requirements/operator.txt, and no other packages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]

# Run in an interpreter of its own, as pyinfra's is: what is imported here would hide what lacks.
WITHOUT = """
import importlib, importlib.abc, importlib.metadata, sys

missing, wanted = (argument.split() for argument in sys.argv[1:])


class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


version = importlib.metadata.version


def version_of(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


sys.meta_path.insert(0, Missing())
importlib.metadata.version = version_of
for name in wanted:
    importlib.import_module(name)
from provision import compiled
assert compiled.find(python="3.11", machine="x86_64") is None
"""


def missing_packages() -> list[str]:
    """Modules that are installed here, of packages that requirements/operator.txt does not name."""
    text = (CHECKOUT / "requirements" / "operator.txt").read_text()
    named = {re.split("[=<>]", line)[0].replace("_", "-").lower() for line in text.splitlines()}
    return [
        module
        for module, owners in packages_distributions().items()
        if not {owner.replace("_", "-").lower() for owner in owners} & {*named, "gpu-service"}
        and module.isidentifier()
        and module not in ("lab", "provision", "gpu_service", "setuptools", "pkg_resources")
    ]


def imported_by(script: str) -> list[str]:
    """The modules of this checkout that a deploy's script imports."""
    text = (CHECKOUT / script).read_text()
    modules = re.findall(r"^from (provision(?:\.\w+)?) import (.*)$", text, re.MULTILINE)
    found = [m if "." in m else f"{m}.{name}" for m, names in modules for name in names.split(", ")]
    return sorted(set(found))


@pytest.mark.parametrize("script", ["deploy.py", "rollback.py", "train.py", "uninstall.py"])
def test_deploys_run_with_what_the_operator_needs_to_install(script: str) -> None:
    missing, wanted = missing_packages(), imported_by(script)
    assert {"filelock", "mypy", "pytest", "torch"} <= set(missing)
    assert "provision.preflight" in wanted
    others = ["provision.wheelhouse", "provision.drift"]
    command = [sys.executable, "-c", WITHOUT, " ".join(missing), " ".join([*wanted, *others])]
    subprocess.run(command, cwd=CHECKOUT, check=True, timeout=120)
