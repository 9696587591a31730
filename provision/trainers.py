"""Trainer hosts: prepared like workers, then one training run on all of them together.

On the host:

    /opt/gpu-service/venvs, releases     as on a worker (provision/workers.py)
    /opt/gpu-service/data/DIGEST/        the packages that hold training data
    /opt/gpu-service/training/           torchrun_script.sh, train.sbatch, slurm-job.sh
    /etc/gpu-service/training.env        what the last run was started with
    /var/lib/gpu-service/training/VERSION/
        progress.log, errors.log         what its processes printed
        snapshots/                       from which it goes on after a failure
        models/NAME/VERSION/             the bundle, on the host of rank 0

A run is a transient unit of systemd, `gpu-training.service`, on each host (with Slurm: on the first
alone), so it outlives whoever started it. systemd's word is the one truth about it: a unit that
runs is attached to, one that ended well waits until its bundle was fetched, and one that failed
until that was told.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from pyinfra import host
from pyinfra.api import FileDownloadCommand, FunctionCommand, deploy, operation
from pyinfra.api.exceptions import DeployError
from pyinfra.api.host import Host
from pyinfra.api.state import State

from gpu_service import bundle
from gpu_service.training import settings as training_settings
from provision import facts, operations, rendering, wheelhouse, workers
from provision.facts import Hardware, quoted, script
from provision.operations import Commands, ManagedFile, ask, executing, fail
from provision.rendering import CHECKOUT
from provision.settings import SERVICE_STATE, Fleet, TrainerSettings
from provision.workers import ETC, OPT, Environment, Release

UNIT = "gpu-training.service"
SCRIPTS = f"{OPT}/training"
RUNS = f"{SERVICE_STATE}/training"
ENV_FILE = f"{ETC}/training.env"

# Everything that two trainers say to each other: rendezvous, gloo and NCCL choose their ports.
OPEN_PORTS = "1024-65535"
# One look at a host that does not answer; after so many it counts as lost.
POLL_TIMEOUT_S = 20
SILENT_POLLS = 3
# How long the others may take to end by themselves when one host has failed.
LINGER_POLLS = 5


class Phase(StrEnum):
    """A run on one host, as systemd tells it."""

    ABSENT = "absent"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """One look at a host's run: `lines` are new ones of its progress, `seen` counts all of them."""

    phase: Phase
    version: str = ""
    seen: int = 0
    lines: tuple[str, ...] = ()


class HostLostError(Exception):
    """A host did not answer."""


class Job:
    """The run of this fleet, as all its hosts know it. One process of pyinfra, so one object."""

    def __init__(self) -> None:
        self.found: dict[str, Sighting] = {}
        self.failed_on: str | None = None
        self.version = ""
        self.fetched_from: str | None = None

    def decide(self) -> None:
        """Which version this is about: what is there, or a new one. Raises `DeployError`."""
        versions = {seen.version for seen in self.found.values() if seen.version}
        if len(versions) > 1:
            raise DeployError(
                f"different runs on the trainers ({', '.join(sorted(versions))}); end them with "
                "--data train=stop, then start one"
            )
        self.version = self.version or next(iter(versions), "") or bundle.new_version()

    def wants_start(self, name: str) -> bool:
        """Whether the run has to be started on this host.

        Also where it is missing on one of several: that host was rebooted, and the others wait
        for it at the rendezvous.
        """
        ended = any(seen.phase in (Phase.DONE, Phase.FAILED) for seen in self.found.values())
        return not ended and self.found[name].phase is Phase.ABSENT

    def is_there(self) -> bool:
        return any(seen.phase is not Phase.ABSENT for seen in self.found.values())


_JOB = Job()


@dataclass(frozen=True, kw_only=True)
class Data:
    """Packages that hold training data, and their place on the host."""

    wheels: tuple[ManagedFile, ...]
    digest: str

    @property
    def folder(self) -> str:
        return f"{OPT}/data/{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a trainer's part of a run is made of."""

    hardware: Hardware
    environment: Environment
    release: Release
    data: Data

    @property
    def python(self) -> str:
        return f"{self.environment.folder}/bin/python"


