"""Writes requirements/*.txt anew from pyproject.toml: `make lock`.

Every package is pinned, with all that it pulls in. torch's local version (`+cpu`) is left out,
so that the same pin means the CPU build on one host and the CUDA build on another.
"""

import json
import subprocess
import sys
from pathlib import Path

SETS = {"service": "service", "operator": "operator", "dev": "service,operator,dev"}
HERE = Path(__file__).parent


def resolve(extras: str) -> list[str]:
    """`name==version` of everything that `.[extras]` needs, as pip resolves it now."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--report", "-", f"{HERE.parent}[{extras}]"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    packages = [entry["metadata"] for entry in report["install"]]
    return sorted(
        f"{package['name'].lower()}=={package['version'].split('+')[0]}"
        for package in packages
        if package["name"] != "gpu-service"
    )


for file, extras in SETS.items():
    lines = ["# Written by `make lock` from pyproject.toml; change it there.", *resolve(extras)]
    (HERE / f"{file}.txt").write_text("\n".join(lines) + "\n")
    print(f"requirements/{file}.txt: {len(lines) - 1} packages")
