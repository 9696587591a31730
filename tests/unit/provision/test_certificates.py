"""What a gateway's certificate says of itself, and what follows."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from provision import certificates
from provision.facts import CertificateState
from provision.settings import GatewaySettings
from tests.unit.provision import fleets

GOOD = CertificateState(
    exists=True,
    matches=True,
    lasts=True,
    issuer="CN = Somebody",
    ends="Feb 26 14:03:21 2027 GMT",
    ocsp=True,
    chain=2,
)


def settings(**data: Any) -> GatewaySettings:
    files = {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"}
    found = fleets.fleet(fleets.gateway(**{**files, **data}), fleets.worker())
    return found.gateways["gw1"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exists": False}, "neither /etc/pki/gw.pem nor /etc/pki/gw.key is there"),
        ({"ends": ""}, "/etc/pki/gw.pem is missing, or holds no certificate in PEM format"),
        ({"matches": False}, "/etc/pki/gw.key is not the key of /etc/pki/gw.pem, or missing"),
        ({"lasts": False}, "/etc/pki/gw.pem ended on Feb 26 14:03:21 2027 GMT"),
    ],
)
def test_files_that_nginx_or_clients_would_refuse_are_named(
    wrong: dict[str, Any], message: str
) -> None:
    (problem,) = certificates.file_problems(settings(), dataclasses.replace(GOOD, **wrong))
    assert message in problem
    assert certificates.file_problems(settings(), GOOD) == []


@pytest.mark.parametrize(
    ("found", "data", "staples"),
    [
        (GOOD, {}, True),
        (dataclasses.replace(GOOD, ocsp=False), {}, False),  # Let's Encrypt's since 2025
        (dataclasses.replace(GOOD, chain=1), {}, False),  # nginx would not find the issuer
        (
            dataclasses.replace(GOOD, chain=1),
            {"tls_trusted_chain": "/etc/pki/chain.pem"},
            True,
        ),
        (CertificateState(), {}, False),
    ],
)
def test_stapling_follows_the_certificate(
    found: CertificateState, data: dict[str, Any], staples: bool
) -> None:
    decided = certificates.decided(settings(tls_stapling="auto", **data), found)
    assert decided.tls_stapling is staples


def test_stapling_that_nginx_would_leave_out_is_refused() -> None:
    asked = settings(tls_stapling=True)
    silent, alone = dataclasses.replace(GOOD, ocsp=False), dataclasses.replace(GOOD, chain=1)
    assert certificates.file_problems(asked, GOOD) == []
    assert "names no OCSP responder" in certificates.file_problems(asked, silent)[0]
    assert "holds no certificate of its issuer" in certificates.file_problems(asked, alone)[0]
    assert certificates.decided(asked, GOOD).tls_stapling is True
    lost = dataclasses.replace(GOOD, unresolved="ocsp.example.com")
    for stapling in (True, "auto"):
        (problem,) = certificates.file_problems(settings(tls_stapling=stapling), lost)
        assert (
            "the OCSP responder ocsp.example.com, whose address this host does not find" in problem
        )
    assert certificates.file_problems(settings(tls_stapling=False), lost) == []


@pytest.mark.parametrize(
    ("now", "days"),
    [
        (datetime(2027, 2, 25, 14, 3, 21, tzinfo=UTC), 1),
        (datetime(2027, 2, 25, 14, 3, 22, tzinfo=UTC), 0),
        (datetime(2027, 2, 27, tzinfo=UTC), -1),
    ],
)
def test_days_until_it_ends(now: datetime, days: int) -> None:
    assert certificates.days_left(GOOD.ends, now) == days
