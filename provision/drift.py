"""What differs from the declared state, host by host, changing nothing.

    python -m provision.drift [inventory.py]

A thin shell around `pyinfra --dry`, which always exits 0. Exit codes, for a scheduler or a
pipeline: 0 nothing differs, 2 something does, 1 it could not be told. `make drift` shows the same,
but make ends with 2 for whatever is not 0.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NONE, ERROR, SOME = 0, 1, 2


def by_host(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Operations that would change something, by host, from the JSON of `pyinfra --dry --json`."""
    found: dict[str, list[str]] = {}
    for operation in report["plan"]:
        pending = [*operation["hosts_with_change"], *operation["hosts_with_conditional_change"]]
        for host in pending:
            found.setdefault(host, []).append(operation["name"])
    return dict(sorted(found.items()))


def main(arguments: Sequence[str]) -> int:
    """Ask pyinfra about `arguments` (default: inventory.py) and print what differs."""
    inventory, *options = arguments or ["inventory.py"]
    pyinfra = str(Path(sys.executable).with_name("pyinfra"))
    command = [pyinfra, "--dry", "--diff", "--json", *options, inventory, "deploy.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        drift = by_host(json.loads(result.stdout))
    except (json.JSONDecodeError, KeyError):
        print(result.stderr.strip() or result.stdout.strip(), file=sys.stderr)
        return ERROR
    if result.returncode:
        print(result.stderr.strip(), file=sys.stderr)
        return ERROR
    for host, operations in drift.items():
        print(f"{host}:")
        print("\n".join(f"  {name}" for name in operations))
    differences = _differences(result.stderr)
    if differences:
        print("\n".join(["", *differences]))
    if not drift:
        print("nothing differs from what is declared")
    return SOME if drift else NONE


def _differences(log: str) -> list[str]:
    """The lines of files that differ, as the operations log them; secrets are never among them."""
    lines = (re.match(r"\s*\[(\S+)\]\s+\| (.*)", line) for line in log.splitlines())
    return [f"{line[1]} | {line[2]}" for line in lines if line]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
