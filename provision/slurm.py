"""The trainers as a Slurm cluster: MUNGE's key, slurm.conf, the daemons.

The first trainer is the controller; all are nodes. The key is made on the controller and goes from
there to the others through this process's memory; it is in no diff, no log and no file here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass

from pyinfra import host, inventory
from pyinfra.api import QuoteString, StringCommand, deploy, operation
from pyinfra.api.host import Host

from provision import facts, operations, record, rendering
from provision.facts import quoted, script
from provision.operations import Commands, ManagedFile, ask, executing, fail
from provision.settings import SERVICE_STATE, Fleet, TrainerSettings

KEY = "/etc/munge/munge.key"
KEY_BYTES = 1024
CONF = "/etc/slurm/slurm.conf"
GRES = "/etc/slurm/gres.conf"
CGROUP = "/etc/slurm/cgroup.conf"
MUNGE, CONTROLLER, NODE = "munge.service", "slurmctld.service", "slurmd.service"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host as slurm.conf names it."""

    hostname: str
    address: str
    cpu_cores: int
    memory_mb: int
    gpus: int
    cgroup: int = 2


def is_used(fleet: Fleet) -> bool:
    """Whether training goes through Slurm: where it is made here, or the first trainer has it."""
    lead = fleet.trainers[fleet.lead_trainer]
    return lead.slurm or bool(_lead(fleet).get_fact(facts.SlurmAnswers))


def _lead(fleet: Fleet) -> Host:
    return _host(fleet.lead_trainer)


def _host(name: str) -> Host:
    found = inventory.get_host(name)
    assert isinstance(found, Host), f"{name} is in the fleet, so in the inventory"
    return found


def nodes(fleet: Fleet) -> list[Node]:
    """All trainers, as they say of themselves."""
    found = []
    for name in fleet.trainers:
        size = _host(name).get_fact(facts.NodeSize)
        hardware = _host(name).get_fact(facts.HostHardware)
        found.append(
            Node(
                hostname=size.hostname,
                address=fleet.addresses[name],
                cpu_cores=hardware.cpu_cores,
                memory_mb=size.memory_mb,
                gpus=hardware.nvidia_gpus,
                cgroup=size.cgroup,
            )
        )
    return found


def config_files(members: list[Node], *, of: Node) -> list[ManagedFile]:
    """Slurm's configuration on one host: the same bytes on all but for cgroup.conf. Pure.

    gres.conf is there only where there are GPUs.
    """
    gpus = any(node.gpus for node in members)
    text = rendering.render("slurm.conf.j2", controller=members[0], nodes=members, gpus=gpus)
    # Slurm's own detection gives up where both versions of control groups are mounted.
    files = [
        ManagedFile(path=CONF, content=text),
        ManagedFile(path=CGROUP, content=f"CgroupPlugin=cgroup/v{of.cgroup}\n".encode()),
    ]
    if gpus:
        files.append(
            ManagedFile(path=GRES, content=rendering.render("gres.conf.j2", nodes=members))
        )
    return files


@deploy("Slurm users")
def users(settings: TrainerSettings) -> None:
    """Users whose numbers Slurm needs equal on all hosts, before packages choose their own."""
    wanted = (
        ("slurm", settings.slurm_uid, "/etc/slurm"),
        (settings.service_user, settings.slurm_service_uid, SERVICE_STATE),
    )
    for name, number, home in host.loop(wanted):  # type: ignore[no-untyped-call]
        record.group(name=f"Group {name}", group=name, gid=number, system=True)
        record.user(  # noqa: S604  `shell` is the user's login shell
            name=f"User {name}",
            user=name,
            uid=number,
            group=name,
            system=True,
            home=home,
            ensure_home=False,
            shell="/sbin/nologin",
        )


@deploy("Slurm")
def member(settings: TrainerSettings, fleet: Fleet) -> None:
    """One host of the cluster; the first is the controller as well."""
    controls = host.name == fleet.lead_trainer
    record.packages(name="Slurm and MUNGE are installed", packages=list(settings.slurm_packages))
    operations.directories(
        name="Slurm's folders",
        paths={
            "/etc/slurm": ("755", "root"),
            "/var/log/slurm": ("755", "slurm"),
            "/var/spool/slurm": ("755", "slurm"),
            **({"/var/spool/slurm/ctld": ("700", "slurm")} if controls else {}),
            "/var/spool/slurm/d": ("755", "root"),
        },
    )
    same_numbers(
        name="Users have the same numbers", users=("slurm", settings.service_user), fleet=fleet
    )
    make_key(name="The cluster has a key", controls=controls)
    share_key(name="The key is on every host", controls=controls, fleet=fleet)
    members = nodes(fleet)
    files = config_files(members, of=members[list(fleet.trainers).index(host.name)])
    operations.place_files(name="Slurm's configuration", files=files)
    operations.units_run(
        name="Slurm runs with it",
        files={
            MUNGE: (KEY,),
            **({CONTROLLER: tuple(f.path for f in files)} if controls else {}),
            NODE: tuple(f.path for f in files),
        },
    )


