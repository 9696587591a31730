"""In which order a gateway's deploy goes about it: what clients of the former configuration need
goes when another one has taken over, and stays where that was refused.
"""

from __future__ import annotations

from typing import Any

import pytest
from pyinfra.api.deploy import add_deploy
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage

from provision import acme, gateway
from tests.unit.provision import fleets
from tests.unit.provision.test_operations import TOLD, FakeHosts, opened, unit_answer, zone

INSTALLED = ["system=rocky", "release=9", "codename=", "manager=dnf", "package=nginx 1:1.22.1-1"]
BEFORE: dict[str, Any] = {
    "nginx-activate": [],
    "os-release": INSTALLED,
    "busctl": [*zone("8009/tcp", "8443/tcp"), *opened("gateway", "8009/tcp", "8443/tcp")],
    "systemctl show -p ActiveState": unit_answer(acme.TIMER),
    **TOLD,
}


def deployed(answers: dict[str, Any]) -> list[str]:
    """What is done on a gateway that served by TLS, with a certificate of an ACME authority."""
    fleet = fleets.fleet()
    hosts = FakeHosts({"gw1": BEFORE | answers})
    add_deploy(hosts.state, gateway.gateway, fleet.gateways["gw1"], fleet)
    hosts.state.set_stage(StateStage.Execute)
    (host,) = hosts.state.inventory
    host.connector.executed_commands.clear()
    try:
        run_ops(hosts.state)
    except Exception:
        assert hosts.failed() == {"gw1"}
    return list(host.connector.executed_commands)


CLOSING = "firewall-cmd --quiet --remove-port=8443/tcp"
RETIRING = f" {acme.TIMER} {acme.UNITS}"


def position(commands: list[str], what: str) -> int:
    return next(n for n, command in enumerate(commands) if what in command)


@pytest.mark.parametrize("what", [CLOSING, RETIRING])
def test_what_the_former_configuration_needs_goes_after_it(what: str) -> None:
    commands = deployed({})
    assert position(commands, "nginx-activate") < position(commands, what)


@pytest.mark.parametrize("what", [CLOSING, RETIRING])
def test_where_another_one_is_refused_it_stays(what: str) -> None:
    commands = deployed({"nginx-activate": {"success": False}})
    assert not any(what in command for command in commands)
