"""Each known fault is found, its mended form is not, and our own rendering has none."""

from pathlib import Path

import pytest

from provision import lint, rendering
from tests.unit.provision.fleets import fleet, gateway, worker

CONF = """
user {user};
worker_rlimit_nofile {nofile};
events {{ worker_connections 1024; }}
http {{
    map $http_upgrade $connection_upgrade {{ default upgrade; {empty} }}
    upstream backend {{ {upstream} }}
    server {{
        location / {{
            proxy_pass http://backend;
            {version}
            {timeout}
            proxy_set_header Upgrade {upgrade};
            proxy_set_header Connection {connection};
        }}
    }}
}}
"""
SOUND = {
    "user": "nginx",
    "timeout": "proxy_read_timeout 1m;",
    "nofile": "2048",
    "empty": "'' '';",
    "upstream": "least_conn; server 10.0.0.1:9005; keepalive 1000;",
    "version": "proxy_http_version 1.1;",
    "upgrade": "$forwarded_upgrade",
    "connection": "$connection_upgrade",
}


def rules(**changes: str) -> list[str]:
    return [finding.rule for finding in lint.lint(CONF.format(**SOUND | changes))]


def test_a_sound_configuration_has_no_findings() -> None:
    assert rules() == []


@pytest.mark.parametrize(
    ("part", "fault", "rule"),
    [
        ("connection", '"upgrade"', "hard-coded-upgrade"),
        ("upgrade", "$http_upgrade", "any-upgrade"),
        ("empty", "'' close;", "close-without-upgrade"),
        (
            "upstream",
            "server 10.0.0.1:9005; keepalive 1000; least_conn;",
            "method-after-keepalive",
        ),
        ("version", "", "http-1.0-upstream"),
        ("nofile", "1024", "descriptors"),
        ("timeout", "proxy_read_timeout 40s;", "silent-socket"),
        ("timeout", "proxy_read_timeout 40000ms;", "silent-socket"),
    ],
)
def test_each_fault_is_found_alone(part: str, fault: str, rule: str) -> None:
    assert rules(**{part: fault}) == [rule]


def test_root_workers_are_a_fault_of_the_hardened_profile_alone() -> None:
    text = CONF.format(**SOUND | {"user": "root"})
    assert lint.lint(text) == []
    assert [finding.rule for finding in lint.lint(text, hardened=True)] == ["root-workers"]


def test_a_read_timeout_is_inherited_and_compared_with_the_services_pings() -> None:
    text = CONF.format(**SOUND | {"timeout": ""})
    assert lint.lint(text) == []  # nginx's own minute is above twice 20 s
    assert [f.rule for f in lint.lint(text, ping_interval_s=30)] == ["silent-socket"]
    inherited = text.replace("http {", "http {\n proxy_read_timeout 1h;")
    assert lint.lint(inherited, ping_interval_s=30) == []


@pytest.mark.parametrize(
    ("unit", "rules"),
    [
        ("[Service]\nLimitNOFILE=2048\n", []),
        ("[Service]\nLimitNOFILE=1024\n", ["descriptors-not-granted"]),
        ("[Service]\n", ["descriptors-not-granted"]),
    ],
)
def test_systemd_has_to_grant_what_nginx_hands_on(unit: str, rules: list[str]) -> None:
    assert [f.rule for f in lint.lint(CONF.format(**SOUND), unit=unit)] == rules


def test_the_command_line_tells_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nginx.conf"
    file.write_text(CONF.format(**SOUND | {"user": "root"}))
    assert lint.main([str(file)]) == 0
    assert lint.main(["--hardened", str(file)]) == 2
    assert "root-workers" in capsys.readouterr().out
    assert lint.main([str(tmp_path / "absent")]) == 1


def test_the_usual_example_of_the_web_has_its_faults_told_in_order_of_lines() -> None:
    found = lint.lint(
        CONF.format(**SOUND | {"upgrade": "$http_upgrade", "connection": '"upgrade"'})
    )
    assert [finding.line for finding in found] == sorted(finding.line for finding in found)
    assert len(found) == 2


def test_what_is_no_configuration_is_said_with_its_line() -> None:
    with pytest.raises(lint.UnparsableError, match="unexpected end of file"):
        lint.lint("http {\n")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"upstream_balance": "round_robin"},
        {"upstream_balance": "ip_hash", "worker_connections": 64},
        {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"},
    ],
)
def test_our_own_rendering_has_none(settings: dict[str, object]) -> None:
    found = fleet(gateway(**settings), worker())
    assert lint.lint(rendering.nginx_conf(found.gateways["gw1"], found).decode()) == []


def test_a_template_with_a_known_fault_is_refused_before_the_deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in rendering.TEMPLATES.iterdir():
        text = path.read_text().replace("Connection $connection_upgrade", 'Connection "upgrade"')
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(rendering, "TEMPLATES", tmp_path)
    rendering._environment.cache_clear()
    try:
        with pytest.raises(rendering.RenderError, match=r"nginx\.conf\.j2.*hard-coded-upgrade"):
            rendering.check_all(fleet())
    finally:
        rendering._environment.cache_clear()
