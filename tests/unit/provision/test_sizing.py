import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provision.sizing import (
    MEASURED_BYTES,
    NGINX_BYTES,
    PER_SOCKET,
    WORKER_BYTES,
    Capacity,
    Demand,
    descriptors,
    document,
    plan,
    problems,
    table,
)

SMALL = Demand(connections=1_000, workers=2, processes=2, keepalive=1000)
ROOMY = Capacity(
    memory=64 << 30,
    first_port=1024,
    last_port=65535,
    nr_open=1 << 30,
    somaxconn=65535,
    conntrack_max=None,
)

demands = st.builds(
    Demand,
    connections=st.integers(1, 2_000_000),
    workers=st.integers(1, 64),
    processes=st.integers(1, 128),
    keepalive=st.integers(1, 10_000),
)


@given(demands)
def test_all_processes_together_have_room_for_every_socket(demand: Demand) -> None:
    needed = plan(demand)
    assert needed.worker_connections * demand.processes >= PER_SOCKET * demand.connections
    assert needed.descriptors >= needed.worker_connections
    assert needed.per_worker * max(1, demand.workers - 1) >= demand.connections


@given(demands)
def test_one_process_may_get_half_as_much_again_as_its_share(demand: Demand) -> None:
    share = min(demand.connections, 1.5 * demand.connections / demand.processes)
    if demand.processes > 1:
        assert plan(demand).worker_connections >= PER_SOCKET * share + demand.keepalive


@given(demands, st.integers(1, 1_000_000))
def test_more_connections_never_need_less(demand: Demand, more: int) -> None:
    larger = plan(dataclasses.replace(demand, connections=demand.connections + more))
    for name, value in dataclasses.asdict(plan(demand)).items():
        assert getattr(larger, name) >= value


def test_a_host_with_room_has_no_problem() -> None:
    assert problems(SMALL, ROOMY) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nr_open": 1024}, "fs.nr_open is 1024: raise it to"),
        ({"first_port": 32768, "last_port": 33000}, r"ip_local_port_range 32768 33000 has 233"),
        ({"somaxconn": 128}, "backlog of 511 .*somaxconn is 128"),
        ({"memory": 32 << 20}, "23 MiB for nginx .* half of the host's 32 MiB"),
        ({"conntrack_max": 1999}, "2000 tracked connections .*nf_conntrack_max is 1999"),
    ],
)
def test_what_a_host_cannot_give_is_said_with_the_arithmetic(
    change: dict[str, int], message: str
) -> None:
    (problem,) = problems(SMALL, dataclasses.replace(ROOMY, **change))
    assert re.search(message, problem)


def test_ports_are_counted_for_the_day_when_a_worker_is_down() -> None:
    demand = Demand(connections=60_000, workers=2, processes=4, keepalive=10)
    (problem,) = problems(demand, ROOMY)
    assert "66044 ports to one worker" in problem
    assert "at least 3 workers" in problem
    assert problems(dataclasses.replace(demand, workers=3), ROOMY) == []


def test_the_default_worker_connections_hold_what_the_reference_says() -> None:
    assert descriptors(8192) == 2 * 8192 + 512


def test_the_document_is_current() -> None:
    committed = (Path(__file__).resolve().parents[3] / "docs" / "sizing.md").read_text()
    assert committed == document(), "run: python -m provision.sizing >docs/sizing.md"


def test_more_is_reserved_than_was_measured() -> None:
    assert NGINX_BYTES + WORKER_BYTES > MEASURED_BYTES


def test_the_table_has_a_line_for_each_size() -> None:
    assert len(table().splitlines()) == 9
