"""Refuses a bad day before it begins: every setting of every host, and every local file that
the deploy will need, are checked before the first connection, all problems in one list.

`check_inventory` is the last line of an inventory file, which pyinfra reads before it connects.
`current_fleet` is what the deploys use; it checks again, now with `--data` overrides, so an
inventory without that line is refused as well, after connecting but before anything is touched.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from pyinfra.api.arguments import all_global_arguments
from pyinfra.api.inventory import Inventory
from pyinfra.connectors.ssh import ConnectorData as SshData
from pyinfra_cli.exceptions import CliError
from pyinfra_cli.inventory import make_inventory_from_files

from gpu_service import bundle
from provision import rendering
from provision.settings import Fleet, Group, HostInput, InvalidFleetError, parse_fleet

CHECKOUT = Path(__file__).resolve().parent.parent

# Host data that pyinfra itself reads: how to connect, and its global arguments (`_sudo`, …).
PYINFRA_KEYS = frozenset(SshData.__annotations__) | {name for name, _ in all_global_arguments()}


@dataclass(frozen=True)
class _Guard:
    """Files whose inventory is being read now: reading one executes it again."""

    active: set[str]


_guard = _Guard(set())


def check_inventory(filename: str) -> None:
    """Check the inventory file that calls this, with its `group_data/`, and end the run if bad.

    The checks of settings always run; those of the bundle, the wheelhouse and the templates
    only when `deploy.py` is what is being run, so that `pyinfra inventory.py train.py` and
    `pyinfra inventory.py exec …` work without a bundle.
    """
    if filename in _guard.active:
        return
    _guard.active.add(filename)
    try:
        inventory = make_inventory_from_files(filename, cwd=str(Path.cwd()))
    finally:
        _guard.active.discard(filename)
    fleet = _checked(inventory)
    if _deploying(sys.argv):
        _refuse(local_problems(fleet))


def _deploying(argv: Iterable[str]) -> bool:
    return any(Path(argument).name == "deploy.py" for argument in argv)


def current_fleet(inventory: Inventory) -> Fleet:
    """The checked fleet of this run. Executed once a host by pyinfra, computed once."""
    known = getattr(inventory, "_gateway_fleet", None)
    if isinstance(known, Fleet):
        return known
    fleet = _checked(inventory)
    _refuse(local_problems(fleet))
    inventory._gateway_fleet = fleet  # type: ignore[attr-defined]
    return fleet


def _checked(inventory: Inventory) -> Fleet:
    hosts = [
        HostInput(name=host.name, groups=frozenset(host.groups), data=_data_of(host))
        for host in inventory
    ]
    try:
        return parse_fleet(hosts, resolve=_resolved(hosts), foreign_keys=PYINFRA_KEYS)
    except InvalidFleetError as error:
        raise _refusal(error.problems) from None


def _data_of(host: Any) -> dict[str, Any]:
    return dict(host.data.dict())


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


def local_problems(fleet: Fleet) -> list[str]:
    """What the operator's machine lacks for this fleet: bundles, wheelhouses, templates."""
    problems = []
    for model in sorted({worker.model for worker in fleet.workers.values()}):
        problems += _bundle_problems(model)
    try:
        rendering.check_all(fleet)
    except (rendering.RenderError, OSError) as error:
        problems.append(str(error))
    except jinja2.TemplateError as error:  # pragma: no cover - rendering wraps them
        problems.append(f"templates: {error}")
    return problems


@cache
def bundle_folder(model: str) -> Path:
    """The folder of the version that `model` (a setting) means. Raises `bundle.BundleError`."""
    folder = CHECKOUT / model
    if (folder / "manifest.json").is_file():
        return folder
    return bundle.latest(folder)


def _bundle_problems(model: str) -> list[str]:
    try:
        bundle.verify(bundle_folder(model))
    except bundle.BundleError as error:
        hint = "" if (CHECKOUT / model).exists() else "; make one with: make model"
        return [f"model {model}: {error}{hint}"]
    return []


def _refuse(problems: list[str]) -> None:
    if problems:
        raise _refusal(problems)


def _refusal(problems: list[str]) -> CliError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    listed = "\n".join(f"      - {problem}" for problem in problems)
    return CliError(f"{count}, nothing was touched:\n{listed}")
