"""Refuses a bad day before it begins: every setting of every host, and the local files that the
deploy will need, are checked before the first connection, all problems in one list.

`check_inventory` is the last line of an inventory file, which pyinfra reads before it connects.
`current_fleet` is what the deploys use; it checks again, so an inventory without that line is
refused as well, after connecting but before anything is touched. Which wheels a host needs is
known only when it was asked for its GPUs: `workers.plan` refuses then, still before any change.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.connectors import get_execution_connectors
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.inventory import Inventory

from gpu_service import admission, bundle
from gpu_service.device import StartupError
from provision import facts, quality, rendering
from provision.rendering import CHECKOUT
from provision.settings import (
    SERVING,
    TRAINING,
    Fleet,
    Group,
    HostInput,
    InvalidFleetError,
    WorkerSettings,
    parse_fleet,
)

# What `--data rollback=…` may say, for rollback.py.
ROLLBACK = "rollback"
SIDES = frozenset({"workers", "gateways"})

# What `--data keep=…` may say, for uninstall.py: what stays on the hosts, apart by commas.
KEEP = "keep"
KEEPABLE = frozenset({"models", "logs"})
NOTHING = "nothing"

# What `--data train=…` may say, for train.py.
TRAIN = "train"
VERBS = ("start", "status", "stop")

# Host data that is no setting: how pyinfra connects, and its global arguments (`_sudo`, …).
FOREIGN_KEYS = (
    frozenset(
        key
        for connector in get_execution_connectors().values()  # type: ignore[no-untyped-call]
        for key in connector.data_cls.__annotations__
    )
    | {name for name, _ in all_global_arguments()}
    | {ROLLBACK, TRAIN, KEEP}
)

# A fleet whose templates were rendered without a fault: the inventory is checked when it is read,
# and once more with the deploy.
_rendered: list[Fleet] = []

# Inventory files that are being read now: reading one executes it again.
_being_read: set[str] = set()


class RefusedError(PyinfraError):
    """A deploy that must not begin: every problem, a line each."""

    def __init__(self, problems: list[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{count}, nothing was touched:\n{listed}")


def check_inventory(filename: str) -> None:
    """Check the inventory file that calls this, with its `group_data/`, and end the run if bad.

    The checks of settings always run; those of the bundle and the templates only when
    `deploy.py` is what is being run, so that `pyinfra inventory.py train.py` and
    `pyinfra inventory.py exec …` work without a bundle.
    """
    if filename in _being_read:
        return
    # Imported here only: it patches the process for gevent, which is pyinfra's to do.
    from pyinfra_cli.inventory import make_inventory_from_files

    _being_read.add(filename)
    try:
        inventory = make_inventory_from_files(
            filename, override_data=_overrides(sys.argv), cwd=str(Path.cwd())
        )
        _checked(inventory, with_files=_runs("deploy.py"), needed=_needed())
    except RefusedError as error:
        # Not an exception that pyinfra would show with a traceback: it is for the operator.
        sys.exit(str(error))
    finally:
        _being_read.discard(filename)


def load(filename: str) -> tuple[Fleet, Mapping[str, Mapping[str, Any]]]:
    """The checked fleet of an inventory file and the data of each host, for tools beside pyinfra.

    Read by a pyinfra of its own, which says what is wrong as it always does. Raises `RefusedError`.
    """
    hosts = [
        HostInput(name=host["name"], groups=frozenset(host["groups"]), data=host["data"])
        for host in _pyinfra(filename, "debug-inventory")
    ]
    try:
        fleet = parse_fleet(hosts, resolve=_resolved(hosts), foreign_keys=FOREIGN_KEYS)
        if asked := fleet.asked_for_gpus():
            fleet = fleet.with_gpus(_gpus(filename, asked))
    except InvalidFleetError as error:
        raise RefusedError(error.problems) from None
    return fleet, {host.name: host.data for host in hosts}


def _gpus(filename: str, hosts: Iterable[str]) -> dict[str, int]:
    """How many NVIDIA GPUs each of these hosts has. Raises `RefusedError`."""
    fact = "provision.facts.HostHardware"
    found = _pyinfra(filename, *(f"--limit={name}" for name in hosts), "fact", fact)[fact]
    if silent := [name for name in hosts if name not in found]:
        raise RefusedError([f"{name}: does not say how many GPUs it has" for name in silent])
    return {name: found[name]["nvidia_gpus"] for name in hosts}


def _pyinfra(filename: str, *arguments: str) -> Any:
    """What a pyinfra of its own says of an inventory file. Raises `RefusedError`."""
    command = [str(Path(sys.executable).with_name("pyinfra")), "-y", "--json", filename, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RefusedError([(result.stderr or result.stdout).strip()])
    return json.loads(result.stdout)


def _runs(deploy: str) -> bool:
    return any(Path(argument).name == deploy for argument in sys.argv)


def _needed() -> tuple[Group, ...]:
    """Groups that must not be empty for what is being run."""
    if _runs("uninstall.py"):
        return ()
    return TRAINING if _runs("train.py") else SERVING


def _overrides(argv: list[str]) -> dict[str, Any]:
    """What `--data KEY=VALUE` says. pyinfra reads the inventory before it tells anyone."""
    from pyinfra_cli.util import parse_cli_arg

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--data", action="append", default=[])
    given = options.parse_known_args(argv[1:])[0].data
    pairs = (argument.partition("=") for argument in given)
    return {key: parse_cli_arg(value) for key, _, value in pairs}


def current_fleet(inventory: Inventory, *, with_files: bool = True) -> Fleet:
    """The checked fleet of this run. Executed once a host by pyinfra, computed once.

    `with_files` also checks the bundles and templates that a deploy needs.
    """
    known = getattr(inventory, "_gateway_fleet", None)
    if isinstance(known, Fleet):
        return known
    fleet = _with_gpus(_checked(inventory, with_files=with_files, needed=_needed()), inventory)
    inventory._gateway_fleet = fleet  # type: ignore[attr-defined]
    return fleet


def _with_gpus(fleet: Fleet, inventory: Inventory) -> Fleet:
    """The fleet with the ports that follow from GPUs: gateways have to know those of all hosts."""
    hosts = {name: inventory.get_host(name) for name in fleet.asked_for_gpus()}
    silent = [name for name, host in hosts.items() if host is None or not host.connected]
    if silent:
        raise RefusedError(
            [
                f"{name}: worker_ports is 'per-gpu' and the host is not connected, so its GPUs are "
                "not known; connect to it, or list its ports in worker_ports"
                for name in silent
            ]
        )
    found = {name: host.get_fact(facts.HostHardware) for name, host in hosts.items() if host}
    try:
        return fleet.with_gpus({name: hardware.nvidia_gpus for name, hardware in found.items()})
    except InvalidFleetError as error:
        raise RefusedError(error.problems) from None


def rollback_sides(host: Any) -> frozenset[str]:
    """Which side of the fleet `rollback.py` is for: both, or what `--data rollback=SIDE` says."""
    wanted = host.data.get(ROLLBACK)
    if wanted is None:
        return SIDES
    if wanted not in SIDES:
        raise RefusedError([f"rollback is {wanted!r}; it may be {' or '.join(sorted(SIDES))}"])
    return frozenset({wanted})


def kept(host: Any) -> frozenset[str]:
    """What `uninstall.py` leaves on the hosts: the logs, or what `--data keep=…` says."""
    wanted = host.data.get(KEEP, "logs")
    words = {word.strip() for word in str(wanted).split(",")} - {NOTHING}
    if not words <= KEEPABLE:
        choices = f"{', '.join(sorted(KEEPABLE))}, both with a comma between them, or {NOTHING}"
        raise RefusedError([f"keep is {wanted!r}; it may be {choices}"])
    return frozenset(words)


def train_verb(host: Any) -> str:
    """What `train.py` is asked for: to start (or attach), or what `--data train=VERB` says."""
    wanted = host.data.get(TRAIN, VERBS[0])
    if wanted not in VERBS:
        raise RefusedError([f"train is {wanted!r}; it may be {', '.join(VERBS)}"])
    return str(wanted)


def _checked(inventory: Inventory, *, with_files: bool, needed: Iterable[Group]) -> Fleet:
    hosts = [
        HostInput(
            name=host.name,
            groups=frozenset(host.groups),
            data=host.data.dict(),  # type: ignore[no-untyped-call]
        )
        for host in inventory
    ]
    problems: list[str] = []
    fleet = None
    try:
        fleet = parse_fleet(
            hosts, resolve=_resolved(hosts), foreign_keys=FOREIGN_KEYS, needed=needed
        )
    except InvalidFleetError as error:
        problems += error.problems
    if with_files:
        problems += _bundle_problems(hosts)
        problems += _quality_problems(fleet) if fleet else []
        problems += _file_problems(fleet) if fleet else []
        problems += _template_problems(fleet) if fleet else []
    if problems or fleet is None:
        raise RefusedError(problems)
    return fleet


def _resolved(hosts: Iterable[HostInput]) -> dict[str, str]:
    found = {}
    for host in hosts:
        if host.data.get("address") or not any(group in host.groups for group in Group):
            continue
        name = host.data.get("ssh_hostname") or host.name
        try:
            found[host.name] = str(
                socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)[0][4][0]
            )
        except OSError:
            continue
    return found


def _bundle_problems(hosts: Iterable[HostInput]) -> list[str]:
    workers = [host for host in hosts if Group.WORKERS in host.groups]
    models = {model for host in workers for model in _models(host.data) if isinstance(model, str)}
    problems = []
    for model in sorted(models):
        try:
            bundle_folder(model)
        except bundle.BundleError as error:
            problems.append(f"model {model}: {error}")
    return problems


def _models(data: Mapping[str, Any]) -> list[Any]:
    """What a worker host is to serve, by its data as they are: they may be wrong otherwise."""
    services = data.get("services")
    if isinstance(services, dict) and services:
        return [service.get("model") for service in services.values() if isinstance(service, dict)]
    return [data.get("model", WorkerSettings.model_fields["model"].default)]


def _quality_problems(fleet: Fleet) -> list[str]:
    """Bundles that were measured worse than a host's settings want, each figure once."""
    problems: dict[str, None] = {}
    for worker in fleet.workers.values():
        for found in fleet.assignments(worker):
            problems |= dict.fromkeys(_missed(found.settings))
    return list(problems)


