"""A bar chart as an SVG file, written by hand: one group of bars per model, one bar per way."""

from __future__ import annotations

import html
from collections.abc import Mapping

_WIDTH, _LEFT, _TOP, _ROW, _GAP, _BAR = 760, 210, 70, 26, 22, 420
_COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart by people who do not see all colours


def svg(title: str, note: str, groups: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """By group and bar: the whole, and the part of it that is drawn pale. Both in ms."""
    most = max(whole for bars in groups.values() for whole, _ in bars.values())
    parts, y = [], float(_TOP)
    for group, bars in groups.items():
        parts.append(_text(20, y + 14, group, weight="bold"))
        y += _ROW
        for (name, (whole, pale)), colour in zip(bars.items(), _COLOURS, strict=False):
            width, run = _BAR * whole / most, _BAR * max(0.0, whole - pale) / most
            parts.append(_text(_LEFT - 10, y + 14, name, anchor="end"))
            parts.append(_rectangle(_LEFT, y, run, colour, 1.0))
            parts.append(_rectangle(_LEFT + run, y, width - run, colour, 0.35))
            parts.append(_text(_LEFT + width + 8, y + 14, f"{whole:.1f} ms"))
            y += _ROW
        y += _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y:.0f}" '
        f'width="{_WIDTH}" height="{y:.0f}" font-family="sans-serif" font-size="13" '
        f'fill="#333333"><title>{html.escape(title)}</title>'
        f'<rect width="{_WIDTH}" height="{y:.0f}" fill="#ffffff"/>'
    )
    return "\n".join([head, _text(20, 26, title, size=16), _text(20, 48, note), *parts, "</svg>\n"])


def _rectangle(x: float, y: float, width: float, colour: str, opacity: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="18" fill="{colour}" '
        f'fill-opacity="{opacity}"/>'
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )
