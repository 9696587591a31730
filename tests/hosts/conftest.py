"""Checks of hosts that are deployed, over SSH, changing nothing: `--inventory FILE`.

Works against the lab and against one's own hosts alike; step one of docs/runbook.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host

from provision import preflight
from provision.settings import Fleet, GatewaySettings, WorkerSettings


@dataclass(frozen=True)
class Target:
    """A host to look at, and what was declared for it."""

    name: str
    host: Host
    settings: Any
    fleet: Fleet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--inventory", metavar="FILE", help="check the hosts of this inventory, as deployed"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, group in (("gateway", "gateways"), ("worker", "workers")):
        if fixture in metafunc.fixturenames:
            targets = _targets(metafunc.config, group)
            if not targets:
                reason = f"no hosts to check: give --inventory FILE that has {group}"
                targets = [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
            metafunc.parametrize(
                fixture, targets, ids=lambda t: getattr(t, "name", "none"), scope="session"
            )


def _targets(config: pytest.Config, group: str) -> list[Any]:
    filename = config.getoption("--inventory")
    if not filename:
        return []
    cache: dict[str, Any] = config.__dict__.setdefault("_gateway_targets", {})
    if filename not in cache:
        try:
            cache[filename] = preflight.load(str(Path(filename)))
        except (preflight.RefusedError, SystemExit) as error:
            raise pytest.UsageError(f"{filename}: {error}") from None
    fleet, inventory = cache[filename]
    settings: dict[str, GatewaySettings | WorkerSettings] = getattr(fleet, group)
    return [
        Target(name=name, host=_connect(inventory.get_host(name)), settings=found, fleet=fleet)
        for name, found in settings.items()
    ]


def _connect(host: Any) -> Host:
    data = host.data
    if data.get("ssh_config_file"):
        return testinfra.get_host(f"ssh://{host.name}", ssh_config=data.ssh_config_file)
    address = data.get("ssh_hostname") or host.name
    user = f"{data.ssh_user}@" if data.get("ssh_user") else ""
    port = f":{data.ssh_port}" if data.get("ssh_port") else ""
    options = {"ssh_identity_file": data.ssh_key} if data.get("ssh_key") else {}
    sudo = {"sudo": True} if data.get("_sudo") else {}
    return testinfra.get_host(f"ssh://{user}{address}{port}", **options, **sudo)


@pytest.fixture(scope="session")
def systemd_property() -> Callable[[Host, str, str], str]:
    """A property of a unit, as systemd has it now."""

    def read(host: Host, unit: str, name: str) -> str:
        return str(host.check_output("systemctl show %s -p %s --value", unit, name)).strip()

    return read
