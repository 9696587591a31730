"""Settings: what is refused, in which words, and that nothing is reported one at a time."""

from pathlib import Path

import pytest

from provision import settings
from provision.settings import HostInput, InvalidFleetError, parse_fleet
from tests.unit.provision.fleets import fleet, gateway, worker

CHECKOUT = Path(__file__).resolve().parents[3]


def problems(*hosts: HostInput, resolve: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(InvalidFleetError) as caught:
        parse_fleet(hosts, resolve=resolve or {}, foreign_keys=frozenset({"ssh_user"}))
    return caught.value.problems


def test_defaults_are_the_reference_set_up() -> None:
    found = fleet()
    gw = found.gateways["gw1"]
    assert (gw.nginx_user, gw.selinux_mode, gw.listen_port) == ("root", "permissive", 8009)
    assert (gw.upstream_keepalive, gw.proxy_read_timeout_s) == (1000, 3600)
    assert found.workers["gpu1"].worker_ports == (9005, 9006)
    assert found.upstream_servers() == ["10.0.0.21:9005", "10.0.0.21:9006"]


def test_every_problem_of_every_host_is_in_one_list() -> None:
    found = problems(
        gateway(listen_port="8009", listen_prot=1),
        worker(worker_ports=[9005, 9005]),
        worker("gpu2", "not-an-address"),
    )
    assert any("gw1: listen_port" in line and "'8009'" in line for line in found)
    assert any("gw1: unknown setting listen_prot; did you mean listen_port?" in p for p in found)
    assert any("gpu1" in line and "9005 more than once" in line for line in found)
    assert any("gpu2" in line and "not-an-address" in line for line in found)


def test_an_empty_worker_group_is_refused() -> None:
    assert any("workers: the group is empty" in line for line in problems(gateway()))


def test_an_empty_gateway_group_is_refused() -> None:
    assert any("gateways: the group is empty" in line for line in problems(worker()))


def test_ports_clash_on_a_host_that_is_both() -> None:
    both = HostInput(
        name="one",
        groups=frozenset({"gateways", "workers"}),
        data={"address": "10.0.0.5", "listen_port": 9005},
    )
    assert problems(both) == [
        "port 9005 on 10.0.0.5: wanted by one listen_port and by one worker_ports"
    ]


def test_two_hosts_with_one_address_clash() -> None:
    found = problems(gateway(), worker(), worker("gpu2", "10.0.0.21"))
    assert "port 9005 on 10.0.0.21: wanted by gpu1 worker_ports and by gpu2 worker_ports" in found


def test_a_name_that_does_not_resolve_needs_an_address() -> None:
    host = HostInput(name="gw.invalid", groups=frozenset({"gateways"}), data={})
    assert any("gw.invalid: address is not set" in line for line in problems(host, worker()))


def test_a_resolved_name_gives_the_address() -> None:
    host = HostInput(name="gw.example", groups=frozenset({"gateways"}), data={})
    found = parse_fleet([host, worker()], resolve={"gw.example": "192.0.2.7"})
    assert found.gateway_addresses() == ["192.0.2.7"]


def test_a_host_in_no_group_is_named() -> None:
    stray = HostInput(name="web3", groups=frozenset({"all"}), data={"address": "10.0.0.9"})
    assert any("web3: is in none of the groups" in line for line in problems(stray, worker()))


def test_tls_needs_certificate_and_key() -> None:
    found = problems(gateway(tls_certificate="/etc/pki/gw.pem"), worker())
    assert any("tls_certificate and tls_certificate_key go together" in line for line in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nginx_user", "root; load_module x"),
        ("server_name", "a;b"),
        ("tls_certificate", "relative.pem"),
        ("listen_port", True),
        ("listen_port", 70000),
        ("selinux_mode", "off"),
        ("upstream_balance", "random"),
        ("worker_connections", 10),
        ("nginx_package", "nginx --nogpgcheck"),
    ],
)
def test_values_that_could_break_a_file_or_command_are_refused(key: str, value: object) -> None:
    assert any(f"gw1: {key}" in line for line in problems(gateway(**{key: value}), worker()))


