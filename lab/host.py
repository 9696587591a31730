"""One host: its supervisor process, and the commands to it.

The supervisor (`python -m lab.host LAB HOST RUN_ID`, one process and one thread per host) owns the
host's overlay mount, which lives in a mount namespace that ends with it, starts systemd-nspawn,
starts it again when the host reboots, and alone writes the host's state.json. Commands reach it by
signals: SIGTERM shuts the host down, SIGUSR1 reboots it.
"""

from __future__ import annotations

import enum
import fcntl
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Final

from lab import names, network
from lab.cgroup import Cgroup
from lab.errors import LabError
from lab.image import base_path
from lab.layer import layer_path
from lab.paths import HostPaths, LabPaths, write_json, write_text
from lab.process import Process
from lab.state import HostPhase, HostState, LabState
from lab.system import detach, die_with_parent, run, wait_for

# Where `python -m lab.…` finds the package.
CHECKOUT: Final = Path(__file__).resolve().parent.parent
BOOT_TIMEOUT_S: Final = 60
SHUTDOWN_TIMEOUT_S: Final = 40
# systemd-nspawn's exit status when the system inside rebooted.
_REBOOT_STATUS: Final = 133
_NSPAWN_RUNTIME: Final = Path("/run/systemd/nspawn")
# systemd, PID 1 of the host: "starts the reboot.target unit" on this signal.
_REBOOT_SIGNAL: Final = signal.SIGRTMIN + 5


class _Request(enum.Enum):
    NONE = "none"
    SHUT_DOWN = "shut down"
    REBOOT = "reboot"


