"""The gateway's profiles, sizing, TLS and limits: what is refused, what is rendered, what is done.

What a real nginx, openssl and systemd make of it is in tests/deploy/test_hardened.py.
"""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from provision import facts, gateway, live, operations, rendering, services, verify
from provision.settings import HARDENED, GatewaySettings, HostInput
from tests.unit.provision import fleets
from tests.unit.provision.fleets import fleet, worker
from tests.unit.provision.test_nginx_conf import block, flat, parsed
from tests.unit.provision.test_operations import opened, run, zone
from tests.unit.provision.test_settings import problems

CERTIFICATE = {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"}
ACME = {"tls_acme": True, "acme_terms_agreed": True, "server_name": "gw.example.com"}
HARD = {"profile": "hardened", **CERTIFICATE}


def settings(**data: Any) -> GatewaySettings:
    return fleet(fleets.gateway(**data), worker()).gateways["gw1"]


def refused(*hosts: HostInput, **data: Any) -> str:
    return "\n".join(problems(*(hosts or (fleets.gateway(**data), worker()))))


# ---- profiles -----------------------------------------------------------------------------------


def test_the_hardened_profile_changes_defaults_and_nothing_else() -> None:
    reference, hardened = settings(**CERTIFICATE), settings(**HARD)
    differing = {
        name
        for name in GatewaySettings.model_fields
        if getattr(reference, name) != getattr(hardened, name)
    }
    assert differing == {"profile", *HARDENED}
    assert {name: getattr(hardened, name) for name in HARDENED} == HARDENED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("selinux_mode", "permissive"),
        ("tls_only", False),
        ("client_max_connections", None),
        ("sandbox", False),
        ("status_port", None),
    ],
)
def test_each_default_of_it_can_be_set_alone(name: str, value: object) -> None:
    assert getattr(settings(**HARD, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "rendered"),
    [
        ("client_max_connections", 5, ("limit_conn", ["client_connections", "5"])),
        (
            "client_handshakes_per_s",
            3,
            ("limit_req", ["zone=client_handshakes", "burst=6", "nodelay"]),
        ),
        ("status_port", 8008, ("listen", ["127.0.0.1:8008"])),
        ("auth_request", "http://127.0.0.1:9090/check", ("auth_request", ["/_authorize"])),
        ("access_log_format", "json", ("access_log", ["/var/log/nginx/access.log", "json"])),
    ],
)
def test_each_thing_can_be_had_without_it(
    tmp_path: Path, name: str, value: object, rendered: tuple[str, list[str]]
) -> None:
    assert rendered not in flat(parsed(tmp_path))
    assert rendered in flat(parsed(tmp_path, **{name: value}))


def test_the_profile_needs_a_certificate_and_no_root() -> None:
    text = refused(profile="hardened", nginx_user="root")
    assert "there is no certificate; set tls_certificate" in text
    assert "nginx_user is root, which the hardened profile does not allow" in text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tls_self_signed": True, **CERTIFICATE}, "choose one"),
        ({"tls_client_ca": "/etc/pki/ca.pem", **CERTIFICATE}, "set tls_only = True"),
        ({"tls_only": True}, "tls_only: there is no certificate"),
        (
            {"tls_self_signed": True, "tls_stapling": True},
            "tls_stapling: nobody answers for a self-signed certificate",
        ),
        ({**CERTIFICATE, "tls_trusted_chain": "/etc/pki/chain.pem"}, "is for tls_stapling"),
        ({**CERTIFICATE, "tls_client_verify": "optional"}, "is for tls_client_ca"),
        ({"tls_resolver": "dns.example"}, "dns.example"),
        ({"allowed_origins": ["*"]}, "allowed_origins.0"),
        ({"allowed_origins": ["https://a.example/"]}, "allowed_origins.0"),
        ({"allowed_origins": ['https://a.example" 0; default']}, "allowed_origins.0"),
        ({"auth_request": "http://x; return 200"}, "auth_request"),
        (
            {**HARD, "tls_certificate_key": "/root/gw.key"},
            "tls_certificate_key is /root/gw.key, which nginx does not see in its sandbox",
        ),
        ({"status_port": 8009}, "wanted by gw1 listen_port and by gw1 status_port"),
        ({"connections": 100, "worker_connections": 512}, "both set"),
    ],
)
def test_what_does_not_go_together_is_refused(data: dict[str, Any], message: str) -> None:
    assert message in refused(**data)