def test_options_of_the_service_are_checked_by_the_service_itself() -> None:
    found = problems(gateway(), worker(service_options={"max_bach": 3, "port": 1}))
    text = "\n".join(found)
    assert "max_bach" in text
    assert "port" in text


@pytest.mark.parametrize(
    ("package", "problem"),
    [
        ("left>=1.0", "'left>=1.0' is not pinned; write NAME==VERSION, or the path of a wheel"),
        ("left==1.*", "is not pinned"),
        ("left", "is not pinned"),
        ("left @ https://example.invalid/left.whl", "Invalid wheel filename"),
        ("left @ https://example.invalid/left", "is not pinned"),
        ("--index-url=x", "worker_packages: '--index-url=x'"),
        ("dist/left.whl", "Invalid wheel filename"),
    ],
)
def test_own_packages_are_wheels_or_pinned(package: str, problem: str) -> None:
    found = problems(gateway(), worker(worker_packages=[package]))
    assert any(problem in line for line in found), found


def test_own_packages_that_are_as_they_should_be() -> None:
    packages = ["dist/left-1.0-py3-none-any.whl", "right[extra]==2.0"]
    assert fleet(gateway(), worker(worker_packages=packages)).workers["gpu1"].wheels == (
        packages[0],
    )


@pytest.mark.parametrize("name", ["control", "tokens_file", "trusted_proxies"])
def test_what_the_deploy_decides_is_no_option(name: str) -> None:
    found = problems(gateway(), worker(service_options={name: "x"}))
    assert any(f"service_options.{name} is decided by the deploy" in line for line in found)


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://10.0.0.99:4318", "10.0.0.99"),
        ("https://[2001:db8::9]:4318/x", "2001:db8::9"),
        ("http://localhost:4318", None),
    ],
)
def test_the_collector_is_let_through(endpoint: str, address: str | None) -> None:
    found = fleet(gateway(), worker(service_options={"otlp_endpoint": endpoint}))
    assert found.workers["gpu1"].collector_address == address


def test_a_collector_by_name_is_refused() -> None:
    options = {"otlp_endpoint": "http://collector.example.com:4318"}
    found = problems(gateway(), worker(service_options=options))
    assert any("collector.example.com is a name" in line for line in found)


def test_enforcing_without_leave_to_connect_is_refused() -> None:
    found = problems(gateway(selinux_mode="enforcing"), worker())
    assert any("13: Permission denied" in p and "selinux_allow_connect = True" in p for p in found)
    assert any("selinux_label_ports = True" in p for p in found)
    for way in ("selinux_allow_connect", "selinux_label_ports"):
        fleet(gateway(selinux_mode="enforcing", **{way: True}), worker())


def test_idle_sockets_outlive_two_pings() -> None:
    found = problems(gateway(proxy_read_timeout_s=40), worker())
    assert any("above twice the service's ping_interval_s, which makes 40" in p for p in found)
    options = {"ping_interval_s": 19}
    fleet(gateway(proxy_read_timeout_s=40), worker(service_options=options))


def test_systemd_waits_longer_than_the_service_drains() -> None:
    found = fleet(gateway(), worker(service_options={"drain_timeout_s": 300}))
    assert found.workers["gpu1"].stop_timeout_s > 300


def test_secrets_are_not_shown_in_problems() -> None:
    found = problems(gateway(), worker(index_url=["https://user:hunter2@example.invalid"]))
    assert not any("hunter2" in line for line in found)


def test_ipv6_upstreams_are_bracketed() -> None:
    assert fleet(gateway(), worker(address="2001:db8::1")).upstream_servers()[0] == (
        "[2001:db8::1]:9005"
    )


def test_the_reference_in_docs_is_current() -> None:
    committed = (CHECKOUT / "docs" / "settings.md").read_text()
    assert committed == settings.reference(), "run: make docs"
