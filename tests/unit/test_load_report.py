import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service import load_report
from gpu_service.histogram import Histogram
from gpu_service.load_report import Plan, Report, Tally

MS = 1_000_000
S = 1000 * MS
START = 7 * S

PLAN = Plan(url="ws://x", connections=2, requests=100)


def tally(*latencies_ms: float, every_ms: int = 1) -> Tally:
    """One answer each millisecond, the first at the start."""
    made = Tally(START)
    for number, latency_ms in enumerate(latencies_ms):
        now_ns = START + number * every_ms * MS
        due_ns = now_ns - int(latency_ms * MS)
        made.answered(worker="w1", due_ns=due_ns, sent_ns=due_ns, now_ns=now_ns)
    return made


def report(made: Tally, plan: Plan = PLAN) -> Report:
    return load_report.report(plan, made, event_loop="asyncio")


def test_a_plan_always_ends() -> None:
    assert Plan(url="ws://x", connections=1).duration_s == load_report.DEFAULT_DURATION_S
    assert PLAN.duration_s is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    made = Tally(START)
    made.answered(worker="w", due_ns=START, sent_ns=START + 90 * MS, now_ns=START + 100 * MS)
    result = report(made, Plan(url="ws://x", connections=1, rate=10))
    assert result.latency_ms.p50 == pytest.approx(100)
    assert result.sent_late_ms is not None
    assert result.sent_late_ms.max == pytest.approx(90)
    assert "from when it was due" in load_report.table(result)


def test_quantiles() -> None:
    result = report(tally(*range(1, 1001))).latency_ms
    assert result.p50 == pytest.approx(500, rel=0.01)
    assert result.p99 == pytest.approx(990, rel=0.01)
    assert result.p99_9 == pytest.approx(999, rel=0.01)
    assert result.max == 1000
    assert result.mean == pytest.approx(500.5)


def test_failures_are_counted_by_code_with_one_message_each() -> None:
    made = tally(1, 2)
    for number in range(3):
        made.failed("UNAVAILABLE", f"full {number}", now_ns=START + S)
    made.failed("INTERNAL", "broken", now_ns=START + S)
    result = report(made)
    assert (result.answered, result.failed) == (2, 4)
    assert result.errors == {"UNAVAILABLE": 3, "INTERNAL": 1}
    table = load_report.table(result)
    assert "2 answered, 4 failed" in table
    assert "errors       UNAVAILABLE  3: full 0\n               INTERNAL  1: broken\n" in table


def test_requests_per_s_is_until_the_last_answer() -> None:
    assert report(tally(*[1] * 101, every_ms=10)).requests_per_s == pytest.approx(101)
    assert report(Tally(START)).requests_per_s == 0


@given(st.lists(st.integers(0, 100_000), max_size=100), st.integers(1, 100))
def test_stretches_of_time_hold_every_request_once(at_ms: list[int], failures: int) -> None:
    made = Tally(START)
    for moment in at_ms:
        now_ns = START + moment * MS
        made.answered(worker="w", due_ns=now_ns - MS, sent_ns=now_ns - MS, now_ns=now_ns)
        if moment % 100 < failures:
            made.failed("INTERNAL", "x", now_ns=now_ns)
    points = made.over_time()
    assert len(points) <= 240
    assert sum(point.answered for point in points) == len(at_ms)
    assert sum(point.failed for point in points) == made.failed_count
    widths = {round(point.to_s - point.from_s, 6) for point in points}
    assert len(widths) == 1
    for moment in at_ms:
        assert any(p.answered and p.from_s <= moment / 1000 <= p.to_s for p in points)


def test_what_a_server_says_does_not_fill_the_memory() -> None:
    made = Tally(START)
    for number in range(5000):
        made.answered(worker=f"w{number}", due_ns=START, sent_ns=START, now_ns=START)
        made.failed(f"c{number}", "x", now_ns=START)
    assert len(made.workers) <= 1001
    assert len(made.errors) <= 1001
    assert sum(made.workers.values()) == sum(made.errors.values()) == 5000


def test_the_curve_ends_where_there_are_no_requests_to_speak_of() -> None:
    fractions = [fraction for fraction, _ in report(tally(*range(100))).percentiles]
    assert fractions[0] == 0
    assert max(fractions) == pytest.approx(0.99)
    assert report(Tally(START)).percentiles == []


def test_a_busy_generator_says_so() -> None:
    made = tally(1, 1, every_ms=1000)
    made.cpu_ns = 950 * MS
    assert "95% of a core: it may be the limit" in load_report.table(report(made))
    made.cpu_ns = 100 * MS
    assert "limit" not in load_report.table(report(made))


def test_progress_tells_how_far_and_how_fast() -> None:
    recent = Histogram()
    for _ in range(50):
        recent.record(3 * MS)
    made = tally(*[3] * 50)
    made.failed("INTERNAL", "x", now_ns=START)
    line = load_report.progress(PLAN, made, recent, now_ns=START + S, recent_ns=S // 2)
    assert line.startswith("[##########..........]  51%    1.0 s  51 done  100/s  p50 3.0")
    assert line.endswith(" 1 failed")
    whichever_first = Plan(url="x", connections=1, requests=1000, duration_s=1.0)
    line = load_report.progress(whichever_first, made, recent, now_ns=START + S, recent_ns=S)
    assert line.startswith("[####################] 100%")


def test_a_report_survives_json() -> None:
    made = tally(1, 2, 3)
    made.failed("INTERNAL", "x", now_ns=START)
    result = report(made)
    decoded = msgspec.json.decode(msgspec.json.encode(result), type=Report)
    assert msgspec.to_builtins(decoded) == msgspec.to_builtins(result)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123, "0.12 ms"), (45.67, "45.7 ms"), (456.7, "457 ms"), (12345, "12.3 s")],
)
def test_durations_for_people(value: float, text: str) -> None:
    assert load_report.ms(value) == text
