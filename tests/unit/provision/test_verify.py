"""What a failed handshake is blamed on, and where one is tried."""

import pytest

from provision import rendering, verify
from provision.verify import Sighting, descriptors_message, diagnose
from tests.unit.provision import fleets
from tests.unit.provision.test_operations import FakeHosts, run

DENIED = (
    "nginx: active",
    "selinux: Enforcing",
    "2026/11/24 10:00:00 [crit] 812#812: *1 connect() to 10.0.0.21:9006 failed (13: Permission "
    'denied) while connecting to upstream, client: 127.0.0.1, server: localhost, request: "GET / '
    'HTTP/1.1", upstream: "http://10.0.0.21:9006/", host: "localhost"',
    'type=AVC msg=audit(1.2:3): avc:  denied  { name_connect } for  pid=812 comm="nginx" '
    "dest=9006 scontext=system_u:system_r:httpd_t:s0 tclass=tcp_socket permissive=0",
)


def sighting(*evidence: str, status: str = "HTTP/1.1 502 Bad Gateway") -> Sighting:
    return Sighting(status=status, place="port 8009", evidence=evidence)


def test_permission_denied_names_selinux_the_denial_and_three_ways_out() -> None:
    text = "\n".join(diagnose(sighting(*DENIED)))
    assert "502 Bad Gateway" in text
    assert "avc:  denied  { name_connect }" in text
    assert "SELinux denies nginx the connection to 10.0.0.21:9006" in text
    assert "setsebool -P httpd_can_network_connect on" in text
    assert "selinux_label_ports = True" in text
    assert "selinux_mode = 'permissive'" in text


def test_an_old_denial_is_not_blamed_where_selinux_denies_nothing() -> None:
    permissive = ("nginx: active", "selinux: Permissive", *DENIED[2:])
    assert "SELinux denies" not in "\n".join(diagnose(sighting(*permissive)))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("connect() failed (111: Connection refused)", "nothing listens"),
        ("upstream timed out (110: Connection timed out)", "a firewall between"),
        ("connect() failed (113: No route to host)", "a firewall between"),
        ("no live upstreams while connecting to upstream", "every worker failed lately"),
    ],
)
def test_other_causes(line: str, cause: str) -> None:
    assert cause in "\n".join(diagnose(sighting("nginx: active", line)))


def test_a_unix_socket_that_nginx_may_not_open_has_another_way_out() -> None:
    line = "connect() to unix:/run/gpu-workers/9005.sock failed (13: Permission denied)"
    text = "\n".join(diagnose(sighting("nginx: active", line)))
    assert "unix_sockets = False" in text
    assert "setsebool" not in text


def test_a_dead_nginx_is_said() -> None:
    assert "nginx does not run" in "\n".join(diagnose(sighting("nginx: failed", status="")))


def test_an_unknown_failure_points_at_the_log() -> None:
    assert "error.log" in diagnose(sighting("nginx: active"))[-1]


@pytest.mark.parametrize(
    ("has", "selinux", "said"),
    [
        ("2000", "Enforcing", None),
        ("1000", "Enforcing", "selinux_allow_setrlimit = True"),
        ("1000", "Permissive", "this host allows no more"),
        ("1000", "absent", "this host allows no more"),
    ],
)
def test_fewer_descriptors_than_declared_are_told(has: str, selinux: str, said: str | None) -> None:
    found = descriptors_message(["wanted 2000", "has 2000", f"has {has}", f"selinux {selinux}"])
    assert (said in found) if said and found else found is said


def test_nothing_is_told_of_descriptors_where_nothing_was_found() -> None:
    assert descriptors_message(["wanted 2000", "selinux absent"]) is None


def test_after_a_rollback_the_places_of_what_is_live_are_tried() -> None:
    certificate = {"tls_certificate": "/c.pem", "tls_certificate_key": "/c.key", "tls_only": True}
    fleet = fleets.fleet(fleets.gateway(**certificate), fleets.worker())
    conf = rendering.nginx_conf(fleet.gateways["gw1"], fleet).decode().splitlines()
    answers = {"can_ask": "HTTP/1.1 101 x", '&& cat "$1"': conf}
    assert run(verify.handshake, answers, probe=None)[-1].endswith(" handshake tls:8443")
    assert not any("can_ask" in command for command in run(verify.handshake, {}, probe=None))


def test_a_gateway_without_curl_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    missing = "curl is missing on this host"
    hosts = FakeHosts({"h": {"can_ask": {"success": False, "stderr": missing}}})
    with pytest.raises(Exception, match="hosts"):
        hosts.run(verify.handshake, probe="tls:8443")
    assert missing in caplog.text
    assert "was answered with" not in caplog.text
