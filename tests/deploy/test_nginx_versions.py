"""nginx of several versions: what real builds say to the renderings, and what a live gateway's
clients notice when the declared version changes.
"""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from provision import nginx_versions, rendering
from provision.nginx_versions import Version
from tests import nginx_builds
from tests.deploy.conftest import CHECKOUT, Deployment
from tests.deploy.test_deploy import wait_for
from tests.unit.provision.fleets import fleet, gateway, worker

INSTALLED, CONFIGURED = "Gateway | nginx is installed", "Gateway | nginx runs this configuration"
BOUND_S = 30

# ---- real builds --------------------------------------------------------------------------------

_CERTIFICATE = {"tls_certificate": "/etc/pki/gw.pem", "tls_certificate_key": "/etc/pki/gw.key"}
_ALL_AT_ONCE = {
    **_CERTIFICATE,
    "profile": "hardened",
    "http2": True,
    "tls_client_ca": "/etc/pki/gw.pem",
    "allowed_origins": ["https://app.example", "https://*.below.example"],
    "auth_request": "http://127.0.0.1:9090/check",
    "access_log_format": "json",
}
SERVICES = {
    "digits": {"model": "models/digits"},
    "words": {"model": "models/words", "path": "/words", "worker_ports": [9105]},
    "named": {"model": "models/digits", "server_names": ["a.example"], "worker_ports": [9205]},
}


@pytest.mark.parametrize("series", nginx_builds.SOURCES)
def test_a_real_nginx_of_each_series_takes_what_is_rendered_for_it(series: str) -> None:
    try:
        build = nginx_builds.build(series)
    except nginx_builds.UnavailableError as error:
        pytest.skip(f"nginx {series} is not to be had here: {error}")
    version = nginx_versions.parse(build.version)
    assert version is not None and version.is_in(series)
    sticky = {"upstream_sticky": "worker"} if version >= Version(1, 29, 6) else {}
    several = {**_CERTIFICATE, **sticky, "http2": True}
    for found in (
        fleet(gateway(), worker()),
        fleet(gateway(**_ALL_AT_ONCE), worker()),
        fleet(gateway(**several, services=SERVICES), worker(services=SERVICES)),
    ):
        text = rendering.nginx_conf(found.gateways["gw1"], found, version=version)
        said = build.check(text)
        assert said.returncode == 0, said.stderr
        # Nothing is called deprecated, or ignored, but for a certificate without a responder.
        warnings = [line for line in said.stderr.splitlines() if "[warn]" in line]
        assert [line for line in warnings if "no OCSP responder" not in line] == []


def test_the_real_ones_refuse_what_they_are_said_not_to_know() -> None:
    """The table is right: a release too early, nginx says so."""
    old = nginx_builds.build("1.22")
    found = fleet(gateway(upstream_sticky="w", http2=True, **_CERTIFICATE), worker())
    text = rendering.nginx_conf(found.gateways["gw1"], found, version=Version(1, 30, 0)).decode()
    assert 'unknown directive "sticky"' in old.check(text.encode()).stderr
    plain = "\n".join(line for line in text.splitlines() if "sticky cookie" not in line)
    assert 'unknown directive "http2"' in old.check(plain.encode()).stderr


# ---- a live gateway -----------------------------------------------------------------------------

REPOSITORY = "/srv/newer"
_REPOSITORY_FILE = f"[newer]\nname=newer\nbaseurl=file://{REPOSITORY}\ngpgcheck=0\n"

# Laid out, versioned and signed as nginx.org's packages are.
MIRROR = "/srv/mirror"
_AS_NGINX_ORG = """
sed -e 's/1.lab.el9/1.el9.ngx/; s/^Epoch: .*/Epoch: 1/' \\
    -e '/^%install/a install -m 644 -Dt %{buildroot}/etc/nginx/conf.d /srv/build/default.conf' \\
    -e '/^%files/a %config(noreplace) /etc/nginx/conf.d/default.conf' \\
    recipe/nginx.spec >recipe/org.spec
echo 'server { listen 80; }' >default.conf
export GNUPGHOME=/srv/build/gnupg
mkdir -m 700 $GNUPGHOME
gpg --batch --quiet --passphrase '' --quick-generate-key lab rsa2048 sign never 2>/dev/null
gpg --armor --export >/srv/build/key 2>/dev/null
"""
_SIGN = "rpmsign --define '__gpg /usr/bin/gpg' --define '_gpg_name lab' --addsign"


