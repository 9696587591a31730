"""Kill a rank or torchrun's agent at a random moment: the run must end as if nothing had been.

Each trial is a run of two ranks that is killed once with SIGKILL, at a moment drawn from the
whole of it, from its start to its end. torchrun restarts lost ranks; when the agent itself is
lost, this program starts it again, as Slurm or systemd would. The weights in the bundle must be
those of a run that nobody touched, byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.results import Row, write
from gpu_service import bundle

CHECKOUT = Path(__file__).parents[2]
VICTIMS = ("rank 0", "rank 1", "agent")
TRIAL_S = 240.0  # most that a trial may take
LAUNCHES = 4  # most that a trial may need

_TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node=2", "--max-restarts=3"),
)
_OPTIONS = {
    "--task": "bench.training.tiny:long",
    "--version": "v",
    "--epochs": "12",
    "--batch-size": "40",
    "--uneven": "keep",
    "--ema": "0.99",
    "--snapshot-steps": "10",
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one run.

    `victim` is who was killed, and `killed_after_s` 0 where the run ended before that. `weights`
    are those of its bundle, None if there is none.
    """

    victim: str
    killed_after_s: float
    took_s: float
    weights: bytes | None


def main() -> int:
    """0 when all runs ended with the weights of the one that was not killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.training.kills")
    parser.add_argument("--count", type=int, default=50, metavar="N", help="kills (default 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole = trial(Path(name) / "whole", victim="", after_s=0.0)
        trials = []
        for number in range(options.count):
            chance = random.Random(f"{options.seed}/{number}")  # noqa: S311  # no secret
            one = killed(Path(name), number, chance, longest_s=whole.took_s)
            trials.append(one)
            verdict = "equal" if one.weights == whole.weights else "DIFFERENT OR MISSING"
            print(
                f"{number + 1:3}: {one.victim} killed after {one.killed_after_s:4.1f} s of "
                f"{whole.took_s:.1f}, done after {one.took_s:5.1f} s, weights {verdict}",
                flush=True,
            )
    equal = sum(one.weights == whole.weights for one in trials)
    finished = sum(one.weights is not None for one in trials)
    extra = statistics.median(one.took_s - whole.took_s for one in trials)
    of = f"of {options.count} killed runs"
    rows = [
        Row(name=f"training: {of}, finished", value=finished, unit="", at_least=options.count),
        Row(name=f"training: {of}, equal weights", value=equal, unit="", at_least=options.count),
        Row(name="training: time lost to a kill, median", value=extra, unit="s"),
    ]
    return 0 if write("training", "python -m bench.training.kills", rows) else 1


def killed(folder: Path, number: int, chance: random.Random, *, longest_s: float) -> Trial:
    """A trial with a kill at a random moment; again where the run was faster than that moment."""
    victim = VICTIMS[number % len(VICTIMS)]
    while True:
        after_s = chance.uniform(0.0, longest_s)
        one = trial(folder / f"{number} {after_s}", victim=victim, after_s=after_s)
        if one.killed_after_s:
            return one
        longest_s = after_s


def trial(folder: Path, *, victim: str, after_s: float) -> Trial:
    """One run in `folder`, with a kill `after_s` its start; none without a victim."""
    folder.mkdir()
    started_s = time.monotonic()
    killed_s = 0.0
    for launch in range(LAUNCHES):
        with _launched(folder) as agent:
            if victim and not launch and _outlasts(agent, after_s):
                victim = _kill(agent, victim)
                killed_s = time.monotonic() - started_s
            try:
                code = agent.wait(max(1.0, started_s + TRIAL_S - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        if code == 0:
            break
    weights = folder / "models" / "tiny" / "v" / bundle.WEIGHTS
    return Trial(
        victim=victim,
        killed_after_s=killed_s,
        took_s=time.monotonic() - started_s,
        weights=weights.read_bytes() if weights.exists() else None,
    )


@contextlib.contextmanager
def _launched(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun's agent with two ranks; what is left of it at the end is killed."""
    log = (folder / "log").open("ab")
    paths = {"--output": folder / "models", "--snapshots": folder / "snapshots"}
    options = [text for pair in (_OPTIONS | paths).items() for text in map(str, pair)]
    agent = subprocess.Popen(
        [sys.executable, *_TORCHRUN, "-m", "gpu_service.training", *options],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=log,
        stderr=log,
    )
    try:
        yield agent
    finally:
        log.close()
        if agent.poll() is None:
            agent.kill()  # its ranks end with it
            agent.wait()


def _outlasts(agent: subprocess.Popen[bytes], after_s: float) -> bool:
    try:
        agent.wait(after_s)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill(agent: subprocess.Popen[bytes], victim: str) -> str:
    """SIGKILL for the victim, or for the agent while it has not started its ranks; who it was."""
    ranks = _ranks(agent.pid)
    if victim not in ranks:
        victim = "agent"
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(ranks.get(victim, agent.pid), signal.SIGKILL)
    return victim


def _ranks(agent: int) -> dict[str, int]:
    """The processes of the agent's ranks, by `rank N`."""
    found = {}
    for children in Path(f"/proc/{agent}/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if line.startswith(b"RANK="):
                        found[f"rank {line[5:].decode()}"] = int(pid)
    return found


if __name__ == "__main__":
    sys.exit(main())
