"""Whatever clients do, every message is answered once, and nothing of it is kept.

The real service, registry and dispatcher; `fuzz.world` launches and finishes the batches, so that
things happen in an order that is chosen, not met.
"""

import asyncio
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from fuzz import targets, world


def request(request_id: str, *, model: str = "counter", **parameters: Any) -> str:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}
    return json.dumps(
        {"id": request_id, "model_name": model, "inputs": [tensor], "parameters": parameters}
    )


def whole(sequence_id: int, **more: Any) -> dict[str, Any]:
    """The parameters of a sequence of one step."""
    return {"sequence_id": sequence_id, "sequence_start": True, "sequence_end": True, **more}


@given(st.binary(max_size=300))
@example(bytes([1, 0, 0, 79, 141]))
@example(bytes([1, 0, 2, 2, 92, 63, 1, 0, 29, 2, 223, 0, 1, 154, 156, 169]))
@example(bytes([1, 0, 0, 67, 204, 89, 0, 0, 0, 0, 155, 0, 0, 98, 17]))
async def test_every_message_is_answered_and_nothing_is_kept(data: bytes) -> None:
    await world.live(data)


@pytest.mark.parametrize("how", ["expired", "cancelled", "cancelled as a sequence"])
async def test_a_sequence_that_ends_before_it_ran_gives_its_place_back(how: str) -> None:
    here = world.World()
    client = here.clients[0]
    timeout = {"timeout_ms": 1e-6} if how == "expired" else {}
    for number in range(world.MAX_STREAMS + 1):
        client.send(request(str(number), **whole(number, **timeout)))
        if how == "cancelled":
            client.send(json.dumps({"cancel": {"id": str(number)}}))
        elif how == "cancelled as a sequence":
            client.send(json.dumps({"cancel": {"sequence_id": number}}))
        await here.run_all()
    await here.end()


async def test_a_sequence_that_ends_keeps_its_place_until_its_last_response() -> None:
    here = world.World()
    one, other = here.clients[:2]
    one.send(request("a", **whole(1, max_responses=4)))
    here.launch()
    here.finish()
    await asyncio.sleep(0)
    for number in range(world.MAX_STREAMS):
        other.send(request(str(number), **whole(number, max_responses=2)))
    await here.end()


async def test_a_step_may_follow_a_request_for_many_responses_that_is_under_way() -> None:
    here = world.World()
    client = here.clients[0]
    client.send(request("a", sequence_id=1, sequence_start=True, max_responses=4))
    here.launch()
    client.send(request("b", sequence_id=1, sequence_end=True))
    await here.run_all()
    await here.end()


@pytest.mark.parametrize("model", ["adder", "counter"])
async def test_a_model_that_is_unloaded_gives_all_its_responses_first(model: str) -> None:
    here = world.World()
    here.clients[0].send(request("a", model=model, max_responses=4))
    here.launch()
    await here.registry.unload(model)
    await here.run_all()
    assert here.clients[0].codes == []
    await here.end()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_the_fuzzer_begins_with_breaks_nothing(name: str) -> None:
    target, seeds = targets.TARGETS[name]
    for seed in seeds():
        target(seed)
    targets.close()
