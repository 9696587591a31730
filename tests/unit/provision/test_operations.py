"""The operations against pyinfra's `@fake` hosts: which commands, in which order, and when none.

The hosts are a script of answers; what real hosts make of the commands is in tests/deploy.
"""

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyinfra.api import Config, Inventory, State, StringCommand
from pyinfra.api.connect import connect_all
from pyinfra.api.operation import add_op
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage

from provision import nginx_versions, operations
from provision.nginx_versions import Feature
from provision.operations import ManagedFile, Roll, WorkerUnit
from provision.rolling import Rollout

Answers = dict[str, Any]
# What every fact's script starts with; commands that ask are left out of what a test sees.
ASKING = (
    "stat -c",
    "readlink",
    "getenforce",
    "nginx -v",
    "getsebool",
    "semanage port -l",
    "busctl",
    "-p SubState",
    "list-units",
    'cat "$1" || true',
    "worker-*.env",
    "record/journal",  # and what is noted of it: test_record.py
    "ls -1t",
)


def asks(command: str) -> bool:
    """Whether a command is a fact's. Those that switch a worker or nginx ask, too, in scripts."""
    if "worker-switch" in command or "nginx-activate" in command:
        return False
    return any(word in command for word in ASKING)


class FakeHosts:
    """Runs one operation on hosts that answer from a script; keeps what was commanded."""

    def __init__(self, answers: dict[str, Answers]) -> None:
        hosts = [
            (f"@fake/{name}", {"fake_responses": script, "fake_delay": 0, "fake_delay_jitter": 0})
            for name, script in answers.items()
        ]
        self.state = State(Inventory((hosts, {})), Config())
        self.state.set_stage(StateStage.Connect)
        connect_all(self.state)
        self.state.set_stage(StateStage.Prepare)

    def run(self, operation: Callable[..., Any], **arguments: Any) -> dict[str, list[str]]:
        add_op(self.state, operation, **arguments)
        self.state.set_stage(StateStage.Execute)
        for host in self.state.inventory:
            host.connector.executed_commands.clear()
        run_ops(self.state)
        return {
            host.name.removeprefix("@fake/"): [
                command for command in host.connector.executed_commands if not asks(command)
            ]
            for host in self.state.inventory
        }

    def fail(self, *names: str) -> None:
        """As hosts that could not be reached."""
        lost = {self.state.inventory.get_host(f"@fake/{name}") for name in names}
        self.state.fail_hosts(lost)

    def failed(self) -> set[str]:
        return {host.name.removeprefix("@fake/") for host in self.state.failed_hosts}


def run(operation: Callable[..., Any], answers: Answers, **arguments: Any) -> list[str]:
    return FakeHosts({"h": answers}).run(operation, **arguments)["h"]


TOLD: Answers = {"nginx -v": "nginx version: nginx/1.22.1"}
FILE = ManagedFile(path="/etc/nginx/nginx.conf", content=b"user root;\n")


def file_answer(managed: ManagedFile, mode: str = "644") -> Answers:
    return {"sha256sum <": [f"{mode} root root", f"{managed.sha256}  -", managed.path]}


def test_a_file_that_is_right_is_left_alone() -> None:
    assert run(operations.place_files, file_answer(FILE), files=[FILE]) == []


def test_a_file_that_differs_is_staged_checked_and_swapped_in_that_order() -> None:
    commands = run(operations.place_files, {}, files=[FILE], verified=True)
    staged, checked, swapped = commands  # the upload itself goes by SFTP
    assert "install -m" in staged
    assert "/etc/nginx/.nginx.conf.candidate" in staged
    assert "sha256sum" in checked
    assert "mv -fT" in swapped
    assert swapped.endswith("/etc/nginx/.nginx.conf.candidate /etc/nginx/nginx.conf")


