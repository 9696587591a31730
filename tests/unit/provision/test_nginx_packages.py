"""Where nginx comes from: what fits, what is chosen, and which commands bring it there.

What dnf makes of them is in tests/deploy/test_nginx_versions.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from provision import facts, nginx_packages, preflight, record
from provision.nginx_packages import REPOSITORY, Wanted
from provision.settings import GatewaySettings
from tests.unit.provision.fleets import fleet, gateway, worker
from tests.unit.provision.test_operations import FakeHosts
from tests.unit.provision.test_settings import problems

CHECKOUT = Path(__file__).resolve().parents[3]
# What every ask of this module starts with.
ASKING = ("os-release", "repoquery", "madison", "stat -c", record.JOURNAL)
NOTING = "journal=$record/journal"  # files/record.sh, which has tests of its own


def declared(**data: Any) -> Wanted:
    return nginx_packages.wanted(fleet(gateway(**data), worker()).gateways["gw1"])


def has(*packages: str, manager: str = "dnf", **said: str) -> list[str]:
    """A host's answer."""
    facts_said = {"system": "rocky", "release": "9", "codename": "", "manager": manager, **said}
    lines = [f"{key}={value}" for key, value in facts_said.items()]
    return [*lines, *(f"package={package}" for package in packages)]


def found(*packages: str, **said: str) -> facts.PackageState:
    return facts.Packages().process(has(*packages, **said))


def commands(
    host: list[str], offered: list[str] | None = None, journal: str = "", **data: Any
) -> list[str]:
    """What is done to a host that answers so."""
    answers: dict[str, Any] = {"os-release": host, "repoquery": offered or []}
    answers |= {"madison": offered or [], record.JOURNAL: [journal]}
    hosts = FakeHosts({"h": answers})
    (done,) = hosts.run(nginx_packages.nginx_installed, declared=declared(**data)).values()
    return [command for command in done if not any(word in command for word in (*ASKING, NOTING))]


def refusal(host: list[str], offered: list[str], **data: Any) -> FakeHosts:
    answers = {"os-release": host, "repoquery": offered, "madison": offered}
    hosts = FakeHosts({"h": answers})
    with pytest.raises(Exception, match="hosts"):
        hosts.run(nginx_packages.nginx_installed, declared=declared(**data))
    return hosts


EL = "nginx 1:1.20.1-22.el9"
ORG = "nginx 1:1.26.3-1.el9.ngx"


@pytest.mark.parametrize(
    ("data", "state", "fitting"),
    [
        ({}, found(EL), True),
        ({}, found(), False),
        # Nothing is upgraded because something newer is there, nor replaced because of where it
        # is from, unless it came by this deploy's repository.
        ({}, found(ORG), True),
        ({}, found(ORG, file=nginx_packages.DNF_REPOSITORY), False),
        ({"nginx_version": "1.20"}, found(EL), True),
        ({"nginx_version": "1.20.2"}, found(EL), False),
        ({"nginx_version": "1.26"}, found(EL), False),
        ({"nginx_source": "nginx.org"}, found(ORG), True),
        ({"nginx_source": "nginx.org"}, found(EL), False),
        ({"nginx_source": "nginx.org"}, found("nginx 1.26.3-1~bookworm"), True),
        ({"nginx_source": "nginx.org"}, found("nginx 1.22.1-9+deb12u3"), False),
        (
            {"nginx_source": "module", "nginx_stream": "1.24"},
            found("nginx 1:1.24.0-4.module+el9", stream="1.24"),
            True,
        ),
        (
            {"nginx_source": "module", "nginx_stream": "1.24"},
            found("nginx 1:1.24.0-4.module+el9", stream="1.22"),
            False,
        ),
        ({"nginx_source": "module", "nginx_stream": "1.24"}, found(EL, stream="1.24"), False),
    ],
)
def test_what_fits_is_told_from_what_does_not(
    data: dict[str, Any], state: facts.PackageState, *, fitting: bool
) -> None:
    assert nginx_packages.fits(declared(**data), state) is fitting


def test_a_host_that_has_what_is_declared_is_left_alone() -> None:
    assert commands(has(EL)) == []
    assert commands(has(EL), nginx_version="1.20") == []


def test_without_a_wish_the_distribution_decides() -> None:
    assert commands(has()) == ["dnf -y -q install nginx"]