def plan(settings: TrainerSettings) -> Plan:
    """What the current host trains with. Raises `DeployError`; touches nothing."""
    if problem := unfit_folder(CHECKOUT / settings.train_models):
        raise DeployError(f"train_models: {problem}")
    hardware = host.get_fact(facts.HostHardware)
    if settings.train_device == "cuda" and not hardware.nvidia_gpus:
        raise DeployError(
            f"{host.name}: train_device is 'cuda', but no NVIDIA driver serves a GPU there "
            "(/proc/driver/nvidia/gpus is empty); install the driver or set train_device='auto'"
        )
    return Plan(
        hardware=hardware,
        environment=workers.environment_for(
            settings, hardware, uses_gpu=uses_gpu(settings, hardware)
        ),
        release=workers.build_release(),  # nothing of what is compiled trains
        data=_data(),
    )


def unfit_folder(folder: Path) -> str | None:
    """Why no bundle could be written into the folder, told before hours of training; or None."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        return f"{there} is no folder, so the bundle could not be brought to {folder}"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written, so the bundle could not be brought to {folder}"
    return None


def uses_gpu(settings: TrainerSettings, hardware: Hardware) -> bool:
    return settings.train_device != "cpu" and hardware.nvidia_gpus > 0


def processes(settings: TrainerSettings, hardware: Hardware) -> int:
    """Processes on a host: one a GPU, and one where there is none."""
    if settings.train_processes != "auto":
        return settings.train_processes
    return hardware.nvidia_gpus if uses_gpu(settings, hardware) else 1


@cache
def _data() -> Data:
    try:
        source = wheelhouse.find_data()
    except wheelhouse.WheelhouseError as error:
        raise DeployError(str(error)) from None
    return Data(
        wheels=tuple(
            ManagedFile(path=f"{OPT}/data/wheels/{wheel.name}", content=wheel)
            for wheel in source.wheels
        ),
        digest=source.digest,
    )


@deploy("Trainer")
def trainer(settings: TrainerSettings, fleet: Fleet, planned: Plan) -> None:
    """Bring one trainer to the state from which a run can start."""
    workers.install(settings, planned.environment, planned.release)
    workers.compile_environment(name="All of it is compiled", environment=planned.environment)
    operations.directories(
        name="Folders of the training",
        paths={
            f"{OPT}/data": ("755", "root"),
            SCRIPTS: ("755", "root"),
            RUNS: ("755", settings.service_user),
        },
    )
    install_data(name="Training data", data=planned.data, python=planned.python)
    operations.place_files(name="Launch scripts", files=launch_scripts())
    others = [address for address in fleet.trainer_addresses() if address != _address(fleet)]
    operations.firewalld(
        name="Trainers reach each other, nobody else does",
        role="trainer",
        ports_from={OPEN_PORTS: others},
    )


def _address(fleet: Fleet) -> str:
    return fleet.addresses[host.name]


def launch_scripts() -> list[ManagedFile]:
    """What starts the training on a host, also by hand."""
    names = ("torchrun_script.sh", "train.sbatch", "slurm-job.sh")
    return [
        ManagedFile(path=f"{SCRIPTS}/{name}", content=rendering.static(name), mode="755")
        for name in names
    ]


@operation()
def install_data(data: Data, python: str) -> Commands:
    """The packages' folder: filled beside, then renamed. What they depend on is left out."""
    if data.folder in host.get_fact(facts.Paths, paths=(data.folder,)):
        return
    yield from operations.place_files._inner(files=data.wheels, verified=True)
    # Wheels for any machine are archives of what they install.
    yield script(
        'python=$1 partial=$2 folder=$3 wheels=$4; shift 4; umask 022; rm -rf "$partial"; '
        'for wheel; do "$python" -m zipfile -e "$wheel" "$partial" || exit 1; done; '
        'mv -T "$partial" "$folder" && rm -rf "$wheels"',
        python,
        f"{OPT}/data/.{data.digest}.partial",
        data.folder,
        f"{OPT}/data/wheels",
        *(wheel.path for wheel in data.wheels),
    )


