"""What `uninstall.py` takes away, puts back and leaves, by what was recorded and what is there.

On real hosts: tests/deploy/test_zero_left.py.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from provision import preflight, record, removal
from provision.facts import FileState
from provision.record import Record
from provision.removal import Do, Fate
from provision.settings import SERVICE_STATE, UNITS
from tests.unit.provision import test_operations
from tests.unit.provision.test_operations import Answers, FakeHosts

CONF = removal.NGINX_CONF


def run(operation: Callable[..., Any], answers: Answers, **arguments: Any) -> list[str]:
    """What an operation commands; questions of this module are left out, too."""
    commands = test_operations.run(operation, answers, **arguments)
    return [
        c
        for c in commands
        if "sites-enabled" not in c and "rpm -e --test" not in c and "semanage port" not in c
    ]


def noted(*lines: str) -> Record:
    return record.parse(line.replace(" | ", "\t") for line in lines)


def state(sha256: str, mode: str = "644") -> FileState:
    return FileState(mode=mode, user="root", group="root", sha256=sha256)


REPLACED = (f"file | {CONF} | found | 644 root root old", f"file | {CONF} | wrote | new")
ADDED = ("file | /etc/added | found | absent", "file | /etc/added | wrote | new")


@pytest.mark.parametrize(
    ("lines", "present", "step"),
    [
        (REPLACED, {CONF: state("new")}, {CONF: Do.RESTORE}),
        (REPLACED, {CONF: state("new", mode="600")}, {CONF: Do.RESTORE}),
        (REPLACED, {CONF: state("old")}, {}),  # restored by a run that was cut later
        (REPLACED, {}, {}),  # gone, with its package
        (ADDED, {"/etc/added": state("new")}, {"/etc/added": Do.REMOVE}),
        # Made by a script on the host, so that nobody knows its digest.
        (ADDED[:1], {"/etc/added": state("any")}, {"/etc/added": Do.REMOVE}),
    ],
)
def test_files_go_back_to_what_was_found(
    lines: tuple[str, ...], present: dict[str, FileState], step: dict[str, Do]
) -> None:
    plan = removal.plan_files(noted(*lines), present)
    assert plan.steps == step
    assert plan.left == ()


def test_what_an_earlier_deploy_wrote_is_ours_too() -> None:
    """A rollback brings back what an earlier deploy wrote."""
    lines = (*REPLACED, f"file | {CONF} | wrote | newer")
    assert removal.plan_files(noted(*lines), {CONF: state("new")}).steps == {CONF: Do.RESTORE}


def test_a_file_that_somebody_changed_is_named_and_left() -> None:
    plan = removal.plan_files(noted(*REPLACED, *ADDED), {CONF: state("theirs")})
    assert plan.steps == {}
    assert str(plan.left[0]) == f"{CONF} stays: somebody changed it since the last deploy"


INSTALLED = ("package | nginx | found | absent", "package | nginx | came-package | nginx")


@pytest.mark.parametrize(
    ("lines", "now", "foreign", "fate"),
    [
        ((), "x", (), Fate.UNTOUCHED),
        ((*REPLACED, *INSTALLED), "new", (), Fate.GONE),
        # Somebody's own servers run in the nginx that came with a deploy.
        ((*REPLACED, *INSTALLED), "new", ("/etc/nginx/conf.d/shop.conf",), Fate.AS_FOUND),
        ((*REPLACED, "package | nginx | found | 1.20.1-1"), "new", (), Fate.AS_FOUND),
        ((*REPLACED, *INSTALLED), "theirs", (), Fate.LEFT),
        # A deploy that ended before it configured what it had installed, whatever that is called.
        (INSTALLED, "x", (), Fate.GONE),
        (("package | nginx-full | found | absent",), "x", (), Fate.GONE),
        (("package | nginx | found | absent",), "x", ("/etc/nginx/conf.d/a.conf",), Fate.AS_FOUND),
        (("package | nginx-full | found | 1.22-1",), "x", (), Fate.UNTOUCHED),
        (("package | certbot | found | absent",), "x", (), Fate.UNTOUCHED),
    ],
)
def test_what_becomes_of_nginx(
    lines: tuple[str, ...], now: str, foreign: tuple[str, ...], fate: Fate
) -> None:
    found = noted(*lines)
    plan = removal.plan_files(found, {CONF: state(now)})
    assert removal.nginx_fate(found, plan, foreign) is fate


def journal(*lines: str, **files: str) -> Answers:
    """A host with this record, and these digests of the files that it names."""
    return {
        'cat "$1" 2>/dev/null': [line.replace(" | ", "\t") for line in lines],
        "sha256sum <": [
            line for path, sha in files.items() for line in ("644 root root", f"{sha}  -", path)
        ],
    }


def unit(active: str, enabled: str) -> list[str]:
    return ["unit=nginx.service", f"ActiveState={active}", f"UnitFileState={enabled}"]


DROP_IN = f"{UNITS}/nginx.service.d/gateway.conf"


def nginx_of_somebody(was: str) -> Answers:
    lines = [
        *REPLACED,
        f"file | {DROP_IN} | found | absent",
        f"file | {DROP_IN} | wrote | drop",
        "package | nginx | found | 1.20.1-1",
        f"unit | nginx.service | found | {was}",
    ]
    files = {CONF: "new", DROP_IN: "drop"}
    return {**journal(*lines, **files), "systemctl show": unit("active", "enabled")}


def test_an_nginx_that_was_there_gets_its_configuration_back_checked_and_reloaded() -> None:
    commands = run(removal.nginx_as_found, nginx_of_somebody("enabled active"))
    candidate = "/etc/nginx/.nginx.conf.candidate"
    assert f"record/found{CONF}" in commands[0]
    assert "nginx -t -q" in commands[1]
    assert commands[2:] == [
        f"mv -fT -- {candidate} {CONF}",
        "systemctl reload-or-restart nginx.service",
        f"rm -f -- {DROP_IN}",
        "systemctl daemon-reload",
    ]


def test_an_nginx_that_did_not_run_does_not_run_afterwards() -> None:
    commands = run(removal.nginx_as_found, nginx_of_somebody("disabled inactive"))
    assert "systemctl stop nginx.service" in commands
    assert commands[-1] == "systemctl disable --quiet nginx.service"


def test_an_nginx_whose_configuration_is_somebody_elses_is_not_touched() -> None:
    answers = journal(*REPLACED, *INSTALLED, **{CONF: "theirs"})
    answers["systemctl show"] = unit("active", "enabled")
    assert run(removal.nginx_as_found, answers) == []
    assert run(removal.files_as_found, answers) == []
    assert run(removal.packages_go, {**answers, "rpm -e": ["+nginx 1.26-1"]}) == []


def test_packages_that_something_needs_stay() -> None:
    answers = journal(*REPLACED, *INSTALLED, **{CONF: "old"})
    (command,) = run(removal.packages_go, {**answers, "rpm -e": ["+nginx 1.26-1"]})
    assert "yum remove" in command
    assert command.endswith(" nginx")
    needed = ["+nginx 1.26-1", "\tnginx is needed by (installed) shop-1.0"]
    assert run(removal.packages_go, {**answers, "rpm -e": needed}) == []


def test_packages_go_in_the_reverse_of_the_order_in_which_they_came() -> None:
    """What came later may need what came before."""
    answers = journal("package | a | found | absent", "package | b | found | absent")
    done = run(removal.packages_go, {**answers, "rpm -e": ["+a 1-1", "+b 1-1"]})
    assert [command[-2:] for command in done] == [" b", " a"]


def test_what_is_asked_about_goes_together_with_what_goes_before_it() -> None:
    hosts = FakeHosts(
        {"h": journal("package | a | found | absent", "package | b | found | absent")}
    )
    hosts.run(removal.packages_go)
    (host,) = hosts.state.inventory
    asked = [c for c in host.connector.executed_commands if "rpm -e --test" in c]
    assert [command.rpartition(" gateway ")[2] for command in asked] == ["b", "b a"]


def test_packages_that_should_have_gone_and_did_not_are_named() -> None:
    there = removal.Leaving(installed={"a": "1-1"})
    assert removal.packages_left(there, gone=False) == []
    (left,) = removal.packages_left(there, gone=True)
    assert str(left).startswith("package a stays: it came by a deploy")
    needed = removal.Leaving(installed={"a": "1-1"}, obstacles=("a is needed by shop-1.0",))
    assert [left.why for left in removal.packages_left(needed, gone=True)] == list(needed.obstacles)
    assert removal.packages_left(removal.Leaving(), gone=True) == []


def test_the_record_stays_with_a_package_that_it_tells_of() -> None:
    answers = journal("package | nginx | found | absent")
    answers["stat -c"] = [f"755 root root {record.STATE}"]
    assert run(removal.record_goes, answers, keep=frozenset()) == [f"rm -rf -- {record.STATE}"]
    answers["rpm -e"] = ["+nginx 1.26-1"]
    assert run(removal.record_goes, answers, keep=frozenset()) == []


def test_a_package_that_a_deploy_brought_to_another_version_is_named() -> None:
    found = noted("package | nginx | found | 1.20-1", "package | nginx | wrote | 1.26-1")
    (left,) = removal.replaced_packages(found, {"nginx": "1.26-1"})
    assert str(left).startswith("package nginx 1.26-1 stays: it was 1.20-1 before")
    # Somebody else's update, and none at all.
    assert removal.replaced_packages(found, {"nginx": "1.28-1"}) == []
    assert removal.replaced_packages(found, {"nginx": "1.20-1"}) == []


def test_labels_of_ports_go_where_they_are_still_there() -> None:
    lines = ("port | http_port_t tcp 9005 | found | absent",)
    labels = ["http_port_t                    tcp      9005, 9007", "http_port_t tcp 9010-9012"]
    (command,) = run(
        removal.selinux_as_found, {**journal(*lines), "semanage port -l -n -C": labels}
    )
    assert "semanage import" in command
    assert "port -d -p tcp 9005" in command
    assert "9007" not in command
    assert run(removal.selinux_as_found, journal(*lines)) == []


def test_users_go_that_were_made_here_and_no_others() -> None:
    lines = (
        "user | gpu-service | found | absent",
        "group | gpu-service | found | absent",
        "user | slurm | found | present",
        "package | nginx | came-user | nginx",
    )
    assert removal.accounts_of(noted(*lines), ["nginx"]) == [
        "user:nginx",
        "user:gpu-service",
        "group:gpu-service",
    ]
    assert "user:nginx" not in removal.accounts_of(noted(*lines), [])


def test_what_a_package_runs_as_stays_with_a_package_that_something_needs() -> None:
    answers = journal(*REPLACED, *INSTALLED, "package | nginx | came-user | nginx", **{CONF: "old"})
    answers["/etc/passwd"] = ["user:nginx"]
    (command,) = (c for c in run(removal.accounts_go, answers) if "/etc/passwd" not in c)
    assert " gateway nginx /var" in command
    answers["rpm -e"] = ["+nginx 1.26-1", "\tnginx is needed by (installed) nginx-mod-stream-1.26"]
    assert [c for c in run(removal.accounts_go, answers) if "/etc/passwd" not in c] == []


def test_copies_of_keys_that_a_run_left_which_was_cut_go_too() -> None:
    remains = removal.remains_of(["/etc/pki/gpu-gateway/acme.key"])
    for what in ("candidate", "incoming", "outgoing"):
        assert f"/etc/pki/gpu-gateway/.acme.key.{what}" in remains


def test_the_models_go_unless_they_are_kept() -> None:
    found = noted("folder | /etc/a | found | absent", "folder | /etc/a/b | found | absent")
    whole, made = removal.folders_of(found, frozenset())
    assert SERVICE_STATE in whole
    assert made == ["/etc/a/b", "/etc/a"]
    assert SERVICE_STATE not in removal.folders_of(found, frozenset({"models"}))[0]


STATE, STATES_S, LOG = "/var/spool/slurm", "/var/spool/slurm/d", "/var/log/slurm"
SLURM_S = [f"folder | {path} | found | absent" for path in (STATE, STATES_S, LOG)]


def test_what_daemons_wrote_goes_with_their_package() -> None:
    whole, made = removal.folders_of(noted(*SLURM_S), frozenset(), ["slurm-slurmd"])
    assert {STATE, LOG} <= {*whole}
    assert made == []
    whole, made = removal.folders_of(noted(*SLURM_S), frozenset({"logs"}), ["slurm-slurmd"])
    assert STATE in whole
    assert LOG not in whole
    assert made == []  # so the logs are nothing that the record has to stay for


def test_what_daemons_wrote_stays_where_they_stay_or_were_there_before() -> None:
    whole, made = removal.folders_of(noted(*SLURM_S), frozenset(), ["nginx"])
    assert not {STATE, LOG} & {*whole}
    assert {*made} == {STATE, STATES_S, LOG}  # where they are empty
    whole, _ = removal.folders_of(noted(), frozenset(), ["slurm-slurmd"])
    assert STATE not in whole


def test_ports_that_deploys_opened_are_closed_and_those_they_shut_are_open_again() -> None:
    answers = {
        "busctl": [
            *('runtime a(ss) 1 "22" "tcp"', 'permanent a(ss) 1 "22" "tcp"'),
            *('runtime a(ss) 1 "8009" "tcp"', 'permanent a(ss) 1 "8009" "tcp"'),
            *("firewall\tgateway\topened\t8009/tcp", "firewall\tworker\tshut\t9005/tcp"),
        ]
    }
    assert run(removal.firewall_as_found, answers) == [
        "firewall-cmd --quiet --permanent --remove-port=8009/tcp",
        "firewall-cmd --quiet --remove-port=8009/tcp",
        "firewall-cmd --quiet --permanent --add-port=9005/tcp",
        "firewall-cmd --quiet --add-port=9005/tcp",
    ]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (["Permissive", "permissive"], ["SELINUX=$2", "setenforce 1"]),
        (["Enforcing", "enforcing"], []),  # it is as it was, whoever did it
        (["Disabled", "disabled"], []),  # somebody else's doing
    ],
)
def test_selinux_goes_back_where_it_is_what_a_deploy_made_of_it(
    now: list[str], expected: list[str]
) -> None:
    lines = (
        "selinux | mode | found | enforcing enforcing",
        "selinux | mode | wrote | permissive",
    )
    commands = run(removal.selinux_as_found, {**journal(*lines), "getenforce": now})
    assert len(commands) == len(expected)
    for command, part in zip(commands, expected, strict=True):
        assert part in command


def test_units_whose_file_was_placed_here_are_stopped_by_name() -> None:
    lines = (
        f"file | {UNITS}/gateway-metrics.service | found | absent",
        f"file | {UNITS}/gpu-worker@.service | found | absent",
        f"file | {DROP_IN} | found | absent",
    )
    assert removal.placed_units(noted(*lines)) == ["gateway-metrics.service"]


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        ({}, {"logs"}),
        ({"keep": "models,logs"}, {"models", "logs"}),
        ({"keep": "nothing"}, set()),
    ],
)
def test_what_is_kept(data: dict[str, Any], kept: set[str]) -> None:
    assert preflight.kept(SimpleNamespace(data=data)) == kept


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(preflight.RefusedError, match="it may be logs, models"):
        preflight.kept(SimpleNamespace(data={"keep": "packages"}))
