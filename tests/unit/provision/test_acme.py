"""ACME: what certbot is told, what renews, and what is refused before anything begins."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from provision import acme, gateway, operations
from provision.settings import ACME_CERTIFICATE, ACME_WEBROOT, GatewaySettings
from tests.unit.provision import fleets
from tests.unit.provision.test_nginx_conf import block, flat, parsed
from tests.unit.provision.test_operations import run, unit_answer
from tests.unit.provision.test_settings import problems

NAME = "gw.example.com"
ACME: dict[str, Any] = {"tls_acme": True, "acme_terms_agreed": True, "server_name": NAME}


def settings(**data: Any) -> GatewaySettings:
    return fleets.fleet(fleets.gateway(**{**ACME, **data}), fleets.worker()).gateways["gw1"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"acme_terms_agreed": False}, "read them (https://acme-v02.api.letsencrypt.org/directory"),
        ({"server_name": "localhost *.example.com"}, "for localhost, *.example.com by the"),
        ({"server_name": "192.0.2.1"}, "nobody issues for 192.0.2.1"),
        ({"acme_names": ["gw;x"]}, "acme_names.0"),
        ({"acme_directory": "http://ca.example/dir"}, "acme_directory"),
        ({"tls_self_signed": True}, "tls_self_signed and tls_acme each give the certificate"),
        ({"acme_http_port": 8443}, "the challenge comes without TLS"),
        ({"status_port": 80}, "wanted by gw1 acme_http_port and by gw1 status_port"),
    ],
)
def test_what_no_authority_would_do_is_refused(data: dict[str, Any], message: str) -> None:
    found = problems(fleets.gateway(**{**ACME, **data}), fleets.worker())
    assert message in "\n".join(found)


def test_two_gateways_cannot_ask_for_one_name() -> None:
    both = (fleets.gateway(**ACME), fleets.gateway("gw2", "10.0.0.12", **ACME))
    (problem,) = problems(*both, fleets.worker())
    assert problem.startswith(f"gw2: tls_acme asks for {NAME}, and so does gw1")


def test_certbot_is_told_what_was_declared() -> None:
    told = acme.obtain(settings(acme_names=["a.example.com", "b.example.com"]))
    words = " ".join(told)
    assert "--server https://acme-v02.api.letsencrypt.org/directory" in words
    assert "--register-unsafely-without-email" in told
    assert "--domain a.example.com --domain b.example.com" in words
    assert f"--webroot-path {ACME_WEBROOT}" in words
    assert "--email ops@example.com" in " ".join(
        acme.obtain(settings(acme_email="ops@example.com"))
    )


def test_each_authority_has_a_folder_of_its_own() -> None:
    staging = "https://acme-staging-v02.api.letsencrypt.org/directory"
    folders = {acme.lineage(settings()), acme.lineage(settings(acme_directory=staging))}
    assert len(folders) == 2
    assert acme.authority("https://[::1]:14000/dir/") == "1_14000_dir"


def test_challenges_are_answered_on_port_80_and_the_rest_is_sent_to_tls(tmp_path: Path) -> None:
    http = block(parsed(tmp_path, **ACME), ("http",))
    (asked,) = (
        d["block"] for d in http if d["directive"] == "server" and ("listen", ["80"]) in flat([d])
    )
    challenge = block(asked, ("location", "^~", "/.well-known/acme-challenge/"))
    assert ("root", [ACME_WEBROOT]) in flat(challenge)
    assert ("return", ["308", "https://$host:8443$request_uri"]) in flat(asked)
    assert ("ssl_certificate", [ACME_CERTIFICATE]) in flat(http)
    assert gateway.public_ports(settings()) == [8009, 8443, 80]


@pytest.mark.parametrize("tls_only", [True, False])
def test_a_plain_port_80_answers_challenges_itself(tmp_path: Path, tls_only: bool) -> None:
    http = block(parsed(tmp_path, **ACME, listen_port=80, tls_only=tls_only), ("http",))
    servers = [d["block"] for d in http if d["directive"] == "server"]
    answering = [server for server in servers if ("root", [ACME_WEBROOT]) in flat(server)]
    assert answering == [servers[0]]
    assert gateway.public_ports(settings(listen_port=80)) == [80, 8443]


def test_units_and_script_are_files_of_the_gateway_where_acme_is_on() -> None:
    files = {managed.path: managed for managed in acme.files(settings(acme_ca="/etc/pki/ca.pem"))}
    unit = files["/etc/systemd/system/gateway-certificate.service"].content
    assert isinstance(unit, bytes)
    assert b"Environment=REQUESTS_CA_BUNDLE=/etc/pki/ca.pem\n" in unit
    assert f"ExecStart={acme.TAKE} {acme.lineage(settings())} ".encode() in unit
    assert files[acme.TAKE].mode == "755"
    assert acme.files(settings(tls_acme=False)) == []


# ---- what is done on the host -------------------------------------------------------------------

ISSUED = [
    *("exists", "matches", "lasts", "chain=2"),
    "notAfter=Feb 26 14:03:21 2027 GMT",
    "issuer=C = US, O = Let's Encrypt, CN = E7",
    "X509v3 Subject Alternative Name: ",
    f"    DNS:{NAME}",
]
RENEWED = unit_answer(acme.TIMER)


def certificate(answer: list[str], *, taken: bool = True, timer: list[str] = RENEWED) -> list[str]:
    answers = {"checkend": answer, "cmp -s": ["yes"] * taken, "systemctl show": timer}
    commands = run(acme.certificate, answers, settings=settings())
    return [c for c in commands if not any(asked in c for asked in answers)]


def test_a_certificate_that_is_right_is_left_to_the_timer() -> None:
    assert certificate(ISSUED) == []


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        ([], False),
        (ISSUED, False),  # what nginx serves is the placeholder, or another authority's
        ([line for line in ISSUED if line != "lasts"], True),
        ([line.replace(NAME, "old.example.com") for line in ISSUED], True),
    ],
)
def test_any_other_is_asked_for_and_taken(answer: list[str], taken: bool) -> None:
    ask, take = certificate(answer, taken=taken)
    assert "certbot certonly" in ask
    assert take.startswith(acme.TAKE)


def test_the_timer_is_enabled_once() -> None:
    (enabling,) = certificate(ISSUED, timer=[])
    assert enabling == f"systemctl enable --quiet --now {acme.TIMER}"


def test_the_timer_goes_with_acme() -> None:
    (retiring,) = run(acme.retire, {"systemctl show": RENEWED})
    assert retiring.endswith(f" {acme.TIMER} {acme.UNITS}")
    gone = [f"unit={acme.TIMER}", "ActiveState=inactive", "UnitFileState=", "MainPID=0"]
    assert run(acme.retire, {"systemctl show": gone}) == []


@pytest.mark.parametrize(("manager", "installs"), [("apt", "apt-get"), ("dnf", "yum")])
def test_a_certbot_that_is_there_changes_nothing(manager: str, installs: str) -> None:
    def done(*said: str) -> list[str]:
        answers = {"os-release": [f"manager={manager}", *said]}
        commands = run(acme.certbot, answers, package="certbot")
        return [command for command in commands if "os-release" not in command]

    assert done("package=certbot 2.1.0-4") == []
    assert any(installs in command for command in done())


def test_after_a_rollback_the_timer_follows_its_unit() -> None:
    there = {"readlink": f"{acme.UNITS}/{acme.TIMER}"}
    stopped = {"systemctl show": [f"unit={acme.TIMER}", "ActiveState=inactive"]}
    enabling = f"systemctl enable --quiet --now {acme.TIMER}"
    assert run(acme.follow, there | stopped) == [enabling]
    assert run(acme.follow, there | {"systemctl show": RENEWED}) == []
    (retiring,) = run(acme.follow, {"systemctl show": RENEWED})
    assert "disable --quiet --now" in retiring
    assert run(acme.follow, stopped) == []


def test_a_timer_whose_file_went_is_stopped_all_the_same(tmp_path: Path) -> None:
    """systemd refuses to disable a unit that has no file any more."""
    wanted = tmp_path / "timers.target.wants" / acme.TIMER
    wanted.parent.mkdir()
    wanted.symlink_to(tmp_path / acme.TIMER)
    stand_in = (
        'systemctl() { echo "$@" >>"$2.told"; case $1 in disable | is-active) false ;; esac; }\n'
    )
    stand_in = stand_in.replace("$2.told", str(tmp_path / "told"))
    subprocess.run(
        ["sh", "-c", stand_in + acme._RETIRE, "sh", acme.TIMER, str(tmp_path)], check=True
    )
    assert not wanted.is_symlink()
    told = (tmp_path / "told").read_text().splitlines()
    assert told[1:3] == [f"stop --quiet {acme.TIMER}", f"reset-failed {acme.TIMER}"]
    lost = [f"unit={acme.TIMER}", "ActiveState=failed", "UnitFileState=", "MainPID=0"]
    assert len(run(acme.retire, {"systemctl show": lost})) == 1


def test_nginx_can_start_before_there_is_a_certificate() -> None:
    folder = ["755 root root " + ACME_WEBROOT]
    names = [f"DNS:{NAME}"]
    (made,) = run(acme.prepare, {"stat -c": folder}, names=names)[-1:]
    assert "openssl req -x509" in made
    assert operations.APPLIED in made
    answers = {"checkend": ISSUED, "stat -c": folder}
    commands = run(acme.prepare, answers, names=names)
    assert not any("openssl req" in command for command in commands)
