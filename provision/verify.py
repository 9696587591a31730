"""The end of a deploy: it proves that clients are served, or fails saying what it saw and why.

On each worker host: one real prediction per worker, compared with what the trained model
answered; where workers ask for tokens, of which the deploy has none, that each is ready, which it
is only after its model answered its own samples. On each gateway host: a WebSocket handshake
through the public port. Checks change nothing and count as no change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pyinfra import host
from pyinfra.api import deploy, operation

from provision import facts, live, rendering, workers
from provision.facts import quoted, script
from provision.operations import Commands, ask, each, executing, fail
from provision.settings import Fleet, GatewaySettings, WorkerSettings


@deploy("Verify workers")
def verify_workers(settings: WorkerSettings, fleet: Fleet, planned: workers.Plan) -> None:
    for found in each(fleet.assignments(settings)):
        of = f" of {found.service}" if found.service else ""
        if found.settings.worker_tokens:
            ready(
                name=f"Each worker{of} is ready",
                address=_reachable(settings),
                ports=found.settings.ports,
            )
        else:
            predict(
                name=f"One real prediction per worker{of}",
                urls=[f"ws://{_reachable(settings)}:{port}" for port in found.settings.ports],
                bundle=planned.models[found.service].folder,
                python=planned.python,
                release=planned.release.folder,
                user=settings.service_user,
            )


def _reachable(settings: WorkerSettings) -> str:
    return "127.0.0.1" if settings.listens_everywhere else settings.worker_listen


@deploy("Verify gateway")
def verify_gateway(settings: GatewaySettings, fleet: Fleet) -> None:
    handshake(name="WebSocket handshake through the public port", probe=fleet.probe(settings))
    sandboxed(name="nginx runs in its sandbox", wanted=settings.sandbox)
    descriptors(name="nginx may open the files that it counts on")


@deploy("Verify gateway")
def verify_live_gateway() -> None:
    """The same of the configuration that a rollback brought back, whatever is declared."""
    handshake(name="WebSocket handshake through the public port", probe=None)
    sandboxed(name="nginx runs in its sandbox", wanted=None)
    descriptors(name="nginx may open the files that it counts on")


@operation()
def predict(urls: list[str], bundle: str, python: str, release: str, user: str) -> Commands:
    """Ask every worker for one real prediction and compare it with the bundle's own answers."""
    if not executing():
        return
    succeeded, output = ask(
        script(
            'release="$1"; user="$2"; shift 2; '
            'exec runuser -u "$user" -- env PYTHONPATH="$release" "$@"',
            release,
            user,
            python,
            *("-P", "-m", "gpu_service", "verify", "--bundle", bundle),
            *urls,
        )
    )
    answers = [json.loads(line) for line in output.stdout_lines if line.startswith("{")]
    if succeeded and answers and all(answer["ok"] for answer in answers):
        for answer in answers:
            host.log(f"verified: {answer['worker']} serves {answer['model']} {answer['version']}")
        return
    yield fail(
        *(f"{answer['url']}: {answer['error']}" for answer in answers if not answer["ok"]),
        *([] if answers else output.output.splitlines()),
        "look at: journalctl -u 'gpu-worker@*' -n 50",
    )


_READY = """
exec 3<>"/dev/tcp/$1/$2" || exit 1
printf '%s\\r\\n' 'GET /v2/health/ready HTTP/1.1' 'Host: localhost' 'Connection: close' '' >&3
IFS= read -r -t 10 -u 3 line
printf '%s\\n' "${line%?}"
"""


@operation()
def ready(address: str, ports: Iterable[int]) -> Commands:
    """Every worker has to say that it is ready."""
    if not executing():
        return
    for port in ports:
        _, output = ask(quoted("bash", "-c", _READY, "ready", address, str(port)))
        status = output.stdout_lines[0] if output.stdout_lines else ""
        if " 200 " not in f"{status} ":
            yield fail(
                f"the worker on port {port} is not ready: {status or 'nothing answered'}",
                f"look at: journalctl -u gpu-worker@{port} -n 50",
            )
            return
        host.log(f"verified: the worker on port {port} is ready")


_EVIDENCE = r"""
echo "nginx: $(systemctl is-active nginx)"
echo "selinux: $(getenforce 2>/dev/null || echo absent)"
tail -n 20 /var/log/nginx/error.log 2>/dev/null
{ ausearch -m avc -ts recent 2>/dev/null || tail -n 200 /var/log/audit/audit.log 2>/dev/null; } |
    grep 'denied.*comm="nginx"' | tail -n 3
"""


@operation()
def handshake(probe: str | None) -> Commands:
    """A handshake at each place of `probe` (files/handshake.sh), one for each service, has to be
    answered by a worker: with 101, or with 401 by one that asks for a token; or by nginx as it
    says. None: the places that the live nginx.conf names.
    """
    if not executing():
        return
    if probe is None:
        probe = live.probe(host.get_fact(facts.FileText, path=live.NGINX_CONF) or "")
    if probe is None:
        host.log(f"{live.NGINX_CONF} is not of a deploy: where it serves clients, it does not say")
        return
    text = rendering.shell("handshake.sh") + 'can_ask "$1" && handshake_status "$1"\n'
    places, *refusals = probe.split()
    for place in places.split(","):
        _, output = ask(quoted("bash", "-c", text, "handshake", place))
        status = output.stdout_lines[0] if output.stdout_lines else ""
        code = next((c for c in ("101", "401", *refusals) if f" {c} " in f"{status} "), None)
        if missing := [line for line in output.stderr_lines if line.startswith("curl is missing")]:
            yield fail(*missing)
            return
        if code is None:
            _, evidence = ask(quoted("bash", "-c", _EVIDENCE))
            lines = tuple(evidence.stdout_lines)
            yield fail(*diagnose(Sighting(status=status, place=said(place), evidence=lines)))
            return
        host.log(f"verified: {said(place)} answers a WebSocket handshake with {code}")