@pytest.mark.parametrize("now", [(), (EL,), ("nginx 2:1.28.0-1.el10",)])
def test_a_pin_installs_upgrades_and_downgrades_to_the_newest_that_it_allows(
    now: tuple[str, ...],
) -> None:
    offered = ["1:1.20.1-22.el9", "", "1:1.26.2-1.el9", "1:1.26.3-1.el9", "1:1.28.0-1.el9"]
    assert commands(has(*now), offered, nginx_version="1.26") == [
        "dnf -q --refresh makecache",
        "dnf -y -q install nginx-1:1.26.3-1.el9",
    ]


def test_a_version_that_nobody_offers_is_refused_and_nothing_installed() -> None:
    hosts = refusal(has(EL), ["1:1.20.1-22.el9"], nginx_version="1.30")
    (host,) = hosts.state.inventory
    assert not any(command.startswith("dnf -y") for command in host.connector.executed_commands)


def test_what_is_there_is_said_where_the_wanted_version_is_not() -> None:
    chosen, said = nginx_packages.choose(
        declared(nginx_version="1.30"), ["1:1.22.1-1.el9", "1:1.20.1-1.el9", "Last metadata"]
    )
    assert chosen is None
    assert "no nginx 1.30; there: 1.20.1, 1.22.1" in said[0]


def test_a_version_that_cannot_do_what_is_set_is_not_installed() -> None:
    wanted = declared(upstream_sticky="w")
    _, said = nginx_packages.choose(wanted, ["1:1.20.1-22.el9"])
    assert "upstream_sticky needs nginx 1.29.6" in said[0]
    chosen, said = nginx_packages.choose(wanted, ["1:1.20.1-22.el9", "1:1.30.2-1.el9"])
    assert (chosen, said) == ("1:1.30.2-1.el9", [])


def test_a_module_stream_is_enabled_after_the_one_before_was_reset() -> None:
    wish = {"nginx_source": "module", "nginx_stream": "1.24"}
    offered = ["1:1.24.0-4.module+el9"]
    assert commands(has(EL, stream="1.22"), offered, **wish) == [
        "dnf -y -q module reset nginx",
        "dnf -y -q module enable nginx:1.24",
        "dnf -q --refresh makecache",
        "dnf -y -q install nginx-1:1.24.0-4.module+el9",
    ]
    assert commands(has(), offered, **wish)[0] == "dnf -y -q module enable nginx:1.24"


@pytest.mark.parametrize(
    ("journal", "first"),
    [
        (f"file\t{nginx_packages.MODULE}\tfound\tabsent", "dnf -y -q module reset nginx"),
        ("", "dnf -q --refresh makecache"),
    ],
)
def test_only_a_stream_that_this_deploy_enabled_is_reset_again(journal: str, first: str) -> None:
    now = has("nginx 1:1.24.0-4.module+el9", stream="1.24")
    assert commands(now, ["1:1.20.1-22.el9"], journal, nginx_version="1.20")[0] == first


def test_nginx_orgs_packages_come_from_its_repository_alone_and_replace_the_split_ones() -> None:
    done = commands(
        has(EL, "nginx-core 1:1.20.1-22.el9"),
        ["1:1.26.3-1.el9.ngx", "1:1.28.0-1.el9.ngx"],
        nginx_source="nginx.org",
        nginx_version="1.26",
    )
    placed = [command.split()[-1] for command in done if "mv -fT" in command]
    welcome = nginx_packages.WELCOME
    assert placed == [nginx_packages.DNF_KEY, nginx_packages.DNF_REPOSITORY, welcome]
    done = done[: done.index("dnf -y -q swap nginx-core nginx-1:1.26.3-1.el9.ngx") + 1]
    assert f"--disablerepo=* --enablerepo={REPOSITORY}" in done[-2].replace("'", "")
    assert done[-1] == "dnf -y -q swap nginx-core nginx-1:1.26.3-1.el9.ngx"


def test_back_to_the_distribution_the_repository_goes_after_its_package() -> None:
    done = commands(
        has(ORG, file=nginx_packages.DNF_REPOSITORY), ["1:1.20.1-22.el9"], nginx_version="1.20"
    )
    welcome = nginx_packages.WELCOME
    staged = "/etc/nginx/conf.d/.default.conf.candidate"
    assert done.pop().endswith(f" {welcome} {welcome}.rpmsave {staged}")
    assert done == [
        f"dnf -q --refresh --disablerepo={REPOSITORY} makecache",
        "dnf -y -q install --allowerasing nginx-1:1.20.1-22.el9",
        f"rm -f -- {nginx_packages.DNF_REPOSITORY}",
    ]


