"""Names and addresses: pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import names
from lab.errors import LabError


@pytest.mark.parametrize(
    ("host", "octet"),
    [("gw1", 11), ("gw9", 19), ("gpu1", 21), ("gpu4", 24), ("train3", 33), ("web", 101)],
)
def test_address_follows_from_the_name(host: str, octet: int) -> None:
    assert names.allot_octet(host, taken=()) == octet


def test_other_names_get_the_first_free_address_until_none_is_left() -> None:
    assert names.allot_octet("web", taken={101, 102, 104}) == 103
    with pytest.raises(LabError, match="no address is left for 'web'"):
        names.allot_octet("web", taken=range(101, 110))


@pytest.mark.parametrize("host", ["", "GW1", "1gw", "gw1.lab", "-x", "localhost", "a" * 13, "a_b"])
def test_bad_host_names_are_refused(host: str) -> None:
    with pytest.raises(LabError, match="can't name a host"):
        names.allot_octet(host, taken=())


@pytest.mark.parametrize("host", ["gw0", "gw10", "gpu22"])
def test_a_number_without_an_address_is_refused(host: str) -> None:
    with pytest.raises(LabError, match="has no address"):
        names.allot_octet(host, taken=())


@pytest.mark.parametrize("name", ["", "Lab", "a.b", "../x", "a" * 17, "a-b"])
def test_bad_lab_names_are_refused(name: str) -> None:
    with pytest.raises(LabError, match="can't name a lab"):
        names.check_lab_name(name)


def test_one_host_has_two_addresses_and_one_hardware_address() -> None:
    host = names.HostSpec(name="gpu1", octet=21)
    assert host.address == "10.77.0.21"
    assert host.loopback(number=3) == "127.77.3.21"
    assert host.hardware == "02:77:00:00:00:15"


def test_the_default_lab_is_number_0_whatever_else_exists() -> None:
    assert names.choose_number("lab", taken=range(1, 255)) == 0


lab_names = st.from_regex(r"[a-z][a-z0-9]{0,15}", fullmatch=True).filter(lambda n: n != "lab")


@given(name=lab_names, taken=st.sets(st.integers(0, 254), max_size=253))
def test_other_labs_get_a_stable_number_of_their_own(name: str, taken: set[int]) -> None:
    taken.discard(min(set(range(1, 255)) - taken))
    if taken >= set(range(1, 255)):
        return
    number = names.choose_number(name, taken=taken)
    assert 1 <= number <= 254
    assert number not in taken
    assert number == names.choose_number(name, taken=taken)


def test_no_number_is_left_after_254_labs() -> None:
    with pytest.raises(LabError, match="254 labs exist"):
        names.choose_number("one", taken=range(1, 255))


@given(one=lab_names, other=lab_names, host=st.sampled_from(["gw1", "gpu1", "web-a"]))
def test_namespaces_of_one_lab_are_never_taken_for_anothers(
    one: str, other: str, host: str
) -> None:
    mine = [names.namespace(one, host), names.namespace(one)]
    theirs = [] if one == other else [names.namespace(other, host), names.namespace(other)]
    assert names.namespaces_of(one, [*reversed(mine), *theirs, "unrelated"]) == mine


def test_interface_names_fit_the_kernel() -> None:
    # IFNAMSIZ: 15 characters and a zero.
    assert len(names.HostSpec(name="a" * 12, octet=101).veth) <= 15