def test_a_secret_never_lies_anywhere_but_in_its_candidate(tmp_path: Path) -> None:
    """No upload, which with `_sudo` goes by /tmp; and never readable by others."""
    secret = ManagedFile(path=f"{tmp_path}/pip.conf", content=b"hunter2\n", secret=True)
    command = secret.upload()
    assert isinstance(command, StringCommand)
    assert "hunter2" not in command.get_raw_value()
    given = command.connector_arguments["_stdin"]
    subprocess.run(command.get_raw_value(), shell=True, check=True, input=given, text=True)
    candidate = Path(secret.candidate)
    assert candidate.read_bytes() == secret.content
    assert candidate.stat().st_mode & 0o777 == 0o600


def test_a_wrong_mode_alone_is_mended() -> None:
    assert run(operations.place_files, file_answer(FILE, mode="666"), files=[FILE]) != []


def test_a_link_is_moved_by_one_rename() -> None:
    arguments = {"path": "/m/current", "target": "2"}
    assert run(operations.link, {"readlink": "/m/current -> 2"}, **arguments) == []
    assert run(operations.link, {"readlink": "/m/current -> 1"}, **arguments) == [
        "ln -sfn -- 2 /m/current.candidate",
        "mv -fT -- /m/current.candidate /m/current",
    ]


@pytest.mark.parametrize(
    ("said", "stale", "expected"),
    [
        ([], [], []),
        ([], ["a.service"], ["systemctl daemon-reload", "systemctl restart a.service"]),
        (["UnitFileState=disabled"], [], ["systemctl enable --quiet a.service"]),
        (["NeedDaemonReload=yes"], [], ["systemctl daemon-reload"]),
    ],
)
def test_units_run_with_their_files_as_they_are(
    said: list[str], stale: list[str], expected: list[str]
) -> None:
    answers = {
        "-p SubState": [*unit_answer("a.service"), *said],
        "ActiveEnterTimestamp": stale,
    }
    done = run(operations.units_run, answers, files={"a.service": ["/a", "/b"]})
    assert [command for command in done if "ActiveEnterTimestamp" not in command] == expected


RULE = 'rule family="ipv4" source address="{}" port port="9005" protocol="tcp" accept'


def zone(*entries: str) -> list[str]:
    """What firewalld says of a zone that has these ports and rules, now and for good."""
    answers = []
    for entry in entries:
        if entry.startswith("rule"):
            escaped = entry.replace('"', '\\"')
            answers.append(f'as 1 "{escaped}"')
        else:
            port, protocol = entry.split("/")
            answers.append(f'a(ss) 1 "{port}" "{protocol}"')
    return [f"{mode} {answer}" for mode in ("runtime", "permanent") for answer in answers] or [
        "runtime as 0"
    ]


def test_without_firewalld_nothing_is_done() -> None:
    assert run(operations.firewalld, {"busctl": []}, role="r", ports=[8009]) == []


def test_firewalld_opens_a_port_now_and_for_good() -> None:
    answers = {"busctl": zone()}
    assert run(operations.firewalld, answers, role="r", ports=[8009]) == [
        "firewall-cmd --quiet --permanent --add-port=8009/tcp",
        "firewall-cmd --quiet --add-port=8009/tcp",
    ]
    answers = {"busctl": zone("8009/tcp")}
    assert run(operations.firewalld, answers, role="r", ports=[8009]) == []


def test_a_gateway_that_left_loses_its_way_to_the_workers() -> None:
    old, new = RULE.format("10.0.0.9"), RULE.format("10.0.0.11")
    answers = {"busctl": zone(old)}
    commands = run(operations.firewalld, answers, role="r", ports_from={9005: ["10.0.0.11"]})
    assert len(commands) == 4
    assert sum("--remove-rich-rule" in c and "10.0.0.9" in c for c in commands) == 2
    assert sum("--add-rich-rule" in c and "10.0.0.11" in c for c in commands) == 2
    answers = {"busctl": zone(new)}
    assert run(operations.firewalld, answers, role="r", ports_from={9005: ["10.0.0.11"]}) == []