def test_a_first_nginx_does_not_come_from_a_repository_that_is_no_longer_declared() -> None:
    done = commands(has(file=nginx_packages.DNF_REPOSITORY))
    assert done[0] == f"dnf -y -q --disablerepo={REPOSITORY} install nginx"


def test_a_stream_is_enabled_before_the_look_at_what_is_installed() -> None:
    """A note ends an installation that was cut."""
    answers = {"os-release": has(), "repoquery": ["1:1.24.0-4.module+el9"]}
    hosts = FakeHosts({"h": answers})
    wish = declared(nginx_source="module", nginx_stream="1.24")
    hosts.run(nginx_packages.nginx_installed, declared=wish)
    (host,) = hosts.state.inventory
    notes = [c.rpartition(" gateway ")[2] for c in host.connector.executed_commands if NOTING in c]
    assert [note.split()[0] for note in notes] == ["file", "packages", "came"]


MADISON = [
    " nginx | 1.26.3-1~bookworm | https://nginx.org/packages/debian bookworm/nginx amd64 Packages",
    " nginx | 1.22.1-9+deb12u3 | http://deb.example/debian bookworm/main amd64 Packages",
]
DEBIAN = {"manager": "apt", "system": "debian", "release": "12", "codename": "bookworm"}


def test_apt_takes_debians_packages_of_one_version() -> None:
    done = commands(has(**DEBIAN), MADISON)
    assert done[0] == "apt-get -qq update"
    assert done[1].endswith(
        f"{nginx_packages.APT_POLICY} nginx=1.22.1-9+deb12u3 nginx-common=1.22.1-9+deb12u3"
    )


def test_apt_takes_nginx_orgs_package_from_its_repository() -> None:
    done = commands(has(**DEBIAN), MADISON, nginx_source="nginx.org")
    placed = [command.split()[-1] for command in done if "mv -fT" in command]
    welcome = nginx_packages.WELCOME
    assert placed == [nginx_packages.APT_KEY, nginx_packages.APT_REPOSITORY, welcome]
    installing = f"{nginx_packages.APT_POLICY} 'nginx=1.26.3-1~bookworm'"
    assert any(command.endswith(installing) for command in done)


def test_a_run_that_was_cut_before_the_welcome_page_went_is_ended_by_the_next() -> None:
    staged, welcome = "/etc/nginx/conf.d/.default.conf.candidate", nginx_packages.WELCOME
    first = commands(has(**DEBIAN), MADISON, nginx_source="nginx.org")
    order = [
        next(n for n, command in enumerate(first) if found in command)
        for found in (f"{staged} 644", nginx_packages.APT_POLICY, f"{staged} {welcome}")
    ]
    assert order == sorted(order), "staged, installed, and put in its place"
    host = [*has("nginx 1.26.3-1~bookworm", **DEBIAN), f"file={welcome}", f"file={staged}"]
    again = commands(host, MADISON, nginx_source="nginx.org")
    assert again[-1] == f"mv -fT -- {staged} {welcome}"
    settled = commands(
        [*has("nginx 1.26.3-1~bookworm", **DEBIAN), f"file={welcome}"],
        MADISON,
        nginx_source="nginx.org",
    )
    assert not any(welcome in command for command in settled)


