"""The deploy under SELinux: what it says of the denial, and that each way out works, at once, for
good, and across a reboot.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from provision.selinux import CONNECT, RELAY
from provision.settings import SELF_SIGNED_CERTIFICATE
from tests.deploy.conftest import CHECKOUT, Run
from tests.selinux.conftest import SETTINGS, Machine


def deploy(machine: Machine, **settings: object) -> Run:
    return machine.run(timeout_s=1200, **settings)


def changed(run: Run) -> list[str]:
    """Operations that changed the gateway."""
    assert run.returncode == 0, run.output
    return [name for names in run.changed.values() for name in names]


@pytest.mark.parametrize("user", ["root", "nginx"])
def test_the_deploy_says_what_denies_and_what_to_do(machine: Machine, user: str) -> None:
    machine.sh("setenforce 1")
    run = deploy(machine, selinux_mode="unmanaged", nginx_user=user)
    assert run.returncode != 0
    assert machine.nginx_users() == {user}
    assert "answered with: HTTP/1.1 502" in run.output
    assert "SELinux denies nginx the connection to 10.0.2.15:9" in run.output
    assert "avc:  denied  { name_connect }" in run.output
    for way in ("selinux_allow_connect = True", "selinux_label_ports = True", "'permissive'"):
        assert way in run.output


WAYS = {
    "connect": {"selinux_mode": "enforcing", "selinux_allow_connect": True},
    "labels": {"selinux_mode": "enforcing", "selinux_label_ports": True, "nginx_user": "nginx"},
    "permissive": {"selinux_mode": "permissive"},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_out_lasts(machine: Machine, way: str) -> None:
    """Out of the denial by a deploy; the second changes nothing; a reboot changes nothing."""
    settings = WAYS[way]
    # As it was before, also at the next boot; and as somebody may have tried by hand: a boolean
    # that is forgotten at the next boot is none that was declared.
    machine.sh("sed -i 's/^SELINUX=.*/SELINUX=enforcing/' /etc/selinux/config; setenforce 1")
    machine.sh(f"setsebool {CONNECT} {'on' if way == 'connect' else 'off'}")
    assert any("SELinux" in name for name in changed(deploy(machine, **settings)))
    assert changed(deploy(machine, **settings)) == []
    machine.reboot()
    assert machine.nginx_domains() == {"httpd_t"}
    assert machine.sh("getenforce").lower() == settings["selinux_mode"]
    assert " 101 " in machine.handshake()
    on = machine.sh(f"getsebool {CONNECT} {RELAY} | grep -c ' on$' || true")
    assert on == ("0" if way == "permissive" else "1")


def test_hardened_is_confined_and_serves_across_a_reboot(machine: Machine) -> None:
    """TLS, the sandbox of systemd, and SELinux at once."""
    settings = {"profile": "hardened", "nginx_user": "nginx", "selinux_mode": "enforcing"}
    settings |= {"tls_self_signed": True}
    changed(deploy(machine, **settings))
    assert changed(deploy(machine, **settings)) == []
    machine.reboot()
    assert machine.sh("getenforce") == "Enforcing"
    assert machine.nginx_domains() == {"httpd_t"}
    assert machine.nginx_users() == {"nginx"}
    assert " 101 " in machine.handshake("tls:8443")
    mounts = machine.sh('grep " / / " /proc/$(cat /run/nginx.pid)/mountinfo | cut -d " " -f 6')
    assert mounts.splitlines()[-1].startswith("ro"), "nginx does not run in its sandbox"
    assert machine.sh(f"openssl x509 -noout -in {SELF_SIGNED_CERTIFICATE} -subject")


def limits(machine: Machine) -> set[int]:
    """How many files nginx's worker processes may open."""
    found = machine.sh(
        "for p in $(pgrep -P $(cat /run/nginx.pid)); do "
        "awk '/Max open files/ { print $4 }' /proc/$p/limits; done"
    )
    return {int(each) for each in found.split()}


def test_a_higher_descriptor_limit_needs_its_boolean(machine: Machine) -> None:
    """Denied, nginx goes on with the old one after the reload, and the deploy says so."""
    before = limits(machine)
    settings = {**WAYS["connect"], "worker_connections": 9000}
    run = deploy(machine, **settings)
    assert run.returncode == 0, run.output
    assert "selinux_allow_setrlimit = True" in run.output
    assert limits(machine) == before
    assert "setrlimit(RLIMIT_NOFILE" in machine.sh("cat /var/log/nginx/error.log")
    run = deploy(machine, **settings, selinux_allow_setrlimit=True)
    assert run.returncode == 0, run.output
    # By its processes alone: the shell that asks has the same words in its arguments.
    machine.sh("while ps -C nginx -o args= | grep -q 'shutting down'; do sleep 1; done")
    assert min(limits(machine)) > max(before)


def test_nginx_may_listen_where_it_is_declared_to(machine: Machine) -> None:
    """8010 carries no label of its own: in enforcing mode the deploy gives it one."""
    settings = {**WAYS["connect"], "listen_port": 8010}
    changed(deploy(machine, **settings))
    assert " 101 " in machine.handshake("8010")
    assert machine.sh("getenforce") == "Enforcing"


def test_the_checks_of_deployed_hosts_hold_here(machine: Machine) -> None:
    settings = WAYS["labels"]
    changed(deploy(machine, **settings))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("tests/hosts/test_gateways.py", "--inventory", "tests/selinux/inventory.py"),
        ],
        cwd=CHECKOUT,
        env={**machine.environment, SETTINGS: json.dumps(settings)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
