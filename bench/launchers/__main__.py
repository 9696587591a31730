"""Start the training in every documented way, disturb it, and compare the weights.

    python -m bench.launchers [train] [hand] [elastic]     # root on Linux, two lab hosts

train     `train.py` on two bare hosts, by torchrun and then as a Slurm cluster
hand      torchrun, torch.distributed.launch and Slurm by hand; with a rank killed, a job queued
          anew, a host whose plug is pulled
elastic   a run that a host joins and leaves

All runs of two ranks of a part have to end with the same weights, byte for byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.launchers.hosts import NAMES, SCRIPTS, Hosts, Run, running, wait_for
from bench.results import Row, write
from gpu_service import bundle

EPOCHS = 8
DISTURBED_AT = 1  # after so many epochs
LEAD, OTHER = NAMES

_MODULE = "-m gpu_service.training {options}"
STANDALONE = f"torchrun --standalone --nproc_per_node=2 {_MODULE}"
LAUNCH = f'"$PYTHON" -m torch.distributed.launch --nproc_per_node=2 {_MODULE}'
# As torch's documentation has it; each host's name has to mean an address that others reach.
TWO_NODES = (
    "torchrun --nnodes=2 --nproc_per_node=1 --rdzv_id=100 --rdzv_backend=c10d "
    f"--rdzv_endpoint={{lead}}:29400 {_MODULE}"
)
SCRIPT = f"env NNODES=2 MASTER_ADDR={{lead}} {SCRIPTS}/torchrun_script.sh {{options}}"
ELASTIC = (
    "env NNODES=1:2 MASTER_ADDR={lead} "
    "RDZV_CONF=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3 "
    f"{SCRIPTS}/torchrun_script.sh {{options}}"
)
SRUN = f"srun --nodes=2 --ntasks-per-node=1 {SCRIPTS}/torchrun_script.sh {{options}}"
# Stays until the job has ended, through all its starts, and tells what the ranks print.
SBATCH = f"""env RDZV_ID="$(basename "$PWD")" NNODES=2 bash -c '
{SCRIPTS}/slurm-job.sh {SCRIPTS}/train.sbatch "$@" & job=$!
until [ -e progress.log ]; do sleep 0.1; done
tail --pid=$job -n +1 -F progress.log errors.log 2>/dev/null & wait $job' sbatch {{options}}"""

_KILL_RANK = """
for process in $(pgrep -f -- "-m gpu_service.training"); do
    if grep -qzx "RANK=1" "/proc/$process/environ"; then kill -KILL "$process"; exit 0; fi
done
echo "no process of rank 1 here"; exit 1
"""


