"""What the parameters of a request mean. Pure; each function raises ProtocolError with the id."""

import math

from gpu_service.batching import NORMAL_PRIORITY, PRIORITIES
from gpu_service.messages import ErrorCode, ProtocolError, Request
from gpu_service.protocol import MAX_ID_CHARS

SequenceId = str | int

# Longer ones are cut: timers do not take any number.
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000

_MOST_RESPONSES = 1_000_000


def invalid(request: Request, message: str) -> ProtocolError:
    """The refusal of a request that can never succeed as it is."""
    return ProtocolError(ErrorCode.INVALID_ARGUMENT, message, request_id=request.id)


def priority_of(request: Request) -> int:
    """From 0 to 9, more is sooner; raises ProtocolError, as all of these."""
    priority = request.parameters.get("priority", NORMAL_PRIORITY)
    if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
        raise invalid(
            request,
            f"parameter 'priority' must be a whole number from {PRIORITIES[0]} to "
            f"{PRIORITIES[-1]}; {NORMAL_PRIORITY} is normal, more is sooner",
        )
    return priority


def timeout_of(request: Request) -> float:
    """Seconds within which it must start; infinity where it does not say."""
    timeout_ms = request.parameters.get("timeout_ms", math.inf)
    if isinstance(timeout_ms, bool | str) or not timeout_ms > 0:
        raise invalid(request, "parameter 'timeout_ms' must be a number greater than 0")
    return min(timeout_ms, _LONGEST_TIMEOUT_MS) / 1000 if timeout_ms != math.inf else math.inf


def most_responses_of(request: Request) -> int | None:
    """How many responses it asks for at most; None where it has not asked for many."""
    most = request.parameters.get("max_responses")
    if most is None:
        return None
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= _MOST_RESPONSES:
        raise invalid(
            request,
            f"parameter 'max_responses' must be a whole number from 1 to {_MOST_RESPONSES}",
        )
    return most


def sequence_of(request: Request) -> tuple[SequenceId | None, bool, bool]:
    """Which sequence `request` is a step of, and whether it is its first and its last one."""
    parameters = request.parameters
    sequence_id = parameters.get("sequence_id")
    if isinstance(sequence_id, bool | float) or sequence_id == "":
        raise invalid(request, "parameter 'sequence_id' must be a text or a whole number")
    if isinstance(sequence_id, str) and len(sequence_id) > MAX_ID_CHARS:
        raise invalid(
            request, f"'sequence_id' has {len(sequence_id)} characters, at most {MAX_ID_CHARS}"
        )
    flags = [parameters.get(name, False) for name in ("sequence_start", "sequence_end")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise invalid(request, "'sequence_start' and 'sequence_end' must be true or false")
    if sequence_id is None and any(flags):
        raise invalid(request, "'sequence_start' and 'sequence_end' need a 'sequence_id'")
    return sequence_id, bool(flags[0]), bool(flags[1])
