"""The lab's network: a controller's namespace that holds a bridge, and a namespace per host with a
cable into that bridge. No namespace has a route to anywhere else.

Nothing here touches the machine's own network namespace but `ip netns add`, which makes a name.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from lab import names
from lab.errors import LabError
from lab.system import LIBC, run

NAMESPACES: Final = Path("/run/netns")
HOST_INTERFACE: Final = "eth0"
_CLONE_NEWNET: Final = 0x40000000


def namespace_path(lab: str, host: str | None = None) -> Path:
    """File that stands for the network namespace of a host, or of the controller."""
    return NAMESPACES / names.namespace(lab, host)


def existing(lab: str) -> list[str]:
    """Namespaces of the lab that exist, the controller's last."""
    try:
        found = [path.name for path in NAMESPACES.iterdir()]
    except FileNotFoundError:
        return []
    return names.namespaces_of(lab, found)


def exists(lab: str, host: str | None = None) -> bool:
    """Whether the namespace is there: its name, and a namespace mounted on it."""
    path = namespace_path(lab, host)
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except FileNotFoundError:
        return False


def create_controller(lab: str) -> None:
    """Make the controller's namespace and the bridge. What an earlier try left is removed."""
    delete(names.namespace(lab))
    controller = _add(names.namespace(lab))
    _configure(
        controller,
        [
            "link set lo up",
            # No multicast snooping and no forward delay: a cable works as soon as it is in.
            f"link add {names.BRIDGE} type bridge forward_delay 0 mcast_snooping 0",
            f"addr add {names.CONTROLLER_ADDRESS}/{names.PREFIX_LENGTH} dev {names.BRIDGE}",
            f"link set {names.BRIDGE} up",
        ],
    )


def attach(lab: str, host: names.HostSpec) -> Path:
    """Give a host a new, empty namespace with a cable into the bridge, and return its path.

    Called at each boot, so that addresses, firewall rules and sysctls of the boot before are gone
    as they are after a real one.
    """
    controller = names.namespace(lab)
    own = names.namespace(lab, host.name)
    # The cable's end in the bridge goes first: the kernel removes a namespace some time after
    # its name, and the cable with it.
    with suppress(LabError):
        _configure(controller, [f"link del {host.veth}"])
    delete(own)
    _add(own)
    _configure(
        controller,
        [
            # A hardware address that follows from the host's: who knew it before a reboot must
            # reach it after, as with a real machine.
            f"link add {host.veth} type veth peer name {HOST_INTERFACE} address {host.hardware} "
            f"netns {own}",
            f"link set {host.veth} master {names.BRIDGE} up",
        ],
    )
    _configure(
        own,
        [
            "link set lo up",
            f"addr add {host.address}/{names.PREFIX_LENGTH} dev {HOST_INTERFACE}",
            f"link set {HOST_INTERFACE} up",
        ],
    )
    return namespace_path(lab, host.name)


def delete(namespace: str) -> None:
    """Remove the name; the namespace and its interfaces follow when no process is left in it."""
    path = NAMESPACES / namespace
    if not path.exists():
        return
    try:
        run(["ip", "netns", "delete", namespace])
    except LabError:
        # `ip netns add` killed between making the file and mounting on it: only a file is left.
        path.unlink(missing_ok=True)


def _add(namespace: str) -> str:
    run(["ip", "netns", "add", namespace])
    return namespace


def _configure(namespace: str, commands: Sequence[str]) -> None:
    run(["ip", "-netns", namespace, "-batch", "-"], input_text="\n".join(commands) + "\n")


def enter_network(path: Path) -> None:
    """Move the calling thread into the network namespace at `path`, for good."""
    with path.open("rb") as namespace:
        _set_network(namespace.fileno())


def _set_network(descriptor: int) -> None:
    if LIBC.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


class NetworkDoor:
    """Opens sockets in another network namespace while the process stays in its own.

    A socket belongs to the namespace in which it was made, for life. One thread uses a door: the
    step in and out changes the calling thread only.
    """

    def __init__(self, path: Path) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def socket(self) -> socket.socket:
        """A new TCP socket of the other namespace."""
        _set_network(self._there)
        try:
            return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        finally:
            _set_network(self._home)