def holds_run(fleet: Fleet, through_slurm: bool) -> bool:
    """Whether the current host has the run's unit: with Slurm the first trainer has it for all."""
    return host.name == fleet.lead_trainer or not through_slurm


@deploy("Training")
def run(settings: TrainerSettings, fleet: Fleet, planned: Plan, *, through_slurm: bool) -> None:
    """Start the run, or attach to the one that is there; tell of it until it ends; fetch it."""
    holds = holds_run(fleet, through_slurm)
    look(name="What runs there", job=_JOB, holds=holds)
    operations.barrier(name="All trainers answered")
    start(
        name="The run is started",
        job=_JOB,
        holds=holds,
        launch=launch(settings, fleet, planned, through_slurm=through_slurm),
    )
    operations.barrier(name="It is started everywhere")
    follow(name="Progress", job=_JOB, holds=holds)
    operations.barrier(name="It ended well")
    fetch(name="The bundle is on this machine", job=_JOB, into=CHECKOUT / settings.train_models)
    operations.barrier(name="The bundle is safe")
    complete(name="The run is complete", job=_JOB)
    forget(name="Old runs are gone", keep=settings.keep_versions)
    workers.prune(
        name="What old runs were made of is gone",
        folders=[f"{OPT}/venvs", f"{OPT}/releases", f"{OPT}/data"],
        keep=settings.keep_versions,
    )


@deploy("Training stops")
def stop(fleet: Fleet, *, through_slurm: bool) -> None:
    """End the run on all hosts, and forget that it was."""
    look(name="What runs there", job=_JOB, holds=holds_run(fleet, through_slurm))
    end(name="The run is stopped", job=_JOB)


@deploy("Training status")
def status(fleet: Fleet, *, through_slurm: bool) -> None:
    """Tell how the run fares; changes nothing."""
    look(name="What runs there", job=_JOB, holds=holds_run(fleet, through_slurm))
    tell(name="How it fares", job=_JOB)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the run is started on one host; `{version}` in values and arguments becomes its own."""

    user: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    arguments: tuple[str, ...]

    def settings_file(self, version: str) -> ManagedFile:
        values = {"GPU_TRAINING_VERSION": version, **self.environment}
        lines = [
            f"{key}={workers.env_quoted(_filled(value, version))}\n"
            for key, value in values.items()
        ]
        return ManagedFile(path=ENV_FILE, content="".join(lines).encode())

    def systemd_run(self, version: str) -> list[str]:
        """The command that starts the transient unit."""
        folder = f"{RUNS}/{version}"
        properties = {
            "Type": "exec",
            "User": self.user,
            "WorkingDirectory": folder,
            "EnvironmentFile": ENV_FILE,
            "StandardOutput": f"append:{folder}/progress.log",
            "StandardError": f"append:{folder}/errors.log",
            # torchrun, asked to end, ends its processes; what is left after that is killed.
            "KillMode": "mixed",
            "TimeoutStopSec": "60",
            "NoNewPrivileges": "yes",
            "LimitNOFILE": "65536",
        }
        return [
            *("systemd-run", "--quiet", f"--unit={UNIT}", "--remain-after-exit"),
            f"--description=Training run {version}",
            f"--setenv=GPU_TRAINING_VERSION={version}",
            *(f"--property={name}={value}" for name, value in properties.items()),
            *self.command,
            *(_filled(argument, version) for argument in self.arguments),
        ]


def _filled(text: str, version: str) -> str:
    return text.replace("{version}", version)


def launch(
    settings: TrainerSettings, fleet: Fleet, planned: Plan, *, through_slurm: bool
) -> Launch:
    """How this host takes part in the run."""
    environment = {
        "PATH": f"{planned.environment.folder}/bin:/usr/local/bin:/usr/bin:/usr/sbin:/bin",
        "PYTHON": planned.python,
        "GPU_WORKER_PYTHON": planned.python,
        "PYTHONPATH": f"{planned.release.folder}:{planned.data.folder}",
        "PYTHONUNBUFFERED": "1",
        "HOME": f"{RUNS}/{{version}}",
        "RDZV_ID": "{version}",
        "MASTER_PORT": str(settings.rendezvous_port),
        "NPROC_PER_NODE": str(processes(settings, planned.hardware)),
        "MAX_RESTARTS": str(settings.train_max_restarts),
        "JOIN_TIMEOUT_S": str(settings.train_join_timeout_s),
        "NNODES": str(len(fleet.trainers)),
    }
    if settings.train_threads != "auto":
        environment["OMP_NUM_THREADS"] = str(settings.train_threads)
    if not uses_gpu(settings, planned.hardware):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if through_slurm:
        # Slurm says which host is the first, and hands out the GPUs.
        environment["TORCHRUN_SCRIPT"] = f"{SCRIPTS}/torchrun_script.sh"
        command = [f"{SCRIPTS}/slurm-job.sh", f"{SCRIPTS}/train.sbatch"]
    else:
        environment["MASTER_ADDR"] = fleet.addresses[fleet.lead_trainer]
        command = [f"{SCRIPTS}/torchrun_script.sh"]
    return Launch(
        user=settings.service_user,
        command=("/usr/bin/env", "bash", *command),
        environment=environment,
        arguments=training_arguments(settings),
    )


def training_arguments(settings: TrainerSettings) -> tuple[str, ...]:
    """The training's command line; `{version}` stands for the run's version."""
    folder = f"{RUNS}/{{version}}"
    options: dict[str, Any] = {"output": f"{folder}/models", "version": "{version}"}
    if "snapshots" in training_settings.Settings.__dataclass_fields__:
        options["snapshots"] = f"{folder}/snapshots"
    return tuple(
        word
        for name, value in {**options, **settings.train_options}.items()
        for word in _option(name, value)
    )


def _option(name: str, value: str | int | float | bool) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={value}"]


# systemd's word on the unit, the number of whole lines, and those that are new. With a wait, it
# answers as soon as there is something to tell: one look costs a round trip, however often it is.
_LOOK = """
state() { systemctl show "$1" -p ActiveState -p SubState -p Environment; }
folder() { sed -n 's/^Environment=.*GPU_TRAINING_VERSION=\\([^ ]*\\).*/\\1/p'; }
unit=$1 runs=$2 version=$3 seen=$4 looks=$5
before=$(state "$unit")
[ -n "$version" ] || version=$(printf '%s\\n' "$before" | folder)
log=$runs/$version/progress.log
lines() { if [ -n "$version" ] && [ -f "$log" ]; then wc -l <"$log"; else echo 0; fi; }
while [ "$looks" -gt 0 ] && [ "$(lines)" -le "$seen" ] && [ "$(state "$unit")" = "$before" ]; do
    looks=$((looks - 1)); sleep 0.2
