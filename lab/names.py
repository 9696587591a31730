"""Names and addresses: which address a host's name stands for, and what the kernel objects of a
lab are called. Pure: every name that the lab gives to a kernel object is made here, so that
cleaning up by prefix can't miss one or touch a stranger's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from lab.errors import LabError

DEFAULT_LAB: Final = "lab"
DEFAULT_HOSTS: Final = ("gw1", "gpu1")
DEFAULT_GATEWAY_PORT: Final = 8009

SUBNET: Final = "10.77.0"
PREFIX_LENGTH: Final = 24
CONTROLLER_ADDRESS: Final = f"{SUBNET}.1"
BRIDGE: Final = "hosts"

# Not 22: a machine whose own sshd listens on 0.0.0.0:22 has port 22 of every loopback address
# taken, and that is most machines that one logs in to.
SSH_PORT: Final = 7722
HOST_SSH_PORT: Final = 22

# First part of the name of every network namespace and cgroup of every lab.
PREFIX: Final = "gateway-lab"

_LAB_NAME: Final = re.compile(r"[a-z][a-z0-9]{0,15}")
_HOST_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,11}")
_NUMBERED: Final = re.compile(r"(gw|gpu|train)([1-9])")
_LOOKS_NUMBERED: Final = re.compile(r"(gw|gpu|train)([0-9]+)")
_FIRST_OCTET: Final = {"gw": 10, "gpu": 20, "train": 30}
_OTHER_OCTETS: Final = range(101, 110)


def check_lab_name(name: str) -> str:
    """Return `name`, or raise LabError where it can't name a lab."""
    if not _LAB_NAME.fullmatch(name):
        raise LabError(
            f"{name!r} can't name a lab: use a lower-case letter, then up to 15 letters or digits"
        )
    return name


def check_host_name(name: str) -> str:
    """Return `name`, or raise LabError where it can't name a host."""
    if not _HOST_NAME.fullmatch(name) or name == "localhost":
        raise LabError(
            f"{name!r} can't name a host: use a lower-case letter, then up to 11 letters, digits "
            "or '-' (gw1 … gw9, gpu1 … gpu9 and train1 … train9 have addresses of their own)"
        )
    return name


def allot_octet(name: str, *, taken: Collection[int]) -> int:
    """Last octet of the address of a new host.

    gwN is 1N, gpuN is 2N, trainN is 3N, with N from 1 to 9; any other name gets the first of
    101 … 109 that is not in `taken` (the octets of the lab's other hosts).

    Raises LabError for a bad name, and when all nine addresses for other names are taken.
    """
    check_host_name(name)
    if match := _NUMBERED.fullmatch(name):
        return _FIRST_OCTET[match[1]] + int(match[2])
    if match := _LOOKS_NUMBERED.fullmatch(name):
        raise LabError(f"{name!r} has no address: {match[1]}1 to {match[1]}9 have")
    for octet in _OTHER_OCTETS:
        if octet not in taken:
            return octet
    raise LabError(f"no address is left for {name!r}: a lab holds nine hosts of other names")


def is_gateway(name: str) -> bool:
    """Whether a host of this name gets its gateway port relayed to the operator's loopback."""
    match = _NUMBERED.fullmatch(name)
    return match is not None and match[1] == "gw"


def choose_number(name: str, *, taken: Iterable[int]) -> int:
    """The K of 127.77.K.x: 0 for the default lab, else a number that follows from the name.

    Two labs whose names lead to the same number don't clash: the next number that is not in
    `taken` (the numbers of all other labs on this machine) is used.
    """
    if name == DEFAULT_LAB:
        return 0
    used = {0, *taken}
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    for step in range(254):
        number = 1 + (start + step) % 254
        if number not in used:
            return number
    raise LabError("254 labs exist on this machine; take one down first: python -m lab status")


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """One host of a lab: its name, the last octet of its two addresses, and the layers that lie
    over its base image, by the names of their folders (lab/layer.py)."""

    name: str
    octet: int
    layers: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """What the hosts of the lab use among each other."""
        return f"{SUBNET}.{self.octet}"

    @property
    def hardware(self) -> str:
        """MAC address, from the range that is free to use locally."""
        return f"02:77:00:00:00:{self.octet:02x}"

    @property
    def veth(self) -> str:
        """The bridge's end of the host's cable, in the controller's namespace."""
        return f"to-{self.name}"

    def loopback(self, *, number: int) -> str:
        """What the operator's machine uses to reach the host, through the relay."""
        return f"127.77.{number}.{self.octet}"


def namespace(lab: str, host: str | None = None) -> str:
    """Name of the network namespace of a host, or of the lab's controller."""
    return f"{PREFIX}-{lab}.{host or 'controller'}"


def cgroup_name(lab: str) -> str:
    """Name of the cgroup that holds every process of the lab."""
    return f"{PREFIX}-{lab}"


def namespaces_of(lab: str, names: Iterable[str]) -> list[str]:
    """Those of the namespace names that belong to the lab, the controller's last.

    A dot ends the lab's name because neither a lab's nor a host's name can hold one: the
    namespaces of `lab` are never taken for those of `labtest`.
    """
    mine = [name for name in names if name.startswith(f"{PREFIX}-{lab}.")]
    return sorted(mine, key=lambda name: (name == namespace(lab), name))
