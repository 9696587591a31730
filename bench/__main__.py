"""All measurements of the service, one after another: `make bench`. A bar that is missed is 1.

`python -m bench peers` measures beside other servers (`make bench-peers`).
"""

from __future__ import annotations

import subprocess
import sys

from bench import report
from bench.harness import CHECKOUT

PROGRAMS = ("serving", "forms", "connections", "memory")


def main() -> int:
    """The names of programs as arguments, else all but those that need other servers."""
    code = 0
    for program in sys.argv[1:] or PROGRAMS:
        print(f"==> python -m bench.{program}", flush=True)
        code |= subprocess.call([sys.executable, "-m", f"bench.{program}"], cwd=CHECKOUT)
    return code | report.main()


if __name__ == "__main__":
    sys.exit(main())