def send(deployment: Deployment, content: bytes, command: str) -> None:
    config = deployment.hosts["gw1"]["ssh_config_file"]
    done = subprocess.run(
        ["ssh", "-F", config, "gw1", "--", command], input=content, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def in_build(deployment: Deployment, text: str) -> None:
    deployment.on("gw1", "sh", "-ec", f"cd /srv/build; {text}")


def build_package(
    deployment: Deployment, version: str, *, to: str = REPOSITORY, spec: str = "nginx"
) -> None:
    """An RPM of what is in /srv/build/tree into a repository on the gateway."""
    defines = {
        "nginx_version": version,
        "tree": "/srv/build/tree",
        "recipe": "/srv/build/recipe",
        "_topdir": "/srv/build/top",
        "_rpmdir": to,
        "_build_name_fmt": "%%{NAME}-%%{VERSION}-%%{RELEASE}.rpm",
    }
    options = " ".join(
        f"--define {shlex.quote(f'{name} {value}')}" for name, value in defines.items()
    )
    in_build(deployment, f"rpmbuild -bb --quiet {options} recipe/{spec}.spec")
    in_build(deployment, f"createrepo_c --quiet {to}")


@pytest.fixture(scope="module")
def newer(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second repository on the gateway, with the real nginx 1.26; the first has 1.22."""
    build = nginx_builds.build("1.26")
    archive = tmp_path_factory.mktemp("build") / "build.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("usr/sbin/nginx", "etc/nginx", "usr/share/nginx/html"):
            tar.add(build.root / name, f"tree/{name}")
        tar.add(CHECKOUT / "lab/recipe", "recipe")
    send(deployment, archive.read_bytes(), "mkdir -p /srv/build && tar -xf - -C /srv/build")
    version = nginx_versions.parse(build.version)
    build_package(deployment, str(version))
    send(deployment, _REPOSITORY_FILE.encode(), "cat >/etc/yum.repos.d/newer.repo")
    yield str(version)
    leftovers = ("/etc/yum.repos.d/newer.repo", REPOSITORY, MIRROR, "/srv/build")
    deployment.on("gw1", "rm", "-rf", *leftovers)
    result = deployment.run(nginx_version=quoted("1.22"))
    assert result.returncode == 0, result.output


def quoted(version: str) -> str:
    """As `--data` has to say it, or it were a number."""
    return f'"{version}"'


def masters(deployment: Deployment) -> list[str]:
    found = deployment.on("gw1", "pgrep", "-f", "^nginx: master", check=False)
    return found.split()


def running_version(deployment: Deployment) -> str:
    """What the master of the pid file runs, not what is installed."""
    told = deployment.on("gw1", "sh", "-c", '"/proc/$(cat /run/nginx.pid)/exe" -v 2>&1')
    return str(nginx_versions.parse(told))


async def answers(socket: ClientConnection) -> None:
    """A worker's pong, through nginx."""
    async with asyncio.timeout(BOUND_S):
        await (await socket.ping())


async def test_upgrades_and_downgrades_keep_every_socket(
    deployment: Deployment, newer: str
) -> None:
    tls: dict[str, Any] = {"tls_self_signed": True, "http2": True}

    async def deployed(version: str) -> dict[str, list[str]]:
        result = await asyncio.to_thread(deployment.run, nginx_version=quoted(version), **tls)
        assert result.returncode == 0, result.output
        return result.changed

    def configuration() -> str:
        return deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")

    await deployed("1.22")
    assert "listen 8443 ssl http2 default_server" in configuration()
    async with connect(deployment.gateway_url) as first:
        assert set((await deployed("1.26"))["gw1"]) == {INSTALLED, CONFIGURED}
        assert running_version(deployment) == newer
        assert "http2 on;" in configuration()
        await answers(first)
        assert len(masters(deployment)) == 2
        assert await deployed("1.26") == {}
        async with connect(deployment.gateway_url) as second:
            # While the first socket is open, nginx by itself would ignore a second change.
            assert set((await deployed("1.22"))["gw1"]) == {INSTALLED, CONFIGURED}
            assert running_version(deployment) == "1.22.1"
            assert "http2 on;" not in configuration()
            for socket in (first, second):
                await answers(socket)
    wait_for(lambda: len(masters(deployment)) == 1, what="former masters end with their sockets")
    main = deployment.on("gw1", "systemctl", "show", "nginx", "-p", "MainPID", "--value")
    assert main.strip() == masters(deployment)[0]


# What a package may bring: a binary that passes `nginx -t` and does not start, or not as it should;
# or not when it takes over, while it did when it was tried beside the one that runs.
_BROKEN = """#!/bin/bash
case "$*" in
    -v | *-t*) exec /usr/sbin/nginx.real "$@" ;;
esac
"""
# A script does not learn what it was called by, which is what nginx executes on USR2 when it is
# tried (files/nginx-trial.sh).
_LATER = """
tried=/run/gpu-gateway/nginx
[ ! -e $tried ] || exec -a $tried /usr/sbin/nginx.real "$@"
[ -n "$NGINX" ] || exec /usr/sbin/nginx.real "$@"
"""
_NO_START = "echo 'this build does not start' >&2\nexit 1\n"
_NO_SERVICE = "exec /usr/sbin/nginx.real -c /srv/build/elsewhere.conf\n"
_TRIED = "tried beside the live configuration, which is as it was"
_BACK = "the previous configuration is back, and clients are served"
_ELSEWHERE = b"pid /run/nginx.pid;\nevents {}\nhttp { server { listen 127.0.0.1:8010; } }\n"


async def test_a_binary_that_is_not_up_to_it_leaves_the_old_one_serving(
    deployment: Deployment, newer: str
) -> None:
    in_build(deployment, "cp tree/usr/sbin/nginx /usr/sbin/nginx.real")
    send(deployment, _ELSEWHERE, "cat >/srv/build/elsewhere.conf")
    async with connect(deployment.gateway_url) as before:
        for version, binary, *told in (
            ("1.26.96", _BROKEN + _NO_START, "this build does not start", _TRIED),
            ("1.26.97", _BROKEN + _NO_SERVICE, "port 8009 would not answer", _TRIED),
            ("1.26.98", _BROKEN + _LATER + _NO_START, "did not take over from the one", _BACK),
            ("1.26.99", _BROKEN + _LATER + _NO_SERVICE, "port 8009 does not answer", _BACK),
        ):
            send(deployment, binary.encode(), "cat >/srv/build/tree/usr/sbin/nginx")
            build_package(deployment, version)
            result = await asyncio.to_thread(
                deployment.run, nginx_version=quoted(version), keepalive_timeout_s=70
            )
            assert result.returncode != 0
            assert all(words in result.output for words in told), result.output
            assert ("the binary that ran before runs again" in result.output) is (_BACK in told)
            assert running_version(deployment) == "1.22.1"
            assert "keepalive_timeout 65;" in deployment.on("gw1", "cat", "/etc/nginx/nginx.conf")
            await answers(before)
            async with connect(deployment.gateway_url) as after:
                await answers(after)
    in_build(deployment, "mv /usr/sbin/nginx.real tree/usr/sbin/nginx")
    result = await asyncio.to_thread(deployment.run, nginx_version=quoted("1.22"))
    assert result.returncode == 0, result.output
    assert len(masters(deployment)) == 1


def test_nginx_orgs_packages_are_installed_where_they_are_signed_by_the_key(
    deployment: Deployment, newer: str, tmp_path: Path
) -> None:
    folder = f"{MIRROR}/centos/9/x86_64"
    in_build(deployment, _AS_NGINX_ORG)
    build_package(deployment, newer, to=folder, spec="org")
    in_build(deployment, f"GNUPGHOME=/srv/build/gnupg {_SIGN} {folder}/*.rpm")
    in_build(deployment, f"createrepo_c --quiet {folder}")
    org = {"nginx_source": "nginx.org", "nginx_mirror": f"file://{MIRROR}"}

    refused = deployment.run(**org)  # by the key that ships, which did not sign these
    assert refused.returncode != 0
    assert "GPG check FAILED" in refused.output
    assert running_version(deployment) == "1.22.1"

    (tmp_path / "key").write_text(deployment.on("gw1", "cat", "/srv/build/key"))
    result = deployment.run(**org, nginx_signing_key=str(tmp_path / "key"))
    assert result.returncode == 0, result.output
    # Older by its epoch than what was there, which says nothing about nginx.
    assert deployment.on("gw1", "rpm", "-q", "nginx").startswith(f"nginx-{newer}-1.el9.ngx")
    assert running_version(deployment) == newer
    assert deployment.on("gw1", "ss", "-ltnH", "sport = :80") == "", "the package's welcome page"

    back = deployment.run(nginx_version=quoted("1.22"))
    assert back.returncode == 0, back.output
    assert running_version(deployment) == "1.22.1"
    folders = ("/etc/yum.repos.d", "/etc/pki/rpm-gpg", "/etc/nginx/conf.d")
    found = deployment.on("gw1", "ls", *folders)
    assert "gateway-nginx" not in found
    assert "default.conf" not in found
    assert "not installed" in deployment.on("gw1", "rpm", "-q", "gpg-pubkey", check=False)


def test_a_version_that_nobody_has_is_refused_and_says_what_there_is(
    deployment: Deployment, newer: str
) -> None:
    result = deployment.run(nginx_version=quoted("1.30"))
    assert result.returncode != 0
    assert f"no nginx 1.30; there: 1.22.1, {newer}" in result.output
    assert result.changed == {}
    assert running_version(deployment) == "1.22.1"
