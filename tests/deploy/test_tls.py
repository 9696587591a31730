"""Certificates of an ACME authority on a real host: certbot, nginx and systemd as they are, asking
Pebble, Let's Encrypt's own test server. Each test goes on where the one before it ended; the last
one leaves the reference set-up for the next file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from provision import acme
from provision.settings import ACME_CERTIFICATE
from tests.deploy.conftest import CHECKOUT, LAB, Deployment, Run

NAME, OTHER = "gw1.lab.test", "other.lab.test"
DIRECTORY = "https://localhost:14000/dir"
ACME = {
    "profile": "hardened",
    # group_data/gateways.py says these for the reference set-up.
    "nginx_user": "nginx",
    "selinux_mode": "enforcing",
    "tls_acme": True,
    "acme_directory": DIRECTORY,
    "acme_ca": "/etc/pebble/server.pem",
    "acme_terms_agreed": True,
    "acme_names": [NAME],
    "client_handshakes_per_s": 50,
}
LINEAGE = f"{acme.HOME}/{acme.authority(DIRECTORY)}/config/live/{acme.LINEAGE}"
RENEWAL = f"{acme.HOME}/{acme.authority(DIRECTORY)}/config/renewal/{acme.LINEAGE}.conf"
UNIT = "gateway-certificate.service"

# Valid for 300 days, as Mozilla's profile allows: certbot renews such a one in its last 30.
PEBBLE = """
set -eu
mkdir -p /etc/pebble && cd /etc/pebble
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=pebble \
    -addext subjectAltName=DNS:localhost -keyout server.key -out server.pem 2>/dev/null
cat >config.json <<'END'
{"pebble": {"listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
    "certificate": "/etc/pebble/server.pem", "privateKey": "/etc/pebble/server.key",
    "httpPort": 80, "tlsPort": 443, "certificateValidityPeriod": 25920000}}
END
echo "$1 gw1.lab.test other.lab.test" >>/etc/hosts
systemd-run --quiet --unit=pebble -E PEBBLE_VA_NOSLEEP=1 -E PEBBLE_WFE_NONCEREJECT=0 \
    pebble -config /etc/pebble/config.json
for _ in $(seq 100); do
    curl -s --cacert server.pem https://localhost:14000/dir >/dev/null && break
    sleep 0.1
done
curl -sf --cacert server.pem https://localhost:15000/roots/0 >root.pem
"""


def deploy(deployment: Deployment, **settings: object) -> Run:
    return deployment.run(**{**ACME, **settings})


def on_gateway(deployment: Deployment, text: str, *arguments: str, check: bool = True) -> str:
    return deployment.on("gw1", "bash", "-c", text, "test", *arguments, check=check)


def served(deployment: Deployment, name: str = NAME) -> str:
    """Serial number of the certificate on the TLS port, if a client that trusts Pebble takes it."""
    return on_gateway(
        deployment,
        "openssl s_client -connect 127.0.0.1:8443 -servername $1 -verify_hostname $1 "
        "-verify_return_error -CAfile /etc/pebble/root.pem </dev/null 2>/dev/null | "
        "openssl x509 -noout -serial 2>/dev/null || true",
        name,
    ).strip()


@pytest.fixture(scope="module", autouse=True)
def pebble(deployment: Deployment) -> Iterator[None]:
    on_gateway(deployment, PEBBLE, str(deployment.hosts["gw1"]["address"]))
    yield
    on_gateway(
        deployment, "systemctl stop pebble; rm -rf /etc/pebble; sed -i /lab.test/d /etc/hosts"
    )


def test_a_live_gateway_gets_its_first_certificate(deployment: Deployment) -> None:
    first = deploy(deployment)
    assert first.returncode == 0, first.output
    assert "verified: port 8443 answers a WebSocket handshake with 101" in first.output
    assert f"nginx serves a new certificate for {NAME}" in first.output
    assert served(deployment)


def test_what_the_authority_gave_is_not_for_everybody(deployment: Deployment) -> None:
    listed = on_gateway(
        deployment,
        "stat -c '%a %U' /etc/pki/gpu-gateway/acme.key; "
        f"stat -c '%a %U' {acme.HOME}/*/config/accounts; ls -A /etc/pki/gpu-gateway | grep acme; "
        f"for path in v2 .well-known/acme-challenge/x; do curl -s -o /dev/null -H 'Host: {NAME}' "
        "-w '%{http_code}\\n' http://127.0.0.1/$path; done",
    )
    assert listed.splitlines() == [
        *("600 root", "700 root"),
        *("acme.key", "acme.pem"),
        *("308", "404"),
    ]


# Opens sockets, says so, and when it is told tries each of them.
HOLDER = """
import asyncio, ssl, sys
from websockets.asyncio.client import connect

