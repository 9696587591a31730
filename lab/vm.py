"""A virtual machine: what a container can't show, a kernel of its own with SELinux enforcing.

One VM a name, of at most 2 GiB, emulated by qemu: bring it up, log in, reboot it, save its state
and come back to it within seconds. Every function that changes a VM holds its lock, and is the
only writer of its files.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from lab import lab as labs
from lab import names, requirements
from lab.errors import LabError
from lab.monitor import Monitor
from lab.paths import home, read_json, write_json, write_text
from lab.process import Process
from lab.state import InventoryHost, process_to_json
from lab.system import detach, run, wait_for
from lab.trash import discard
from lab.vm_image import ADDRESS, VmImage, ensure_vm_image

HOST: Final = "selinux"  # the VM's host name, and its name in ssh_config

# Command that must be there beside the lab's own -> Debian's package that has it.
TOOLS: Final[Mapping[str, str]] = {
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setfiles": "policycoreutils",
}

# Emulated unless told otherwise: /dev/kvm may be there and yet boot no kernel.
ACCELERATOR_VARIABLE: Final = "GATEWAY_LAB_ACCEL"
_ACCELERATORS: Final = {"tcg": "tcg,thread=multi,tb-size=256", "kvm": "kvm"}

MEMORY_MIB: Final = 1024
# Of an emulated machine on a busy one.
BOOT_TIMEOUT_S: Final = 900
SNAPSHOT_TIMEOUT_S: Final = 300
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class VmPaths:
    """Files of one VM."""

    directory: Path

    @classmethod
    def of(cls, name: str) -> Self:
        return cls(directory=home() / "vms" / names.check_lab_name(name))

    @property
    def lock(self) -> Path:
        """Outside the VM's folder, so that it can be held while that folder is removed."""
        return self.directory.with_suffix(".lock")

    @property
    def disk(self) -> Path:
        """What the VM wrote over its image, and its snapshots."""
        return self.directory / "disk.qcow2"

    @property
    def monitor(self) -> Path:
        return self.directory / "monitor"

    @property
    def pid(self) -> Path:
        return self.directory / "qemu.pid"

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def control(self) -> Path:
        """ssh's own socket: one connection for all commands."""
        return self.directory / "ssh"


@dataclass(frozen=True, kw_only=True)
class VmState:
    """A VM that was started: its qemu, and the port of 127.0.0.1 that leads to its sshd."""

    qemu: Process
    port: int
    image: VmImage

    def to_json(self) -> dict[str, object]:
        return {
            "qemu": process_to_json(self.qemu),
            "port": self.port,
            "image": str(self.image.directory),
        }

    @classmethod
    def read(cls, paths: VmPaths) -> Self | None:
        """None where no VM of this name runs."""
        found: dict[str, Any] | None = read_json(paths.state)
        if found is None:
            return None
        state = cls(
            qemu=Process(**found["qemu"]),
            port=found["port"],
            image=VmImage(directory=Path(found["image"])),
        )
        return state if state.qemu.alive() else None


@contextmanager
def _locked(paths: VmPaths) -> Iterator[None]:
    paths.lock.parent.mkdir(parents=True, exist_ok=True)
    with paths.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(
                f"another command is changing the VM {paths.directory.name!r}; wait for it to end"
            ) from None
        yield


def setup(*, progress: Progress) -> VmImage:
    """Make the machine ready: tools, the lab's base image, the VM's image."""
    base = labs.setup(progress=progress)
    requirements.install_tools(progress, TOOLS)
    return ensure_vm_image(home(), base=base, progress=progress)


def up(name: str, *, progress: Progress) -> VmState:
    """Make sure that the VM runs, and wait until one can log in. Raises LabError."""
    paths = VmPaths.of(name)
    with _locked(paths):
        if (running := VmState.read(paths)) is not None:
            progress("the VM is up already")
            return running
        image = setup(progress=progress)
        discard(paths.directory, home=home())
        paths.directory.mkdir(parents=True)
        state = _start(paths, image)
        write_json(paths.state, state.to_json())
        progress("booting")
        _wait_ssh(paths, timeout_s=BOOT_TIMEOUT_S)
    return state


def down(name: str) -> bool:
    """End the VM and remove everything of it; False when there was nothing."""
    paths = VmPaths.of(name)
    if not paths.directory.exists():
        return False
    with _locked(paths):
        if (state := VmState.read(paths)) is not None:
            _close_ssh(paths)
            state.qemu.send(signal.SIGKILL)  # its disk goes, too
            wait_for(
                lambda: not state.qemu.alive(),
                awaited="qemu to end",
                timeout_s=20,
                log=str(paths.console_log),
            )
        discard(paths.directory, home=home())
    return True


def reboot(name: str) -> None:
    """Reboot from inside, in order, and wait until one can log in again."""
    paths, _ = _running(name)
    with _locked(paths):
        before = execute(paths, "cat", "/proc/sys/kernel/random/boot_id").stdout
        execute(paths, "systemctl", "reboot")
        _close_ssh(paths)

        def is_back() -> bool:
            found = execute(paths, "cat", "/proc/sys/kernel/random/boot_id", check=False)
            return found.returncode == 0 and found.stdout != before

        wait_for(
            is_back,
            awaited="the VM to reboot",
            timeout_s=BOOT_TIMEOUT_S,
            log=str(paths.console_log),
            every_s=1,
        )