class Supervisor:
    """Runs one host from power-on to power-off."""

    def __init__(self, *, state: LabState, paths: LabPaths, host: names.HostSpec) -> None:
        self._lab = state
        self._host = host
        self._paths = paths.host(host.name)
        # The uppermost first, as overlayfs wants them.
        self._lower = [
            *(layer_path(paths.home, layer) for layer in reversed(host.layers)),
            base_path(paths.home, state.base),
        ]
        self._cgroup = Cgroup(state.name, host.name)
        self._request = _Request.NONE
        self._state = HostState(
            supervisor=Process.of(os.getpid()), phase=HostPhase.OFF, boots=0, leader_pid=None
        )

    def run(self) -> None:
        """Boot the host, and again each time it reboots; return when it is off."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)
        self._move(HostPhase.BOOTING)
        try:
            self._mount()
            while self._boot() == _REBOOT_STATUS and self._request is not _Request.SHUT_DOWN:
                # Nothing of the boot before may live on, whatever state it was left in.
                self._cgroup.kill()
                self._move(HostPhase.BOOTING)
        finally:
            self._cgroup.kill()
            self._move(HostPhase.OFF)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._request = _Request.SHUT_DOWN if number == signal.SIGTERM else _Request.REBOOT

    def _move(self, phase: HostPhase, *, leader_pid: int | None = None) -> None:
        self._state = self._state.moved(phase, leader_pid=leader_pid)
        write_json(self._paths.state, self._state.to_json())
        print(f"{time.strftime('%H:%M:%S')} {self._host.name} is {phase.value}", flush=True)

    def _booting(self) -> bool:
        """systemd says READY again after each daemon-reload; only the first tells anything."""
        return self._state.phase is HostPhase.BOOTING

    def _mount(self) -> None:
        # "volatile" (no syncing to disk, the hosts are disposable) refuses a work folder that an
        # earlier mount used.
        shutil.rmtree(self._paths.work, ignore_errors=True)
        for path in (self._paths.work, self._paths.root):
            path.mkdir(exist_ok=True)
        options = ",".join(
            (
                f"lowerdir={':'.join(map(str, self._lower))}",
                f"upperdir={self._paths.upper}",
                f"workdir={self._paths.work}",
                "volatile",
            )
        )
        run(["mount", "-t", "overlay", "-o", options, "overlay", str(self._paths.root)])
        # What systemd-nspawn leaves there when it is killed goes with the mount namespace.
        _NSPAWN_RUNTIME.mkdir(parents=True, exist_ok=True)
        run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(_NSPAWN_RUNTIME)])

    def _boot(self) -> int:
        """One life of the host. Returns systemd-nspawn's exit status."""
        namespace = network.attach(self._lab.name, self._host)
        self._cgroup.create()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify,
            self._paths.console_log.open("ab") as console,
        ):
            notify.bind("")  # The kernel picks a free abstract name.
            child = subprocess.Popen(
                self._command(namespace),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={
                    "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin"),
                    "NOTIFY_SOCKET": "@" + notify.getsockname()[1:].decode(),
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                    # A host sets net.* for itself; its own namespace holds what it sets.
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
                    # EL has /tmp on disk; nspawn's tmpfs would also cap it at a part of memory.
                    "SYSTEMD_NSPAWN_TMPFS_TMP": "0",
                },
                preexec_fn=self._prepare_child,
            )
            try:
                return self._watch(child, notify)
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()

    def _prepare_child(self) -> None:
        # systemd shuts the host down in order if the supervisor should die.
        die_with_parent(signal.SIGTERM)
        self._cgroup.enter()

    def _command(self, namespace: Path) -> list[str]:
        uptime_s = int(float(Path("/proc/uptime").read_text().split()[0]))
        return [
            # A clock since boot of its own: the host's uptime starts at 0, as that of a machine.
            *("unshare", "--time", "--boottime", f"-{uptime_s}", "--"),
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={self._paths.root}"),
            f"--machine={machine_name(self._lab.name, self._host.name)}",
            f"--hostname={self._host.name}",
            *("--register=no", "--keep-unit", f"--network-namespace-path={namespace}"),
            # The host's own firewall; without --private-network nspawn would not grant it.
            "--capability=CAP_NET_ADMIN",
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=read-only"),
            *("--notify-ready=yes", "--kill-signal=SIGRTMIN+3", "--settings=no"),
            # To the host's systemd: tell the console, which is a log file, what is started.
            *("--", "--show-status=yes", "--log-color=no"),
        ]

    def _watch(self, child: subprocess.Popen[bytes], notify: socket.socket) -> int:
        """Follow the host until systemd-nspawn ends; pass requests on to it."""
        kill_at: float | None = None
        wakeup, wakeup_end = socket.socketpair()
        with wakeup, wakeup_end:
            wakeup.setblocking(False)
            wakeup_end.setblocking(False)
            signal.set_wakeup_fd(wakeup_end.fileno())
            pidfd = os.pidfd_open(child.pid)
            try:
                leader_pid: int | None = None
                while True:
                    if self._request is _Request.SHUT_DOWN and kill_at is None:
                        kill_at = time.monotonic() + SHUTDOWN_TIMEOUT_S
                        child.terminate()
                    if self._request is _Request.REBOOT:
                        self._request = _Request.NONE
                        if self._state.leader_pid is not None:
                            os.kill(self._state.leader_pid, _REBOOT_SIGNAL)
                    if kill_at is not None and time.monotonic() > kill_at:
                        print(f"no end after {SHUTDOWN_TIMEOUT_S} s: killing", flush=True)
                        child.kill()
                    watched: list[int | socket.socket] = [pidfd, notify, wakeup]
                    ready, _, _ = select.select(
                        watched, [], [], 1.0 if kill_at is not None else None
                    )
                    if wakeup in ready:
                        wakeup.recv(4096)
                    if notify in ready:
                        for line in notify.recv(4096).decode(errors="replace").splitlines():
                            key, _, value = line.partition("=")
                            if key == "X_NSPAWN_LEADER_PID":
                                leader_pid = int(value)
                            elif (key, value) == ("READY", "1") and self._booting():
                                self._move(HostPhase.RUNNING, leader_pid=leader_pid)
                    if pidfd in ready:
                        return child.wait()
            finally:
                signal.set_wakeup_fd(-1)
                os.close(pidfd)


def machine_name(lab: str, host: str) -> str:
    return f"{names.PREFIX}-{lab}-{host}"


