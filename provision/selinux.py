"""SELinux on a gateway: its mode, what it lets nginx do, and the operations that bring both about.

nginx runs as `httpd_t`, whatever its user is. In enforcing mode that type may connect to no worker
unless a boolean says so, or the worker's port carries a label that another boolean covers
(docs/explanation/selinux.md has what was measured).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyinfra import host
from pyinfra.api import StringCommand, operation

from provision import facts, record
from provision.facts import SelinuxMode, quoted, script
from provision.operations import APPLIED, Commands, fail
from provision.settings import Fleet, GatewaySettings

# nginx may connect to any port of any host.
CONNECT = "httpd_can_network_connect"
# nginx may connect to ports that carry a web server's label, among a few others.
RELAY = "httpd_can_network_relay"
# nginx may raise its own descriptor limit, as it has to at a reload that raises it.
SETRLIMIT = "httpd_setrlimit"

WEB_PORT = "http_port_t"
# That carry it in the policies of EL and of Debian, so there is no need to ask.
WEB_PORTS = frozenset({80, 443, 488, 8008, 8009, 8443})
# Types of ports that nobody has claimed.
UNCLAIMED = frozenset(
    {"ephemeral_port_t", "hi_reserved_port_t", "port_t", "reserved_port_t", "unreserved_port_t"}
)
# Has `semanage` on EL; a minimal installation lacks it.
SEMANAGE_PACKAGE = "policycoreutils-python-utils"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What SELinux has to be told on one gateway."""

    booleans: tuple[str, ...]
    web_ports: tuple[int, ...]  # to be labelled, unless they are

    @classmethod
    def of(cls, settings: GatewaySettings, fleet: Fleet) -> Policy:
        """Pure."""
        wanted = {
            CONNECT: settings.selinux_allow_connect,
            RELAY: settings.selinux_label_ports,
            SETRLIMIT: settings.selinux_allow_setrlimit,
        }
        ports = set(worker_ports(fleet)) if settings.selinux_label_ports else set()
        if settings.selinux_mode == "enforcing":
            ports |= set(settings.listening_ports)
        return cls(
            booleans=tuple(name for name, on in wanted.items() if on),
            web_ports=tuple(sorted(ports - WEB_PORTS)),
        )


def worker_ports(fleet: Fleet) -> list[int]:
    """Ports that a gateway connects to."""
    return [int(address.rpartition(":")[2]) for address in fleet.upstream_servers()]


def configure(settings: GatewaySettings, fleet: Fleet) -> None:
    """What nginx needs is allowed before the mode is set: in enforcing mode, not a moment
    without it."""
    policy = Policy.of(settings, fleet)
    if policy.booleans:
        booleans(name=f"SELinux lets nginx: {', '.join(policy.booleans)}", wanted=policy.booleans)
    if policy.web_ports:
        if host.get_fact(facts.LacksSemanage):
            record.packages(name="semanage is installed", packages=[SEMANAGE_PACKAGE])
        shown = ", ".join(map(str, policy.web_ports))
        web_ports(name=f"SELinux labels ports {shown} {WEB_PORT}", ports=policy.web_ports)
    mode(name=f"SELinux is {settings.selinux_mode}", wanted=settings.selinux_mode)


@operation()
def mode(wanted: str) -> Commands:
    """Set SELinux's mode for the running system and for the next boot.

    + wanted: enforcing, permissive, disabled or unmanaged

    A host without SELinux is left as it is. A running system can't be switched to or from
    disabled; the next boot is configured and the rest is said.
    """
    if wanted == "unmanaged":
        host.noop("SELinux's mode is not managed (selinux_mode = 'unmanaged')")
        return
    aim = SelinuxMode(wanted)
    found = host.get_fact(facts.Selinux)
    live = (SelinuxMode.ENFORCING, SelinuxMode.PERMISSIVE)
    configures = found.configured not in (SelinuxMode.ABSENT, aim)
    switches = found.running in live and aim in live and found.running is not aim
    if configures or switches:
        yield record.found("selinux", "mode", f"{found.running} {found.configured}")
        yield record.wrote("selinux", "mode", aim)
    if configures:
        yield configured(aim)
    if found.running is SelinuxMode.ABSENT:
        host.noop("this host has no SELinux")
    elif switches:
        yield quoted("setenforce", "1" if aim is SelinuxMode.ENFORCING else "0")
    elif found.running is not aim:
        host.log(f"SELinux is {found.running} and becomes {aim} at the next boot only")


def configured(wanted: str) -> StringCommand:
    """The mode of the next boot. The file may hold comments and SELINUXTYPE: only the one line
    changes. Edited beside and renamed; the label is the old file's.
    """
    return script(
        'cp -a "$1" "$1.candidate" && '
        'sed -i "s/^SELINUX=.*/SELINUX=$2/" "$1.candidate" && mv -f "$1.candidate" "$1"',
        "/etc/selinux/config",
        wanted,
    )


@operation()
def booleans(wanted: Iterable[str]) -> Commands:
    """Switch SELinux booleans on, now and for good, where the host has them.

    One that is on until the next boot only (`setsebool` without `-P`) is not taken for on; all
    that are missing are switched by one command, since each builds the policy anew.
    pyinfra's own operation ends the run on a host without SELinux.
    """
    names = tuple(wanted)
    found = host.get_fact(facts.SelinuxBooleans, booleans=names)
    for name in names:
        if name not in found:
            host.noop(f"this host has no SELinux boolean {name}")
    off = [name for name, state in found.items() if not (state.active and state.permanent)]
    for name in off:
        yield record.found("boolean", name, "off")
    if off:
        yield quoted("setsebool", "-P", *(f"{name}=on" for name in off))
    if SETRLIMIT in off:
        # nginx takes it over at a reload, so what it last took over is forgotten.
        yield quoted("rm", "-f", "--", APPLIED)


@operation()
def web_ports(ports: Iterable[int]) -> Commands:
    """Give TCP ports the label of a web server's, for good, where the host has SELinux.

    + ports: all that are to carry it; those that were labelled before and are no longer among
      them lose it

    A port that the policy gives to something else is refused: the label would be taken from it.
    """
    found = host.get_fact(facts.SelinuxPorts)
    if not found:
        host.noop("this host has no SELinux")
        return
    types = {port: port_type(found, port) for port in ports}
    claimed = {port: kind for port, kind in types.items() if kind not in {WEB_PORT, *UNCLAIMED}}
    if claimed:
        yield fail(
            *(
                f"port {port} is {kind} in this host's SELinux policy, so it belongs to something "
                "else; use another port, or selinux_allow_connect instead of selinux_label_ports"
                for port, kind in claimed.items()
            )
        )
        return
    labels = [port for port, kind in types.items() if kind != WEB_PORT]
    ours = [int(key.split()[-1]) for key in host.get_fact(record.Journal).of("port")]
    stale = [port for port in ours if port not in types and port_type(found, port) == WEB_PORT]
    for port in labels:
        yield record.found("port", f"{WEB_PORT} tcp {port}", "absent")
    if labels or stale:
        # One transaction: each builds the policy anew.
        yield script(
            'printf "%s\\n" "$@" | semanage import',
            *(f"port -d -p tcp {port}" for port in stale),
            *(f"port -a -t {WEB_PORT} -p tcp {port}" for port in labels),
        )


def port_type(ranges: Sequence[facts.PortRange], port: int) -> str:
    """The type of a TCP port: that of the smallest range that holds it, as the kernel decides."""
    holding = [found for found in ranges if found.first <= port <= found.last]
    return min(holding, key=lambda found: found.last - found.first).type if holding else "port_t"
