"""What decides whether nginx may connect to the workers' ports, asked of the policy itself: no
deploy in between. docs/explanation/selinux.md shows the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lab.system import wait_for
from provision.selinux import CONNECT, RELAY, WEB_PORT
from tests.selinux.conftest import OTHER_PORT, PORTS, Machine

SERVED, DENIED = "101", "502"


@dataclass(frozen=True)
class Row:
    mode: str
    booleans: tuple[str, ...]
    labelled: bool
    answer: str

    def __str__(self) -> str:
        allowed = [*self.booleans, *(["label"] if self.labelled else [])]
        return f"{self.mode}-{'+'.join(allowed) or 'nothing'}"


UNLABELLED = (
    Row("enforcing", (), False, DENIED),
    Row("permissive", (), False, SERVED),
    Row("enforcing", (RELAY,), False, DENIED),
    Row("enforcing", (CONNECT,), False, SERVED),
)
LABELLED = (
    Row("enforcing", (), True, DENIED),
    Row("enforcing", (RELAY,), True, SERVED),
)


@pytest.fixture(scope="module", params=["root", "nginx"])
def user(request: pytest.FixtureRequest, deployed: Machine) -> str:
    """User of nginx's worker processes."""
    deployed.restore("deployed")
    deployed.sh(f"sed -i 's/^user .*;/user {request.param};/' /etc/nginx/nginx.conf")
    deployed.sh("systemctl restart nginx")
    return str(request.param)


def answer(machine: Machine) -> tuple[str, str]:
    """A handshake's status line, and what nginx logs of it, once it tries its back ends again:
    those that were denied in the row before are left out for their `fail_timeout`.
    """

    def tried() -> tuple[str, str] | None:
        machine.sh(": >/var/log/nginx/error.log")
        status, log = machine.handshake(), machine.sh("cat /var/log/nginx/error.log")
        return None if "no live upstreams" in log else (status, log)

    return wait_for(tried, awaited="nginx to try its back ends", timeout_s=60, log="error.log")


def ask(machine: Machine, row: Row) -> None:
    """Bring the policy to the row, without nginx being told, and compare what clients see."""
    for boolean in (CONNECT, RELAY):
        machine.sh(f"setsebool {boolean} {'on' if boolean in row.booleans else 'off'}")
    machine.sh(f"setenforce {row.mode}")
    status, log = answer(machine)
    assert f" {row.answer} " in status, row
    if row.answer == DENIED:
        assert "failed (13: Permission denied) while connecting to upstream" in log
    else:
        assert "(13: Permission denied)" not in log


def test_nginx_is_confined_whoever_it_is(deployed: Machine, user: str) -> None:
    """Else nothing below would mean anything: started from a shell, nginx is not."""
    assert deployed.nginx_domains() == {"httpd_t"}
    assert deployed.nginx_users() == {user}


@pytest.mark.parametrize("row", UNLABELLED, ids=str)
def test_without_labels(deployed: Machine, user: str, row: Row) -> None:
    ask(deployed, row)


def test_the_denial_is_in_the_audit_log(deployed: Machine, user: str) -> None:
    ask(deployed, UNLABELLED[0])
    found = deployed.sh("ausearch -m avc -ts recent </dev/null | grep name_connect | tail -n 1")
    assert 'comm="nginx"' in found
    assert any(f"dest={port} " in found for port in PORTS)
    assert "scontext=system_u:system_r:httpd_t:s0" in found
    assert "tcontext=system_u:object_r:unreserved_port_t:s0" in found


@pytest.fixture(scope="module")
def labelled(deployed: Machine, user: str) -> Machine:
    lines = "\\n".join(f"port -a -t {WEB_PORT} -p tcp {port}" for port in PORTS)
    deployed.sh(f"printf '{lines}\\n' | semanage import")
    return deployed


@pytest.mark.parametrize("row", LABELLED, ids=str)
def test_with_labels(labelled: Machine, user: str, row: Row) -> None:
    ask(labelled, row)


def test_a_label_opens_no_other_port(labelled: Machine, user: str) -> None:
    """One on which something listens, too."""
    labelled.sh(f"setenforce enforcing; setsebool {RELAY} on")
    labelled.sh(
        f"sed -i 's/:{PORTS[0]} /:{OTHER_PORT} /; /:{PORTS[1]} /d' /etc/nginx/nginx.conf; "
        "systemctl reload nginx"
    )
    labelled.sh(": >/var/log/nginx/error.log")
    assert f" {DENIED} " in labelled.handshake()
    assert f":{OTHER_PORT} failed (13: Permission denied)" in labelled.sh(
        "cat /var/log/nginx/error.log"
    )