def test_a_worker_port_that_was_open_to_all_is_closed() -> None:
    new = RULE.format("10.0.0.11")
    answers = {"busctl": zone(new) + zone("9005/tcp")[:1]}
    assert run(operations.firewalld, answers, role="r", ports_from={9005: ["10.0.0.11"]}) == [
        "firewall-cmd --quiet --remove-port=9005/tcp"
    ]


WORKER_PORT: Any = {"role": "r", "ports_from": {9005: ["10.0.0.11"]}}


@pytest.mark.parametrize(
    "entry",
    [
        'rule family="ipv4" source address="10.0.0.9" port port="9005" protocol="tcp" reject',
        'rule family="ipv4" port port="9005" protocol="tcp" log prefix="accept" drop',
        'rule family="ipv4" source address="10.0.0.9" port port="9005" protocol="udp" accept',
        'rule family="ipv4" forward-port port="9005" protocol="tcp" to-port="8080"',
        "9005/udp",
        "9006-9100/tcp",
    ],
)
def test_a_rule_that_lets_nobody_in_by_tcp_stays(entry: str) -> None:
    found = {"busctl": zone(RULE.format("10.0.0.11"), entry)}
    assert run(operations.firewalld, found, **WORKER_PORT) == []


@pytest.mark.parametrize(
    "entry",
    [
        "9000-9100/tcp",
        'rule family="ipv4" source address="10.0.0.9" port port="9000-9005" protocol="tcp" accept',
    ],
)
def test_a_range_that_somebody_opened_over_a_worker_port_is_left_to_them(entry: str) -> None:
    hosts = FakeHosts({"h": {"busctl": zone(entry)}})
    with pytest.raises(Exception, match="hosts"):
        hosts.run(operations.firewalld, **WORKER_PORT)
    (host,) = hosts.state.inventory
    assert not any("firewall-cmd" in command for command in host.connector.executed_commands)
    said = operations._too_wide("9000-9100/tcp", 9005)
    assert "firewall-cmd --remove-port=9000-9100/tcp" in said


def test_ranges_of_other_roles_and_what_is_open_within_a_range_stay() -> None:
    wide = RULE.format("10.0.0.31").replace("9005", "1024-65535")
    found = {"busctl": [*zone(RULE.format("10.0.0.11"), wide), *opened("trainer", wide)]}
    assert run(operations.firewalld, found, **WORKER_PORT) == []
    found = {"busctl": [*zone(wide, "9100/tcp")]}
    arguments: Any = {"role": "r", "ports_from": {"1024-65535": ["10.0.0.31"]}}
    assert run(operations.firewalld, found, **arguments) == []


def opened(role: str, *entries: str) -> list[str]:
    """What the host's record says that a role has opened."""
    return [f"firewall\t{role}\topened\t{entry}" for entry in entries]


def test_a_port_that_was_opened_here_and_is_not_wanted_any_more_is_closed() -> None:
    answers = {"busctl": [*zone("8009/tcp", "8443/tcp"), *opened("r", "8009/tcp", "8443/tcp")]}
    assert run(operations.firewalld, answers, role="r", ports=[8009], closes=False) == []
    assert run(operations.firewalld, answers, role="r", ports=[8009]) == [
        "firewall-cmd --quiet --permanent --remove-port=8443/tcp",
        "firewall-cmd --quiet --remove-port=8443/tcp",
    ]


def test_what_an_operator_or_another_role_opened_stays_open() -> None:
    answers = {"busctl": [*zone("22/tcp", "8443/tcp"), *opened("other", "8443/tcp")]}
    assert run(operations.firewalld, answers, role="r") == []
    both = {"busctl": [*zone("8443/tcp"), *opened("r", "8443/tcp"), *opened("other", "8443/tcp")]}
    assert run(operations.firewalld, both, role="r") == []