def save(name: str, tag: str) -> None:
    """Keep memory and disk as they are now, to come back to; replaces one of the same name."""
    paths, _ = _running(name)
    with _locked(paths):
        _close_ssh(paths)
        with Monitor(paths.monitor, timeout_s=SNAPSHOT_TIMEOUT_S) as monitor:
            monitor.snapshot("savevm", check_tag(tag))


def restore(name: str, tag: str) -> None:
    """Back to what was saved, and wait until one can log in."""
    paths, _ = _running(name)
    with _locked(paths):
        _close_ssh(paths)
        with Monitor(paths.monitor, timeout_s=SNAPSHOT_TIMEOUT_S) as monitor:
            monitor.snapshot("loadvm", check_tag(tag))
        _wait_ssh(paths, timeout_s=BOOT_TIMEOUT_S)


def check_tag(tag: str) -> str:
    """Return `tag`, or raise LabError where it can't name a snapshot."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", tag):
        raise LabError(f"{tag!r} can't name a snapshot: use lower-case letters, digits and '-'")
    return tag


def execute(
    paths: VmPaths, *command: str, check: bool = True, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in the VM. With `check`, raises LabError with what it said."""
    done = subprocess.run(
        ssh_command(paths, *command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise LabError(f"failed in the VM ({done.returncode}): {' '.join(command)}\n{said}")
    return done


def ssh_command(paths: VmPaths, *command: str) -> list[str]:
    return ["ssh", "-F", str(paths.ssh_config), HOST, "--", *command]


def inventory(name: str) -> InventoryHost:
    """The running VM, for an inventory file. Raises LabError where there is none."""
    paths, state = _running(name)
    return InventoryHost(
        name=HOST,
        address=ADDRESS,
        ssh_hostname="127.0.0.1",
        ssh_port=state.port,
        ssh_user="root",
        ssh_key=str(state.image.ssh_key),
        ssh_known_hosts_file=str(paths.known_hosts),
        ssh_config_file=str(paths.ssh_config),
        ssh_strict_host_key_checking="yes",
    )


def _running(name: str) -> tuple[VmPaths, VmState]:
    paths = VmPaths.of(name)
    if (state := VmState.read(paths)) is None:
        raise LabError(f"the VM {name!r} is not up; start it with: python -m lab vm up")
    return paths, state


def _accelerator() -> str:
    wanted = os.environ.get(ACCELERATOR_VARIABLE, "tcg")
    if wanted not in _ACCELERATORS:
        raise LabError(
            f"{ACCELERATOR_VARIABLE}={wanted}: it may be {' or '.join(sorted(_ACCELERATORS))}"
        )
    return _ACCELERATORS[wanted]


def _start(paths: VmPaths, image: VmImage) -> VmState:
    run(
        [
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
            *("-b", str(image.disk), str(paths.disk)),
        ]
    )
    port = _free_port()
    _write_ssh_config(paths, image, port)
    detach(["nice", "-n", "5", *qemu_command(paths, image, port)], log=paths.console_log)

    def started() -> Process | None:
        try:
            return Process.of(int(paths.pid.read_text()))
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return None

    process = wait_for(started, awaited="qemu to start", timeout_s=20, log=str(paths.console_log))
    return VmState(qemu=process, port=port, image=image)


def qemu_command(paths: VmPaths, image: VmImage, port: int) -> list[str]:
    """No device but what is needed, no way out of this machine, and none in but sshd."""
    return [
        *("qemu-system-x86_64", "-machine", "q35", "-accel", _accelerator(), "-cpu", "max"),
        *("-nodefaults", "-display", "none", "-no-user-config"),
        *("-smp", "2", "-m", str(MEMORY_MIB), "-pidfile", str(paths.pid)),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", "root=/dev/vda rw console=ttyS0 quiet security=selinux net.ifnames=0"),
        *("-drive", f"file={paths.disk},if=virtio,cache=unsafe"),
        *("-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"),
        *("-serial", "stdio", "-qmp", f"unix:{paths.monitor},server=on,wait=off"),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_ssh_config(paths: VmPaths, image: VmImage, port: int) -> None:
    key = image.host_key.with_suffix(".pub").read_text()
    write_text(paths.known_hosts, f"[127.0.0.1]:{port} {key}")
    write_text(
        paths.ssh_config,
        f"Host {HOST}\n"
        f"    HostName 127.0.0.1\n"
        f"    Port {port}\n"
        f"    User root\n"
        f"    IdentityFile {image.ssh_key}\n"
        f"    IdentitiesOnly yes\n"
        f"    UserKnownHostsFile {paths.known_hosts}\n"
        f"    StrictHostKeyChecking yes\n"
        f"    ConnectTimeout 90\n"
        f"    ServerAliveInterval 15\n"
        f"    LogLevel ERROR\n"
        f"    ControlMaster auto\n"
        f"    ControlPath {paths.control}\n"
        f"    ControlPersist 60\n",
    )


def _wait_ssh(paths: VmPaths, *, timeout_s: float) -> None:
    wait_for(
        lambda: execute(paths, "true", check=False).returncode == 0,
        awaited="the VM to let one log in",
        timeout_s=timeout_s,
        log=str(paths.console_log),
        every_s=0.5,
    )


def _close_ssh(paths: VmPaths) -> None:
    """End the kept connection: its other end is about to be gone."""
    if paths.control.exists():
        command = ["ssh", "-F", str(paths.ssh_config), "-O", "exit", HOST]
        subprocess.run(command, capture_output=True, timeout=20, check=False)
