"""Rows of measurements, written where the documentation reads them: `bench/results/NAME.json`.

A row is name, value, unit, bar, whether the bar holds, and the command, the date and the machine
that measured it, with the share of the machine that other programs used meanwhile. On a machine
that was not quiet no bar holds or is missed, but of a count: ratios of such a run can be anything.
Several programs may write into one file: rows of other names stay.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Of all cores; what others use beyond makes a run worthless.
_MOST_BY_OTHERS = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `at_most` or `at_least` is its bar; without one it is for information.

    `counted`: a count or an equality, which a busy machine does not change.
    """

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    counted: bool = False

    @property
    def holds(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


def write(name: str, command: str, rows: list[Row]) -> bool:
    """Write the rows and print them as a table; whether every bar holds.

    To be called when all servers have ended. Rows that this command wrote before, and does not
    write any more, are dropped.
    """
    RESULTS.mkdir(exist_ok=True)
    by_others = _used_by_others()
    quiet = by_others <= _MOST_BY_OTHERS
    origin = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()}",
        "used_by_others": round(by_others, 3),
    }
    measured = {row.name: {**_figure(row, quiet), **origin} for row in rows}
    kept = [row for row in read(name) if row["command"] != command and row["name"] not in measured]
    candidate = _path(name).with_suffix(".candidate")
    candidate.write_text(json.dumps({"rows": [*kept, *measured.values()]}, indent=1) + "\n")
    candidate.rename(_path(name))
    for row in rows:
        verdict = _verdict(row) if quiet or row.counted else ""
        print(f"{row.name:<60} {row.value:>12.3f} {row.unit:<6} {verdict}")
    judged = [row for row in rows if quiet or row.counted]
    if len(judged) < len(rows):
        print(f"No verdict: other programs used {by_others:.0%} of this machine. Run it alone.")
    with_bar = [row for row in rows if row.holds is not None]
    return all(row in judged and row.holds for row in with_bar)


def _figure(row: Row, quiet: bool) -> dict[str, Any]:
    figure = asdict(row)
    counted = figure.pop("counted")
    return {**figure, "holds": row.holds if quiet or counted else None}


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a file as they were written; none if it is not there."""
    if not _path(name).exists():
        return []
    report = json.loads(_path(name).read_text())
    # Older files say once for all rows where they come from.
    origin = {key: report[key] for key in ("command", "date", "machine") if key in report}
    return [{**origin, **row} for row in report["rows"]]


def _path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _used() -> tuple[float, float, float]:
    """Now, CPU seconds of all programs, and of this one with all that it started and saw end."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    own = os.times()
    return (
        time.monotonic(),
        (user + nice + system) / os.sysconf("SC_CLK_TCK"),
        own.user + own.system + own.children_user + own.children_system,
    )


_AT_START = _used()
_counted_s = 0.0


def count_as_own(cpu_s: float) -> None:
    """CPU time of what belongs to the measurement, but was not started by this process."""
    global _counted_s
    _counted_s += cpu_s


def _used_by_others() -> float:
    """The share of all cores, since this module was imported."""
    elapsed, everything, own = (
        now - before for now, before in zip(_used(), _AT_START, strict=True)
    )
    return max(0.0, everything - own - _counted_s) / (elapsed * (os.cpu_count() or 1))


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