def _missed(worker: WorkerSettings) -> list[str]:
    try:
        folder = bundle_folder(worker.model)
    except bundle.BundleError:
        return []  # `_bundle_problems` says so
    training = bundle.read_manifest(folder).training
    missed = quality.problems(
        training.metrics if training else {},
        at_least=worker.min_metrics,
        at_most=worker.max_metrics,
    )
    return [f"model {worker.model} ({folder.name}): {figure}" for figure in missed]


def _file_problems(fleet: Fleet) -> list[str]:
    """Files of the operator's that are named and cannot be used, each once."""
    problems: dict[str, None] = {}
    for worker in fleet.workers.values():
        for wheel in worker.wheels:
            if not (CHECKOUT / wheel).is_file():
                problems[f"worker_packages: {wheel} is no file; build it, or take it out"] = None
        for found in fleet.assignments(worker):
            if found.settings.worker_tokens:
                problems |= dict.fromkeys(_token_problems(found.settings.worker_tokens))
    for gateway in fleet.gateways.values():
        if gateway.nginx_source == "nginx.org":
            problems |= dict.fromkeys(_key_problems(gateway.nginx_signing_key))
    return list(problems)


def _key_problems(name: str) -> list[str]:
    try:
        text = (CHECKOUT / name).read_bytes()
    except OSError as error:
        return [f"nginx_signing_key: {name} cannot be read: {error.strerror}"]
    if b"-----BEGIN PGP PUBLIC KEY BLOCK-----" not in text:
        return [f"nginx_signing_key: {name} holds no public key (armored, as nginx.org has it)"]
    return []


def _token_problems(name: str) -> list[str]:
    try:
        admission.Tokens(CHECKOUT / name)
    except StartupError as error:
        return [f"worker_tokens: {error}"]
    return []


@cache
def bundle_folder(model: str) -> Path:
    """The folder of the version that `model` (a setting) means, verified once a run.

    Raises `bundle.BundleError`.
    """
    folder = bundle.find(CHECKOUT / model)
    bundle.verify(folder)
    return folder


def _template_problems(fleet: Fleet) -> list[str]:
    if fleet in _rendered:
        return []
    try:
        rendering.check_all(fleet)
    except rendering.RenderError as error:
        return [str(error)]
    _rendered.append(fleet)
    return []
