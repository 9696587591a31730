import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service import load_report, plot
from gpu_service.load_report import Plan, Tally

SVG = "{http://www.w3.org/2000/svg}"


def drawn(made: Tally, url: str = "ws://x") -> ElementTree.Element:
    run = load_report.report(Plan(url=url, connections=1), made, event_loop="asyncio")
    return ElementTree.fromstring(plot.svg(run))


def tally(latencies_ns: list[int], *, failed_at_ns: int | None = None) -> Tally:
    made = Tally(0)
    for number, latency_ns in enumerate(latencies_ns):
        now_ns = number * 10_000_000
        made.answered(worker="w", due_ns=now_ns - latency_ns, sent_ns=now_ns, now_ns=now_ns)
    if failed_at_ns is not None:
        made.failed("INTERNAL", "x", now_ns=failed_at_ns)
    return made


def texts(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter(f"{SVG}text")]


@given(st.lists(st.integers(0, 10**12), max_size=50))
def test_whatever_was_measured_lies_within_the_panels(latencies_ns: list[int]) -> None:
    svg = drawn(tally(latencies_ns))
    for line in svg.iter(f"{SVG}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 70 <= x <= 940.1
            assert 69.9 <= y <= 350.1


def test_the_slowest_is_drawn_highest() -> None:
    svg = drawn(tally([1_000_000] * 50 + [500_000_000] + [1_000_000] * 49))
    slowest, *_ = svg.iter(f"{SVG}polyline")
    heights = [float(point.split(",")[1]) for point in slowest.attrib["points"].split()]
    assert heights.index(min(heights)) == 5  # of stretches of 0.1 s


def test_scales_have_labels_and_failures_marks() -> None:
    said = texts(drawn(tally([1_500_000] * 200, failed_at_ns=10**9)))
    for label in ("1 ms", "2 ms", "0", "50", "90", "99", "seconds", "failed"):
        assert label in said
    assert "failed" not in texts(drawn(tally([1_500_000])))


def test_a_run_without_answers_can_be_drawn() -> None:
    assert any("0 answered" in text for text in texts(drawn(Tally(0))))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.5], [1, 2]),
        ([1, 10], [1, 2, 5, 10]),
        ([0.3, 4], [0.2, 0.5, 1, 2, 5]),
        ([0.001, 100], [0.001, 0.01, 0.1, 1, 10, 100]),
        ([1, 1], [1, 2]),
        ([], [1, 2]),
    ],
)
def test_scales_are_round(values: list[float], scale: list[float]) -> None:
    assert plot._scale(values) == pytest.approx(scale)
