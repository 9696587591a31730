"""A named set of hosts: bring it up, take it down, tell how it fares.

Every function that changes a lab runs in a command that holds the lab's lock, and is the only
writer of that lab's state.json, ssh_config and known_hosts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from lab import host as hosts
from lab import layer, names, network, relay
from lab.cgroup import Cgroup
from lab.errors import LabError, LabNotUp
from lab.image import base_path, ensure_base
from lab.paths import LabPaths, write_json, write_text
from lab.requirements import install_tools, require
from lab.state import HostPhase, HostState, LabPhase, LabState, relay_process, relayed
from lab.system import detach, run, wait_for
from lab.trash import discard

RELAY_TIMEOUT_S: Final = 20
SSH_TIMEOUT_S: Final = 20
Progress = Callable[[str], None]


@contextmanager
def locked(paths: LabPaths) -> Iterator[None]:
    """Hold the lab's lock. Raises LabError at once when another command has it."""
    paths.lock.parent.mkdir(parents=True, exist_ok=True)
    with paths.lock.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise LabError(
                f"another command (pid {lock.read().strip() or 'unknown'}) is changing the lab "
                f"{paths.name!r}; wait for it to end"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def setup(*, progress: Progress) -> Path:
    """Make the machine ready: tools, then the base image. Returns the image's path."""
    require()
    install_tools(progress)
    paths = LabPaths.of(names.DEFAULT_LAB)
    if not base_path(paths.home).is_dir():
        progress("building the base image (once; about a minute)")
    return ensure_base(paths.home, in_use=lambda: _bases_in_use(paths.home), progress=progress)


def up(
    name: str,
    wanted: Sequence[str],
    *,
    gateway_port: int = names.DEFAULT_GATEWAY_PORT,
    layers: Sequence[str] = (),
    progress: Progress,
) -> LabState:
    """Make sure that the wanted hosts run; hosts that run already stay as they are.

    Those that are new get the layers. What an `up` that was killed left behind is removed first.
    Raises LabError.
    """
    for host in wanted:
        names.allot_octet(host, taken=())
    names.check_lab_name(name)
    layer.check(layers)
    base = setup(progress=progress)
    paths = LabPaths.of(name)
    with locked(paths):
        state = LabState.read(paths)
        if state is not None and not _can_go_on(paths, state):
            progress("removing what an interrupted run left behind")
            state = None
        if state is None:
            state = _begin(paths, name=name, base=base, gateway_port=gateway_port)
        elif gateway_port not in (names.DEFAULT_GATEWAY_PORT, state.gateway_port):
            raise LabError(
                f"the lab {name!r} already uses gateway port {state.gateway_port}; to change it, "
                "take the lab down first: python -m lab down"
            )
        elif state.base != base.name:
            progress("the recipe of the base image has changed; `down` and `up` to use it")
        state = _add_hosts(paths, state, wanted, layers=_layers(paths, state, layers, progress))
        _check_ports(paths, state)
        _start_relay(paths, state)
        _start_hosts(paths, state, wanted, progress=progress)
        state = replace(state, phase=LabPhase.UP)
        write_json(paths.state, state.to_json())
    return state


def down(name: str) -> bool:
    """End the lab and remove everything of it but its lock; False when there was nothing."""
    paths = LabPaths.of(names.check_lab_name(name))
    found = (
        paths.directory.exists()
        or bool(network.existing(name))
        or any(directory.exists() for directory in Cgroup(name).directories)
    )
    if found:
        with locked(paths):
            _sweep(paths)
    return found


def _can_go_on(paths: LabPaths, state: LabState) -> bool:
    """Whether `up` may build on what is there, or must begin afresh: after a first `up` that was
    killed, and after the machine itself rebooted."""
    return (
        state.phase is LabPhase.UP
        and network.exists(state.name)
        and base_path(paths.home, state.base).is_dir()
    )


def _begin(paths: LabPaths, *, name: str, base: Path, gateway_port: int) -> LabState:
    _sweep(paths)
    paths.directory.mkdir(parents=True)
    state = LabState(
        name=name,
        number=names.choose_number(name, taken=_numbers_in_use(paths)),
        run_id=secrets.token_hex(8),
        phase=LabPhase.STARTING,
        base=base.name,
        gateway_port=gateway_port,
        hosts=(),
    )
    write_json(paths.state, state.to_json())
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(paths.ssh_key)])
    network.create_controller(name)
    return state


def _sweep(paths: LabPaths) -> None:
    """End and remove everything that carries the lab's name, in whatever state it was left."""
    # First, so that a daemon which is still on its way finds its run gone.
    paths.state.unlink(missing_ok=True)
    Cgroup(paths.name).kill()
    for namespace in network.existing(paths.name):
        network.delete(namespace)
    if inside := _mounts_below(paths.directory):
        raise LabError(f"something is mounted in the lab's folder: unmount {', '.join(inside)}")
    discard(paths.directory, home=paths.home)


def _mounts_below(directory: Path) -> list[str]:
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if Path(point).is_relative_to(directory)]


