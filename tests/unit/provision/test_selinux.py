"""SELinux's operations against pyinfra's `@fake` hosts, and which of them a gateway needs.

What a real policy makes of them is in tests/selinux.
"""

from typing import Any

import pytest

from provision import facts, selinux
from provision.selinux import Policy
from tests.unit.provision import fleets
from tests.unit.provision.test_operations import FakeHosts, run


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (["Permissive", "permissive"], "permissive", []),
        (["Enforcing", "permissive"], "permissive", ["setenforce 0"]),
        (["Permissive", "enforcing"], "enforcing", ["setenforce 1"]),
        (["Enforcing", "enforcing"], "permissive", ["SELINUX=$2", "setenforce 0"]),
        # Neither way works on a running system: only the next boot is configured.
        (["Disabled", "disabled"], "permissive", ["SELINUX=$2"]),
        (["Enforcing", "enforcing"], "disabled", ["SELINUX=$2"]),
        (["absent"], "permissive", []),
        (["Enforcing", "enforcing"], "unmanaged", []),
    ],
)
def test_mode(found: list[str], wanted: str, expected: list[str]) -> None:
    commands = run(selinux.mode, {"getenforce": found}, wanted=wanted)
    assert len(commands) == len(expected)
    for command, part in zip(commands, expected, strict=True):
        assert part in command


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["a --> on", "b --> on", "a=1", "b=1"], []),
        (["a --> off", "b --> off"], ["setsebool -P a=on b=on"]),
        (["a --> on", "b --> off", "a=1"], ["setsebool -P b=on"]),
        (["a --> on", "b --> on", "b=1"], ["setsebool -P a=on"]),  # a: until the next boot only
        (["a --> off"], ["setsebool -P a=on"]),  # this policy has no b
        ([], []),  # no SELinux here
    ],
)
def test_booleans(found: list[str], expected: list[str]) -> None:
    assert run(selinux.booleans, {"getsebool": found}, wanted=["a", "b"]) == expected


def test_nginx_is_reloaded_once_it_may_raise_its_limit() -> None:
    commands = run(
        selinux.booleans,
        {"getsebool": [f"{selinux.SETRLIMIT} --> off"]},
        wanted=[selinux.SETRLIMIT],
    )
    assert commands[-1] == "rm -f -- /var/lib/gpu-gateway/applied"


PORTS = [
    "http_port_t                    tcp      80, 443, 8008, 8009, 8443",
    "tor_port_t                     tcp      6969, 9001, 9030, 9050",
    "unreserved_port_t              tcp      1024-32767, 61001-65535",
]


def labelling(found: list[str], *ports: int) -> list[str]:
    return run(selinux.web_ports, {"semanage port -l": found}, ports=ports)


def test_ports_are_labelled_in_one_transaction() -> None:
    (command,) = labelling(PORTS, 9005, 9006, 8009)
    assert "semanage import" in command
    assert command.endswith(
        "'port -a -t http_port_t -p tcp 9005' 'port -a -t http_port_t -p tcp 9006'"
    )


def test_labelled_ports_and_hosts_without_selinux_are_left_alone() -> None:
    labelled = ["http_port_t                    tcp      9005, 80, 9006", *PORTS[1:]]
    assert labelling(labelled, 9005, 9006) == []
    assert labelling([], 9005) == []


def test_a_port_that_is_no_longer_declared_loses_its_label_where_it_was_given_here() -> None:
    labelled = ["http_port_t                    tcp      9005, 9006, 9007, 80", *PORTS[1:]]
    journal = [f"port\thttp_port_t tcp {port}\tfound\tabsent" for port in (9005, 9006)]
    answers = {"semanage port -l": labelled, "cat": journal}
    (command,) = run(selinux.web_ports, answers, ports=[9005])
    assert command.endswith("'port -d -p tcp 9006'")


def test_a_port_of_something_else_is_never_taken_from_it() -> None:
    hosts = FakeHosts({"h": {"semanage port -l": PORTS}})
    with pytest.raises(Exception, match="hosts"):
        hosts.run(selinux.web_ports, ports=[9005, 9050])
    commands = next(iter(hosts.state.inventory)).connector.executed_commands
    assert not any("semanage import" in command for command in commands)


def test_the_smallest_range_decides() -> None:
    ranges = facts.SelinuxPorts().process(PORTS)
    assert selinux.port_type(ranges, 9050) == "tor_port_t"
    assert selinux.port_type(ranges, 9005) == "unreserved_port_t"
    assert selinux.port_type(ranges, 40000) == "port_t"


def policy(**settings: Any) -> Policy:
    fleet = fleets.fleet(fleets.gateway(**settings), fleets.worker(worker_ports=[9005, 9006]))
    return Policy.of(fleet.gateways["gw1"], fleet)


def test_the_reference_set_up_asks_nothing_of_the_policy() -> None:
    assert policy() == Policy(booleans=(), web_ports=())


def test_the_broad_way() -> None:
    found = policy(selinux_mode="enforcing", selinux_allow_connect=True)
    assert found == Policy(booleans=("httpd_can_network_connect",), web_ports=())


def test_the_narrow_way_labels_the_workers_ports() -> None:
    found = policy(selinux_mode="enforcing", selinux_label_ports=True)
    assert found == Policy(booleans=("httpd_can_network_relay",), web_ports=(9005, 9006))


def test_hardened_may_raise_its_descriptor_limit() -> None:
    found = policy(profile="hardened", tls_self_signed=True)
    assert found.booleans == ("httpd_can_network_connect", "httpd_setrlimit")
    assert found.web_ports == ()  # 8008, 8009 and 8443 are labelled by the policy itself


def test_enforcing_labels_what_nginx_listens_on() -> None:
    found = policy(selinux_mode="enforcing", selinux_allow_connect=True, listen_port=8010)
    assert found.web_ports == (8010,)
    asking = {"tls_acme": True, "acme_terms_agreed": True, "server_name": "gw.example.com"}
    found = policy(
        selinux_mode="enforcing", selinux_allow_connect=True, acme_http_port=8081, **asking
    )
    assert found.web_ports == (8081,)  # beside those that the policy labels itself
