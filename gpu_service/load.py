"""`python -m gpu_service load`: sends requests to one address, and says how long answers took.

Owns its connections and, with a rate, one thread that keeps the time; all else is on one event
loop (uvloop where it is installed). What was measured is kept in `load_report`. Ends by itself,
after a number of requests or a time. Starts fast: no torch.
"""

import asyncio
import collections
import contextlib
import functools
import itertools
import resource
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import msgspec
import numpy

from gpu_service import bundle, datatypes, golden, load_report, plot
from gpu_service.client import (
    Client,
    ClientError,
    DeadlineExceededError,
    InferenceError,
    UnreachableError,
)
from gpu_service.device import Tensors
from gpu_service.histogram import Histogram
from gpu_service.load_report import Plan, Tally

_DEADLINE_S = 30.0
_OPENING_AT_ONCE = 64

# With a rate, requests are sent when it is time, answered or not, up to so many under way: as
# many as a server takes of a connection. Beyond, they wait here, and that counts as latency.
_UNDER_WAY_PER_CONNECTION = 64
_MOST_UNDER_WAY = 4096

# The thread that keeps the time does not wake up more often; at higher rates, several requests
# are sent at a time.
_SHORTEST_TICK_S = 0.000_2

_PAUSE_WHEN_BROKEN_S = 0.1
_REFRESH_S = 0.25
_LINE_EVERY_S = 2.0


class InputError(Exception):
    """What was to be sent, or written, cannot be; the message says what and why."""


def main(
    plan: Plan,
    *,
    path: Path | None,
    files: Sequence[tuple[str, Path]],
    json_file: Path | None,
    plot_file: Path | None,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    output: TextIO = sys.stdout,
    progress: TextIO = sys.stderr,
) -> int:
    """Send the samples of the bundle in `path`, one a request, or the arrays in `files`.

    Returns 0 if all was answered, 1 if anything failed, 130 after Ctrl-C; the report is made in
    any case. Raises InputError, bundle.BundleError, and client.ClientError when there is no
    server.
    """
    inputs = _from_bundle(path) if path is not None else _from_files(files)
    if path is not None:
        plan = msgspec.structs.replace(plan, model=bundle.read_manifest(path).name)
    for file in (json_file, plot_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"{file}: there is no such folder to write it to")
    loop_name, loop_factory = _loop()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        # What is refused is to be seen, not to be smoothed over.
        client_of = functools.partial(
            Client, plan.url, deadline_s=_DEADLINE_S, retry_refused=False, token=token, tls=tls
        )
        tally, interrupted = runner.run(_main(plan, inputs, client_of, progress))
    report = load_report.report(plan, tally, event_loop=loop_name)
    print(load_report.table(report), file=output)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if plot_file is not None:
        plot_file.write_text(plot.svg(report), encoding="utf-8")
    if interrupted:
        return 130
    return 1 if report.failed or not report.answered else 0


def _from_bundle(path: Path) -> list[Tensors]:
    return list(golden.one_by_one(bundle.load_samples(path)))


def _from_files(files: Sequence[tuple[str, Path]]) -> list[Tensors]:
    arrays = {}
    for name, file in files:
        try:
            array = numpy.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: cannot be read as a .npy array: {error}") from None
        if not isinstance(array, numpy.ndarray):
            raise InputError(f"{file}: holds several arrays; one .npy array is expected")
        if name in arrays:
            raise InputError(f"input {name!r} is given twice")
        try:
            datatypes.name_of(array.dtype)
        except ValueError as error:
            raise InputError(f"{file}: {error}") from None
        arrays[name] = array
    return [arrays]


def _loop() -> tuple[str, Callable[[], asyncio.AbstractEventLoop]]:
    try:
        import uvloop
    except ImportError:
        return "asyncio", asyncio.new_event_loop
    return "uvloop", uvloop.new_event_loop


# ------------------------------------------------------------------------------ when to send


class Turns:
    """Says to those that send when it is their turn, and when there are no more.

    This one lets each send its next request at once.
    """

    def __init__(self, plan: Plan, *, started_ns: int) -> None:
        self._started_ns = started_ns
        self._most = plan.requests
        self._ends_ns = None if plan.duration_s is None else started_ns + int(plan.duration_s * 1e9)
        self._taken = 0
        self._stopped = False

    async def next(self) -> int | None:
        """When the next request is, or was, to be sent (ns, perf_counter); None: no more."""
        return self._take(time.perf_counter_ns())

    def stop(self) -> None:
        """No more turns."""
        self._stopped = True

    def _take(self, due_ns: int) -> int | None:
        if (
            self._stopped
            or (self._most is not None and self._taken >= self._most)
            or (self._ends_ns is not None and due_ns >= self._ends_ns)
        ):
            return None
        self._taken += 1
        return due_ns


