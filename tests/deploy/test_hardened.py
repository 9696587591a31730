"""The hardened gateway on a real host: nginx, openssl and systemd as they are. Each test goes on
where the one before it ended; the last one leaves the reference set-up for the next file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from provision.settings import SELF_SIGNED_CERTIFICATE, SELF_SIGNED_KEY
from tests.deploy.conftest import CHECKOUT, LAB, Deployment, Run

HARDENED = {
    "profile": "hardened",
    # group_data/gateways.py says these for the reference set-up.
    "nginx_user": "nginx",
    "selinux_mode": "enforcing",
    "tls_self_signed": True,
    "connections": 2000,
    "access_log_format": "json",
    "allowed_origins": ["https://app.example.com", "https://*.below.example"],
    "client_max_connections": 20,
    "client_handshakes_per_s": 50,
}
UPGRADE = ("-H", "Connection: Upgrade", "-H", "Upgrade: websocket")
KEY = ("-H", "Sec-WebSocket-Version: 13", "-H", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")


def deploy(deployment: Deployment, **settings: object) -> Run:
    return deployment.run(**{**HARDENED, **settings})


def curl(deployment: Deployment, *arguments: str) -> str:
    """Status and headers of an answer, as a client sees it that trusts the certificate."""
    return deployment.on(
        "gw1",
        *("curl", "-s", "--http1.1", "--include", "--cacert", SELF_SIGNED_CERTIFICATE, *arguments),
        check=False,
    )


def address(deployment: Deployment) -> str:
    return str(deployment.hosts["gw1"]["address"])


@pytest.fixture
def trusted(deployment: Deployment, tmp_path: Path) -> Path:
    """The gateway's certificate, for clients."""
    path = tmp_path / "ca.pem"
    path.write_text(deployment.on("gw1", "cat", SELF_SIGNED_CERTIFICATE))
    return path