# ---- rendering ----------------------------------------------------------------------------------


def test_plain_http_is_sent_to_tls_and_plain_websockets_are_told_why(tmp_path: Path) -> None:
    http = block(parsed(tmp_path, **HARD), ("http",))
    plain, tls = [d["block"] for d in http if d["directive"] == "server"][:2]
    returns = [args for name, args in flat(plain) if name == "return"]
    assert returns[0][0] == "426"
    assert "wss on port 8443" in returns[0][1]
    assert returns[1] == ["308", "https://$host:8443$request_uri"]
    assert "proxy_pass" not in dict(flat(plain))
    assert ("add_header", ["Strict-Transport-Security", "max-age=63072000", "always"]) in flat(tls)
    assert ("ssl_protocols", ["TLSv1.2", "TLSv1.3"]) in flat(tls)


def test_a_self_signed_certificate_is_not_stapled_and_not_searched_for_elsewhere(
    tmp_path: Path,
) -> None:
    found = flat(parsed(tmp_path, profile="hardened", tls_self_signed=True))
    assert "ssl_stapling" not in dict(found)
    assert ("ssl_certificate", ["/etc/pki/gpu-gateway/self-signed.pem"]) in found


def test_client_certificates_are_asked_for(tmp_path: Path) -> None:
    asking = {**HARD, "tls_client_ca": "/etc/pki/ca.pem"}
    found = flat(parsed(tmp_path, **asking))
    assert ("ssl_verify_client", ["on"]) in found
    assert ("ssl_client_certificate", ["/etc/pki/ca.pem"]) in found
    assert settings(**asking).probe_refusals == ["400"]
    optional = {**asking, "tls_client_verify": "optional"}
    assert ("ssl_verify_client", ["optional"]) in flat(parsed(tmp_path, **optional))
    assert settings(**optional).probe_refusals == []


def test_nobody_says_the_name_of_a_certificate_of_himself(tmp_path: Path) -> None:
    # nginx sends no header whose value is empty, and the variable is, without a certificate.
    for found in (parsed(tmp_path), parsed(tmp_path, **HARD)):
        passing = [args for name, args in flat(found) if name == "proxy_pass"]
        told = [args for _, args in flat(found) if args[:1] == ["X-Client-Name"]]
        assert told == [["X-Client-Name", "$ssl_client_s_dn"]] * len(passing)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://app.example.com", True),
        ("https://a.b.below.example", True),
        ("https://below.example", False),
        ("http://a.below.example", False),
        ("https://app.example.com.evil.test", False),
        ("https://evil.test/.below.example", False),
        ("https://appxexample.com", False),
        ("null", False),
    ],
)
def test_origins_are_compared_as_a_whole(origin: str, *, allowed: bool) -> None:
    found = services.origin_patterns(["https://app.example.com", "https://*.below.example"])
    patterns = [pattern.strip('"') for pattern, _ in found]
    matching = [
        pattern
        for pattern in patterns
        if (re.search(pattern[1:], origin) if pattern.startswith("~") else pattern == origin)
    ]
    assert bool(matching) is allowed


def test_programs_without_an_origin_pass_and_unknown_ones_do_not(tmp_path: Path) -> None:
    http = block(parsed(tmp_path, allowed_origins=["https://app.example.com"]), ("http",))
    (table,) = [d for d in http if d["directive"] == "map" and d["args"][0] == "$http_origin"]
    entries = {d["directive"]: d["args"][0] for d in table["block"]}
    assert entries == {"default": "1", "": "0", "https://app.example.com": "0"}


def test_limits_count_websockets_alone(tmp_path: Path) -> None:
    http = block(parsed(tmp_path, **HARD), ("http",))
    (table,) = [d for d in http if d["directive"] == "map" and d["args"][1] == "$websocket_client"]
    entries = {d["directive"]: d["args"][0] for d in table["block"]}
    assert entries == {"default": "", "websocket": "$binary_remote_addr"}
    zones = [d["args"][0] for d in http if d["directive"].endswith("_zone")]
    assert zones == ["$websocket_client"] * 2