class PacedTurns(Turns):
    """Turns at fixed times. One that is taken late is still due when it was due."""

    def __init__(self, plan: Plan, *, started_ns: int) -> None:
        super().__init__(plan, started_ns=started_ns)
        assert plan.rate is not None
        self._period_ns = 1e9 / plan.rate
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()
        self._loop = asyncio.get_running_loop()
        self._done = threading.Event()
        # A thread, because an event loop's timers are a millisecond late, which would be
        # measured as latency.
        self._thread = threading.Thread(target=self._keep_time, name="pace", daemon=True)
        self._thread.start()

    async def next(self) -> int | None:
        """See `Turns`; returns when it is time."""
        due_ns = self._take(self._started_ns + int(self._taken * self._period_ns))
        if due_ns is not None and due_ns > time.perf_counter_ns():
            future = self._loop.create_future()
            self._waiting.append((due_ns, future))
            await future
        return None if self._stopped else due_ns

    def stop(self) -> None:
        """No more turns; the thread ends."""
        super().stop()
        self._done.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        now_ns = time.perf_counter_ns()
        while self._waiting and (self._stopped or self._waiting[0][0] <= now_ns):
            _, future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)

    def _keep_time(self) -> None:
        tick_ns = max(self._period_ns, _SHORTEST_TICK_S * 1e9)
        for tick in itertools.count():
            at_ns = self._started_ns + tick * tick_ns
            while (early_ns := at_ns - time.perf_counter_ns()) > 0:
                if self._done.wait(early_ns / 1e9):
                    return
            if self._done.is_set():
                return
            if -early_ns < tick_ns:  # else a later tick is due, too, and releases more
                self._loop.call_soon_threadsafe(self._release)


# ------------------------------------------------------------------------------ sending


async def _main(
    plan: Plan, inputs: Sequence[Tensors], client_of: Callable[[], Client], progress: TextIO
) -> tuple[Tally, bool]:
    _raise_descriptor_limit()
    async with contextlib.AsyncExitStack() as stack:
        clients = await _connected(plan.connections, client_of, stack)
        tally = Tally(time.perf_counter_ns())
        cpu_ns = time.process_time_ns()
        display = asyncio.create_task(_display(plan, tally, progress))
        try:
            interrupted = await _send_all(plan, clients, inputs, tally)
        finally:
            display.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await display
        tally.cpu_ns = time.process_time_ns() - cpu_ns
        tally.reconnects = sum(client.reconnects for client in clients)
    return tally, interrupted


async def _connected(
    count: int, client_of: Callable[[], Client], stack: contextlib.AsyncExitStack
) -> list[Client]:
    at_once = asyncio.Semaphore(_OPENING_AT_ONCE)

    async def open_one() -> Client:
        async with at_once:
            return await stack.enter_async_context(client_of())

    opened = await asyncio.gather(*(open_one() for _ in range(count)), return_exceptions=True)
    clients = [client for client in opened if isinstance(client, Client)]
    for error in opened:
        if isinstance(error, BaseException):
            raise error
    return clients


async def _send_all(
    plan: Plan, clients: Sequence[Client], inputs: Sequence[Tensors], tally: Tally
) -> bool:
    """Send all there is to send; True if Ctrl-C ended it."""
    made = PacedTurns if plan.rate else Turns
    turns = made(plan, started_ns=tally.started_ns)
    under_way = len(clients)
    if plan.rate:
        most = max(len(clients), _MOST_UNDER_WAY)
        under_way = min(len(clients) * _UNDER_WAY_PER_CONNECTION, most)
    cycled = itertools.cycle(inputs)
    tasks = [
        asyncio.create_task(_send(client, turns, cycled, tally, model=plan.model))
        for client in itertools.islice(itertools.cycle(clients), under_way)
    ]
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        for task in tasks:
            task.cancel()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        turns.stop()
        for task in tasks:
            task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    return interrupted


async def _send(
    client: Client,
    turns: Turns,
    inputs: Iterator[Tensors],
    tally: Tally,
    *,
    model: str | None,
) -> None:
    while (due_ns := await turns.next()) is not None:
        sent_ns = time.perf_counter_ns()
        try:
            result = await client.infer(next(inputs), model=model)
        except ClientError as error:
            tally.failed(_code(error), str(error), now_ns=time.perf_counter_ns())
            if not isinstance(error, InferenceError):
                # A client that has given up answers at once, and for ever.
                await asyncio.sleep(_PAUSE_WHEN_BROKEN_S)
        else:
            tally.answered(
                worker=result.worker,
                due_ns=due_ns,
                sent_ns=sent_ns,
                now_ns=time.perf_counter_ns(),
            )


def _code(error: ClientError) -> str:
    match error:
        case InferenceError():
            return error.code
        case DeadlineExceededError():
            return f"no answer in {_DEADLINE_S:g} s"
        case UnreachableError():
            return "unreachable"
        case _:
            return "given up"


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ------------------------------------------------------------------------------ progress


async def _display(plan: Plan, tally: Tally, stream: TextIO) -> None:
    """Show progress until cancelled: one line that changes on a terminal, else one now and then."""
    live = stream.isatty()
    shown_ns = tally.started_ns
    width = 0
    try:
        while True:
            await asyncio.sleep(_REFRESH_S if live else _LINE_EVERY_S)
            recent, tally.recent = tally.recent, Histogram()
            now_ns = time.perf_counter_ns()
            line = load_report.progress(
                plan, tally, recent, now_ns=now_ns, recent_ns=now_ns - shown_ns
            )
            shown_ns = now_ns
            stream.write(f"\r{line:<{width}}" if live else f"{line}\n")
            stream.flush()
            width = len(line)
    finally:
        if live:
            stream.write("\r" + " " * width + "\r")
            stream.flush()