class Measurements:
    """Rows, and how many of the runs ended with the weights of the first."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.expected = ""
        self.compared = 0
        self.equal = 0

    def took(self, what: str, seconds: float) -> None:
        self.rows.append(Row(name=f"launchers: {what}", value=seconds, unit="s"))
        print(f"{what:<60} {seconds:6.1f} s", flush=True)

    def compare(self, weights: str) -> None:
        self.expected = self.expected or weights
        self.compared += 1
        self.equal += weights == self.expected
        if weights != self.expected:
            print("  its weights DIFFER", flush=True)

    def close(self, what: str) -> None:
        """A row of what was compared so far, and begin anew."""
        name = f"launchers: {what}, runs with equal weights"
        self.rows.append(
            Row(name=name, value=self.equal, unit="", at_least=self.compared, counted=True)
        )
        self.expected, self.compared, self.equal = "", 0, 0


def by_train_py(hosts: Hosts, found: Measurements) -> None:
    """The whole way, on bare hosts, and again when there is nothing to prepare."""
    options = {"epochs": 2, "batch_size": 256, "deterministic": True}
    ways: dict[str, dict[str, object]] = {
        "train.py, torchrun, bare hosts": {},
        "train.py, torchrun, prepared hosts": {},
        "train.py, Slurm, hosts without it": {"slurm": True},
        "train.py, Slurm, prepared hosts": {"slurm": True},
    }
    for what, data in ways.items():
        with tempfile.TemporaryDirectory() as name:
            found.took(what, hosts.train(Path(name), train_options=options, **data))
            (weights,) = Path(name).glob(f"digits/*/{bundle.WEIGHTS}")
            found.compare(weights.read_bytes().hex())
    found.close("train.py")


Disturbance = Callable[[Hosts, Run, Measurements], None]


def by_hand(hosts: Hosts, found: Measurements) -> None:
    """Every launcher, undisturbed and disturbed."""
    ways: list[tuple[str, str, tuple[str, ...], Disturbance | None]] = [
        ("torchrun --standalone", STANDALONE, (LEAD,), None),
        ("python -m torch.distributed.launch", LAUNCH, (LEAD,), None),
        ("torchrun, two hosts, as documented", TWO_NODES, NAMES, None),
        ("torchrun_script.sh, two hosts", SCRIPT, NAMES, None),
        ("torchrun_script.sh, a rank killed", SCRIPT, NAMES, kill_rank),
        ("srun, two hosts", SRUN, (LEAD,), None),
        ("srun, a rank killed", SRUN, (LEAD,), kill_rank),
        ("sbatch, two hosts", SBATCH, (LEAD,), None),
        ("sbatch, a rank killed", SBATCH, (LEAD,), kill_rank),
        ("sbatch, queued anew", SBATCH, (LEAD,), requeue),
        ("sbatch, a host's plug pulled", SBATCH, (LEAD,), pull_the_plug),
    ]
    for number, (what, command, on, disturb) in enumerate(ways):
        with running(hosts, f"run{number}", EPOCHS) as run:
            run.start(command.replace("{lead}", hosts.addresses[LEAD]), *on)
            if disturb:
                run.wait_until_in(DISTURBED_AT)
                disturb(hosts, run, found)
            found.took(what, run.end())
            found.compare(run.weights())
    found.close("by hand")


def kill_rank(hosts: Hosts, run: Run, found: Measurements) -> None:
    hosts.on(OTHER, _KILL_RANK)


def requeue(hosts: Hosts, run: Run, found: Measurements) -> None:
    hosts.on(LEAD, 'scontrol requeue "$(squeue --noheader --name="$1" --format=%A)"', _job(run))


def pull_the_plug(hosts: Hosts, run: Run, found: Measurements) -> None:
    """Off, until Slurm has noticed and queued the job anew; then on again."""
    hosts.lab("power-off", "--hard", OTHER)
    ask = 'squeue --noheader --states=all --name="$1" --format=%T'
    noticed = wait_for(
        lambda: hosts.on(LEAD, ask, _job(run)).split() == [b"PENDING"], "the job is queued anew"
    )
    found.took("plug pulled, until Slurm noticed", noticed)
    started = time.monotonic()
    hosts.lab("power-on", OTHER)
    running = wait_for(
        lambda: hosts.on(LEAD, ask, _job(run)).split() == [b"RUNNING"], "the job runs again"
    )
    found.took("power on, until the job ran again", running)
    print(f"  (the lab took {time.monotonic() - started - running:.1f} s of it)")


def _job(run: Run) -> str:
    return f"gpu-training-{run.name}"


def elastic(hosts: Hosts, found: Measurements) -> None:
    """One host, then two, then one: every epoch is trained, whoever takes part."""
    with running(hosts, "elastic", 4 * EPOCHS) as run:
        command = ELASTIC.replace("{lead}", hosts.addresses[LEAD])
        run.start(command, LEAD)
        run.wait_until_in(DISTURBED_AT)
        alone = run.said().count("world size 1")
        run.start(command, OTHER)
        found.took(
            "elastic, until a second host had joined",
            wait_for(lambda: "world size 2" in run.said(), "two hosts"),
        )
        leaving = run.processes.pop(OTHER)
        hosts.on(OTHER, f"pkill -TERM -u gpu-service -f -- '{run.folder}'")
        found.took(
            "elastic, until the first went on without it",
            wait_for(lambda: run.said().count("world size 1") > alone, "one host"),
        )
        leaving.wait()
        run.end()
        name = "launchers: elastic 1, 2, 1 hosts, epochs done"
        epochs = len(run.curve())
        found.rows.append(Row(name=name, value=epochs, unit="", at_least=run.epochs, counted=True))


PARTS: dict[str, Callable[[Hosts, Measurements], None]] = {
    "train": by_train_py,
    "hand": by_hand,
    "elastic": elastic,
}


def main() -> int:
    """0 when every run ended and all weights are equal."""
    parser = argparse.ArgumentParser(prog="python -m bench.launchers")
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help="default: all")
    parser.add_argument("--lab", default="launchers", metavar="NAME", help="name of the lab")
    parser.add_argument("--keep", action="store_true", help="leave the hosts running")
    options = parser.parse_args()
    hosts = Hosts(options.lab)
    parts = options.parts or list(PARTS)
    hosts.up(bare="train" in parts)
    good = True
    try:
        for part in parts:
            if part != "train":
                hosts.prepare()
            found = Measurements()
            PARTS[part](hosts, found)
            good &= write("training", f"python -m bench.launchers {part}", found.rows)
    finally:
        if not options.keep:
            hosts.lab("down")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
