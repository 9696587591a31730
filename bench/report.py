"""What was measured, for people: `python -m bench.report` writes docs/benchmarks.md and a plot.

Reads bench/results/serving.json and deploy.json, and measures nothing.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import Any

from bench.harness import CHECKOUT
from bench.results import RESULTS, read

_TABLE = CHECKOUT / "docs" / "benchmarks.md"
_PLOT = RESULTS / "serving.svg"

_INTRODUCTION = """\
# Benchmarks

Generated from `bench/results/` by `python -m bench.report`, which `make bench`, `make bench-peers`
and `make bench-deploy` end with. What is compared by speed runs in turns, one after the other on
the same machine, and its rows are medians of all turns or ratios of those; the rows of memory are
single measurements. Ratios carry over to other machines better than absolute numbers do.

![Requests a second of the example model](../bench/results/serving.svg)
"""

# In the order of the document: the program's module, and what it does.
_PROGRAMS = (
    (
        "serving",
        "The service and its model",
        "64 closed-loop connections, 3,136-byte float32 inputs, one torch thread, and a load "
        "client in C on a core of its own. The yardstick is the raw batched forward of the same "
        "model, in the faster one of two sizes of batch; the service may be faster still, where "
        "its warm-up finds fused kernels faster. The identity model computes nothing, and its "
        "worker has one core, as picows' echo server has. nginx runs with the gateway's own "
        "configuration.\n\n"
        "The service is measured as hosts run it, compiled by mypyc (provision/compiled.py), and "
        "beside it the same from its sources. The raw forward has the whole machine; beside the "
        "service, the other core reads, writes and asks. Where two cores of a virtual machine "
        "share one of the processor's, that alone slows the forward by up to a third. Others ran "
        "on the machine of 2026-11-30, too: the same forward took 1 or 1.4 times as long for a "
        "second or so at a time, so what is compared is measured for moments, in turns. Without "
        "fused kernels nine runs of that day gave 1.06, 0.84, 1.17, 1.02, 0.84, 0.93, 0.77, 0.92 "
        "and 0.77 of the raw forward, and through nginx 1.00, 0.94, 1.04, 0.93, 0.82, 0.90, 0.76, "
        "0.82 and 0.76; with them seven gave 0.97, 0.97, 0.99, 0.93, 0.97, 0.83 and 0.95, and "
        "through nginx 0.96, 0.80, 0.93, 0.87, 0.93, 0.81 and 0.99. In turns with one another, a "
        "worker with them had 1.13, 1.47, 1.31 and 1.15 times "
        "the answers of one without, for 1, 4, 16 and 64 clients. "
        "The CPU that a request takes is the machine's as well: on the quiet one of 2026-11-29 "
        "the echo server took 9 µs and the service 13 to 14; on this one, where the rows below "
        "say what the kernel takes of both, the bar of 15 µs is out of reach.\n\n"
        "Why an idle client waits longer than the forward takes in a loop: the rows at the end say "
        "what the same forward takes after a sleep, and what an echo server that does nothing at "
        "all takes through nginx. What the service does between two forwards is in nobody's cache "
        "after one, nor is the forward's after that: by time stamps in a worker, of a client's "
        "420 µs without nginx 12 were from the message to the batch, 309 the forward (240 in a "
        "loop at that time), 42 tensors in and out, 48 the answer with the kernel's send. "
        "Since 2026-11-29 the event loop runs so small a batch itself, and polls for up to 200 µs "
        "before it sleeps (`busy_poll_us`): in turns with the version before, 0.82 of its p50 "
        "through nginx, 0.92 without the polling. Two clients of two workers on two cores got 1.32 "
        "times as many answers as by the version before, 1.10 without the polling; eight 1.05 and "
        "1.07, 64 1.08 and 0.99. Tried and not kept: torch.compile (no faster for one sample, 19 s "
        "to start).\n\n"
        "Why a request takes more CPU than the echo server's: callgrind counts 36,000 instructions "
        "for one of the identity model beside the kernel's (92,600 before 2026-11-29, 41,700 in "
        "the middle of that day). They are of many functions once each, more than the processor's "
        "first cache holds, so what counts is how many of them there are, not what is copied.",
    ),
    (
        "forms",
        "What fused kernels gain on a CPU",
        "Networks of some kinds with random weights, and the example model, on one thread: the "
        "time of a batch as the module runs it and in a form with fused kernels, by that of one "
        "traced call. Below 1 is faster. Workers measure the same at their start, and use for each "
        "size of batch what is the fastest there.",
    ),
    (
        "peers",
        "Beside other servers",
        "The same traced forward on one torch thread, the service's and one of mosec's with the "
        "kernels fused for each size of batch, which the service does where its warm-up finds "
        "them faster; batches of up to 64, over 64 HTTP connections that stay open, the same "
        "3,136 bytes of input. Each peer runs with the best of some settings, chosen at the start "
        "of the run: mosec with batches of up to 32 or 64 and a wait of 1 or 10 ms, with the "
        "tensors' bytes as bodies; pytriton with a delay of 0, 1 or 5 ms and 2 or 8 HTTP threads, "
        "with Triton's binary extension. All are started anew five times, since two processes of "
        "the same server differ.",
    ),
    (
        "connections",
        "Many connections",
        "Through nginx to two workers, all open at once; each asks once. Memory is that of nginx "
        "and both workers together, what processes share counted once. The other client asks 300 "
        "times a second, with the many beside it and without them in turns; its p99 is the median "
        "of 50 whiles of 2 s each. In a third part of each turn as many "
        "files are open instead, of /dev/null: what watches a machine looks at each descriptor of "
        "each process, every second maybe (2026-12-01: up to 40 ms at a time, and p99 1.13 times "
        "as long).",
    ),
    (
        "memory",
        "Memory over time",
        "One worker process; its resident memory after a warm-up, and after as many requests and "
        "connects as the rows say. Every second client leaves without a closing handshake.",
    ),
    (
        "ansible",
        "Beside Ansible",
        "The same as a playbook (bench/ansible/playbook.yml: ansible-core 2.19, pipelining, forks "
        "20), on the same hosts; runs that have nothing to do in turns. After a first deploy by "
        "either, what they rendered is the same byte by byte.",
    ),
    (
        "changes",
        "A gateway that is changed",
        "Sockets that ask every two seconds, and connectors that do nothing but handshakes, while "
        "the gateway is deployed 20 times; every second change is broken, each in another way: a "
        "template that does not render, what nginx alone refuses, a key of another certificate, "
        "everybody denied, no way to the workers, a taken port, a file of somebody else, a full "
        "disk in two places, a lost connection. Each configuration marks its answers.",
    ),
    (
        "rolling",
        "A rolling restart",
        "Two hosts with two workers each, the project's clients, one gateway; a setting of the "
        "service changes, so all four restart. The capacity is what the workers' metrics say.",
    ),
    (
        "interrupts",
        "Deploys that are killed",
        "SIGKILL at seeded random moments of a deploy that changes the gateway and restarts both "
        "workers of a host; the next run has to leave exactly what is declared.",
    ),
)

# Without one: other programs used the machine meanwhile.
_VERDICTS = {True: "holds", False: "**missed**", None: "*not measured alone*"}

# What the plot compares: the row's name, and what it is called there.
_BARS = (
    ("raw forward", "raw forward"),
    ("direct", "gpu_service"),
    ("direct (not compiled)", "gpu_service, from its sources"),
    ("through nginx", "gpu_service, nginx"),
    ("mosec 0.9.8", "mosec 0.9.8"),
    ("mosec 0.9.8 with fused kernels", "mosec, fused kernels"),
    ("pytriton 0.7.0", "pytriton 0.7.0"),
)

_WIDTH, _LEFT, _TOP, _STEP, _BAR = 760, 220, 60, 40, 24
_COLOURS = {"raw forward": "#999999"}
_OWN, _OTHER, _TEXT = "#0072b2", "#d55e00", "#333333"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    parts = [_INTRODUCTION]
    for program, title, about in _PROGRAMS:
        own = [row for row in rows if row["command"].split()[2] == f"bench.{program}"]
        if own:
            dates = ", ".join(sorted({row["date"] for row in own}))
            machines = "; ".join(sorted({row["machine"] for row in own}))
            lines = [
                f"## {title}",
                "",
                about,
                "",
                f"`python -m bench.{program}`, {dates}, {machines}.",
            ]
            lines += ["", "| figure | value | bar | |", "|---|---:|---:|---|"]
            parts.append("\n".join([*lines, *map(_line, own)]) + "\n")
    return "\n".join(parts)


def svg(rows: Sequence[dict[str, Any]]) -> str:
    """The plot: requests a second, one bar each."""
    # Of one machine: the peers are measured on request, maybe on another one.
    here = {row["machine"] for row in rows if row["name"] == "direct"}
    values = {row["name"]: float(row["value"]) for row in rows if row["machine"] in here}
    values["raw forward"] = max(values.get(f"raw forward, batches of {n}", 0.0) for n in (32, 64))
    bars = [(label, values[name]) for name, label in _BARS if name in values]
    most = max((value for _, value in bars), default=1.0)
    height = _TOP + _STEP * len(bars) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13" '
        f'fill="{_TEXT}">',
        "<title>Requests a second of the example model</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="30" font-size="16">Requests a second, example CNN, one CPU thread, '
        "64 connections</text>",
    ]
    for number, (label, value) in enumerate(bars):
        y = _TOP + _STEP * number
        width = value / most * (_WIDTH - _LEFT - 100)
        colour = _COLOURS.get(label, _OWN if label.startswith("gpu_service") else _OTHER)
        middle = y + _BAR * 0.7
        parts += [
            f'<text x="{_LEFT - 10}" y="{middle:.0f}" text-anchor="end">'
            f"{html.escape(label)}</text>",
            f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{_LEFT + width + 8:.1f}" y="{middle:.0f}">{value:,.0f}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(row: dict[str, Any]) -> str:
    bar, verdict = "", ""
    for key, words in (("at_most", "≤"), ("at_least", "≥")):
        if row[key] is not None:
            bar = f"{words} {row[key]:g}{_unit(row)}"
            verdict = _VERDICTS[row["holds"]]
    return f"| {row['name']} | {_number(row['value'])}{_unit(row)} | {bar} | {verdict} |"


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _unit(row: dict[str, Any]) -> str:
    return f" {row['unit']}" if row["unit"] else ""


def main() -> int:
    rows = [*read("serving"), *read("deploy")]
    _TABLE.write_text(markdown(rows))
    _PLOT.write_text(svg(rows))
    print(f"written: {_TABLE.relative_to(CHECKOUT)}, {_PLOT.relative_to(CHECKOUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
