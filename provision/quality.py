"""The quality gate: which bundles may be deployed, by what was measured on their test samples.

Pure. `min_metrics` and `max_metrics` state the bars; a bundle's manifest has the figures, which
training writes when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping


def problems(
    metrics: Mapping[str, float], *, at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> list[str]:
    """Each bar that is missed, with both figures; also that of a metric which is not there."""
    found = []
    for name, bar in at_least.items():
        # Not `<`: no bar holds for a figure that is not a number.
        if name in metrics and not metrics[name] >= bar:
            found.append(f"{name} is {metrics[name]:g}, and min_metrics wants at least {bar:g}")
    for name, bar in at_most.items():
        if name in metrics and not metrics[name] <= bar:
            found.append(f"{name} is {metrics[name]:g}, and max_metrics wants at most {bar:g}")
    there = ", ".join(sorted(metrics)) or "none"
    found += [
        f"it has no metric {name}, of which a bar is set; its metrics: {there}"
        for name in sorted({*at_least, *at_most} - set(metrics))
    ]
    return found
