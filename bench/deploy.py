"""How long a deploy takes that has nothing to do: `python -m bench.deploy`, with the lab deployed.

Includes everything that the operator waits for: Python's start, SSH, every fact, and the
verification with a real prediction per worker and a handshake.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.results import Row, write

CHECKOUT = Path(__file__).resolve().parents[1]
RUNS = 7


def one_run() -> float:
    """Seconds of one deploy; ends the measurement if it changed anything or failed."""
    pyinfra = str(Path(sys.executable).with_name("pyinfra"))
    started = time.perf_counter()
    result = subprocess.run(
        [pyinfra, "-y", "inventory.py", "deploy.py"], cwd=CHECKOUT, capture_output=True, text=True
    )
    took = time.perf_counter() - started
    output = result.stdout + result.stderr
    if result.returncode:
        sys.exit(output)
    if "changed it" in output:
        sys.exit("the deploy changed something: deploy first, then measure")
    return took


def main() -> int:
    times = [one_run() for _ in range(RUNS)]
    rows = [
        Row(name="no-op deploy, median", value=statistics.median(times), unit="s", at_most=4.0),
        Row(name="no-op deploy, slowest", value=max(times), unit="s"),
    ]
    return 0 if write("deploy", "python -m bench.deploy", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