def on_network(
    deployment: Deployment, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python of this machine, on the network of the hosts."""
    return subprocess.run(
        [*(sys.executable, "-m", "lab", "--name", LAB, "run"), sys.executable, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def on_gateway(deployment: Deployment, text: str) -> str:
    return deployment.on("gw1", "bash", "-c", text)


def test_hardening_a_live_gateway_changes_it_and_a_second_run_does_not(
    deployment: Deployment,
) -> None:
    deployment.run()
    first = deploy(deployment)
    assert first.returncode == 0, first.output
    assert "verified: port 8443 answers a WebSocket handshake with 101" in first.output
    assert "nginx runs without its sandbox until it is started anew" in first.output
    second = deploy(deployment)
    assert second.returncode == 0, second.output
    assert second.changed == {}


def test_a_hardened_gateway_is_as_declared(deployment: Deployment, tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.py"
    inventory.write_text(
        (CHECKOUT / "inventory.py")
        .read_text()
        .replace(
            "# Every setting of every host is checked",
            f"for _, _data in gateways:\n    _data.update({HARDENED!r})\n"
            f"for _, _data in workers:\n    _data.update(model={str(deployment.model)!r})\n"
            "# Every setting of every host is checked",
        )
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "tests/hosts/test_gateways.py"),
            *("--inventory", str(inventory)),
        ],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_predictions_come_by_tls_to_a_client_that_trusts_the_certificate(
    deployment: Deployment, trusted: Path
) -> None:
    result = on_network(
        deployment,
        *("-m", "gpu_service", "predict", f"wss://{address(deployment)}:8443"),
        *("--bundle", str(deployment.model)),
        SSL_CERT_FILE=str(trusted),
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_plain_requests_are_redirected_and_plain_handshakes_told_why(
    deployment: Deployment,
) -> None:
    answer = curl(deployment, "http://localhost:8009/v2?a=1")
    assert answer.startswith("HTTP/1.1 308 ")
    assert "Location: https://localhost:8443/v2?a=1" in answer
    answer = curl(deployment, *UPGRADE, *KEY, "http://localhost:8009/")
    assert answer.startswith("HTTP/1.1 426 ")
    assert "Upgrade: TLS/1.2, HTTP/1.1" in answer
    assert "connect to wss on port 8443" in answer


def test_tls_tells_browsers_to_come_by_it_only(deployment: Deployment) -> None:
    answer = curl(deployment, "https://localhost:8443/v2")
    assert answer.startswith("HTTP/1.1 200 ")
    assert "Strict-Transport-Security: max-age=63072000" in answer
    old = curl(deployment, "--tls-max", "1.1", "https://localhost:8443/v2")
    assert old == ""


def test_sslyze_finds_mozillas_intermediate_profile(deployment: Deployment, trusted: Path) -> None:
    """It tries every protocol, cipher suite and curve, and known attacks, on the live port."""
    scan = on_network(
        deployment,
        *("-m", "sslyze", "--mozilla_config=intermediate", f"--certinfo_ca_file={trusted}"),
        f"{address(deployment)}:8443",
    )
    assert scan.returncode == 0, scan.stdout + scan.stderr
    assert "OK - Compliant" in scan.stdout


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://app.example.com", "200"),
        ("https://a.b.below.example", "200"),
        ("https://below.example", "403"),
        ("https://app.example.com.evil.test", "403"),
    ],
)
def test_only_pages_of_allowed_origins_pass(
    deployment: Deployment, origin: str, status: str
) -> None:
    answer = curl(deployment, "-H", f"Origin: {origin}", "https://localhost:8443/v2")
    assert answer.startswith(f"HTTP/1.1 {status} ")


def test_counters_are_on_loopback_alone(deployment: Deployment) -> None:
    assert "Active connections" in curl(deployment, "http://127.0.0.1:8008/status")
    listening = deployment.on("gw1", "ss", "-ltnH", "sport = :8008")
    assert [line.split()[3] for line in listening.splitlines()] == ["127.0.0.1:8008"]


def test_every_line_of_the_log_is_an_object(deployment: Deployment) -> None:
    curl(deployment, "-A", 'a"b\\c', "https://localhost:8443/v2?log=1")
    lines = on_gateway(deployment, "grep -h log=1 /var/log/nginx/access.log").splitlines()
    entry = json.loads(lines[-1])
    assert entry["user_agent"] == 'a"b\\c'
    assert entry["status"] == "200"
    assert len(entry["id"]) == 32
    assert entry["upstream"].endswith((":9005", ":9006"))
    assert float(entry["upstream_response_time"]) >= 0


def test_nginx_lives_in_its_sandbox(deployment: Deployment) -> None:
    """A restart, a reload, a rotation of its logs and a large body, all inside."""
    # It takes effect when nginx is started, which a deploy does not do to one that runs.
    on_gateway(deployment, "systemctl restart nginx && nginx -t -q && systemctl reload nginx")
    seen = on_gateway(
        deployment,
        "pid=$(cat /run/nginx.pid); "
        "grep -c '^CapBnd:.00000000000004eb$' /proc/$pid/status; "
        "nsenter -t $pid -m sh -c 'touch /etc/x /usr/x; ls /root' 2>&1 | grep -c 'Read-only'; "
        "logrotate -f /etc/logrotate.d/nginx && echo rotated; "
        "head -c 300000 /dev/zero >/tmp/body; "
        "curl -sk -o /dev/null --data-binary @/tmp/body https://127.0.0.1:8443/v2; rm /tmp/body; "
        "grep -c -e emerg -e crit -e 'Permission denied' -e 'not permitted' "
        "/var/log/nginx/error.log; true",
    ).split()
    assert seen == ["1", "2", "rotated", "0"]
    again = deploy(deployment)
    assert again.returncode == 0, again.output
    assert again.changed == {}
    assert "without its sandbox" not in again.output


def test_the_certificate_is_made_anew_before_it_ends_and_served(deployment: Deployment) -> None:
    on_gateway(
        deployment,
        f"openssl x509 -in {SELF_SIGNED_CERTIFICATE} -signkey {SELF_SIGNED_KEY} -days 5 "
        f"-copy_extensions copy -out /tmp/old.pem 2>/dev/null; "
        f"cat /tmp/old.pem >{SELF_SIGNED_CERTIFICATE}; rm /tmp/old.pem",
    )
    before = deployment.on("gw1", "sha256sum", SELF_SIGNED_KEY)
    renewed = deploy(deployment)
    assert renewed.returncode == 0, renewed.output
    assert "is made anew: it ends within 30 days" in renewed.output
    assert deployment.on("gw1", "sha256sum", SELF_SIGNED_KEY) != before
    assert deployment.on("gw1", "stat", "-c", "%a %U", SELF_SIGNED_KEY).split() == ["600", "root"]
    assert curl(deployment, "https://localhost:8443/v2").startswith("HTTP/1.1 200 ")


def test_a_certificate_of_somebody_else_stays(deployment: Deployment) -> None:
    kept = f"{SELF_SIGNED_CERTIFICATE}.kept"
    on_gateway(
        deployment,
        f"cp -p {SELF_SIGNED_CERTIFICATE} {kept}; openssl req -x509 -new -days 300 "
        f"-key {SELF_SIGNED_KEY} -subj /O=Somebody -out {SELF_SIGNED_CERTIFICATE} 2>/dev/null",
    )
    refused = deploy(deployment)
    assert refused.returncode != 0
    assert "was not made by this deploy" in refused.output
    assert "Somebody" in on_gateway(
        deployment, f"openssl x509 -noout -subject -in {SELF_SIGNED_CERTIFICATE}"
    )
    on_gateway(deployment, f"mv {kept} {SELF_SIGNED_CERTIFICATE}")


def test_clients_show_a_certificate_and_somebody_else_decides(deployment: Deployment) -> None:
    """Client certificates and `auth_request`, which here asks the gateway's own counters."""
    on_gateway(
        deployment,
        "cd /etc/pki/gpu-gateway && exec 2>/dev/null && "
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=clients -keyout ca.key -out ca.pem && "
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=me "
        "-keyout me.key -out me.csr && "
        "openssl x509 -req -days 2 -in me.csr -CA ca.pem -CAkey ca.key -out me.pem",
    )
    asking = {"tls_client_ca": "/etc/pki/gpu-gateway/ca.pem"}
    allowed = deploy(deployment, auth_request="http://127.0.0.1:8008/status", **asking)
    assert allowed.returncode == 0, allowed.output
    assert "verified: port 8443 answers a WebSocket handshake with 400" in allowed.output
    mine = ["--cert", "/etc/pki/gpu-gateway/me.pem", "--key", "/etc/pki/gpu-gateway/me.key"]
    url = "https://localhost:8443/v2"
    assert curl(deployment, url).startswith("HTTP/1.1 400 ")
    assert curl(deployment, *mine, url).startswith("HTTP/1.1 200 ")
    # A worker knows the client by its certificate, whatever the client says of itself.
    forged = ("-H", "X-Client-Name: CN=forged", "--max-time", "2")
    opened = curl(deployment, *mine, *UPGRADE, *KEY, *forged, "https://localhost:8443/")
    assert opened.startswith("HTTP/1.1 101 ")
    told = """journalctl -u 'gpu-worker@*' -o cat -n 200 | grep -o '"client":"CN=[^"]*"'"""
    clients = deployment.on(
        "gpu1",
        *("bash", "-c"),
        f"for _ in $(seq 100); do {told} && break; sleep 0.1; done | sort -u",
    )
    assert clients.split() == ['"client":"CN=me"']
    denied = deploy(deployment, auth_request="http://127.0.0.1:8008/nothing", **asking)
    assert denied.returncode == 0, denied.output
    # What is neither 2xx nor 401 or 403 is an error of whoever was asked.
    assert curl(deployment, *mine, url).startswith("HTTP/1.1 500 ")


def test_what_the_host_cannot_give_is_refused_before_anything_is_touched(
    deployment: Deployment,
) -> None:
    assert deploy(deployment).returncode == 0  # back from what other tests declared
    refused = deploy(deployment, connections=5_000_000)
    assert refused.returncode != 0
    assert "gw1: connections = 5000000 needs" in refused.output
    assert "nothing was touched" in refused.output
    assert "Traceback" not in refused.output
    assert deploy(deployment).changed == {}


def test_the_way_back_leaves_nothing_of_it(deployment: Deployment) -> None:
    back = deployment.run()
    assert back.returncode == 0, back.output
    on_gateway(deployment, "systemctl restart nginx")
    assert on_gateway(deployment, "systemctl show nginx -p ProtectSystem --value") == "no\n"
    assert deployment.run().changed == {}