done
state "$unit"
count=$(lines)
echo "Lines=$count"
if [ "$count" -gt "$seen" ]; then sed -n "$((seen + 1)),${count}p" "$log"; fi
"""


def see(*, version: str = "", seen: int = 0, wait: bool = False) -> Sighting:
    """Look at the current host's run. Raises `HostLostError`."""
    command = script(_LOOK, UNIT, RUNS, version, str(seen), "25" if wait else "0")
    try:
        with gevent.Timeout(POLL_TIMEOUT_S, HostLostError):
            succeeded, output = ask(command)
    except (HostLostError, OSError, EOFError) as error:
        raise HostLostError(f"no answer ({error or type(error).__name__})") from None
    if not succeeded:
        raise HostLostError(output.output.strip() or "no answer")
    return parse_sighting(output.stdout_lines)


def parse_sighting(lines: Iterable[str]) -> Sighting:
    """What one look printed. Pure."""
    lines = list(lines)
    last = next((n for n, line in enumerate(lines) if line.startswith("Lines=")), len(lines))
    head = dict(line.partition("=")[::2] for line in lines[: last + 1])
    variables = dict(pair.partition("=")[::2] for pair in head.get("Environment", "").split())
    return Sighting(
        phase=_phase(head.get("ActiveState", ""), head.get("SubState", "")),
        version=variables.get("GPU_TRAINING_VERSION", ""),
        seen=int(head.get("Lines", "0") or 0),
        lines=tuple(lines[last + 1 :]),
    )