def test_a_rule_of_a_worker_that_was_retired_goes() -> None:
    rule = RULE.format("10.0.0.11")
    answers = {"busctl": [*zone(rule), *opened("r", rule)]}
    commands = run(operations.firewalld, answers, role="r", ports_from={9006: []})
    assert sum("--remove-rich-rule" in command for command in commands) == len(commands) == 2


def unit_answer(unit: str, *, active: str = "active", deployment: str = "d1") -> list[str]:
    return [
        f"unit={unit}",
        f"ActiveState={active}",
        "UnitFileState=enabled",
        "NeedDaemonReload=no",
        "MainPID=9",
        f"GPU_SERVICE_DEPLOYMENT={deployment}",
    ]


def socket_answer(worker: WorkerUnit, *, active: str = "active") -> list[str]:
    enabled = "enabled" if active == "active" else "disabled"
    return [f"unit={worker.socket}", f"ActiveState={active}", f"UnitFileState={enabled}"]


def worker_unit(port: int, *, keeps_socket: bool = False) -> WorkerUnit:
    settings = ManagedFile(path=f"/etc/gpu-service/worker-{port}.env", content=b"x=1\n")
    return WorkerUnit(
        name=f"gpu-worker@{port}.service",
        settings=settings,
        deployment="d1",
        keeps_socket=keeps_socket,
        worker=f"h:{port}",
    )


A, B = worker_unit(9005), worker_unit(9006)


def answers(*states: list[str], files: tuple[WorkerUnit, ...] = (A, B)) -> Answers:
    placed = [
        line
        for worker in files
        for line in ("644 root root", f"{worker.settings.sha256}  -", worker.settings.path)
    ]
    return {"systemctl show": [line for state in states for line in state], "sha256sum <": placed}


def is_switch(command: str, worker: WorkerUnit) -> bool:
    """Whether it is files/worker-switch.sh, for this worker."""
    settings = worker.settings
    return command.endswith(
        f"worker-switch {worker.name} {settings.path} {settings.candidate} {settings.sha256}"
    )


def is_staged(command: str, worker: WorkerUnit) -> bool:
    """Whether it makes room for the worker's settings beside those that are there."""
    return "install -m" in command and worker.settings.candidate in command


ROLL_OF_THREE = Roll(min_up=0.5, capacity={"": {"h:9005": 1, "@fake/i:9005": 1, "@fake/j:9005": 1}})


def roll(script: Answers, *workers: WorkerUnit) -> list[str]:
    return run(operations.roll_workers, script, workers=workers, rollout=Rollout())


def start(script: Answers, *workers: WorkerUnit) -> list[str]:
    return run(operations.start_workers, script, workers=workers, rollout=Rollout())


def test_workers_that_run_what_was_declared_are_not_restarted() -> None:
    assert roll(answers(unit_answer(A.name), unit_answer(B.name)), A, B) == []


def test_only_what_runs_something_else_is_restarted() -> None:
    script = answers(unit_answer(A.name), unit_answer(B.name, deployment="d0"))
    staged, switched = roll(script, A, B)
    assert is_staged(staged, B)
    assert is_switch(switched, B)


def test_a_worker_that_is_down_is_started_although_its_settings_are_right() -> None:
    commands = roll(answers(unit_answer(A.name, active="failed")), A)
    assert is_switch(commands[-1], A)


def test_a_worker_that_reloads_its_models_is_up() -> None:
    right = answers(unit_answer(A.name, active="reloading"))
    assert roll(right, A) == []
    stale = answers(unit_answer(A.name, active="reloading", deployment="d0"))
    assert start(stale, A) == []
    assert is_switch(roll(stale, A)[-1], A)


def test_those_that_are_down_are_started_first_and_no_other_is_touched() -> None:
    script = answers(unit_answer(A.name, deployment="d0"), unit_answer(B.name, active="failed"))
    staged, switched = start(script, A, B)
    assert is_staged(staged, B)
    assert is_switch(switched, B)


