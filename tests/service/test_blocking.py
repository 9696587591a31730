"""The blocking client: threads, signals, forks, and servers that die under it."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from gpu_service.blocking import BlockingClient
from gpu_service.client import (
    ClientError,
    DeadlineExceededError,
    InferenceError,
    UnreachableError,
)
from gpu_service.messages import ProtocolError
from tests.service.conftest import ROOT, Process, metric
from tests.service.fakes import BOUND_S, POISON, WAIT, x_of

Spawn = Callable[..., Process]
IN_FLIGHT = "gpu_service_in_flight_requests"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"


def until_in_flight(port: int, count: int) -> None:
    until(lambda: metric(port, IN_FLIGHT) == count)


def doubled(client: BlockingClient, value: float) -> float:
    return float(client.infer(x_of(value)).outputs["y"][-1, 0])


def threads() -> int:
    return sum(thread.name == "gpu-service-client" for thread in threading.enumerate())


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def server(spawn: Spawn, gate: Path) -> Process:
    process = spawn(GATE=str(gate))
    process.until("ready")
    return process


def test_many_threads_call_at_once_and_get_their_own_results(server: Process) -> None:
    with (
        BlockingClient(server.url) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        results = list(pool.map(lambda n: doubled(client, n), range(400)))
    assert results == [2 * n for n in range(400)]
    assert threads() == 0


def test_errors_are_those_of_the_asyncio_client(server: Process) -> None:
    with BlockingClient(server.url) as client:
        with pytest.raises(InferenceError, match=r"^INTERNAL: "):
            client.infer(x_of(POISON))
        with pytest.raises(InferenceError, match="no model 'cat'"):
            client.infer(x_of(1), model="cat")
        with pytest.raises(ProtocolError, match="complex64"):
            client.infer({"x": numpy.zeros((1, 3), "c8")})
        assert doubled(client, 4) == 8


def test_a_deadline_ends_one_call_and_no_other(server: Process, gate: Path) -> None:
    with (
        BlockingClient(server.url) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        patient = pool.submit(doubled, client, WAIT)
        until_in_flight(server.port, 1)
        with pytest.raises(DeadlineExceededError, match=r"no answer within 0.05 s"):
            client.infer(x_of(1), deadline_s=0.05)
        gate.touch()
        assert patient.result(BOUND_S) == 2 * WAIT


def test_an_address_without_a_server_is_an_error_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with (
            pytest.raises(UnreachableError, match="cannot connect: Connection refused"),
            BlockingClient(f"ws://127.0.0.1:{port}"),
        ):
            pass
    assert threads() == 0


def test_life_has_an_order(server: Process) -> None:
    client = BlockingClient(server.url)
    with pytest.raises(ClientError, match="is not open; use it as"):
        client.infer(x_of(1))
    with client:
        with pytest.raises(RuntimeError, match="from OPEN to OPENING"):
            client.__enter__()
        assert doubled(client, 1) == 2
    client.close()
    with pytest.raises(ClientError, match="was closed"):
        client.infer(x_of(1))
    with pytest.raises(RuntimeError, match="from CLOSED to OPENING"):
        client.__enter__()


def test_closing_from_another_thread_ends_the_calls(server: Process) -> None:
    with (
        BlockingClient(server.url) as client,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(doubled, client, WAIT) for _ in range(4)]
        until_in_flight(server.port, 4)
        client.close()
        for call in calls:
            with pytest.raises(ClientError, match="was closed"):
                call.result(BOUND_S)


def test_no_call_hangs_when_the_client_is_closed_at_any_moment(server: Process) -> None:
    for _ in range(20):
        with (
            concurrent.futures.ThreadPoolExecutor(4) as pool,
            BlockingClient(server.url) as client,
        ):

            def call_until_closed(client: BlockingClient = client) -> bool:
                try:
                    while True:
                        client.infer(x_of(1))
                except ClientError as error:
                    return "was closed" in str(error)

            calls = [pool.submit(call_until_closed) for _ in range(4)]
            client.infer(x_of(1))
            client.close()
            assert [call.result(BOUND_S) for call in calls] == [True] * 4


def test_closing_while_it_opens_ends_the_opening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts, and says nothing
        client = BlockingClient(f"ws://127.0.0.1:{mute.getsockname()[1]}")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            opening = pool.submit(client.__enter__)
            connection, _ = mute.accept()
            with connection:
                client.close()
                with pytest.raises(ClientError, match="was closed"):
                    opening.result(BOUND_S)
    assert threads() == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_call_of_8_threads_fails_when_the_server_dies_and_comes_back(
    spawn: Spawn, server: Process, gate: Path, how: signal.Signals
) -> None:
    port = server.port
    restarted = threading.Event()
    with (
        BlockingClient(server.url, deadline_s=BOUND_S) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):

        def call(thread: int) -> list[float]:
            results = []
            while not restarted.is_set():
                results.append(doubled(client, thread))
            # The same connection serves on.
            return [*results, *(doubled(client, thread) for _ in range(10))]

        calls = [pool.submit(call, thread) for thread in range(8)]
        until(lambda: metric(port, 'gpu_service_requests_total{code="OK"}') > 100)
        if how == signal.SIGTERM:
            server.terminate()
            server.wait()
        else:
            server.kill()
        second = spawn("--port", str(port), GATE=str(gate))
        assert second.port == port
        until(lambda: metric(port, 'gpu_service_requests_total{code="OK"}') > 100)
        restarted.set()
        for thread, future in enumerate(calls):
            assert set(future.result(BOUND_S)) == {2.0 * thread}
        assert client.reconnects >= 1


def test_calls_under_way_at_a_kill_are_answered_by_the_next_process(
    spawn: Spawn, server: Process, gate: Path
) -> None:
    port = server.port
    with (
        BlockingClient(server.url, deadline_s=BOUND_S) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        calls = [
            pool.submit(lambda n=n: client.infer(x_of(WAIT, n)).outputs["y"][1, 0])
            for n in range(8)
        ]
        until_in_flight(port, 8)
        server.kill()
        gate.touch()
        second = spawn("--port", str(port), GATE=str(gate))
        assert [call.result(BOUND_S) for call in calls] == [2 * n for n in range(8)]
        assert second.port == port


def test_a_refused_call_comes_back(spawn: Spawn, gate: Path) -> None:
    server = spawn("--max-batch", "1", "--max-queue", "1", GATE=str(gate))
    refused = 'gpu_service_requests_total{code="UNAVAILABLE"}'
    with (
        BlockingClient(server.url, deadline_s=BOUND_S) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        busy = pool.submit(doubled, client, WAIT)
        until_in_flight(server.port, 1)
        calls = [pool.submit(doubled, client, n) for n in range(4)]
        until(lambda: metric(server.port, refused) >= 3)
        with (
            BlockingClient(server.url, retry_refused=False) as impatient,
            pytest.raises(InferenceError, match="UNAVAILABLE"),
        ):
            impatient.infer(x_of(1))
        gate.touch()
        assert busy.result(BOUND_S) == 2 * WAIT
        assert [call.result(BOUND_S) for call in calls] == [2 * n for n in range(4)]


def test_ctrl_c_ends_the_call_and_the_client_lives(server: Process, gate: Path) -> None:
    # In a process of its own, because a signal here would hit the tests.
    program = (
        "import signal, sys\n"
        "from gpu_service.blocking import BlockingClient\n"
        "from tests.service.fakes import WAIT, x_of\n"
        # Where the tests were started in the background, it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with BlockingClient(sys.argv[1]) as client:\n"
        "    try:\n"
        "        client.infer(x_of(WAIT), deadline_s=1e6)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
        "        sys.stdin.readline()\n"
        "        print(client.infer(x_of(3)).outputs['y'][0, 0])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, server.url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        until_in_flight(server.port, 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        until_in_flight(server.port, 0)  # the server knows that nobody waits
        gate.touch()
        output, _ = process.communicate("\n", timeout=BOUND_S)
        assert output == "6.0\n"
        assert process.returncode == 0


def test_leaving_without_closing_does_not_hang(server: Process) -> None:
    program = (
        "import sys\n"
        "from gpu_service.blocking import BlockingClient\n"
        "client = BlockingClient(sys.argv[1]).__enter__()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, server.url], cwd=ROOT, check=True, timeout=BOUND_S
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_gets_an_error_and_disturbs_nobody(server: Process) -> None:
    with BlockingClient(server.url) as client:
        assert doubled(client, 1) == 2
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.infer(x_of(1))
            except ClientError as error:
                client.close()
                status = 0 if "before a fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert doubled(client, 2) == 4
        assert client.reconnects == 0
