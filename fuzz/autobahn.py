"""Autobahn's test suite against a session of the service: `python -m fuzz.autobahn`.

The suite wants a server that returns what it gets, so the service behind the session is a
stand-in that does; the session is the one that serves. The suite runs on Python 2.7 alone
(`--python`) and is installed into `.cache/autobahn` from the package index. Writes its
figures into `docs/conformance.md`; what each case did is in `.cache/autobahn/reports`.
"""

import argparse
import asyncio
import collections
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import uvloop

from fuzz import driver
from gpu_service.connection import Caller
from gpu_service.session import Limits

SUITE = "autobahntestsuite==0.8.2"
CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = CHECKOUT / ".cache" / "autobahn"
DOCUMENT = CHECKOUT / "docs" / "conformance.md"
AGENT = "gpu_service"

# Compression is not offered by the server.
EXCLUDED = ["12.*", "13.*"]

CATEGORIES = {
    "1": "framing",
    "2": "pings and pongs",
    "3": "reserved bits",
    "4": "opcodes",
    "5": "fragmentation",
    "6": "UTF-8",
    "7": "closing",
    "9": "limits and performance",
    "10": "automatic fragmentation",
}

LIMITS = Limits(
    max_in_flight=1024,
    max_message_bytes=16 << 20,  # the largest message of 9.*
    max_fragments=1 << 20,
    ping_interval_s=3600.0,  # the suite counts the frames that it gets
    ping_timeout_s=3600.0,
)

BEGIN, END = "<!-- python -m fuzz.autobahn -->\n", "<!-- end -->\n"

Results = Mapping[str, Mapping[str, Any]]


# Where the service differs from the suite on purpose; `docs/conformance.md` says why.
KNOWN = {"7.1.5"}


class Echo:
    """Returns what one connection gets. A `service.Service` and its `Connection`."""

    def __init__(self, caller: Caller | None = None) -> None:
        self._caller = caller

    def connect(self, caller: Caller) -> "Echo":
        return Echo(caller)

    def receive(self, message: str | bytes) -> None:
        assert self._caller is not None, "connect() comes first"
        binary = isinstance(message, bytes)
        payload = message if isinstance(message, bytes) else message.encode()
        self._caller.answer([payload], binary=binary, final=True)

    def unclog(self) -> None:
        pass

    def close(self) -> None:
        pass


def install(python: str) -> Mapping[str, str]:
    """The environment in which `python` finds the suite."""
    environ = {**os.environ, "PYTHONUSERBASE": str(FOLDER), "PYTHONWARNINGS": "ignore"}
    command = [python, "-m", "pip", "install", "--quiet", "--user", "--no-warn-script-location"]
    try:
        subprocess.run([*command, SUITE], env=environ, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{SUITE} could not be installed: {error}; --python must name a Python 2.7 with pip "
            "(pyenv install 2.7.18), and there must be a C compiler"
        ) from None
    return environ


async def run(python: str, environ: Mapping[str, str], cases: list[str]) -> Results:
    """What the suite says of each case, by its name."""
    loop = asyncio.get_running_loop()
    host, service = driver.Host(), Echo()
    server = await loop.create_server(
        lambda: cast(asyncio.Protocol, driver.session(host=host, service=service, limits=LIMITS)),
        "127.0.0.1",
        0,
    )
    port = server.sockets[0].getsockname()[1]
    reports = FOLDER / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    specification = {
        "outdir": str(reports),
        "servers": [{"agent": AGENT, "url": f"ws://127.0.0.1:{port}"}],
        "cases": cases,
        "exclude-cases": EXCLUDED,
        "exclude-agent-cases": {},
    }
    spec = FOLDER / "fuzzingclient.json"
    spec.write_text(json.dumps(specification))
    suite = await asyncio.create_subprocess_exec(
        *(python, "-m", "autobahntestsuite.wstest", "-m", "fuzzingclient", "-s", str(spec)),
        env=environ,
        cwd=FOLDER,
        stdout=sys.stderr,
    )
    code = await suite.wait()
    server.close()
    if code != 0:
        raise SystemExit(f"the suite exited with {code}; what it said stands above")
    results: dict[str, Results] = json.loads((reports / "index.json").read_text())
    return results[AGENT]


def table(results: Results) -> str:
    """The results by category, as a table in Markdown."""
    counts: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in CATEGORIES
    }
    for case, result in results.items():
        counts[case.partition(".")[0]][_verdict(result)] += 1
    columns = ["OK", "NON-STRICT", "INFORMATIONAL", "FAILED"]
    lines = [
        "| | category | cases | passed | non-strict | informational | failed |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for number, count in counts.items():
        if count:
            figures = " | ".join(str(count[column]) for column in columns)
            lines.append(f"| {number} | {CATEGORIES[number]} | {count.total()} | {figures} |")
    total = sum(counts.values(), collections.Counter())
    figures = " | ".join(f"**{total[column]}**" for column in columns)
    lines.append(f"| | **all** | **{total.total()}** | {figures} |")
    return "\n".join(lines) + "\n"


def _verdict(result: Mapping[str, Any]) -> str:
    """The worse of how the case went and how its close did."""
    verdicts = {result["behavior"], result["behaviorClose"]}
    order = ["NON-STRICT", "INFORMATIONAL", "OK"]
    if not verdicts <= set(order):
        return "FAILED"
    return next(verdict for verdict in order if verdict in verdicts)


def document(results: Results, command: str) -> None:
    """Put the table into the document, in the place of the last one."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    today = datetime.date.today().isoformat()
    said = f"{today}, {SUITE.replace('==', ' ')}, `{command}`:\n\n{table(results)}"
    DOCUMENT.write_text(before + BEGIN + said + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.autobahn", description=__doc__)
    parser.add_argument("--python", default="python2.7", help="a Python 2.7 with pip")
    parser.add_argument("cases", nargs="*", help="such as 6.*; nothing is written then")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    environ = install(options.python)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(run(options.python, environ, options.cases or ["*"]))
    print(table(results), end="")
    if not options.cases:
        document(results, "python -m fuzz.autobahn")
    failed = {case for case, result in results.items() if _verdict(result) == "FAILED"}
    if failed - KNOWN:
        print("failed:", ", ".join(sorted(failed - KNOWN)), file=sys.stderr)
    return 1 if failed - KNOWN else 0


if __name__ == "__main__":
    sys.exit(main())
