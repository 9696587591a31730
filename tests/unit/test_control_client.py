"""`python -m gpu_service models`: what it sends through the socket, and what it says."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_service import __main__ as command_line
from gpu_service import control_client

BOUND_S = 20.0

Answer = Callable[[bytes], bytes | None]


class Worker:
    """Listens at a socket, and answers each connection's line once; None: not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[Any] = []
        self.answer: Answer = lambda _: b'{"ok": true}\n'
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener:
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as reader:
                    line = reader.readline()
                    if not line:
                        return
                    self.asked.append(json.loads(line))
                    answer = self.answer(line)
                    if answer is None:
                        reader.read()  # until the client has gone
                    else:
                        connection.sendall(answer)

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:
            last.connect(str(self.path))
        self._thread.join(BOUND_S)
        assert not self._thread.is_alive()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path / "control")
    yield worker
    worker.stop()


def answering(answer: Any) -> Answer:
    return lambda _: json.dumps(answer).encode() + b"\n"


def run(worker: Worker, *arguments: str) -> int:
    return command_line.main(["models", *arguments, "--control", str(worker.path)])


def test_what_is_served_is_a_table(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"name": "digits", "version": "v1", "digest": "a" * 64, "source": "/srv/digits"}
    two = {"name": "listener", "version": "v22", "digest": "b" * 64, "source": "/srv/listener"}
    models = [one | {"sequences": 0, "queued_samples": 3}, two | {"sequences": 12}]
    worker.answer = answering({"ok": True, "models": models})
    assert run(worker, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "MODEL     VERSION  DIGEST        SEQUENCES  QUEUED  FROM",
        "digits    v1       aaaaaaaaaaaa  0          3       /srv/digits",
        "listener  v22      bbbbbbbbbbbb  12                 /srv/listener",
    ]
    assert worker.asked == [{"list": {}}]


def test_load_sends_an_absolute_path_and_keeps_links(
    worker: Worker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    monkeypatch.chdir(tmp_path)
    worker.answer = answering({"ok": True, "loaded": {"name": "digits", "version": "v1"}})
    assert run(worker, "load", "current") == 0
    assert worker.asked == [{"load": {"path": str(tmp_path / "current")}}]
    assert capsys.readouterr().out == "serves digits v1\n"


@pytest.mark.parametrize(("options", "version"), [([], None), (["--version", "v1"], "v1")])
def test_unload_names_what_has_gone(
    worker: Worker,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    version: str | None,
) -> None:
    gone = [{"name": "digits", "version": "v1"}, {"name": "digits", "version": "v2"}]
    worker.answer = answering({"ok": True, "unloaded": gone})
    assert run(worker, "unload", "digits", *options) == 0
    assert worker.asked == [{"unload": {"name": "digits", "version": version}}]
    assert capsys.readouterr().out == "unloaded digits v1\nunloaded digits v2\n"


@pytest.mark.parametrize(
    ("loaded", "said"),
    [([], "nothing is new\n"), ([{"name": "digits", "version": "v2"}], "serves digits v2\n")],
)
def test_reload_says_what_is_new(
    worker: Worker, capsys: pytest.CaptureFixture[str], loaded: list[Any], said: str
) -> None:
    worker.answer = answering({"ok": True, "loaded": loaded})
    assert run(worker, "reload") == 0
    assert worker.asked == [{"reload": {}}]
    assert capsys.readouterr().out == said


def test_a_refusal_is_said(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "NOT_FOUND", "message": "model 'x' is not loaded"}
    worker.answer = answering({"error": error})
    assert run(worker, "unload", "x") == 1
    assert capsys.readouterr().err == (
        "gpu_service models unload: model 'x' is not loaded (NOT_FOUND)\n"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed without an answer"),
        (b"{", "no worker of gpu_service"),
        (b"[" * 100_000 + b"\n", "no worker of gpu_service"),
        (b"[]\n", "no worker of gpu_service"),
        (b"{}\n", "no worker of gpu_service"),
        (b'{"error": "no"}\n', "no worker of gpu_service"),
        (b'{"ok": 1}\n', "no worker of gpu_service"),
        (b"\xff\n", "no worker of gpu_service"),
    ],
)
def test_another_kind_of_server_is_noticed(worker: Worker, answer: bytes, message: str) -> None:
    worker.answer = lambda _: answer
    with pytest.raises(control_client.ControlError, match=message):
        control_client.ask(worker.path, {"list": {}}, timeout_s=BOUND_S)


def test_an_answer_in_parts_is_put_together(worker: Worker) -> None:
    """And one larger than any buffer of a socket."""
    worker.answer = answering({"ok": True, "text": "x" * (4 << 20)})
    answer = control_client.ask(worker.path, {"list": {}}, timeout_s=BOUND_S)
    assert len(answer["text"]) == 4 << 20


def test_no_answer_in_time_says_what_to_do(worker: Worker) -> None:
    worker.answer = lambda _: None
    with pytest.raises(control_client.ControlError, match=r"no answer within 0\.05 s"):
        control_client.ask(worker.path, {"list": {}}, timeout_s=0.05)


def test_no_socket_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none"
    assert command_line.main(["models", "list", "--control", str(path)]) == 1
    assert f"does the worker run, with `--control {path}`?" in capsys.readouterr().err


def test_a_socket_that_was_left_behind_is_told_from_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(tmp_path / "control"))
    with pytest.raises(control_client.ControlError, match="nobody listens"):
        control_client.ask(tmp_path / "control", {"list": {}}, timeout_s=BOUND_S)


@pytest.mark.parametrize("name", ["file", "x" * 200])
def test_what_is_no_socket_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(control_client.ControlError, match=name):
        control_client.ask(tmp_path / name, {"list": {}}, timeout_s=BOUND_S)


def test_the_socket_may_be_named_by_the_environment(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.answer = answering({"ok": True, "models": []})
    monkeypatch.setenv("GPU_SERVICE_CONTROL", str(worker.path))
    assert command_line.main(["models", "list"]) == 0