def test_weights_and_backups_reach_the_upstream() -> None:
    found = fleet(
        fleets.gateway(),
        worker(worker_ports=[9005]),
        worker("gpu2", "10.0.0.22", worker_ports=[9005], weight=3),
        worker("gpu3", "10.0.0.23", worker_ports=[9005], backup=True),
    )
    text = rendering.nginx_conf(found.gateways["gw1"], found).decode()
    servers = re.findall(r"^ +server (10\.\S+) .*fail_timeout=5s(.*);", text, re.MULTILINE)
    assert servers == [
        ("10.0.0.21:9005", ""),
        ("10.0.0.22:9005", " weight=3"),
        ("10.0.0.23:9005", " backup"),
    ]


def test_backups_need_somebody_to_back_up_and_a_method_that_knows_them() -> None:
    text = refused(fleets.gateway(upstream_balance="ip_hash"), worker(backup=True))
    assert "ip_hash, which knows no backup workers, and gpu1 has them" in text
    assert "all workers are backups" in text


def test_the_probe_goes_where_clients_are_served() -> None:
    def probe(**data: Any) -> str:
        found = fleet(fleets.gateway(**data), worker())
        return found.probe(found.gateways["gw1"])

    assert probe() == "8009"
    assert probe(**CERTIFICATE) == "8009"
    assert probe(**HARD) == "tls:8443"
    asks = {"tls_client_ca": "/etc/pki/ca.pem", "auth_request": "http://127.0.0.1/"}
    assert probe(**HARD, **asks) == "tls:8443 400 403"


