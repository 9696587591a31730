"""The disk of the test VM: Debian 12 with a kernel that has SELinux, its policy, and what the hosts
of the lab have of Enterprise Linux (yum, the repository with nginx), taken from their base image.

The process that holds the cache's lock builds; the result is kept under the SHA-256 of this file
and of the base image's recipe. The disk is never written to afterwards: a VM has an overlay.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.bootstrap import bootstrap
from lab.image import recipe_digest
from lab.paths import write_text
from lab.system import run
from lab.trash import discard

ADDRESS: Final = "10.0.2.15"  # qemu's user network
POLICY: Final = "default"  # as Debian names its targeted policy

_INCLUDE: Final = (
    # A machine that boots and can be logged in to. Without libpam-systemd, which would start a
    # user's systemd at each login: that takes a minute in an emulated machine on a busy one.
    *("linux-image-cloud-amd64", "initramfs-tools", "systemd-sysv", "dbus", "udev"),
    *("openssh-server", "sudo", "procps", "iproute2", "curl", "logrotate", "ca-certificates"),
    # SELinux with the targeted policy, its tools, and the audit log. Without netbase,
    # `semanage port` does not know what tcp is.
    *("selinux-basics", "selinux-policy-default", "auditd", "policycoreutils"),
    *("policycoreutils-python-utils", "setools", "netbase"),
    # EL's package manager, and what nginx and the deploy are linked to.
    *("rpm", "dnf", "python3", "libpcre2-8-0", "libssl3", "zlib1g", "libcrypt1"),
)

# What makes the lab's hosts look like EL: from the base image, path by path.
_FROM_BASE: Final = (
    *("etc/dnf/vars", "etc/os-release", "etc/redhat-release", "etc/system-release"),
    *("etc/yum.conf", "etc/yum.repos.d", "usr/bin/yum", "usr/lib/os-release"),
    *("usr/share/lab-repository", "var/cache/dnf", "var/lib/rpm"),
)

_NETWORK: Final = f"""\
[Match]
Name=eth0

[Network]
Address={ADDRESS}/24
"""

# rpm labels what it installs, as on EL; Debian's rpm looks elsewhere for the plugin that does it.
_RPM_MACROS: Final = """\
%_dbpath /var/lib/rpm
%__plugindir /usr/lib/x86_64-linux-gnu/rpm-plugins
"""

_MASKED_UNITS: Final = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer"),
    *("fstrim.timer", "dnf-makecache.timer", "logrotate.timer", "getty@tty1.service"),
    *("systemd-timesyncd.service", "systemd-networkd-wait-online.service"),
)


@dataclass(frozen=True, kw_only=True)
class VmImage:
    """The files of a built image."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def ssh_key(self) -> Path:
        """For root of all VMs of this image, which are reached from this machine only."""
        return self.directory / "ssh_key"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key"


def vm_digest() -> str:
    """SHA-256, in hex, of everything that decides what the image holds."""
    return hashlib.sha256(Path(__file__).read_bytes() + recipe_digest().encode()).hexdigest()


def ensure_vm_image(home: Path, *, base: Path, progress: Callable[[str], None]) -> VmImage:
    """Return the image of the present recipe; build it where it isn't there yet.

    `base`: the base image of the lab's hosts. Raises LabError with the place of the log.
    """
    image = VmImage(directory=home / "cache" / f"vm-{vm_digest()[:16]}")
    if image.directory.is_dir():
        return image
    cache = image.directory.parent
    with _locked(cache / "vm.lock", progress=progress):
        if image.directory.is_dir():
            return image
        # Images of older recipes stay: a VM may run on one. `vm clean` removes them.
        for stale in cache.glob("making-vm-*"):
            discard(stale, home=home)
        progress("building the VM's image (once; a few minutes)")
        building = VmImage(directory=Path(tempfile.mkdtemp(prefix="making-vm-", dir=cache)))
        root = building.directory / "root"
        bootstrap(root, _INCLUDE, log_path=cache / "build-vm.log", progress=progress)
        progress("  labelling and making the disk")
        _make_keys(building)
        _configure(root, building)
        _take_from_base(root, base)
        _take_kernel(root, building)
        _make_disk(root, building)
        discard(root, home=home)
        building.directory.rename(image.directory)
    return image


@contextmanager
def _locked(path: Path, *, progress: Callable[[str], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another command is building the VM's image; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_keys(image: VmImage) -> None:
    for key in (image.ssh_key, image.host_key):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab-vm", "-f", str(key)])


def _configure(root: Path, image: VmImage) -> None:
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    write_text(ssh / "authorized_keys", image.ssh_key.with_suffix(".pub").read_text(), mode=0o600)
    for left in (root / "etc/ssh").glob("ssh_host_*"):
        left.unlink()
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    write_text(host_key, image.host_key.read_text(), mode=0o600)
    write_text(root / "etc/fstab", "/dev/vda / ext4 defaults 0 1\n")
    write_text(root / "etc/hostname", "selinux\n")
    write_text(root / "etc/hosts", f"127.0.0.1 localhost\n{ADDRESS} selinux\n")
    write_text(root / "etc/resolv.conf", "")
    write_text(root / "etc/default/locale", "LANG=C.UTF-8\n")
    write_text(root / "etc/systemd/network/lab.network", _NETWORK)
    # The mode is the file's alone: a word on the kernel's command line would win over it.
    write_text(root / "etc/selinux/config", f"SELINUX=enforcing\nSELINUXTYPE={POLICY}\n")
    (root / "etc/rpm").mkdir(exist_ok=True)
    write_text(root / "etc/rpm/macros", _RPM_MACROS)
    nsswitch = root / "etc/nsswitch.conf"
    lines = nsswitch.read_text().splitlines()
    # There is no name server: with "dns" each lookup of an unknown name waits 10 s for one.
    lines = ["hosts: files" if line.startswith("hosts:") else line for line in lines]
    write_text(nsswitch, "\n".join(lines) + "\n")
    units = root / "etc/systemd/system"
    for unit in _MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    wanted = units / "multi-user.target.wants/systemd-networkd.service"
    wanted.symlink_to("/lib/systemd/system/systemd-networkd.service")


def _take_from_base(root: Path, base: Path) -> None:
    for name in _FROM_BASE:
        source, target = base / name, root / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _take_kernel(root: Path, image: VmImage) -> None:
    """qemu boots them itself: no boot loader."""
    for pattern, target in (("vmlinuz-*", image.kernel), ("initrd.img-*", image.initrd)):
        (found,) = (root / "boot").glob(pattern)
        shutil.copy(found, target)
        found.unlink()


def _make_disk(root: Path, image: VmImage) -> None:
    """Labelled here, so that the VM need not boot once to do it; mke2fs keeps the labels."""
    contexts = root / f"etc/selinux/{POLICY}/contexts/files/file_contexts"
    nice = ("nice", "-n", "10")
    run([*nice, "setfiles", "-F", "-r", str(root), str(contexts), str(root)], timeout_s=300)
    raw = image.directory / "disk.raw"
    # 256: room for the labels in each inode.
    run([*nice, "mke2fs", "-q", "-t", "ext4", "-I", "256", "-d", str(root), str(raw), "3G"],
        timeout_s=300)  # fmt: skip
    run([*nice, "qemu-img", "convert", "-O", "qcow2", str(raw), str(image.disk)], timeout_s=300)
    raw.unlink()