def _layers(
    paths: LabPaths, state: LabState, wanted: Sequence[str], progress: Progress
) -> tuple[str, ...]:
    """Folders of the layers, over the base image that this lab runs on."""
    return tuple(
        layer.ensure(
            name,
            home=paths.home,
            base=base_path(paths.home, state.base),
            in_use=lambda: _layers_in_use(paths.home),
            progress=progress,
        )
        for name in wanted
    )


def _add_hosts(
    paths: LabPaths, state: LabState, wanted: Sequence[str], *, layers: tuple[str, ...]
) -> LabState:
    """The state with the wanted hosts in it, and the files by which SSH knows them."""
    for name in wanted:
        known = [host for host in state.hosts if host.name == name]
        if known and not set(layers) <= set(known[0].layers):
            raise LabError(
                f"{name} is there already, without {', '.join(layers)}; a host gets its layers "
                f"when it is made: python -m lab --name {state.name} down, then up"
            )
        if known:
            continue
        octet = names.allot_octet(name, taken={host.octet for host in state.hosts})
        spec = names.HostSpec(name=name, octet=octet, layers=layers)
        state = replace(state, hosts=(*state.hosts, spec))
    write_json(paths.state, state.to_json())
    for host in state.hosts:
        hosts.prepare(paths, host)
    write_text(paths.known_hosts, _known_hosts(paths, state))
    write_text(paths.ssh_config, _ssh_config(paths, state))
    return state


def _known_hosts(paths: LabPaths, state: LabState) -> str:
    return "".join(
        f"[{host.loopback(number=state.number)}]:{names.SSH_PORT} "
        f"{hosts.public_key(paths, host.name)}\n"
        for host in state.hosts
    )


def _ssh_config(paths: LabPaths, state: LabState) -> str:
    blocks = [
        f"Host {host.name}\n    HostName {host.loopback(number=state.number)}\n"
        for host in state.hosts
    ]
    common = (
        f"Host {' '.join(host.name for host in state.hosts)}\n"
        "    User root\n"
        f"    Port {names.SSH_PORT}\n"
        f"    IdentityFile {paths.ssh_key}\n"
        "    IdentitiesOnly yes\n"
        f"    UserKnownHostsFile {paths.known_hosts}\n"
        "    GlobalKnownHostsFile /dev/null\n"
        "    StrictHostKeyChecking yes\n"
        "    ControlMaster auto\n"
        f"    ControlPath {paths.directory}/ssh-%n\n"
        "    ControlPersist 60\n"
        "    ConnectTimeout 10\n"
        # A host whose plug was pulled says nothing: notice within 15 s.
        "    ServerAliveInterval 5\n"
    )
    return "\n".join([*blocks, common])


def _check_ports(paths: LabPaths, state: LabState) -> None:
    """Raises LabError, before anything boots, for an address that someone else listens on."""
    served = set(relayed(paths))
    for route in relay.routes(state):
        if str(route) in served:
            continue
        try:
            with closing(relay.listen(route) or socket.socket()):
                pass
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise LabError(f"can't listen on {route}: {error.strerror}") from None
            gateway = route.listen[1] == state.gateway_port
            advice = (
                "choose another port for the gateway on this machine: "
                "python -m lab down; python -m lab up --gateway-port 8010"
                if gateway
                else "end what listens there"
            )
            raise LabError(
                f"{route} is taken: something on this machine listens on port {route.listen[1]} "
                f"(`ss -ltnp sport = :{route.listen[1]}` tells what); {advice}"
            ) from None


def _start_relay(paths: LabPaths, state: LabState) -> None:
    wanted = {str(route) for route in relay.routes(state) if not route.optional}
    running = relay_process(paths)
    if running is not None:
        if wanted <= set(relayed(paths)):
            return
        running.send(signal.SIGHUP)
    else:
        Cgroup(state.name, relay.PART).kill()
        paths.relay.unlink(missing_ok=True)
        detach(
            [sys.executable, "-m", "lab.relay", state.name, state.run_id],
            log=paths.relay_log,
            cwd=hosts.CHECKOUT,
        )
    wait_for(
        lambda: wanted <= set(relayed(paths)),
        awaited="the relay to listen",
        timeout_s=RELAY_TIMEOUT_S,
        log=str(paths.relay_log),
    )


def _start_hosts(
    paths: LabPaths, state: LabState, wanted: Sequence[str], *, progress: Progress
) -> None:
    started_at = time.monotonic()
    starting = []
    for name in wanted:
        found = HostState.read(paths.host(name))
        if found is None or found.phase is HostPhase.OFF:
            hosts.power_on(paths, state, state.host(name))
            starting.append(name)
        elif found.phase is HostPhase.BOOTING:
            starting.append(name)
    for name in wanted:
        if name not in starting:
            progress(f"{name} is up already")
    for name in starting:
        hosts.wait_running(paths, name, timeout_s=hosts.BOOT_TIMEOUT_S)
        _wait_ssh(paths, state, state.host(name))
        progress(f"{name} booted ({time.monotonic() - started_at:.1f} s)")


