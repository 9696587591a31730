"""The latency plot of a load run: an SVG file, written by hand, that any browser shows.

Pure; a report in, text out. Two panels: latencies over time, and the latency that each share of
the requests did not exceed. Both have logarithmic scales of latency.
"""

import html
import math
from collections.abc import Iterable, Sequence

from gpu_service.load_report import Report, ms

_WIDTH, _HEIGHT = 960, 420
_LEFT, _TOP, _PANEL_WIDTH, _PANEL_HEIGHT, _GAP = 70, 70, 390, 280, 90

_MOST_STEPS = 10

# Told apart by people who do not see all colours, too.
_COLOURS = {"p50": "#0072b2", "p99": "#d55e00", "max": "#999999"}
_GRID, _TEXT = "#dddddd", "#333333"

Points = Sequence[tuple[float, float]]


def svg(run: Report) -> str:
    """The whole file."""
    over_time = {
        "max": [(point.to_s, point.max) for point in run.over_time if point.answered],
        "p99": [(point.to_s, point.p99) for point in run.over_time if point.answered],
        "p50": [(point.to_s, point.p50) for point in run.over_time if point.answered],
    }
    failed = [(point.from_s + point.to_s) / 2 for point in run.over_time if point.failed]
    # The tail is what matters: each nine takes as much room as the one before.
    by_share = [(-math.log10(1 - fraction), value) for fraction, value in run.percentiles]
    scale = _scale([value for line in [*over_time.values(), by_share] for _, value in line])
    first = _Panel(x=_LEFT, width_units=max(run.over_time[-1].to_s, 1e-9), scale=scale)
    second = _Panel(
        x=_LEFT + _PANEL_WIDTH + _GAP,
        width_units=max(1.0, by_share[-1][0] if by_share else 1.0),
        scale=scale,
    )
    title = f"{run.requests_per_s:,.0f} requests/s over {run.connections} connections"
    note = (
        f"{run.answered:,} answered, {run.failed:,} failed in {run.duration_s:.1f} s; latency from "
        f"{run.latency_from}: p50 {ms(run.latency_ms.p50)}, p99 {ms(run.latency_ms.p99)}, "
        f"max {ms(run.latency_ms.max)}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12" '
        f'fill="{_TEXT}">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        label(_LEFT, 26, title, size=16),
        label(_LEFT, 46, note),
        *first.frame([(at, f"{at:g}") for at in _round_steps(first.width_units)], "seconds"),
        *(first.line(points, _COLOURS[name]) for name, points in over_time.items()),
        *(first.mark(at) for at in failed),
        *second.frame(_nines(second.width_units), "percent of requests"),
        second.line(by_share, _COLOURS["p99"]),
        *_legend([*over_time, *(["failed"] if failed else [])]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Panel:
    """A rectangle with a linear axis from 0 to `width_units`, and one through `scale`, in ms."""

    def __init__(self, *, x: float, width_units: float, scale: Sequence[float]) -> None:
        self._x = x
        self.width_units = width_units
        self._scale = scale

    def _at(self, across: float, value_ms: float) -> tuple[float, float]:
        low, high = self._scale[0], self._scale[-1]
        part = math.log(max(value_ms, low) / low) / math.log(high / low)
        x = self._x + across / self.width_units * _PANEL_WIDTH
        return x, _TOP + _PANEL_HEIGHT * (1 - part)

    def frame(self, ticks: Iterable[tuple[float, str]], unit: str) -> list[str]:
        bottom = _TOP + _PANEL_HEIGHT
        parts = []
        for value_ms in self._scale:
            x, y = self._at(0, value_ms)
            parts.append(f'<path d="M{x:.1f} {y:.1f}h{_PANEL_WIDTH}" stroke="{_GRID}"/>')
            parts.append(label(x - 6, y + 4, f"{value_ms:g} ms", anchor="end"))
        for at, text in ticks:
            x, _ = self._at(at, 1)
            parts.append(f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="{_GRID}"/>')
            parts.append(label(x, bottom + 18, text, anchor="middle"))
        middle = self._x + _PANEL_WIDTH / 2
        parts.append(label(middle, bottom + 38, unit, anchor="middle"))
        return parts

    def line(self, points: Points, colour: str) -> str:
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self._at(*point) for point in points))
        return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"/>'

    def mark(self, across: float) -> str:
        x, _ = self._at(across, 1)
        return f'<path d="M{x:.1f} {_TOP}v8" stroke="#cc0000" stroke-width="2"/>'


def label(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    """A text at a point, which is where it begins, or with another `anchor` its middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{html.escape(text)}</text>"
    )


def _legend(names: Iterable[str]) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        x, y = _LEFT + 70 * number, _TOP + _PANEL_HEIGHT + 56
        colour = _COLOURS.get(name, "#cc0000")
        parts.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(label(x + 24, y, name))
    return parts


def _scale(values_ms: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, … around all values, or powers of ten where those would be too many."""
    positive = [value for value in values_ms if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    for factors in ((1, 2, 5), (1,)):
        steps = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        first = max(number for number, step in enumerate(steps) if step <= low)
        last = min(number for number, step in enumerate(steps) if step >= high)
        scale = steps[first : max(last, first + 1) + 1]
        if len(scale) <= _MOST_STEPS:
            break
    return scale


def _round_steps(most: float) -> list[float]:
    """Some round numbers from 0 to `most`."""
    rough = most / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * step for number in range(math.floor(most / step) + 1)]


def _nines(most: float) -> list[tuple[float, str]]:
    """0, 50, 90, 99, 99.9, … where they are on an axis of nines."""
    nines = [(float(n), f"{100 - 10.0 ** (2 - n):.10g}") for n in range(1, math.floor(most) + 1)]
    return [(0.0, "0"), (-math.log10(0.5), "50"), *nines]