def prepare(paths: LabPaths, host: names.HostSpec) -> None:
    """Make the folder of a new host: its SSH host key, root's authorized key, names and machine ID.

    The folder appears whole or not at all.
    """
    final = paths.host(host.name)
    if final.directory.exists():
        return
    final.directory.parent.mkdir(exist_ok=True)
    new = HostPaths(directory=final.directory.with_name(f".{host.name}.new"))
    shutil.rmtree(new.directory, ignore_errors=True)
    ssh = new.upper / "etc/ssh"
    ssh.mkdir(parents=True)
    key = ssh / "ssh_host_ed25519_key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(key)])
    root = new.upper / "root"
    (root / ".ssh").mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    authorized = paths.ssh_key.with_suffix(".pub").read_text()
    write_text(root / ".ssh/authorized_keys", authorized, mode=0o600)
    # Kept over reboots, as that of a machine.
    write_text(new.upper / "etc/machine-id", f"{secrets.token_hex(16)}\n", mode=0o444)
    write_text(new.upper / "etc/hostname", f"{host.name}\n")
    write_text(
        new.upper / "etc/hosts",
        f"127.0.0.1 localhost\n::1 localhost\n{host.address} {host.name}\n",
    )
    new.directory.rename(final.directory)


def public_key(paths: LabPaths, host: str) -> str:
    """The host's SSH key as known_hosts wants it: type and key."""
    text = (paths.host(host).upper / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    return " ".join(text.split()[:2])


def power_on(paths: LabPaths, state: LabState, host: names.HostSpec) -> None:
    """Start the supervisor of a host that is off, and return while it boots."""
    own = paths.host(host.name)
    sweep(state.name, host.name)
    own.state.unlink(missing_ok=True)
    detach(
        [
            # Slave: what the machine unmounts later is unmounted here as well, so that this
            # process doesn't keep namespaces of other hosts alive.
            *("unshare", "--mount", "--propagation", "slave", "--"),
            *(sys.executable, "-m", "lab.host", state.name, host.name, state.run_id),
        ],
        log=own.supervisor_log,
        cwd=CHECKOUT,
    )


def sweep(lab: str, host: str) -> None:
    """End a host and its supervisor at once, whatever state they are in."""
    # The host first, so that it gets no chance to shut down in order; it is removed last, because
    # a supervisor that still lives may be removing it as well.
    Cgroup(lab, host).signal_kill()
    Cgroup(lab, f"{host}.supervisor").kill()
    Cgroup(lab, host).kill()


def wait_running(paths: LabPaths, host: str, *, boots: int = 1, timeout_s: float) -> HostState:
    """Wait until the host has booted `boots` times since it was powered on and is ready."""
    own = paths.host(host)

    def probe() -> HostState | None:
        state = HostState.read(own)
        if state is None:
            return None
        if state.phase is HostPhase.OFF:
            said = own.supervisor_log.read_text(errors="replace").splitlines()[-5:]
            raise LabError(
                f"{host} went off while it booted; see {own.console_log} and "
                f"{own.supervisor_log}, which ends:\n" + "\n".join(said)
            )
        return state if state.phase is HostPhase.RUNNING and state.boots >= boots else None

    return wait_for(
        probe,
        awaited=f"{host} to boot",
        timeout_s=timeout_s,
        log=f"{own.console_log} and {own.supervisor_log}",
    )


def enter_run(lab: str, part: str, run_id: str) -> tuple[LabPaths, LabState] | None:
    """First step of a daemon: enter the cgroup by which it can be ended, *then* see whether the
    lab's run is still the one it was started for. In this order a sweep either ends it or is
    noticed here. Returns None for a daemon that came too late."""
    cgroup = Cgroup(lab, part)
    try:
        cgroup.create()
        cgroup.enter()
    except FileNotFoundError:
        return None  # Swept away between the two.
    paths = LabPaths.of(lab)
    state = LabState.read(paths)
    if state is None or state.run_id != run_id:
        cgroup.leave()
        return None
    os.chdir("/")
    return paths, state


def main(arguments: list[str]) -> int:
    lab, name, run_id = arguments
    entered = enter_run(lab, f"{name}.supervisor", run_id)
    if entered is None:
        print("the lab was taken down meanwhile", file=sys.stderr)
        return 1
    paths, state = entered
    with (paths.host(name).directory / "supervisor.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # An `up` that was killed started the other one, and the next `up` this one.
            print("the host has a supervisor already", file=sys.stderr)
            return 1
        return _supervise(paths, state, name)


def _supervise(paths: LabPaths, state: LabState, name: str) -> int:
    try:
        Supervisor(state=state, paths=paths, host=state.host(name)).run()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