def _wait_ssh(paths: LabPaths, state: LabState, host: names.HostSpec) -> None:
    """Wait until the host's sshd greets, by the way that the operator's ssh takes."""
    address = (host.loopback(number=state.number), names.SSH_PORT)

    def greeted() -> bool:
        try:
            with socket.create_connection(address, timeout=2) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    wait_for(
        greeted,
        awaited=f"sshd of {host.name} to answer on {relay.address_text(address)}",
        timeout_s=SSH_TIMEOUT_S,
        log=str(paths.host(host.name).console_log),
    )


def reboot(name: str, host: str, *, timeout_s: float = hosts.BOOT_TIMEOUT_S) -> None:
    """Reboot a host from inside, in order, and wait until it is back. Raises LabError."""
    paths, state = _running(name)
    spec = state.host(host)
    with locked(paths):
        before = HostState.read(paths.host(host))
        if before is None or before.phase is not HostPhase.RUNNING:
            raise LabError(
                f"{host} does not run, so it can't reboot: python -m lab power-on {host}"
            )
        before.supervisor.send(signal.SIGUSR1)
        hosts.wait_running(
            paths, host, boots=before.boots + 1, timeout_s=timeout_s + hosts.SHUTDOWN_TIMEOUT_S
        )
        _wait_ssh(paths, state, spec)


def power_off(name: str, host: str, *, pull_the_plug: bool = False) -> None:
    """Shut a host down in order, or end all its processes at once. Its disk stays."""
    paths, state = _running(name)
    state.host(host)
    with locked(paths):
        found = HostState.read(paths.host(host))
        if found is None or found.phase is HostPhase.OFF:
            return
        if pull_the_plug:
            hosts.sweep(name, host)
        else:
            found.supervisor.send(signal.SIGTERM)
        wait_for(
            lambda: not found.supervisor.alive(),
            awaited=f"{host} to shut down",
            timeout_s=hosts.SHUTDOWN_TIMEOUT_S + 10,
            log=str(paths.host(host).supervisor_log),
        )


def power_on(name: str, host: str, *, progress: Progress) -> None:
    """Boot a host of the lab that is off, with the disk it had."""
    paths, state = _running(name)
    state.host(host)
    with locked(paths):
        _start_hosts(paths, state, [host], progress=progress)


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """One line of `status`."""

    name: str
    phase: HostPhase
    boots: int
    address: str
    ssh: str


@dataclass(frozen=True, kw_only=True)
class LabStatus:
    """How a lab fares. `listening`: where the relay leads in from."""

    name: str
    complete: bool
    listening: list[str]
    hosts: list[HostStatus]


def status(name: str) -> LabStatus | None:
    """None when there is no such lab. Looks only; needs no lock."""
    paths = LabPaths.of(names.check_lab_name(name))
    state = LabState.read(paths)
    if state is None:
        return None
    found = []
    for host in state.hosts:
        at = HostState.read(paths.host(host.name))
        found.append(
            HostStatus(
                name=host.name,
                phase=at.phase if at else HostPhase.OFF,
                boots=at.boots if at else 0,
                address=host.address,
                ssh=f"{host.loopback(number=state.number)}:{names.SSH_PORT}",
            )
        )
    listening = relayed(paths)
    return LabStatus(
        name=name,
        complete=state.phase is LabPhase.UP and bool(listening),
        listening=listening,
        hosts=found,
    )


def gateway(name: str) -> str:
    """ADDRESS:PORT of this machine that leads to the first gateway. Raises LabError."""
    return relay.gateway(_running(name)[1])


def all_labs() -> list[str]:
    """Names of the labs that exist on this machine."""
    return sorted(path.parent.name for path in _state_files(LabPaths.of(names.DEFAULT_LAB).home))


def _running(name: str) -> tuple[LabPaths, LabState]:
    paths = LabPaths.of(names.check_lab_name(name))
    state = LabState.read(paths)
    if state is None or state.phase is not LabPhase.UP:
        raise LabNotUp(name)
    return paths, state


def _state_files(home: Path) -> list[Path]:
    return list((home / "labs").glob("*/state.json"))


def _states(home: Path) -> list[LabState]:
    found = (LabState.read(LabPaths(home=home, name=p.parent.name)) for p in _state_files(home))
    return [state for state in found if state is not None]


def _numbers_in_use(paths: LabPaths) -> set[int]:
    return {state.number for state in _states(paths.home) if state.name != paths.name}


def _bases_in_use(home: Path) -> set[str]:
    return {state.base for state in _states(home)}


def _layers_in_use(home: Path) -> set[str]:
    return {layer for state in _states(home) for host in state.hosts for layer in host.layers}


def controller_namespace(name: str) -> Path:
    """File of the network namespace in which `python -m lab run` starts commands."""
    paths, _ = _running(name)
    if not network.exists(paths.name):
        raise LabNotUp(name)
    return network.namespace_path(paths.name)
