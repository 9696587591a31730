"""A certificate from an ACME authority such as Let's Encrypt, by certbot, and its renewal.

nginx serves a pair of files of its own (`settings.ACME_CERTIFICATE`), never certbot's: a new one is
taken over by `files/take-certificate.sh`, in a deploy and twice a day by a timer. Until there is a
first one, a self-signed certificate stands there, so that nginx can start and answer the
authority's challenge.

certbot has a folder of its own for each authority: to change `acme_directory` is to ask anew, and
certificates of others on the same host are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from pyinfra import host
from pyinfra.api import StringCommand, operation
from typing_extensions import override

from provision import facts, operations, record, rendering
from provision.facts import quoted, script
from provision.operations import Commands, ManagedFile, executing, fail
from provision.settings import ACME_CERTIFICATE, ACME_KEY, ACME_WEBROOT, UNITS, GatewaySettings

HOME = "/var/lib/gpu-gateway/acme"
LINEAGE = "gateway"
TAKE = "/usr/libexec/gpu-gateway/take-certificate"
TIMER = "gateway-certificate.timer"

# Renewal comes long before. Where it did not, a deploy asks once more.
LATE_S = 2 * 24 * 3600


def authority(directory: str) -> str:
    """Name of the folder for what was had from an authority."""
    place = urlsplit(directory)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", place.netloc + place.path).strip("_")


def lineage(settings: GatewaySettings) -> str:
    """Where certbot keeps the certificate and its key."""
    return f"{HOME}/{authority(settings.acme_directory)}/config/live/{LINEAGE}"


def _folders(settings: GatewaySettings) -> list[str]:
    own = f"{HOME}/{authority(settings.acme_directory)}"
    return [
        *("--config-dir", f"{own}/config"),
        *("--work-dir", f"{own}/work"),
        *("--logs-dir", f"{own}/logs"),
    ]


def renew(settings: GatewaySettings) -> list[str]:
    """certbot's command line for the timer; the rest it noted when it got the first one."""
    return ["certbot", "renew", "--quiet", "--no-random-sleep-on-renew", *_folders(settings)]


def obtain(settings: GatewaySettings) -> list[str]:
    """certbot's command line for a first certificate, or one for other names."""
    email = settings.acme_email
    return [
        *("certbot", "certonly", "--non-interactive", "--agree-tos"),
        *(["--email", email] if email else ["--register-unsafely-without-email"]),
        *("--no-eff-email", "--server", settings.acme_directory),
        *("--webroot", "--webroot-path", ACME_WEBROOT),
        *("--key-type", "ecdsa", "--max-log-backups", "30"),
        *("--cert-name", LINEAGE, "--keep-until-expiring", "--renew-with-new-domains"),
        *(word for name in settings.certificate_domains for word in ("--domain", name)),
        *_folders(settings),
    ]


def take(settings: GatewaySettings) -> list[str]:
    """The command line that has nginx serve what certbot has."""
    name = settings.certificate_domains[0]
    port = str(settings.tls_listen_port)
    return [TAKE, lineage(settings), ACME_CERTIFICATE, ACME_KEY, port, name]


def files(settings: GatewaySettings) -> list[ManagedFile]:
    """What renews the certificate; nothing where somebody else does."""
    if not settings.tls_acme:
        return []
    unit = rendering.render(
        "gateway-certificate.service.j2",
        ca=settings.acme_ca,
        renew=renew(settings),
        take=take(settings),
        writable=ACME_CERTIFICATE.rpartition("/")[0],
    )
    return [
        ManagedFile(path=TAKE, content=rendering.static("take-certificate.sh"), mode="755"),
        ManagedFile(path=f"{UNITS}/gateway-certificate.service", content=unit),
        ManagedFile(path=f"{UNITS}/{TIMER}", content=rendering.static("gateway-certificate.timer")),
    ]


class IsTaken(facts.Said):
    """Whether what nginx is to serve is what certbot has."""

    @override
    def command(self, lineage: str) -> StringCommand:
        return script(
            'cmp -s "$1/fullchain.pem" "$2" && cmp -s "$1/privkey.pem" "$3" && echo yes; true',
            lineage,
            ACME_CERTIFICATE,
            ACME_KEY,
        )