def test_all_that_are_down_are_started_at_once() -> None:
    script = answers(unit_answer(A.name, active="failed"), unit_answer(B.name, active="failed"))
    staged, switched = start(script, A, B)
    assert is_staged(staged, A)
    assert is_staged(staged, B)
    assert switched.endswith(" ".join((*A.settings_to_switch, *B.settings_to_switch)))


@pytest.mark.parametrize(("fails", "expected"), [("none", 0), ("b", 1), ("a", 1)])
def test_workers_that_are_switched_at_once_fail_where_one_does(
    fails: str, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = f'echo "$@" >>{tmp_path}/"$1"; [ "$1" != {fails} ]'
    monkeypatch.setattr(operations.rendering, "shell", lambda _: text)
    command = operations._switch_workers([("a", "1", "2", "3"), ("b", "4", "5", "6 7")])
    assert subprocess.run(command.get_raw_value(), shell=True).returncode == expected
    assert (tmp_path / "a").read_text() == "a 1 2 3\n"
    assert (tmp_path / "b").read_text() == "b 4 5 6 7\n"


def test_small_files_go_together_and_a_large_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that was cut finds the large one there."""
    monkeypatch.setattr(operations, "_TOGETHER_BYTES", 10)
    files = [ManagedFile(path=f"/f/{n}", content=b"x" * n) for n in (4, 6, 1, 11, 3, 2)]
    groups = [[len(f.content) for f in group] for group in operations._by_size(files)]
    assert groups == [[4, 6], [1], [11], [3, 2]]


def test_what_arrives_damaged_replaces_nothing(tmp_path: Path) -> None:
    good, bad = (ManagedFile(path=f"{tmp_path}/{n}", content=n.encode()) for n in ("good", "bad"))
    Path(good.candidate).write_bytes(b"good")
    Path(bad.candidate).write_bytes(b"half")
    check = operations.sha256_check(good, bad).get_raw_value()
    result = subprocess.run(check, shell=True, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{bad.candidate} arrived damaged" in result.stderr
    assert not Path(bad.candidate).exists()
    assert Path(good.candidate).exists()


def test_a_worker_stays_up_where_too_few_others_are() -> None:
    """Two of three are not there: their hosts could not be reached."""
    hosts = FakeHosts({"h": answers(unit_answer(A.name, deployment="d0")), "i": {}, "j": {}})
    hosts.fail("i", "j")
    with pytest.raises(Exception, match="hosts"):
        hosts.run(operations.roll_workers, workers=[A], rollout=Rollout(), roll=ROLL_OF_THREE)
    commands = next(iter(hosts.state.inventory)).connector.executed_commands
    assert not any(is_switch(command, A) for command in commands)


def test_workers_of_hosts_that_are_not_part_of_the_run_are_not_taken_for_down() -> None:
    """As with `--limit`."""
    hosts = FakeHosts({"h": answers(unit_answer(A.name, deployment="d0"))})
    commands = hosts.run(
        operations.roll_workers, workers=[A], rollout=Rollout(), roll=ROLL_OF_THREE
    )["h"]
    assert is_switch(commands[-1], A)


def slept(monkeypatch: pytest.MonkeyPatch, answer: Answers, gateways: Mapping[str, Any]) -> float:
    """How long the second of two workers' turn waits after the first was restarted."""
    waits: list[float] = []
    monkeypatch.setattr(
        operations, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=waits.append)
    )
    stale = answers(unit_answer(A.name, deployment="d0"), unit_answer(B.name, deployment="d0"))
    seen_by = Roll(capacity={"": {"h:9005": 1, "h:9006": 1}}, gateways=gateways, fail_timeout_s=5)
    commands = run(
        operations.roll_workers, answer | stale, workers=[A, B], rollout=Rollout(), roll=seen_by
    )
    assert is_switch(commands[-1], B)
    return sum(waits)


