"""Rows of measurements, written where the documentation reads them: `bench/results/NAME.json`.

A row is name, value, unit, bar, and whether the bar holds; a file carries the machine and the date.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `at_most` or `at_least` is its bar; without one it is for information."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


def write(name: str, command: str, rows: list[Row]) -> bool:
    """Write the rows and print them as a table; whether every bar holds."""
    RESULTS.mkdir(exist_ok=True)
    report = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()}",
        "rows": [{**asdict(row), "holds": row.holds} for row in rows],
    }
    path = RESULTS / f"{name}.json"
    candidate = path.with_suffix(".candidate")
    candidate.write_text(json.dumps(report, indent=1) + "\n")
    candidate.rename(path)
    for row in rows:
        print(f"{row.name:<44} {row.value:>10.3f} {row.unit:<6} {_verdict(row)}")
    return all(row.holds is not False for row in rows)


def _verdict(row: Row) -> str:
    if row.holds is None:
        return ""
    bar = f"at most {row.at_most}" if row.at_most is not None else f"at least {row.at_least}"
    return f"{bar}: {'holds' if row.holds else 'MISSED'}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
