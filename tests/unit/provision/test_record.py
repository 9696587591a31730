"""The record of what was found on a host: its journal, the script that writes it (run here, on a
folder in place of the host's), and that operations note before they change, and only then.
"""

import os
import subprocess
from pathlib import Path

import pytest

from provision import operations, record, rendering, selinux
from provision.operations import ManagedFile
from tests.unit.provision.test_operations import FILE, FakeHosts, file_answer, zone


class Host:
    """A folder that stands for a host's file system, as far as the script knows its state."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.folder = self.state / "record"

    def note(self, *words: str) -> None:
        text = rendering.shell("record.sh").replace(record.STATE, str(self.state))
        result = subprocess.run(
            ["sh", "-c", text, "record", *words],
            env={**os.environ, "PATH": f"{self.root}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr) == (0, "")

    def install(self, packages: str) -> None:
        """A package manager that has these, a line each."""
        (self.root / "bin").mkdir(exist_ok=True)
        for name, text in (("dnf", ""), ("rpm", f"printf '%s' '{packages}'")):
            program = self.root / "bin" / name
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)

    def record(self) -> record.Record:
        return record.parse((self.folder / "journal").read_text().splitlines())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_first_note_of_what_was_found_counts() -> None:
    lines = [
        "boolean\thttpd_can_network_connect\tfound\toff",
        "boolean\thttpd_can_network_connect\tfound\ton",
        "file\t/etc/a\twrote\t1",
        "file\t/etc/a\twrote\t2",
        "package\tnginx\tcame-user\tnginx",
        "package\tnginx",  # cut short by a crash
    ]
    found = record.parse(lines)
    assert found.of("boolean") == {"httpd_can_network_connect": "off"}
    assert found.wrote["file", "/etc/a"] == {"1", "2"}
    assert found.came == {"nginx": {"user": ("nginx",)}}
    assert found.of("package") == {}


def test_a_port_that_was_closed_again_is_not_ours_any_more() -> None:
    changes = ("opened\t1/tcp", "opened\t2/tcp", "closed\t1/tcp", "shut\t9/tcp")
    found = record.parse(f"firewall\tgateway\t{change}" for change in changes)
    assert found.firewall["gateway"].opened == {"2/tcp"}
    assert found.firewall["gateway"].shut == {"9/tcp"}


def test_a_file_is_kept_as_it_was_found_whatever_is_written_later(host: Host) -> None:
    live = host.root / "etc" / "nginx.conf"
    live.parent.mkdir()
    live.write_text("the distribution's\n")
    live.chmod(0o640)
    host.note("file", str(live), "aa")
    live.write_text("ours\n")
    host.note("file", str(live), "bb")
    copy = host.folder / f"found{live}"
    assert copy.read_text() == "the distribution's\n"
    assert copy.stat().st_mode & 0o777 == 0o640
    found = host.record()
    assert found.of("file")[str(live)].startswith("640 ")
    assert found.wrote["file", str(live)] == {"aa", "bb"}


def test_a_file_that_was_not_there_is_noted_with_the_folders_that_it_needs(host: Host) -> None:
    path = host.root / "new" / "deeper" / "drop-in.conf"
    host.note("file", str(path))
    found = host.record()
    assert found.of("file") == {str(path): "absent"}
    assert set(found.of("folder")) == {str(path.parent), str(path.parent.parent)}
    assert found.wrote == {}


def test_nobody_but_root_reads_it(host: Host) -> None:
    host.note("found", "boolean", "b", "off")
    assert host.folder.stat().st_mode & 0o777 == 0o700
    assert (host.folder / "journal").stat().st_mode & 0o777 == 0o600


def test_accounts_are_noted_as_they_were(host: Host) -> None:
    host.note("account", "user", "root")
    host.note("account", "group", "nobody-has-this")
    found = host.record()
    assert found.of("user") == {"root": "present"}
    assert found.of("group") == {"nobody-has-this": "absent"}


def test_what_an_installation_brings_is_noted_and_what_was_there_is_not(host: Host) -> None:
    host.install("bash\t5.1-1\nnginx-filesystem\t1.20-1\n")
    host.note("packages", "nginx")
    host.install(
        "bash\t5.1-1\nnginx-filesystem\t1.20-1\nnginx\t1.20-1\nnginx-core\t1.20-1\n"
        "gpg-pubkey\tabc-1\n"
    )
    host.note("came", "nginx")
    host.install("bash\t5.1-1\n")  # whatever is there later
    host.note("packages", "nginx")
    found = host.record()
    assert found.of("package") == {"nginx": "absent"}
    assert found.came["nginx"] == {"package": ("gpg-pubkey-abc-1", "nginx", "nginx-core")}
    assert found.wrote["package", "nginx"] == {"1.20-1"}


BARE, NGINX = "bash\t5.1-1\n", "bash\t5.1-1\nnginx\t1.20-1\nnginx-core\t1.20-1\n"


@pytest.mark.parametrize(
    "following", [("packages", "certbot"), ("found", "boolean", "b", "off"), ("ended",)]
)
def test_what_came_with_an_installation_that_was_cut_is_noted_by_the_next_note(
    host: Host, following: tuple[str, ...]
) -> None:
    host.install(BARE)
    host.note("packages", "nginx")
    host.install(NGINX)
    host.note(*following)
    assert host.record().came == {"nginx": {"package": ("nginx", "nginx-core")}}
    host.install(f"{NGINX}certbot\t2-1\n")
    host.note("came", "certbot")
    expected = {"package": ("certbot",)} if following[0] == "packages" else {}
    assert host.record().came.get("certbot", {}) == expected
    assert not list(host.folder.glob("before.*"))


def test_what_came_after_an_installation_that_failed_is_somebody_elses(host: Host) -> None:
    host.install(BARE)
    host.note("packages", "nginx")
    since = "epel-release\t9-1\ngpg-pubkey\tabc-1\n"
    host.install(f"{BARE}{since}")
    host.note("packages", "nginx")
    host.install(f"{NGINX}{since}")
    host.note("came", "nginx")
    came = host.record().came["nginx"]
    assert came == {"key": ("gpg-pubkey-abc-1",), "package": ("nginx", "nginx-core")}


def test_what_came_in_the_days_after_one_that_was_cut_is_nobody_knows_whose(host: Host) -> None:
    host.install(BARE)
    host.note("packages", "nginx")
    os.utime(host.folder / "before.asked", (0, 0))
    host.install(f"{NGINX}vim\t9-1\n")
    host.note("ended")
    assert host.record().came == {}
    assert not list(host.folder.glob("before.*"))


def test_an_installation_that_was_cut_is_ended_before_anything_goes() -> None:
    hosts = FakeHosts({"h": {"readlink": [record.PENDING]}})
    hosts.run(record.installation_ended)
    assert commands(hosts)[-1].endswith(" ended")
    settled = FakeHosts({"h": {}})
    settled.run(record.installation_ended)
    assert not any(map(noted, commands(settled)))


def test_a_host_that_was_deployed_before_says_so(host: Host) -> None:
    host.state.mkdir()
    (host.state / "applied").touch()
    host.note("found", "boolean", "b", "off")
    assert host.record().is_late


def commands(hosts: FakeHosts) -> list[str]:
    return [str(c) for c in next(iter(hosts.state.inventory)).connector.executed_commands]


def noted(command: str) -> bool:
    return "no copy of $1 could be kept" in command


def test_an_operation_notes_just_before_it_changes_and_nothing_otherwise() -> None:
    right = FakeHosts({"h": file_answer(FILE)})
    right.run(operations.place_files, files=[FILE])
    assert not any(map(noted, commands(right)))
    wrong = FakeHosts({"h": {}})
    wrong.run(operations.place_files, files=[FILE])
    note, stage, swap = commands(wrong)[-3:]
    assert noted(note)
    assert note.endswith(f" file {FILE.path} {FILE.sha256}")
    assert "install -m" in stage
    assert "mv -fT" in swap


def test_what_goes_with_a_whole_folder_is_not_noted() -> None:
    wheel = ManagedFile(path="/opt/gpu-service/wheels/a.whl", content=b"")
    hosts = FakeHosts({"h": {}})
    hosts.run(operations.place_files, files=[wheel])
    assert not any(map(noted, commands(hosts)))


@pytest.mark.parametrize(
    ("operation", "answers", "arguments", "note"),
    [
        (
            selinux.mode,
            {"getenforce": ["Enforcing", "enforcing"]},
            {"wanted": "permissive"},
            " found selinux mode 'enforcing enforcing'",
        ),
        (
            selinux.booleans,
            {"getsebool": ["b --> off"]},
            {"wanted": ["b"]},
            " found boolean b off",
        ),
        (
            selinux.web_ports,
            {"semanage port -l": ["unreserved_port_t tcp 1024-65535"]},
            {"ports": [9005]},
            " found port 'http_port_t tcp 9005' absent",
        ),
        (
            operations.firewalld,
            {"busctl": zone()},
            {"role": "gateway", "ports": [8009]},
            " append firewall gateway opened 8009/tcp",
        ),
        (
            record.packages,
            {"rpm": ["bash-5.1"]},
            {"packages": ["nginx=1.26"]},
            " packages nginx",
        ),
    ],
)
def test_operations_note_what_they_find(operation, answers, arguments, note) -> None:  # type: ignore[no-untyped-def]
    hosts = FakeHosts({"h": answers})
    hosts.run(operation, **arguments)
    notes = [command for command in commands(hosts) if noted(command)]
    assert notes[0].endswith(note), notes[0][-100:]
