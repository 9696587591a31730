"""The load generator against real servers: that it counts right, ends, and hides nothing."""

import asyncio
import concurrent.futures
import io
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy
import pytest

from gpu_service import __main__ as command_line
from gpu_service import load
from gpu_service.load import InputError, PacedTurns
from gpu_service.load_report import Plan, Report
from tests.service.conftest import ROOT, Process, metric
from tests.service.fakes import BOUND_S, POISON, WAIT, x_of

Spawn = Callable[..., Process]
ANSWERED = 'gpu_service_requests_total{code="OK"}'


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def server(spawn: Spawn, gate: Path) -> Process:
    process = spawn("--worker", "w1", GATE=str(gate))
    process.until("ready")
    return process


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"


def array(folder: Path, *values: float) -> Path:
    file = folder / "x.npy"
    numpy.save(file, x_of(*values)["x"])
    return file


def run(plan: Plan, folder: Path, *values: float, progress: io.StringIO | None = None) -> Report:
    """What a run with these values measured; its exit code must fit."""
    result = folder / "result.json"
    code = load.main(
        plan,
        path=None,
        files=[("x", array(folder, *(values or (1.0,))))],
        json_file=result,
        plot_file=folder / "plot.svg",
        output=io.StringIO(),
        progress=progress or io.StringIO(),
    )
    report = msgspec.json.decode(result.read_bytes(), type=Report)
    assert code == (1 if report.failed else 0)
    return report


def test_exactly_so_many_are_sent_and_counted(server: Process, tmp_path: Path) -> None:
    report = run(Plan(url=server.url, connections=8, requests=500), tmp_path)
    assert (report.answered, report.failed) == (500, 0)
    assert report.workers == {"w1": 500}
    assert report.reconnects == 0
    assert metric(server.port, ANSWERED) == 500
    assert metric(server.port, "gpu_service_connections_opened_total") == 8
    assert 0 < report.latency_ms.p50 <= report.latency_ms.p99 <= report.latency_ms.max
    assert report.sent_late_ms is None
    ElementTree.parse(tmp_path / "plot.svg")


def test_a_time_ends_it(server: Process, tmp_path: Path) -> None:
    report = run(Plan(url=server.url, connections=2, duration_s=0.3), tmp_path)
    assert report.answered == metric(server.port, ANSWERED) > 0


def test_with_a_rate_requests_do_not_wait_for_answers(
    server: Process, gate: Path, tmp_path: Path
) -> None:
    plan = Plan(url=server.url, connections=1, requests=50, rate=1000)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened = pool.submit(
            lambda: (
                until(lambda: metric(server.port, "gpu_service_in_flight_requests") == 50),
                gate.touch(),
            )
        )
        report = run(plan, tmp_path, WAIT)
        opened.result(BOUND_S)
    assert report.answered == 50
    # All waited for the gate, those sent first for the longest.
    assert report.latency_from == "when it was due"
    assert report.latency_ms.max >= report.latency_ms.p50 > 0
    assert report.duration_s * 1000 >= report.latency_ms.max