def test_only_a_file_that_nobody_added_to_goes_with_the_package(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.conf", tmp_path / "theirs.conf"
    ours.write_text(f"{nginx_packages.NO_WELCOME}\n")
    theirs.write_text(f"{nginx_packages.NO_WELCOME}\nserver {{ listen 81; }}\n")
    text, missing = nginx_packages._WELCOME_GOES, tmp_path / "missing"
    subprocess.run(
        ["sh", "-c", text, "sh", nginx_packages.NO_WELCOME, ours, theirs, missing], check=True
    )
    assert (ours.exists(), theirs.exists()) == (False, True)


def test_apt_tells_the_mirror_of_a_folder_in_its_own_way() -> None:
    row = " nginx | 1.26.3-1~bookworm | file:/srv/m/debian bookworm/nginx amd64 Packages"
    assert nginx_packages.madison([row], "file:///srv/m", ours=True) == ["1.26.3-1~bookworm"]
    assert nginx_packages.madison([row], "file:///srv/m", ours=False) == []


def test_a_server_that_the_operator_has_where_the_package_has_its_own_stays() -> None:
    host = has(**DEBIAN, file=nginx_packages.WELCOME)
    done = commands(host, MADISON, nginx_source="nginx.org")
    assert not any(nginx_packages.WELCOME in command for command in done)


@pytest.fixture
def apt(tmp_path: Path) -> Callable[[], list[str]]:
    """Runs files/apt-install.sh with an apt-get that asks as Debian's scripts do; what it saw."""
    policy, saw = tmp_path / "policy-rc.d", tmp_path / "saw"
    program = tmp_path / "apt-get"
    program.write_text(
        f'#!/bin/sh\nfor unit in nginx nginx.service ssh; do {policy} --quiet "$unit" restart\n'
        f'echo "$unit $?" >>{saw}; done; echo "$*" >>{saw}\n'
    )
    program.chmod(0o755)

    def install() -> list[str]:
        subprocess.run(
            ["sh", str(CHECKOUT / "files/apt-install.sh"), str(policy), "nginx=1.22.1-9"],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=True,
        )
        return saw.read_text().splitlines()

    return install


def test_debians_scripts_leave_the_running_nginx_alone(
    apt: Callable[[], list[str]], tmp_path: Path
) -> None:
    *units, arguments = apt()
    assert units == ["nginx 101", "nginx.service 101", "ssh 0"]  # 101: forbidden
    assert arguments.endswith("install nginx=1.22.1-9")
    assert not (tmp_path / "policy-rc.d").exists()


def test_a_policy_of_somebody_else_stays_and_one_that_was_left_goes(
    apt: Callable[[], list[str]], tmp_path: Path
) -> None:
    policy = tmp_path / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 104\n")
    policy.chmod(0o755)
    assert apt()[0] == "nginx 104"
    assert policy.exists()
    mark = "# Written by the gateway's deploy, for as long as it installs nginx."
    policy.write_text(f"#!/bin/sh\n{mark}\n")
    (tmp_path / "saw").unlink()
    assert apt()[0] == "nginx 101"
    assert not policy.exists()


def test_apt_has_no_module_streams() -> None:
    refusal(has(**DEBIAN), [], nginx_source="module", nginx_stream="1.24")


@pytest.mark.parametrize(
    ("stream", "folder"), [(None, "http://m/p"), ("mainline", "http://m/p/mainline")]
)
def test_the_repositories_believe_the_key_alone(stream: str | None, folder: str) -> None:
    wish = declared(nginx_source="nginx.org", nginx_mirror="http://m/p", nginx_stream=stream)
    key, repository = nginx_packages.repository_files(wish, found())
    text = repository.content
    assert isinstance(text, bytes)
    assert f"baseurl={folder}/centos/9/$basearch/\n".encode() in text
    assert b"\ngpgcheck=1\n" in text
    assert f"gpgkey=file://{key.path}\n".encode() in text
    _, sources = nginx_packages.repository_files(wish, found(**DEBIAN))
    assert isinstance(sources.content, bytes)
    assert f"URIs: {folder}/debian\nSuites: bookworm\n".encode() in sources.content
    assert f"Signed-By: {nginx_packages.APT_KEY}\n".encode() in sources.content


def test_the_key_that_ships_is_nginxs_own(tmp_path: Path) -> None:
    """By fingerprints, as https://nginx.org/en/pgp_keys.html and the runbook have them."""
    key = CHECKOUT / GatewaySettings.model_fields["nginx_signing_key"].default
    try:
        shown = subprocess.run(
            ["gpg", "--homedir", str(tmp_path), "--show-keys", "--with-colons", str(key)],
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError:
        pytest.skip("gpg is not installed, which reads the key")
    lines = [line.split(":") for line in shown.stdout.splitlines()]
    fingerprints = {fields[9] for fields in lines if fields[0] == "fpr"}
    assert fingerprints == {
        "573BFD6B3D8FBC641079A6ABABF5BD827BD9BF62",
        "8540A6F18833A80E9C1653A42FD21310B49F6B46",
        "9E9BE90EACBCDE69FE9B204CBCDCD8A38D88A2B3",
    }
    assert all(name in (CHECKOUT / "docs/runbook.md").read_text() for name in fingerprints)


def test_a_key_that_is_none_is_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("ssh-ed25519 AAAA")
    assert "holds no public key" in preflight._key_problems(str(tmp_path / "key"))[0]
    assert "cannot be read" in preflight._key_problems(str(tmp_path / "none"))[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nginx_source": "module"}, 'as "1.24"'),
        ({"nginx_source": "module", "nginx_stream": "stable"}, 'as "1.24"'),
        ({"nginx_stream": "1.24"}, "means nothing to nginx_source 'distribution'"),
        ({"nginx_source": "nginx.org", "nginx_stream": "1.24"}, "'stable' and 'mainline'"),
        (
            {"nginx_source": "module", "nginx_stream": "1.24", "nginx_version": "1.26"},
            "1.26 is not in the nginx_stream 1.24",
        ),
        ({"nginx_mirror": "ftp://x"}, "nginx_mirror"),
        ({"nginx_mirror": "https://x/\nevil"}, "nginx_mirror"),
    ],
)
def test_sources_that_make_no_sense_are_refused(data: dict[str, Any], message: str) -> None:
    assert message in "\n".join(problems(gateway(**data), worker()))


def test_keys_of_the_repository_go_with_it_and_before_another_key_comes() -> None:
    journal = "package\tnginx\tcame-package\tgpg-pubkey-7bd9bf62-4e4e3262"

    def run(host: list[str], journal: str = journal, **data: Any) -> list[str]:
        done = commands(host, ["1:1.26.3-1.el9.ngx"], journal, **data)
        return [c for c in done if "gpg-pubkey-" in c]

    there = has(ORG, file=nginx_packages.DNF_KEY)
    assert len(run(there, nginx_source="nginx.org")) == 1  # what lies there is another one
    assert len(run(there)) == 1
    assert run(has(ORG), nginx_source="nginx.org") == []
    assert run(there, "") == []  # the operator had them before

    def uninstalling(host: list[str], journal: str = journal) -> list[str]:
        hosts = FakeHosts({"h": {"os-release": host, record.JOURNAL: [journal]}})
        return [c for c in hosts.run(nginx_packages.keys_go)["h"] if "--show-keys" in c]

    assert len(uninstalling(there)) == 1
    assert len(uninstalling(there, journal.replace("came-package", "came-key"))) == 1
    assert uninstalling(there, "") == []
    assert uninstalling(has(ORG)) == []


def test_what_came_with_a_package_that_was_refused_is_noted_before_keys_are_looked_at() -> None:
    there = has(ORG, file=nginx_packages.DNF_KEY)
    hosts = FakeHosts({"h": {"os-release": there, "readlink": [record.PENDING]}})
    hosts.run(nginx_packages.keys_go)
    (host,) = hosts.state.inventory
    ran = host.connector.executed_commands
    noting = next(n for n, c in enumerate(ran) if NOTING in c and c.endswith(" ended"))
    reading = next(n for n, c in enumerate(ran) if NOTING not in c and record.JOURNAL in c)
    assert noting < reading


def test_keys_go_that_came_here_and_no_others(tmp_path: Path) -> None:
    for name, text in {
        "gpg": "echo pub:-:2048:1:ABF5BD827BD9BF62:1; echo pub:-:4096:1:2FD21310B49F6B46:2",
        "rpm": f'echo "$*" >>{tmp_path}/did',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    came = ("gpg-pubkey-573bfd6babf5bd827bd9bf62-4e4e3262", "gpg-pubkey-350d275d-627bb8d5")
    subprocess.run(
        ["sh", "-c", nginx_packages._KEYS_GO, "keys", "/key", *came],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    asked, went = (tmp_path / "did").read_text().splitlines()
    assert asked == f"-q {came[0]}"
    assert went == f"-e -- {came[0]}"


def test_what_needs_a_newer_one_is_looked_for() -> None:
    assert not declared().by_choice
    assert declared(upstream_sticky="w").by_choice


def test_the_files_that_it_leaves_are_declared() -> None:
    """What uninstalling has to take away."""
    for state in (found(), found(**DEBIAN)):
        placed = nginx_packages.repository_files(declared(nginx_source="nginx.org"), state)
        assert {managed.path for managed in placed} <= set(nginx_packages.FILES)