def _phase(active: str, sub: str) -> Phase:
    if active == "failed":
        return Phase.FAILED
    if active == "active" and sub == "exited":
        return Phase.DONE
    if active in ("active", "activating", "deactivating", "reloading"):
        return Phase.RUNNING
    return Phase.ABSENT


@operation()
def look(job: Job, holds: bool) -> Commands:
    """Learn what runs on this host."""
    if not executing() or not holds:
        return
    try:
        job.found[host.name] = see()
    except HostLostError as error:
        yield fail(f"{host.name}: {error}")


@operation()
def start(job: Job, holds: bool, launch: Launch) -> Commands:
    """Start the unit where the run is not there already."""
    if not executing():
        return
    job.decide()
    if holds and not job.wants_start(host.name):
        host.log(f"attached to the run {job.version}, which is {job.found[host.name].phase}")
        return
    if not holds and job.is_there():
        return
    folder = f"{RUNS}/{job.version}"
    # Also on hosts that hold no unit: with Slurm, processes run on all.
    yield script(
        'install -d -m 755 -o "$2" -g "$2" "$1" && cd "$1" && touch progress.log errors.log && '
        'chown "$2:$2" progress.log errors.log',
        folder,
        launch.user,
    )
    if not holds:
        return
    yield from operations.place_files._inner(files=[launch.settings_file(job.version)])
    yield quoted(*launch.systemd_run(job.version))


@operation()
def follow(job: Job, holds: bool) -> Commands:
    """Tell each line of progress until the run ends, on this host or for all."""
    if not executing():
        return
    seen = silent = linger = 0
    phase = Phase.RUNNING
    while phase is Phase.RUNNING:
        try:
            sighting = see(version=job.version, seen=seen, wait=True)
            silent = 0
        except HostLostError as error:
            silent += 1
            if silent < SILENT_POLLS:
                continue
            job.failed_on = job.failed_on or host.name
            yield fail(f"{host.name} is lost: {error}", *_again())
            return
        for line in sighting.lines:
            host.log(line)
        seen = sighting.seen
        phase = sighting.phase if holds else _phase_of_others(job)
        job.found[host.name] = sighting
        if phase is Phase.RUNNING and job.failed_on and (linger := linger + 1) > LINGER_POLLS:
            yield quoted("systemctl", "stop", UNIT)
            yield fail(f"stopped on {host.name}, because it failed on {job.failed_on}")
            return
    if phase is Phase.DONE:
        return
    first = job.failed_on is None
    job.failed_on = job.failed_on or host.name
    words = _last_words(job.version) if first or holds else []
    # Told, so that the next call begins anew.
    yield quoted("sh", "-c", f"systemctl stop {UNIT}; systemctl reset-failed {UNIT}; true")
    yield fail(f"the run {job.version} {_how(phase)} on {host.name}; its last words:", *words)


def _again() -> list[str]:
    return [
        "the run is left as it is on the other trainers: call train.py again when the host is "
        "back, or end it with --data train=stop"
    ]


def _how(phase: Phase) -> str:
    return "failed" if phase is Phase.FAILED else "was stopped"


def _phase_of_others(job: Job) -> Phase:
    """For a host that holds no unit: how the one that holds it was last seen."""
    if job.failed_on:
        return Phase.FAILED
    phases = [seen.phase for name, seen in job.found.items() if name != host.name]
    return Phase.DONE if Phase.DONE in phases else Phase.RUNNING


def _last_words(version: str) -> list[str]:
    _, output = ask(
        script(
            'cd "$1" 2>/dev/null || exit 0; [ ! -f errors.log ] || tail -n 200 errors.log; '
            'journalctl -u "$2" -n 5 --no-pager -o cat 2>/dev/null; true',
            f"{RUNS}/{version}",
            UNIT,
        )
    )
    return [*telling(output.stdout_lines), f"all of it: {RUNS}/{version}/errors.log"]


def telling(lines: Iterable[str]) -> list[str]:
    """The lines that say why: the program's own words first; else the end of it all. Pure."""
    lines = [line.strip() for line in lines if line.strip()]
    marks = ("training: ", "torchrun_script: ", "train.sbatch: ", "slurm-job: ", "Error: ")
    own = [line for line in lines if line.startswith(marks[:-1]) or marks[-1] in line]
    return list(dict.fromkeys(own))[-6:] or lines[-12:]