def test_gateways_that_were_not_asked_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are not part of the run, or could not be asked."""
    here, elsewhere = {"@fake/h": {"": "8009"}}, {"gw2": {"": "8009"}}
    assert slept(monkeypatch, {}, here) == 0
    assert slept(monkeypatch, {}, here | elsewhere) == 6.5
    assert slept(monkeypatch, {"worker-seen": {"success": False}}, here) == 6.5
    assert slept(monkeypatch, {}, {"gw2": {"another": "8009/another"}}) == 0


def test_the_next_one_goes_when_the_gateways_see_the_one_before() -> None:
    stale = answers(unit_answer(A.name, deployment="d0"), unit_answer(B.name, deployment="d0"))
    hosts = FakeHosts({"h": stale})
    seen_by = Roll(capacity={"": {"h:9005": 1, "h:9006": 1}}, gateways={"@fake/h": {"": "8009/x"}})
    rollout = Rollout()
    commands = hosts.run(operations.roll_workers, workers=[A, B], rollout=rollout, roll=seen_by)[
        "h"
    ]
    order = [c for c in commands if "worker-switch" in c or "worker-seen" in c]
    assert is_switch(order[0], A)
    assert order[1].endswith(" worker-seen 8009/x 2 h:9005")
    assert is_switch(order[2], B)
    assert len(order) == 3


def test_each_worker_gets_its_settings_just_before_its_own_restart() -> None:
    stale = (unit_answer(A.name, deployment="d0"), unit_answer(B.name, deployment="d0"))
    commands = roll(answers(*stale, files=()), A, B)
    order = [
        (kind, worker.name)
        for command in commands
        for worker in (A, B)
        for kind, found in (
            ("stage", is_staged(command, worker)),
            ("switch", is_switch(command, worker)),
        )
        if found
    ]
    assert order == [
        ("stage", A.name),
        ("switch", A.name),
        ("stage", B.name),
        ("switch", B.name),
    ]


def test_a_settings_file_that_drifted_is_put_right_without_a_restart() -> None:
    commands = roll(answers(unit_answer(A.name), files=()), A)
    assert any("mv -fT" in command for command in commands)
    assert not any(is_switch(command, A) for command in commands)


KEPT = worker_unit(9005, keeps_socket=True)


def test_a_socket_that_systemd_holds_as_declared_is_left_alone() -> None:
    assert roll(answers(unit_answer(KEPT.name), socket_answer(KEPT)), KEPT) == []


def test_a_socket_that_is_wanted_and_missing_switches_the_worker() -> None:
    script = answers(unit_answer(KEPT.name), socket_answer(KEPT, active="inactive"))
    commands = roll(script, KEPT)
    assert commands[0] == f"systemctl enable --quiet {KEPT.socket}"
    assert is_switch(commands[-1], KEPT)


def test_a_socket_that_is_not_wanted_any_more_switches_the_worker() -> None:
    commands = roll(answers(unit_answer(A.name), socket_answer(A)), A)
    assert commands[0] == f"systemctl disable --quiet {A.socket}"
    assert is_switch(commands[-1], A)


def test_a_socket_that_is_open_but_not_enabled_costs_no_restart() -> None:
    disabled = [*socket_answer(KEPT)[:-1], "UnitFileState=disabled"]
    commands = roll(answers(unit_answer(KEPT.name), disabled), KEPT)
    assert commands == [f"systemctl enable --quiet {KEPT.socket}"]


def test_after_a_failure_no_other_worker_of_any_host_is_restarted() -> None:
    stale = answers(unit_answer(A.name, deployment="d0"), unit_answer(B.name, deployment="d0"))
    script = {"worker-switch": {"success": False}} | stale
    hosts = FakeHosts({"one": dict(script), "two": dict(script)})
    rollout = Rollout()
    with pytest.raises(Exception, match="hosts"):
        hosts.run(operations.roll_workers, workers=[A, B], rollout=rollout, _serial=True)
    restarts = [
        command
        for host in hosts.state.inventory
        for command in host.connector.executed_commands
        if is_switch(command, A) or is_switch(command, B)
    ]
    assert len(restarts) == 1
    assert rollout.failed_on is not None


NGINX = ["unit=nginx.service", "ActiveState=active", "UnitFileState=enabled"]


def nginx(script: Answers, main: ManagedFile) -> list[str]:
    answers = TOLD | script
    return run(operations.run_nginx, answers, files=[], main=lambda _: main, probe="8009")


def test_nginx_is_activated_after_all_is_staged_and_only_for_another_configuration() -> None:
    staged = nginx({"systemctl show": NGINX}, FILE)
    steps = ("nginx-activate", "install -m", "rm -f --")
    order = [next(step for step in steps if step in command) for command in staged]
    assert order == ["rm -f --", "install -m", "nginx-activate"]
    # What arrived is compared with what was sent, by the script that holds the lock.
    probe, digest, *declared = staged[-1].split()[-4:]
    assert (probe, declared) == ("8009", [FILE.sha256, FILE.path])
    same = {"systemctl show": NGINX, "cat ": digest, **file_answer(FILE)}
    assert nginx(same, FILE) == []


def test_a_run_that_was_cut_before_the_reload_is_repaired() -> None:
    """The file is right, but nginx never took it over."""
    commands = nginx({"systemctl show": NGINX, "cat ": "older", **file_answer(FILE)}, FILE)
    assert not any("install -m" in command for command in commands)
    assert "nginx-activate" in commands[-1]


def test_another_binary_than_the_one_that_runs_takes_over_with_the_same_configuration() -> None:
    digest = nginx({"systemctl show": NGINX}, FILE)[-1].split()[-2]
    same = {"systemctl show": NGINX, "cat ": digest, **file_answer(FILE)}
    replaced = {"nginx -v": [TOLD["nginx -v"], "outdated"]} | same
    commands = nginx(replaced, FILE)
    assert not any("install -m" in command for command in commands)
    assert "nginx-activate" in commands[-1]


def test_the_configuration_is_for_the_version_that_the_host_has() -> None:
    asked: list[str] = []

    def main(version: nginx_versions.Version) -> ManagedFile:
        asked.append(str(version))
        return FILE

    run(operations.run_nginx, TOLD, files=[], main=main, probe="8009")
    assert asked[-1] == "1.22.1"


def test_before_an_upgrade_what_would_change_is_told_for_a_version_that_can_do_it() -> None:
    """At prepare: what the older one that is still installed can do does not count."""
    asked: list[nginx_versions.Version] = []

    def main(version: nginx_versions.Version) -> ManagedFile:
        asked.append(version)
        return FILE

    needed = nginx_versions.oldest_with([Feature.STICKY, Feature.HTTP2_DIRECTIVE])
    run(operations.run_nginx, TOLD, files=[], main=main, probe="8009", oldest=needed)
    assert asked[0] == needed == nginx_versions.ARRIVALS[Feature.STICKY].since


def test_a_host_without_nginx_is_told_apart() -> None:
    hosts = FakeHosts({"h": {"nginx -v": ["sh: nginx: oh no"]}})
    with pytest.raises(Exception, match="hosts"):
        hosts.run(operations.run_nginx, files=[], main=lambda _: FILE, probe="8009")
    assert hosts.failed() == {"h"}


def test_a_worker_that_is_no_longer_declared_is_stopped_and_forgotten() -> None:
    script: Answers = {"list-units": [A.name, B.name]}
    arguments = {"settings_file": "/etc/gpu-service/worker-{}.env".format}
    assert run(operations.retire_workers, script, keep=[9005, 9006], **arguments) == []
    commands = run(operations.retire_workers, script, keep=[9006], **arguments)
    assert commands[0] == f"systemctl disable --quiet --now {A.socket} {A.name}"
    assert commands[1].startswith("rm -f -- /etc/gpu-service/worker-9005.env ")
