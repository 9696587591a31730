"""Inventories for tests, as `parse_fleet` takes them."""

from typing import Any

from provision.settings import Fleet, HostInput, parse_fleet


def gateway(name: str = "gw1", address: str = "10.0.0.11", **data: Any) -> HostInput:
    return HostInput(name=name, groups=frozenset({"gateways"}), data={"address": address, **data})


def worker(name: str = "gpu1", address: str = "10.0.0.21", **data: Any) -> HostInput:
    return HostInput(name=name, groups=frozenset({"workers"}), data={"address": address, **data})


def fleet(*hosts: HostInput) -> Fleet:
    return parse_fleet(hosts or (gateway(), worker()), resolve={})