@pytest.mark.parametrize("data", [{}, HARD, {**HARD, "tls_client_ca": "/etc/pki/ca.pem"}])
def test_the_activation_finds_the_probe_in_the_configuration(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    found = fleet(fleets.gateway(**data), worker())
    path = tmp_path / "nginx.conf"
    path.write_bytes(rendering.nginx_conf(found.gateways["gw1"], found))
    text = rendering.shell("nginx-activate.sh")
    function = text[text.index("probe_of() {") : text.index("first_of() {")]
    result = subprocess.run(
        ["bash", "-c", f'{function}\nprobe_of "$1"', "probe", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == found.probe(found.gateways["gw1"])
    assert live.probe(path.read_text()) == found.probe(found.gateways["gw1"])


@pytest.mark.parametrize("data", [{}, HARD, {**CERTIFICATE, "status_port": 8008}, ACME])
def test_the_live_configuration_says_its_public_ports(data: dict[str, Any]) -> None:
    found = fleet(fleets.gateway(**data), worker())
    text = rendering.nginx_conf(found.gateways["gw1"], found).decode()
    assert sorted(live.ports(text)) == sorted(gateway.public_ports(found.gateways["gw1"]))
    drop_in = rendering.nginx_unit(found.gateways["gw1"], found).decode()
    assert live.is_sandboxed(drop_in) is found.gateways["gw1"].sandbox


def test_a_configuration_of_somebody_else_says_nothing() -> None:
    text = "http { server {\n listen 80 default_server;\n} }\n"
    assert (live.probe(text), live.ports(text)) == (None, [])


def test_a_rollback_opens_the_ports_of_what_went_live_and_closes_none() -> None:
    found = fleet()
    conf = rendering.nginx_conf(found.gateways["gw1"], found).decode().splitlines()
    answers = {
        "busctl": [*zone("8010/tcp"), *opened("gateway", "8010/tcp")],
        '&& cat "$1"': conf,
    }
    commands = [command for command in run(gateway.live_ports, answers) if "cat" not in command]
    assert commands == [
        "firewall-cmd --quiet --permanent --add-port=8009/tcp",
        "firewall-cmd --quiet --add-port=8009/tcp",
    ]


@pytest.mark.parametrize(
    ("manager", "missing", "installs"),
    [("dnf", True, "yum install -y curl"), ("apt", True, "apt-get"), ("dnf", False, None)],
)
def test_curl_is_installed_where_it_is_missing(
    manager: str, missing: bool, installs: str | None
) -> None:
    answers = {
        "command -v": ["yes"] if missing else [],
        "os-release": [f"manager={manager}"],
        "rpm -qa": [],
    }
    commands = run(gateway.curl, answers)
    assert any(installs in command for command in commands) if installs else len(commands) == 1


@pytest.mark.parametrize(("probe", "status"), [("tls:8443", 1), ("8009", 0)])
def test_a_host_without_curl_is_told_to_have_it(tmp_path: Path, probe: str, status: int) -> None:
    text = rendering.shell("handshake.sh") + 'can_ask "$1"'
    result = subprocess.run(
        ["/bin/bash", "-uc", text, "x", probe],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == status
    assert ("curl is missing on this host" in result.stderr) is (status == 1)


@pytest.mark.parametrize(
    ("status", "probe", "served"),
    [
        ("HTTP/1.1 101 Switching Protocols", "8009", True),
        ("HTTP/1.1 401 Unauthorized", "tls:8443", True),
        ("HTTP/1.1 400 Bad Request", "tls:8443", False),
        ("HTTP/1.1 400 Bad Request", "tls:8443 400 403", True),
        ("HTTP/1.1 502 Bad Gateway", "tls:8443 400 403", False),
        ("", "8009", False),
    ],
)
def test_what_counts_as_served(status: str, probe: str, *, served: bool) -> None:
    text = rendering.shell("handshake.sh") + 'is_served "$1" "$2"'
    result = subprocess.run(["bash", "-c", text, "is_served", status, probe])
    assert (result.returncode == 0) is served


@pytest.mark.parametrize(
    "data",
    [
        {},
        HARD,
        {"profile": "hardened", "tls_self_signed": True, "connections": 2000},
        {
            **HARD,
            "allowed_origins": ["https://a.example", "https://*.b.example"],
            "auth_request": "http://127.0.0.1:9090/check",
            "tls_client_ca": "/etc/pki/ca.pem",
            "access_log_format": "json",
            "tls_resolver": "2001:db8::53",
        },
    ],
)
def test_gixy_and_our_own_lint_have_nothing_against_it(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    found = fleet(fleets.gateway(**data), worker())
    rendering.check_all(found)
    if importlib.util.find_spec("gixy") is None:
        pytest.skip("gixy-next is not installed (requirements/dev.txt)")
    path = tmp_path / "nginx.conf"
    path.write_bytes(rendering.nginx_conf(found.gateways["gw1"], found))
    # Without a resolver nginx looks the responder up when it reads its configuration.
    skipped = "--skips=ssl_stapling_without_resolver"
    command = [
        str(Path(sys.executable).with_name("gixy")),
        *([] if "tls_resolver" in data else [skipped]),
        *("--disable-includes", str(path)),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ---- sizing -------------------------------------------------------------------------------------

ROOMY = facts.Limits(
    cores=4,
    memory=64 << 30,
    first_port=1024,
    last_port=65535,
    nr_open=1 << 20,
    somaxconn=4096,
    conntrack_max=None,
)


class FakeHost:
    """The current host, which answers one fact."""

    name = "gw1"

    def __init__(self, limits: facts.Limits) -> None:
        self.limits = limits
        self.asked = 0

    def get_fact(self, fact: object) -> facts.Limits:
        self.asked += 1
        return self.limits


def test_limits_follow_from_the_connections(tmp_path: Path) -> None:
    found = fleet(fleets.gateway(connections=20_000), worker())
    limits = rendering.limits(found.gateways["gw1"], found, cores=4)
    assert limits == rendering.Limits(worker_connections=16384, descriptors=33280, backlog=2000)
    text = rendering.nginx_conf(found.gateways["gw1"], found, cores=4).decode()
    assert "worker_connections 16384;" in text
    assert "worker_rlimit_nofile 33280;" in text
    assert "listen 8009 default_server so_keepalive=on backlog=2000;" in text
    unit = rendering.nginx_unit(found.gateways["gw1"], found, cores=4).decode()
    assert "LimitNOFILE=33280\n" in unit


def test_a_number_of_processes_that_is_set_counts_instead_of_the_cores() -> None:
    found = fleet(fleets.gateway(connections=20_000, worker_processes=1), worker())
    limits = rendering.limits(found.gateways["gw1"], found, cores=64)
    assert limits.worker_connections >= 40_000


def test_a_host_is_asked_only_where_its_limits_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHost(ROOMY)
    monkeypatch.setattr(gateway, "host", fake)
    found = fleet()
    assert gateway.sized(found.gateways["gw1"], found) == 1
    assert fake.asked == 0
    found = fleet(fleets.gateway(connections=1000), worker())
    assert gateway.sized(found.gateways["gw1"], found) == 4


def test_what_the_host_cannot_give_is_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = dataclasses.replace(ROOMY, somaxconn=128, memory=64 << 20, nr_open=4096)
    monkeypatch.setattr(gateway, "host", FakeHost(small))
    found = fleet(fleets.gateway(connections=2000), worker())
    with pytest.raises(gateway.RefusedError) as caught:
        gateway.sized(found.gateways["gw1"], found)
    text = str(caught.value)
    assert "3 problems, nothing was touched" in text
    assert "gw1: connections = 2000 needs a backlog of 511" in text
    assert "47 MiB for nginx (2000 connections of 24 KiB)" in text


def test_limits_of_a_host_are_read() -> None:
    output = [
        "cores 2",
        "memory_kib 24684092",
        "ip_local_port_range 32768\t60999",
        "nr_open 1048576",
        "somaxconn 4096",
    ]
    found = facts.HostLimits().process(output)
    assert found == facts.Limits(2, 24684092 * 1024, 32768, 60999, 1048576, 4096, None)
    assert facts.HostLimits().process([*output, "nf_conntrack_max 9"]).conntrack_max == 9


# ---- a certificate of its own -------------------------------------------------------------------

NAMES = ["DNS:localhost", "IP:10.0.0.11"]
OURS = [
    "exists",
    "matches",
    "lasts",
    f"issuer=O = {operations.SELF_SIGNED_BY}, CN = localhost",
    "X509v3 Subject Alternative Name: ",
    "    DNS:localhost, IP Address:10.0.0.11",
]


def certificate(answer: list[str], names: list[str] = NAMES) -> list[str]:
    commands = run(
        operations.self_signed_certificate,
        {"checkend": answer},
        certificate="/c.pem",
        key="/c.key",
        names=names,
    )
    return [command for command in commands if "checkend" not in command]


def test_a_certificate_that_is_right_is_left_alone() -> None:
    assert certificate(OURS) == []


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ([], NAMES),  # there is none
        ([line for line in OURS if line != "lasts"], NAMES),
        ([line for line in OURS if line != "matches"], NAMES),
        (OURS, [*NAMES, "DNS:gw.example.com"]),
    ],
)
def test_it_is_made_anew_when_it_ends_or_does_not_fit(answer: list[str], names: list[str]) -> None:
    (command,) = certificate(answer, names)
    assert "openssl req -x509" in command
    assert operations.APPLIED in command  # so that nginx takes it over


@pytest.mark.parametrize(
    "answer",
    [
        ["exists", "matches", "lasts", "issuer=C = US, O = Let's Encrypt, CN = E7"],
        ["missing"],
    ],
)
def test_another_ones_is_never_replaced_and_openssl_is_asked_for(answer: list[str]) -> None:
    with pytest.raises(Exception, match="hosts"):
        certificate(answer)


def test_it_is_for_every_name_of_the_server_and_this_host() -> None:
    names = gateway.certificate_names(settings(server_name="a.example *.b.example"), "2001:db8::1")
    assert names == [
        "DNS:a.example",
        "DNS:*.b.example",
        "DNS:localhost",
        "IP:2001:db8::1",
        "IP:127.0.0.1",
    ]


# ---- the sandbox --------------------------------------------------------------------------------


def test_the_sandbox_is_part_of_the_one_drop_in() -> None:
    found = fleet(fleets.gateway(**HARD), worker())
    unit = rendering.nginx_unit(found.gateways["gw1"], found).decode()
    assert "ProtectSystem=strict\n" in unit
    assert "ReadWritePaths=/run /var/log/nginx" in unit
    assert "NoNewPrivileges=" not in unit
    plain = fleet()
    assert "Protect" not in rendering.nginx_unit(plain.gateways["gw1"], plain).decode()


@pytest.mark.parametrize(
    ("wanted", "mounted", "message"),
    [
        (True, "ro,relatime", None),
        (False, "rw,relatime", None),
        (True, "", None),  # nginx does not run: the handshake says that
        (True, "rw,relatime", "runs without its sandbox"),
        (False, "ro,relatime", "still runs in its sandbox"),
    ],
)
def test_a_sandbox_that_waits_for_a_restart_is_told(
    wanted: bool,
    mounted: str,
    message: str | None,
) -> None:
    found = verify.sandbox_message(wanted=wanted, mounted=mounted)
    assert (message in found) if message and found else found is message