def said(place: str) -> str:
    """A place of a probe, as it is told."""
    return f"port {place.removeprefix('tls:')}"


@operation()
def sandboxed(wanted: bool | None) -> Commands:
    """Says so where nginx was started before its sandbox was declared, or taken back: a restart
    closes its sockets, so that is the operator's to decide. Changes nothing.

    + wanted: as declared; None: as the live drop-in says
    """
    if wanted is None:
        text = host.get_fact(facts.FileText, path=live.NGINX_DROP_IN) or ""
        wanted = live.is_sandboxed(text)
    message = sandbox_message(wanted=wanted, mounted=host.get_fact(facts.NginxRoot))
    if message and executing():
        host.log(message)
    yield from ()


def sandbox_message(*, wanted: bool, mounted: str) -> str | None:
    """What to tell of a running nginx whose root file system is mounted so. Pure."""
    inside = mounted.split(",")[0] == "ro"
    if not mounted or inside == wanted:
        return None
    state = "still runs in its sandbox" if inside else "runs without its sandbox"
    return (
        f"nginx {state} until it is started anew, which closes its sockets: systemctl restart nginx"
    )


@operation()
def descriptors() -> Commands:
    """Says so where nginx's worker processes got fewer descriptors than its configuration counts
    on: a reload cannot always raise the limit, and nginx goes on without. Changes nothing.
    """
    found: tuple[str, ...] = host.get_fact(facts.NginxDescriptors)
    message = descriptors_message(found)
    if message and executing():
        host.log(message)
    yield from ()


def descriptors_message(lines: Iterable[str]) -> str | None:
    """What to tell of the limits that were found. Pure."""
    rows = [line.split() for line in lines]
    found = {
        key: [row[1] for row in rows if len(row) == 2 and row[0] == key]
        for key in ("wanted", "has", "selinux")
    }
    has = min((int(value) for value in found["has"]), default=0)
    wanted = int(found["wanted"][0]) if found["wanted"] else 0
    if not has or has >= wanted:
        return None
    short = f"nginx's worker processes may open {has} files, not the {wanted} that were declared"
    if found["selinux"] == ["Enforcing"]:
        return (
            f"{short}: SELinux keeps a running nginx from raising its limit; set "
            "selinux_allow_setrlimit = True in group_data/gateways.py, and deploy, or at a quiet "
            "time, as it closes all sockets: systemctl restart nginx"
        )
    return f"{short}: this host allows no more; see: systemctl show nginx -p LimitNOFILE"


@dataclass(frozen=True)
class Sighting:
    """What a failed handshake left behind: the status line, and lines of logs."""

    status: str
    place: str  # `port 8009/digits`
    evidence: tuple[str, ...]


def diagnose(seen: Sighting) -> list[str]:
    """What was seen and the likely cause, most telling first. Pure."""
    lines = [
        f"the handshake on {seen.place} was answered with: {seen.status or 'nothing'}",
        *(f"  seen: {line}" for line in _telling(seen.evidence)),
    ]
    return [*lines, *_cause(seen)]


def _telling(evidence: Iterable[str]) -> list[str]:
    patterns = ("failed (", "no live upstreams", "[emerg]", "avc:", "nginx: ", "selinux: ")
    found = [line for line in evidence if any(pattern in line for pattern in patterns)]
    return list(dict.fromkeys(found))[-8:]


def _cause(seen: Sighting) -> list[str]:
    text = "\n".join(seen.evidence)
    upstream = re.search(r"upstream: \"http://([^/\"]+)", text)
    where = upstream.group(1) if upstream else "a worker"
    if "(13: Permission denied)" in text and "connect() to unix:" in text:
        return [
            "likely cause: nginx may not open the workers' Unix sockets (unix_sockets): SELinux "
            "in enforcing mode, or nginx_user is not in the group of /run/gpu-workers",
            "  way out: unix_sockets = False in group_data/workers.py, and deploy",
        ]
    if "connect()" in text and "(13: Permission denied)" in text and "selinux: Enforcing" in text:
        return [
            f"likely cause: SELinux denies nginx the connection to {where}. `user root` does not "
            "change that. Three ways out; set one in group_data/gateways.py, and deploy:",
            "  1. selinux_allow_connect = True: stays enforcing, nginx may connect to any port "
            "(by hand, on the gateway: setsebool -P httpd_can_network_connect on)",
            "  2. selinux_label_ports = True: stays enforcing, nginx may connect to the workers' "
            "ports and to web servers' only",
            "  3. selinux_mode = 'permissive' (the default): nothing is denied, only logged",
        ]
    if "(111: Connection refused)" in text or "(111: Unknown error)" in text:
        return [
            f"likely cause: nothing listens on {where}; "
            "on that host: systemctl status 'gpu-worker@*'"
        ]
    if "(110: Connection timed out)" in text or "(113: No route to host)" in text:
        return [
            f"likely cause: a firewall between this gateway and {where}, or a wrong `address` of "
            "that host in the inventory"
        ]
    if "no live upstreams" in text:
        return ["likely cause: every worker failed lately; their own logs say why"]
    if "nginx: active" not in text:
        return ["likely cause: nginx does not run; see: journalctl -u nginx -n 50"]
    if not seen.status:
        return ["likely cause: nothing answered on the port; see: ss -ltnp"]
    return ["no known cause matches; see /var/log/nginx/error.log on the gateway"]