@operation()
def fetch(job: Job, into: Path) -> Commands:
    """Bring the bundle here from the host that has it: beside, verified, then renamed.

    + into: folder on the operator's machine that gets NAME/VERSION/
    """
    if not executing():
        return
    found = _bundle_files(job.version)
    if not found:
        return
    name, files = found
    partial = into / name / f".{job.version}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in files:
        source = f"{RUNS}/{job.version}/models/{name}/{job.version}/{file}"
        yield FileDownloadCommand(source, str(partial / file))
    yield FunctionCommand(_keep, (partial, into / name / job.version, job), {})


def _bundle_files(version: str) -> tuple[str, list[str]] | None:
    """Name of the model and of its files, where this host has the run's bundle."""
    _, output = ask(
        script(
            'cd "$1" 2>/dev/null || exit 0; for m in */"$2"/manifest.json; do '
            '[ -f "$m" ] || continue; cd "${m%/*}" && find . -type f -printf "$m %P\\n"; exit; '
            "done; true",
            f"{RUNS}/{version}/models",
            version,
        )
    )
    pairs = [line.partition(" ")[::2] for line in output.stdout_lines]
    names = [file for _, file in pairs if posixpath.basename(file) == file]
    return (pairs[0][0].split("/")[0], names) if pairs else None


def _keep(state: State, host: Host, partial: Path, target: Path, job: Job) -> bool:
    """Verify what arrived and give it its name. False, with words, where it cannot be used."""
    try:
        manifest = bundle.verify(partial)
    except bundle.BundleError as error:
        host.log(f"the bundle arrived damaged, run again: {error}")
        return False
    if target.exists() and bundle.digest(target) == bundle.digest(partial):
        shutil.rmtree(partial)
    elif target.exists():
        host.log(f"{target} exists with other content; move it away, and call train.py again")
        return False
    else:
        partial.rename(target)
    job.fetched_from = host.name
    host.log(f"bundle {target}: {_summary(manifest)}")
    host.log(f"deploy it with: pyinfra inventory.py deploy.py --data model={_shown(target)}")
    return True


def _summary(manifest: bundle.Manifest) -> str:
    metrics = manifest.training.metrics if manifest.training else {}
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "no metrics"


def _shown(target: Path) -> str:
    return str(target.relative_to(CHECKOUT) if target.is_relative_to(CHECKOUT) else target)


@operation()
def complete(job: Job) -> Commands:
    """Let the unit go, now that its bundle is here."""
    if not executing():
        return
    if job.fetched_from is None:
        yield fail(
            f"no trainer has the bundle of the run {job.version}; "
            f"look at {RUNS}/{job.version}/progress.log and errors.log"
        )
        return
    if job.found.get(host.name, Sighting(phase=Phase.ABSENT)).phase is Phase.DONE:
        yield quoted("systemctl", "stop", UNIT)


@operation()
def end(job: Job) -> Commands:
    """Stop the unit, whatever it does, and wait until it has."""
    if not executing():
        return
    found = job.found.get(host.name)
    if found is None or found.phase is Phase.ABSENT:
        host.log("no training runs here")
        return
    yield quoted("sh", "-c", f"systemctl stop {UNIT}; systemctl reset-failed {UNIT}; true")
    host.log(f"the run {found.version} was {found.phase}; it is stopped")


@operation()
def tell(job: Job) -> Commands:
    """One host's part of the run, and the last that it said."""
    found = job.found.get(host.name)
    if not executing() or found is None:
        return
    if found.phase is Phase.ABSENT:
        host.log("no training runs here")
    else:
        host.log(f"the run {found.version} is {found.phase}")
    for line in found.lines[-1:]:
        host.log(line)
    yield from ()


@operation()
def forget(keep: int) -> Commands:
    """Remove the files of old runs, oldest first."""
    found = host.get_fact(facts.NewestFirst, paths=(RUNS,)).get(RUNS, [])
    for name in found[keep:]:
        yield quoted("rm", "-rf", "--", f"{RUNS}/{name}")