@operation()
def certbot(package: str) -> Commands:
    """certbot is installed, by the package manager that the host has."""
    found = host.get_fact(facts.Packages, names=(package,), files=())
    if package in found.packages:
        return  # also where the lists are a day old: apt's operation would fetch them anew
    yield from record.by_manager(package, found.manager)


# Under /var/www, for which SELinux's policy has a type that nginx may read.
_WEBROOT = """
set -eu
install -d -m 755 -- "$1"
! command -v restorecon >/dev/null || restorecon -R -- "${1%/*}"
"""


@operation()
def prepare(names: Iterable[str]) -> Commands:
    """The folder for challenges, and a certificate to start nginx with where there is none.

    + names: what it is for, as `DNS:NAME`
    """
    folders = host.get_fact(facts.FolderStates, paths=(ACME_WEBROOT,))
    if folders.get(ACME_WEBROOT) != ("755", "root", "root"):
        yield record.folders([ACME_WEBROOT])
        yield script(_WEBROOT, ACME_WEBROOT)
    found = host.get_fact(facts.Certificate, certificate=ACME_CERTIFICATE, key=ACME_KEY, seconds=0)
    if found.matches:
        return
    if not found.openssl:
        yield fail(operations.NO_OPENSSL)
        return
    yield from operations.make_self_signed(ACME_CERTIFICATE, ACME_KEY, list(names))


@operation()
def certificate(settings: GatewaySettings) -> Commands:
    """nginx serves a certificate of the authority, for the declared names; it is renewed in time.

    One that is right is left to the timer. A failure leaves what was served.
    """
    timer = host.get_fact(facts.UnitStates, units=(TIMER,)).get(TIMER, facts.UnitState())
    found = host.get_fact(
        facts.Certificate, certificate=ACME_CERTIFICATE, key=ACME_KEY, seconds=LATE_S
    )
    wanted = frozenset(f"DNS:{name}" for name in settings.certificate_domains)
    taken = host.get_fact(IsTaken, lineage=lineage(settings))
    if not (taken and found.matches and found.lasts and found.names == wanted):
        if executing():
            host.log(f"asking {settings.acme_directory} for a certificate")
        yield _asking(settings)
        yield quoted(*take(settings))
        if executing():
            host.log(
                f"nginx serves a new certificate for {', '.join(settings.certificate_domains)}"
            )
    if timer.needs_daemon_reload:
        yield quoted("systemctl", "daemon-reload")
    if not (timer.enabled and timer.active == "active"):
        yield quoted("systemctl", "enable", "--quiet", "--now", TIMER)


# systemd disables no unit whose file is gone, and calls a timer failed whose file it finds no more.
_RETIRE = """
if ! systemctl disable --quiet --now "$1" 2>/dev/null; then
    rm -f -- "$2/timers.target.wants/$1"
    systemctl stop --quiet "$1" 2>/dev/null
fi
systemctl reset-failed "$1" 2>/dev/null
! systemctl is-active --quiet "$1"
"""


@operation()
def retire() -> Commands:
    """Nothing renews a certificate that nginx does not serve any more.

    After nginx let go of it, since until then it has to be renewed. The unit's file went with the
    configuration that named the certificate.
    """
    timer = host.get_fact(facts.UnitStates, units=(TIMER,)).get(TIMER, facts.UnitState())
    if timer.enabled or timer.active != "inactive":
        yield script(_RETIRE, TIMER, UNITS)


@operation()
def follow() -> Commands:
    """What renews a certificate runs where a rollback left its unit, and only there."""
    unit = f"{UNITS}/{TIMER}"
    if unit not in host.get_fact(facts.Paths, paths=(unit,)):
        yield from retire._inner()
        return
    timer = host.get_fact(facts.UnitStates, units=(TIMER,)).get(TIMER, facts.UnitState())
    if not (timer.enabled and timer.active == "active"):
        yield quoted("systemctl", "enable", "--quiet", "--now", TIMER)


_ASK = """
[ -z "$1" ] || export REQUESTS_CA_BUNDLE="$1"
placeholder=$2
shift 2
"$@" && exit 0
echo "certbot got no certificate: its reason stands above. nginx serves $placeholder" >&2
exit 1
"""


def _asking(settings: GatewaySettings) -> StringCommand:
    serves = "what it served; where there never was one, that is a self-signed one"
    return script(_ASK, settings.acme_ca or "", serves, *obtain(settings))
