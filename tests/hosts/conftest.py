"""Checks of hosts that are deployed, over SSH, changing nothing: `--inventory FILE`.

Works against the lab and against one's own hosts alike; step one of docs/runbook.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
            cache[filename] = preflight.load(filename)
        except preflight.RefusedError as error:
            raise pytest.UsageError(f"{filename}: {error}") from None
    fleet, data = cache[filename]
    settings: dict[str, GatewaySettings | WorkerSettings] = getattr(fleet, group)
    return [
        Target(name=name, host=_connect(name, data[name]), settings=found, fleet=fleet)
        for name, found in settings.items()
    ]


def _connect(name: str, data: Mapping[str, Any]) -> Host:
    options: dict[str, Any] = {"sudo": True} if data.get("_sudo") else {}
    if data.get("ssh_config_file"):
        return testinfra.get_host(f"ssh://{name}", ssh_config=data["ssh_config_file"], **options)
    user = f"{data['ssh_user']}@" if data.get("ssh_user") else ""
    port = f":{data['ssh_port']}" if data.get("ssh_port") else ""
    if data.get("ssh_key"):
        options["ssh_identity_file"] = data["ssh_key"]
    return testinfra.get_host(f"ssh://{user}{data.get('ssh_hostname') or name}{port}", **options)


@pytest.fixture(scope="session")
def systemd_property() -> Callable[[Host, str, str], str]:
    """A property of a unit, as systemd has it now."""

    def read(host: Host, unit: str, name: str) -> str:
        return str(host.check_output("systemctl show %s -p %s --value", unit, name)).strip()

    return read