@operation()
def same_numbers(users: Iterable[str], fleet: Fleet) -> Commands:
    """Refuse hosts whose users have other numbers than on the controller: no job would run."""
    if not executing():
        return
    command = quoted("id", "-u", "--", *users)
    _, there = ask(command, of=_lead(fleet))
    _, here = ask(command)
    if here.stdout_lines != there.stdout_lines:
        yield fail(
            f"user numbers of {', '.join(users)} are {', '.join(here.stdout_lines)} here and "
            f"{', '.join(there.stdout_lines)} on {fleet.lead_trainer}; Slurm needs them equal: "
            "usermod --uid NUMBER USER"
        )


@operation()
def make_key(controls: bool) -> Commands:
    """The cluster's key, made once, on the controller."""
    if not controls or host.get_fact(facts.FileStates, paths=(KEY,)).get(KEY):
        return
    yield record.file(KEY)
    yield script(
        'umask 077; head -c "$2" /dev/urandom >"$1.new" && chown munge:munge "$1.new" && '
        'chmod 400 "$1.new" && mv -fT "$1.new" "$1"',
        KEY,
        str(KEY_BYTES),
    )


@operation()
def share_key(controls: bool, fleet: Fleet) -> Commands:
    """The controller's key on this host: mode 0400, readable by MUNGE alone.

    It travels as standard input, so it is in no argument and in no temporary file.
    """
    if controls:
        return
    if not executing():
        # The controller may not have one yet; whether it differs shows when it is written.
        if host.get_fact(facts.FileStates, paths=(KEY,)).get(KEY) is None:
            yield StringCommand("true")
        return
    # Asked as the current operation would ask here: by sudo, or not.
    succeeded, output = ask(quoted("base64", "-w", "0", KEY), of=_lead(fleet))
    if not succeeded:
        yield fail(f"the key cannot be read on {fleet.lead_trainer}: {output.stderr}")
        return
    encoded = output.stdout.strip()
    wanted = ManagedFile(
        path=KEY,
        content=base64.b64decode(encoded),
        mode="400",
        user="munge",
        group="munge",
        secret=True,
    )
    if wanted.matches(host.get_fact(facts.FileStates, paths=(KEY,)).get(KEY)):
        return
    yield record.file(KEY)
    yield StringCommand(
        *("sh", "-c"),
        QuoteString(
            'umask 077; base64 -d >"$1.new" && chown munge:munge "$1.new" && chmod 400 "$1.new" '
            '&& mv -fT "$1.new" "$1"'
        ),
        *("key", QuoteString(KEY)),
        _stdin=encoded,
    )


@deploy("Verify Slurm")
def verify(settings: TrainerSettings, fleet: Fleet) -> None:
    """Every host has to be a node that takes jobs."""
    if host.name == fleet.lead_trainer:
        answers(name="All nodes take jobs", count=len(fleet.trainers))


_NODES = """
want=$1 looks=150
ready='^(idle|mixed|allocated|completing)$'
count() { sinfo --noheader --Node --format=%T 2>/dev/null | grep -cE "$ready"; }
while [ "$looks" -gt 0 ] && [ "$(count)" -lt "$want" ]; do looks=$((looks - 1)); sleep 0.2; done
sinfo --Node --format='%N %T %E' 2>&1
[ "$(count)" -ge "$want" ] && exit 0
systemctl --no-pager --lines=5 status munge slurmctld slurmd 2>&1 | tail -n 30
exit 1
"""


@operation()
def answers(count: int) -> Commands:
    """Wait, for half a minute at most, until all nodes are up."""
    if not executing():
        return
    succeeded, output = ask(script(_NODES, str(count)))
    if not succeeded:
        yield fail("not all trainers are nodes that take jobs:", *output.stdout_lines)
        return
    host.log(f"verified: Slurm has {count} nodes that take jobs")
