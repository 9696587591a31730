import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gpu_service import control
from gpu_service.device import StartupError
from tests.service.fakes import BOUND_S
from tests.unit.test_registry import Shelf, shelf  # noqa: F401 - a fixture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
async def served(shelf: Shelf, path: Path) -> AsyncIterator[Shelf]:  # noqa: F811
    """A control socket at `path` for a registry that serves m 1."""
    await shelf.load("a", "m", "1")
    async with control.listening(str(path), shelf.registry):
        yield shelf


async def ask(path: Path, *lines: bytes | dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to some lines of one connection, until it is closed."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    for line in lines:
        writer.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    with contextlib.suppress(OSError):
        writer.write_eof()
    async with asyncio.timeout(BOUND_S):
        answers = (await reader.read()).splitlines()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return [json.loads(answer) for answer in answers]


async def test_models_come_and_go(served: Shelf, path: Path) -> None:
    served.put("b", "n", "2")
    answers = await ask(
        path,
        {"list": {}},
        {"load": {"path": "b"}},
        {"reload": {}},
        {"unload": {"name": "m", "version": "1"}},
        {"list": {}},
    )
    m, n = {"name": "m", "version": "1"}, {"name": "n", "version": "2"}
    more = {"sequences": 0, "queued_samples": 0}
    assert answers == [
        {"ok": True, "models": [{**m, "digest": "m 1", "source": "a", **more}]},
        {"ok": True, "loaded": n},
        {"ok": True, "loaded": []},
        {"ok": True, "unloaded": [m]},
        {"ok": True, "models": [{**n, "digest": "n 2", "source": "b", **more}]},
    ]


async def test_a_reload_tells_what_is_new(served: Shelf, path: Path) -> None:
    served.put("a", "m", "2")
    (answer,) = await ask(path, {"reload": {}})
    assert answer == {"ok": True, "loaded": [{"name": "m", "version": "2"}]}


async def test_failures_are_told_with_their_code(served: Shelf, path: Path) -> None:
    answers = await ask(
        path,
        {"load": {"path": "nowhere"}},
        {"unload": {"name": "x"}},
        {"unload": {"name": "m", "version": None}},
    )
    assert [answer["error"]["code"] for answer in answers] == [
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "INVALID_ARGUMENT",
    ]
    assert "nowhere: no bundle here" in answers[0]["error"]["message"]
    assert served.served() == [("m", "1")]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"}{\n",
        b"[]\n",
        b"{}\n",
        b'{"lisst": {}}\n',
        b'{"load": {}}\n',
        b'{"load": {"path": 5}}\n',
        b'{"load": {"path": "b", "now": true}}\n',
        b'{"load": null}\n',
        b'{"load": {"path": "\xff"}}\n',
        b'{"load": {"path": "b"}, "list": {}}\n',
        b"[" * 60_000 + b"\n",
    ],
)
async def test_a_bad_line_is_told_so_and_the_next_one_is_obeyed(
    served: Shelf, path: Path, line: bytes
) -> None:
    served.put("b", "n", "2")
    bad, good = await ask(path, line, {"list": {}})
    assert bad["error"]["code"] == "INVALID_ARGUMENT"
    assert "ok" not in bad
    assert good["ok"]
    assert served.served() == [("m", "1")]


async def test_a_line_that_is_too_long_is_told_so_and_ends_its_connection_alone(
    served: Shelf, path: Path
) -> None:
    (answer,) = await ask(path, b" " * 100_000 + b'{"list": {}}\n')
    assert "65536 bytes" in answer["error"]["message"]
    assert (await ask(path, {"list": {}}))[0]["ok"]


async def test_the_last_line_needs_no_end(served: Shelf, path: Path) -> None:
    assert (await ask(path, b'{"list": {}}'))[0]["ok"]


async def test_whoever_leaves_in_the_middle_does_no_harm(served: Shelf, path: Path) -> None:
    _, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b'{"list"')
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert (await ask(path, {"list": {}}))[0]["ok"]


async def test_only_its_owner_may_open_it(served: Shelf, path: Path) -> None:
    status = path.stat()
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o600
    before = os.umask(0o022)
    os.umask(before)
    assert before != 0o177  # what was set for it is undone


async def test_without_a_path_there_is_none(shelf: Shelf, tmp_path: Path) -> None:  # noqa: F811
    async with control.listening("", shelf.registry):
        assert list(tmp_path.iterdir()) == []


async def test_it_is_gone_in_the_end(shelf: Shelf, path: Path) -> None:  # noqa: F811
    async with control.listening(str(path), shelf.registry):
        assert path.exists()
    assert not path.exists()


async def test_the_socket_of_a_worker_that_was_killed_is_replaced(
    shelf: Shelf,  # noqa: F811
    path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    async with control.listening(str(path), shelf.registry):
        assert (await ask(path, {"list": {}}))[0]["ok"]


async def test_the_socket_of_a_worker_that_lives_is_left_alone(served: Shelf, path: Path) -> None:
    with pytest.raises(StartupError, match="another worker listens there"):
        async with control.listening(str(path), served.registry):
            pass
    assert (await ask(path, {"list": {}}))[0]["ok"]


@pytest.mark.parametrize("what", ["file", "folder", "link"])
async def test_what_is_no_socket_is_left_alone(
    shelf: Shelf,  # noqa: F811
    path: Path,
    what: str,
) -> None:
    match what:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(StartupError, match=r"control: something else is there; check --control"):
        async with control.listening(str(path), shelf.registry):
            pass
    assert path.is_symlink() or path.exists()


@pytest.mark.parametrize(
    ("name", "says"), [("missing/control", "No such file"), ("x" * 200, "too long")]
)
async def test_a_path_that_cannot_be_is_a_clear_failure(
    shelf: Shelf,  # noqa: F811
    tmp_path: Path,
    name: str,
    says: str,
) -> None:
    with pytest.raises(StartupError, match=f"cannot make the control socket .*{says}"):
        async with control.listening(str(tmp_path / name), shelf.registry):
            pass
