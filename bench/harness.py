"""What the benchmarks share: server processes, ports, C programs, CPU and memory from /proc."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy

from gpu_service import bundle
from gpu_service.messages import Request
from gpu_service.protocol import encode_request
from provision import compiled

CHECKOUT = Path(__file__).resolve().parents[1]
CACHE = CHECKOUT / ".bench"

# One torch thread everywhere, and no pool of another library beside it.
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

CORES = sorted(os.sched_getaffinity(0))

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_KIB = 1024


# Orphans of a server become children of this process, which ends them and counts their CPU time.
_PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Server:
    """A server, on a port that was free, with the processes that it started.

    Has the first core alone with `on_one`, else all.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        on_one: bool = False,
        checkout: Path = CHECKOUT,
        environ: Mapping[str, str] = ENVIRON,
        is_ready: Callable[[], bool] | None = None,
    ) -> None:
        self.port = port
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with this object
        self.process = subprocess.Popen(
            command,
            cwd=checkout,
            env=environ,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, set(CORES[:1] if on_one else CORES)),
        )
        self._stopped = False
        atexit.register(self.stop)  # whatever goes wrong, nothing is left behind
        signal.signal(signal.SIGTERM, _exit)  # as `timeout` sends it, which else runs no atexit
        self._wait(is_ready or (lambda: answers(port)))

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if is_ready():
                return
            time.sleep(0.05)
        self.stop()
        self._log.seek(0)
        sys.exit(f"{self._log.read()[-4000:]}\nit did not start: {self.process.args!r}")

    @property
    def cpu_s(self) -> tuple[float, float]:
        """CPU time of all its threads so far, without other processes of it: all, and the
        kernel's part.
        """
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        user, kernel = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in fields[11:13])
        return user + kernel, kernel

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process, as the kernel counts it page by page."""
        return _rollup(self.process.pid, "Rss:")

    @property
    def pss_bytes(self) -> int:
        """Resident memory of all its processes, what they share counted once."""
        return sum(_rollup(pid, "Pss:") for pid in _family(self.process.pid))

    @property
    def descriptors(self) -> int:
        """How many descriptors all its processes have open."""
        folders = (Path(f"/proc/{pid}/fd") for pid in _family(self.process.pid))
        return sum(1 for folder in folders for _ in folder.iterdir())

    def stop(self) -> None:
        """End it, and whatever it left behind."""
        if self._stopped:
            return
        self._stopped = True
        shared = {path for pid in _family(self.process.pid) for path in _shared_memory(pid)}
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in _family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for path in shared:  # pytriton leaves its blocks behind
            path.unlink(missing_ok=True)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)


def answers(port: int) -> bool:
    """Whether something accepts connections on this port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def built(name: str, folder: Path) -> Path:
    """The C program bench/serving/NAME.c, built into `folder`."""
    program = folder / name
    source = CHECKOUT / "bench" / "serving" / f"{name}.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-o", str(program), str(source)], check=True)
    return program


def model() -> Path:
    """The newest bundle of the example model; `make model` trains one."""
    folder = CHECKOUT / "models" / "digits"
    if not folder.is_dir():
        sys.exit("there is no model to measure with; train one: make model")
    return bundle.find(folder)


@functools.cache
def release() -> Path:
    """A folder with the service as a host runs it: compiled."""
    folder = CACHE / "release"
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "gpu_service"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "gpu_service", package, ignore=ignored)
    try:
        found = compiled.build()
    except compiled.CompilingError as error:
        sys.exit(f"the service could not be compiled: {error}")
    for path in found.iterdir():
        shutil.copy(path, package)
    (folder / "bench").symlink_to(CHECKOUT / "bench")
    return folder


def serve(path: Path, *options: str, checkout: Path | None = None) -> Server:
    """The service with the bundle `path`, one torch thread, all cores."""
    port = free_port()
    command = [sys.executable, "-m", "gpu_service", "serve", "--bundle", str(path)]
    command += ["--device", "cpu", "--threads", "1", "--port", str(port), *options]
    return Server(command, port=port, checkout=checkout or release())


def identity(*, checkout: Path | None = None) -> Server:
    """The service with a model that computes nothing, on one core."""
    port = free_port()
    command = [sys.executable, "-m", "bench.serving.servers", "identity", str(port)]
    return Server(command, port=port, checkout=checkout or release(), on_one=True)


def write_frame(file: Path, tensor: str, shape: tuple[int, ...]) -> None:
    """One request of random FP32 values, as a binary message."""
    values = numpy.random.default_rng(0).random(shape, numpy.float32)
    file.write_bytes(encode_request(Request(inputs={tensor: values}, id="1")))


def on_last_core(command: Sequence[str]) -> list[str]:
    """The command of a load client, which shares no core with a server that has one alone."""
    return ["taskset", "-c", str(CORES[-1]), *command]


@contextlib.contextmanager
def stopping(*servers: Server) -> Iterator[None]:
    """Stop the servers at the end, the last one first."""
    try:
        yield
    finally:
        for server in reversed(servers):
            server.stop()


def _family(session: int) -> list[int]:
    """The processes of a session: each server begins one, and what it starts stays in there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(process.name))
    return found


def _shared_memory(pid: int) -> set[Path]:
    """The blocks of POSIX shared memory that the process has mapped."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {Path(line.split()[5]) for line in lines if " /dev/shm/" in line}
    return set()


def _rollup(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * _KIB
    raise ValueError(f"/proc/{pid}/smaps_rollup has no {what}")
