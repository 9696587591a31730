"""`python -m gpu_service models`: asks a worker on this machine through its control socket.

Owns nothing between calls. What the socket speaks is described in `control`.
"""

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

_MAX_ANSWER_BYTES = 16 << 20


class ControlError(Exception):
    """The worker cannot be asked, or refused; the message says why and what to do."""


def ask(control: Path, command: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """The worker's answer to `command`, such as {"list": {}}. Raises ControlError."""
    try:
        line = _exchange(control, json.dumps(command).encode() + b"\n", timeout_s=timeout_s)
    except TimeoutError:
        raise ControlError(
            f"{control}: no answer within {timeout_s:g} s; the worker may be at it still: "
            "see `models list`, or wait longer with --timeout-s"
        ) from None
    except FileNotFoundError:
        raise ControlError(
            f"{control}: no such socket; does the worker run, with `--control {control}`?"
        ) from None
    except ConnectionRefusedError:
        raise ControlError(f"{control}: nobody listens; is it of a worker that ended?") from None
    except PermissionError:
        raise ControlError(f"{control}: only the worker's own user may open it") from None
    except OSError as error:
        raise ControlError(f"{control}: {error.strerror or error}") from None
    try:
        answer = json.loads(line)
        if answer.get("ok") is True:
            return dict(answer)
        message = f"{answer['error']['message']} ({answer['error']['code']})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ControlError(
            f"{control}: closed without an answer"
            if not line
            else f"{control}: what listens there is no worker of gpu_service"
        ) from None
    raise ControlError(message)


def list_models(control: Path, *, timeout_s: float, output: TextIO | None = None) -> None:
    """Print a table of what is served, the default first. Raises ControlError."""
    rows = [("MODEL", "VERSION", "DIGEST", "SEQUENCES", "QUEUED", "FROM")]
    for model in ask(control, {"list": {}}, timeout_s=timeout_s)["models"]:
        names = ("name", "version", "digest", "sequences", "queued_samples", "source")
        values = [str(model.get(name, "")) for name in names]
        values[2] = values[2][:12]
        rows.append((values[0], values[1], values[2], values[3], values[4], values[5]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip(), file=output)


def load(control: Path, path: Path, *, timeout_s: float, output: TextIO | None = None) -> None:
    """Have the worker load the bundle in `path`, as the worker sees it. Raises ControlError."""
    # Not resolved: a link to the current version is looked up again by `reload`.
    command = {"load": {"path": str(path.absolute())}}
    _say("serves", [ask(control, command, timeout_s=timeout_s)["loaded"]], output)


def unload(
    control: Path, name: str, version: str | None, *, timeout_s: float, output: TextIO | None = None
) -> None:
    """Have the worker serve a model, or one version of it, no more. Raises ControlError."""
    command = {"unload": {"name": name, "version": version}}
    _say("unloaded", ask(control, command, timeout_s=timeout_s)["unloaded"], output)


def reload(control: Path, *, timeout_s: float, output: TextIO | None = None) -> None:
    """Have the worker look for newer versions where its models are from. Raises ControlError."""
    loaded = ask(control, {"reload": {}}, timeout_s=timeout_s)["loaded"]
    _say("serves", loaded, output)
    if not loaded:
        print("nothing is new", file=output)


def _say(what: str, models: list[dict[str, str]], output: TextIO | None) -> None:
    for model in models:
        print(f"{what} {model['name']} {model['version']}", file=output)


def _exchange(control: Path, line: bytes, *, timeout_s: float) -> bytes:
    until = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(control))
        connection.sendall(line)
        answer = bytearray()
        while not answer.endswith(b"\n") and len(answer) <= _MAX_ANSWER_BYTES:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            connection.settimeout(left)
            part = connection.recv(65536)
            if not part:
                break
            answer += part
        return bytes(answer)
