"""A gateway's certificate, as it lies on the host: judged before anything is touched where the
files are somebody else's, and its end told.

What nginx is told of it beside its path (OCSP stapling) follows from what the certificate says, so
it is asked on the host.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pyinfra import host, logger, state
from pyinfra.api import operation

from provision import facts
from provision.facts import CertificateState
from provision.operations import Commands, executing
from provision.preflight import RefusedError
from provision.settings import GatewaySettings


def settled(settings: GatewaySettings) -> GatewaySettings:
    """The settings with `tls_stapling` decided. The current host is asked where files are named.

    Raises `RefusedError` for a certificate that nginx would refuse, or clients would.
    """
    if settings.tls_certificate is None:
        return decided(settings, CertificateState())
    found = host.get_fact(
        facts.Certificate,
        certificate=settings.tls_certificate,
        key=settings.tls_certificate_key,
        seconds=0,
    )
    problems = file_problems(settings, found) if found.openssl else []
    if problems:
        raise RefusedError([f"{host.name}: {problem}" for problem in problems])
    return decided(settings, found)


def decided(settings: GatewaySettings, found: CertificateState) -> GatewaySettings:
    """The same with `tls_stapling` either True or False. Pure."""
    if settings.tls_stapling != "auto":
        return settings
    staples = found.ocsp and (found.chain > 1 or bool(settings.tls_trusted_chain))
    return settings.model_copy(update={"tls_stapling": staples})


def file_problems(settings: GatewaySettings, found: CertificateState) -> list[str]:
    """What is wrong with the files that `tls_certificate` and its key name. Pure."""
    certificate, key = settings.tls_certificate, settings.tls_certificate_key
    if not found.exists:
        return [f"neither {certificate} nor {key} is there; put both on the gateway"]
    if not found.ends:
        return [f"{certificate} is missing, or holds no certificate in PEM format"]
    if not found.matches:
        return [f"{key} is not the key of {certificate}, or missing; put the right one there"]
    if not found.lasts:
        return [f"{certificate} ended on {found.ends}, so no client would accept it; renew it"]
    if decided(settings, found).tls_stapling:
        return _stapling_problems(settings, found)
    return []


def _stapling_problems(settings: GatewaySettings, found: CertificateState) -> list[str]:
    """What nginx would only warn of, and then not staple."""
    if found.unresolved:
        return [
            f"{settings.tls_certificate} names the OCSP responder {found.unresolved}, whose "
            "address this host does not find; mend its name service, or set tls_stapling = False"
        ]
    if not found.ocsp:
        return [
            f"tls_stapling is True, and {settings.tls_certificate} names no OCSP responder; "
            "take it out, or write 'auto'"
        ]
    if found.chain < 2 and not settings.tls_trusted_chain:
        return [
            f"tls_stapling is True, and {settings.tls_certificate} holds no certificate of its "
            "issuer; append that, or name it as tls_trusted_chain"
        ]
    return []


# Those who renew by themselves have done so by then.
ENDING_DAYS = 14


@operation()
def tell_end(certificate: str, key: str) -> Commands:
    """Says until when the certificate is valid: in `make drift`, and in a deploy when it ends soon.

    Changes nothing.
    """
    if state.config.DIFF or executing():
        found = host.get_fact(facts.Certificate, certificate=certificate, key=key, seconds=0)
        if found.ends:
            days = days_left(found.ends, datetime.now(UTC))
            if state.config.DIFF:
                host.log(f"| {certificate} is valid until {found.ends}, in {days} days")
            elif days < ENDING_DAYS:
                host.log_styled(
                    f"{certificate} ends on {found.ends}, in {days} days; nobody has renewed it",
                    fg="yellow",
                    log_func=logger.warning,
                )
    yield from ()


def days_left(ends: str, now: datetime) -> int:
    """Whole days from `now` until a time as openssl prints it; negative when it is over. Pure."""
    end = datetime.strptime(ends, "%b %d %H:%M:%S %Y %Z").replace(tzinfo=UTC)
    return (end - now).days