def test_a_request_that_could_not_be_sent_in_time_counts_from_when_it_was_due(
    server: Process, gate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_UNDER_WAY_PER_CONNECTION", 1)

    def hold_the_first_for_a_while() -> None:
        until_s = time.monotonic() + 0.2
        until(lambda: time.monotonic() > until_s)
        gate.touch()

    plan = Plan(url=server.url, connections=1, requests=2, rate=1000)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        opened = pool.submit(hold_the_first_for_a_while)
        report = run(plan, tmp_path, WAIT)
        opened.result(BOUND_S)
    assert report.sent_late_ms is not None
    assert report.sent_late_ms.max > 1
    # The second, too, although it was answered at once when it was sent.
    assert report.latency_ms.p50 >= report.sent_late_ms.max


async def test_a_turn_that_is_taken_late_was_due_when_it_was_due() -> None:
    started_ns = time.perf_counter_ns() - 10 * 10**9
    plan = Plan(url="ws://x", connections=1, requests=3, rate=1)
    turns = PacedTurns(plan, started_ns=started_ns)
    due = [await turns.next() for _ in range(4)]
    turns.stop()
    assert due == [started_ns, started_ns + 10**9, started_ns + 2 * 10**9, None]


async def test_turns_come_when_they_are_due_and_in_order() -> None:
    started_ns = time.perf_counter_ns()
    turns = PacedTurns(
        Plan(url="ws://x", connections=1, duration_s=0.2, rate=500), started_ns=started_ns
    )
    came = []

    async def take() -> None:
        while (due_ns := await turns.next()) is not None:
            assert time.perf_counter_ns() >= due_ns
            came.append(due_ns - started_ns)

    async with asyncio.timeout(BOUND_S):
        await asyncio.gather(*(take() for _ in range(10)))
    turns.stop()
    assert sorted(came) == [n * 2_000_000 for n in range(100)]


async def test_stopping_ends_those_that_wait_for_their_turn() -> None:
    plan = Plan(url="ws://x", connections=1, requests=5, rate=0.001)
    turns = PacedTurns(plan, started_ns=time.perf_counter_ns())
    await turns.next()
    waiting = asyncio.create_task(turns.next())
    await asyncio.sleep(0)
    turns.stop()
    assert await waiting is None


def test_errors_are_counted_by_code(server: Process, tmp_path: Path) -> None:
    report = run(Plan(url=server.url, connections=2, requests=20), tmp_path, POISON)
    assert (report.answered, report.failed) == (0, 20)
    assert report.errors == {"INTERNAL": 20}
    assert "its log has the cause" in report.examples["INTERNAL"]


def test_what_is_refused_is_counted_and_not_tried_again(spawn: Spawn, tmp_path: Path) -> None:
    server = spawn("--max-batch", "2", "--max-queue", "2")
    plan = Plan(url=server.url, connections=32, requests=2000)
    report = run(plan, tmp_path, 1.0, 2.0)
    assert report.errors.keys() == {"UNAVAILABLE"}
    assert report.answered + report.failed == 2000
    assert metric(server.port, 'gpu_service_requests_total{code="UNAVAILABLE"}') == report.failed


def test_a_server_that_is_killed_costs_time_and_no_answer(
    spawn: Spawn, server: Process, tmp_path: Path
) -> None:
    port = server.port

    def restart() -> None:
        until(lambda: metric(port, ANSWERED) > 50)
        server.kill()
        assert spawn("--port", str(port), "--worker", "w2").port == port

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(restart)
        report = run(Plan(url=server.url, connections=4, requests=1500, rate=500), tmp_path)
        restarted.result(BOUND_S)
    assert (report.answered, report.failed) == (1500, 0)
    assert report.reconnects == 4
    assert report.workers.keys() == {"w1", "w2"}
    # Those that were due meanwhile waited as long as that took: it shows.
    assert report.latency_ms.max >= 100


def test_a_server_that_goes_for_good_ends_it_with_failures(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_DEADLINE_S", 0.5)

    def kill() -> None:
        until(lambda: metric(server.port, ANSWERED) > 50)
        server.kill()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        report = run(Plan(url=server.url, connections=2, duration_s=1.5, rate=200), tmp_path)
        killed.result(BOUND_S)
    assert report.errors.keys() == {"unreachable"}


def test_progress_on_a_terminal_is_one_line(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_REFRESH_S", 0.02)
    screen = Screen()
    run(Plan(url=server.url, connections=2, duration_s=0.3), tmp_path, progress=screen)
    shown = screen.getvalue()
    assert "\n" not in shown
    assert shown.count("\r[") >= 2
    assert shown.endswith(" \r")  # nothing of it is left above the result


def test_progress_elsewhere_is_lines(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_LINE_EVERY_S", 0.05)
    lines = io.StringIO()
    run(Plan(url=server.url, connections=2, duration_s=0.3), tmp_path, progress=lines)
    assert "\r" not in lines.getvalue()
    assert all(line.startswith("[") for line in lines.getvalue().splitlines())
    assert len(lines.getvalue().splitlines()) >= 2


def test_ctrl_c_ends_it_with_what_was_measured(server: Process, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_service", "load", server.url, "--duration-s", "3600"]
    command += ["--connections", "4", "--rate", "200", "--input", f"x={array(tmp_path, 1)}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: metric(server.port, ANSWERED) > 50)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=BOUND_S)
    assert process.returncode == 130
    assert "answered, 0 failed" in output
    assert "Traceback" not in errors


def test_an_address_where_nothing_listens_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["load", "ws://127.0.0.1:1", "--input", f"x={array(tmp_path, 1)}"]
    assert command_line.main(arguments) == 1
    assert "gpu_service load: ws://127.0.0.1:1: cannot connect" in capsys.readouterr().err


def test_what_cannot_be_sent_or_written_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    plan = Plan(url="ws://127.0.0.1:1", connections=1)
    good, text, complex_ = array(tmp_path, 1), tmp_path / "text", tmp_path / "complex.npy"
    text.write_text("hello")
    numpy.save(complex_, numpy.zeros((1, 3), "c8"))
    for files, json_file, message in (
        ([("x", tmp_path / "none.npy")], None, "none.npy: cannot be read as a .npy array"),
        ([("x", text)], None, "text: cannot be read as a .npy array"),
        ([("x", complex_)], None, "complex64 has no Open Inference Protocol datatype"),
        ([("x", good), ("x", good)], None, "'x' is given twice"),
        ([("x", good)], tmp_path / "none" / "x.json", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            load.main(plan, path=None, files=files, json_file=json_file, plot_file=None)
