import io
import json
import logging
from collections.abc import Iterator

import pytest

from gpu_service import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    root.handlers[:], root.level = before


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_of_json_with_its_fields(stream: io.StringIO) -> None:
    logs.info("ready", port=9005, reason="a\nb")
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")  # type: ignore[attr-defined]
    assert line == {"level": "info", "event": "ready", "port": 9005, "reason": "a\nb"}


def test_a_cause_adds_its_traceback(stream: io.StringIO) -> None:
    try:
        raise ValueError("because")
    except ValueError as error:
        logs.error("failed", cause=error)
    (line,) = lines(stream)
    assert "ValueError: because" in str(line["traceback"])
    assert line["level"] == "error"


def test_libraries_are_heard_from_warning_up(stream: io.StringIO) -> None:
    logging.getLogger("websockets.server").info("connection open")
    logging.getLogger("websockets.server").error("handler %s", "failed")
    (line,) = lines(stream)
    assert (line["logger"], line["event"]) == ("websockets.server", "handler failed")


def test_a_rate_limit_counts_what_it_keeps_back() -> None:
    now = [0.0]
    limit = logs.RateLimit(most=2, per_s=10, clock=lambda: now[0])
    assert [limit.admit() for _ in range(5)] == [0, 0, None, None, None]
    now[0] = 10
    assert [limit.admit() for _ in range(3)] == [3, 0, None]