async def main(address, name, ca):
    tls = ssl.create_default_context(cafile=ca)
    sockets = [
        await connect(f"wss://{address}:8443", ssl=tls, server_hostname=name, proxy=None)
        for _ in range(20)
    ]
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    async with asyncio.timeout(30):
        await asyncio.gather(*[await socket.ping() for socket in sockets])
    print("alive", len(sockets), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_renewal_is_served_and_closes_no_socket(deployment: Deployment, tmp_path: Path) -> None:
    ca = tmp_path / "root.pem"
    ca.write_text(on_gateway(deployment, "cat /etc/pebble/root.pem"))
    address = str(deployment.hosts["gw1"]["address"])
    before = served(deployment)
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "lab", "--name", LAB, "run"),
            *(sys.executable, "-c", HOLDER, address, NAME, str(ca)),
        ],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        # Not yet: nothing happens. Then it is time.
        on_gateway(deployment, f"systemctl start {UNIT}")
        assert served(deployment) == before
        on_gateway(
            deployment,
            f"sed -i '1i renew_before_expiry = 9999 days' {RENEWAL}; systemctl start {UNIT}",
        )
        renewed = served(deployment)
        assert renewed not in ("", before)
        assert holder.communicate("\n", timeout=60)[0] == "alive 20\n"
    again = deploy(deployment)
    assert again.returncode == 0, again.output
    assert again.changed == {}
    on_gateway(deployment, f"sed -i /renew_before_expiry/d {RENEWAL}")


def test_a_certificate_with_another_ones_key_is_not_taken(deployment: Deployment) -> None:
    before = served(deployment)
    said = on_gateway(
        deployment,
        f"cp {LINEAGE}/privkey.pem /root/kept; "
        f"openssl ecparam -name prime256v1 -genkey -noout >{LINEAGE}/privkey.pem; "
        f"systemctl start {UNIT} 2>/dev/null || echo failed; systemctl is-failed {UNIT}; "
        f"journalctl -u {UNIT} -n 20 -o cat; cat /root/kept >{LINEAGE}/privkey.pem; rm /root/kept; "
        "ls -A /etc/pki/gpu-gateway | grep acme",
    )
    assert said.startswith("failed\nfailed\n")
    assert "is not that of its certificate" in said
    assert "it is not taken; nginx serves on with the certificate before" in said
    assert said.endswith("acme.key\nacme.pem\n")
    assert served(deployment) == before
    on_gateway(deployment, f"systemctl start {UNIT}; systemctl is-active {acme.TIMER}")


def test_an_authority_that_refuses_fails_the_deploy_and_nothing_else(
    deployment: Deployment,
) -> None:
    before = served(deployment)
    # The authority asks the name's address, which is nobody's.
    on_gateway(deployment, "echo 127.0.0.9 lost.lab.test >>/etc/hosts")
    refused = deploy(deployment, acme_names=[NAME, "lost.lab.test"], acme_http_port=81)
    assert refused.returncode != 0
    assert "certbot got no certificate" in refused.output
    assert "lost.lab.test" in refused.output
    assert served(deployment) == before


def test_other_names_are_asked_for(deployment: Deployment) -> None:
    asked = deploy(deployment, acme_names=[NAME, OTHER])
    assert asked.returncode == 0, asked.output
    assert served(deployment, OTHER) == served(deployment, NAME) != ""


def test_drift_and_the_checks_of_hosts_tell_until_when_it_is_valid(
    deployment: Deployment,
) -> None:
    drift = subprocess.run(
        [
            *(sys.executable, "-m", "provision.drift", "inventory.py"),
            *deployment.command(**{**ACME, "acme_names": [NAME, OTHER]})[3:],
        ],
        cwd=CHECKOUT,
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert drift.returncode == 0, drift.stdout + drift.stderr
    assert f"gw1 | {ACME_CERTIFICATE} is valid until " in drift.stdout
    assert "in 299 days" in drift.stdout


def timer(deployment: Deployment) -> str:
    """Whether the renewal is enabled, and whether it runs."""
    asking = f"systemctl is-enabled {acme.TIMER}; systemctl is-active {acme.TIMER}"
    return " ".join(on_gateway(deployment, asking, check=False).split())


def test_a_rollback_brings_the_renewal_back(deployment: Deployment) -> None:
    assert deployment.run().returncode == 0
    assert timer(deployment).split()[-1] == "inactive"
    back = deployment.run(deploy="rollback.py", rollback="gateways")
    assert back.returncode == 0, back.output
    assert "verified: port 8443 answers a WebSocket handshake with 101" in back.output
    assert served(deployment, OTHER)
    assert timer(deployment) == "enabled active"


def test_the_way_back_leaves_the_reference(deployment: Deployment) -> None:
    back = deployment.run()
    assert back.returncode == 0, back.output
    assert timer(deployment).split()[-1] == "inactive"
    wanted = f"{acme.UNITS}/timers.target.wants"
    assert acme.TIMER not in on_gateway(deployment, f"ls {wanted} 2>/dev/null || true")
