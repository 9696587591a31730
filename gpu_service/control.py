"""The control socket of a worker: models are loaded, unloaded and reloaded through it.

Owns a Unix socket, which only its owner may open: nothing that changes a worker is reachable over
the network. One JSON object a line in, one out, in order.

    {"list": {}}
    {"load": {"path": "/srv/models/digits"}}
    {"unload": {"name": "digits", "version": "20261124-101500"}}
    {"reload": {}}
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from gpu_service import logs
from gpu_service.batches import Work
from gpu_service.device import StartupError
from gpu_service.messages import ErrorCode
from gpu_service.registry import LoadError, Registry
from gpu_service.signature import ModelInfo

_LINE_BYTES = 65536
_BACKLOG = 16


class _Load(msgspec.Struct, forbid_unknown_fields=True):
    path: str


class _Unload(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    version: str | None = None


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Command(msgspec.Struct, forbid_unknown_fields=True):
    """One of them is given."""

    load: _Load | None = None
    unload: _Unload | None = None
    reload: _Nothing | None = None
    list: _Nothing | None = None


@contextlib.asynccontextmanager
async def listening(path: str, registry: Registry[Any]) -> AsyncIterator[None]:
    """Take commands at `path` meanwhile; at an empty one, none. Raises StartupError."""
    if not path:
        yield
        return
    server = await asyncio.start_unix_server(
        _Control(registry).serve, sock=_bind(path), limit=_LINE_BYTES, backlog=_BACKLOG
    )
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            Path(path).unlink()


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise OSError(None, "something else is there")
            if _is_alive(path):
                raise OSError(None, "another worker listens there")
            Path(path).unlink()  # of a worker that was killed
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot make the control socket {path}: {error.strerror or error}; check --control"
        ) from None
    return listener


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        return client.connect_ex(path) != errno.ECONNREFUSED


class _Control:
    def __init__(self, registry: Registry[Work]) -> None:
        self._registry = registry

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(msgspec.json.encode(answer) + b"\n")
                await writer.drain()
        except ValueError:  # a line without end
            answer = _error(ErrorCode.INVALID_ARGUMENT, f"a line of more than {_LINE_BYTES} bytes")
            writer.write(msgspec.json.encode(answer) + b"\n")
        except OSError as error:  # gone
            logs.warning("control_connection_failed", reason=str(error))
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            return {"ok": True, **await self._obey(msgspec.json.decode(line, type=_Command))}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _error(ErrorCode.INVALID_ARGUMENT, f"not a command: {error}")
        except LoadError as error:
            return _error(error.code, str(error))
        except Exception as error:
            logs.error("control_failed", cause=error)
            return _error(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")

    async def _obey(self, command: _Command) -> Mapping[str, Any]:
        if sum(each is not None for each in msgspec.structs.astuple(command)) > 1:
            raise LoadError(ErrorCode.INVALID_ARGUMENT, "a line has one command")
        match command:
            case _Command(load=_Load(path=path)):
                return {"loaded": _named(await self._registry.load(Path(path)))}
            case _Command(unload=_Unload(name=name, version=version)):
                return {"unloaded": [*map(_named, await self._registry.unload(name, version))]}
            case _Command(reload=_Nothing()):
                return {"loaded": [*map(_named, await self._registry.reload())]}
            case _Command(list=_Nothing()):
                return {"models": [self._described(served) for served in self._registry.all()]}
        raise LoadError(
            ErrorCode.INVALID_ARGUMENT, "not a command: one of load, unload, reload, list"
        )

    def _described(self, served: Any) -> Mapping[str, Any]:
        return {
            **_named(served.info),
            "digest": served.info.digest,
            "source": str(served.source),
            "sequences": served.sequences,
            "queued_samples": served.channel.queued_samples,
        }


def _named(model: ModelInfo) -> dict[str, str]:
    return {"name": model.name, "version": model.version}


def _error(code: ErrorCode, message: str) -> Mapping[str, Any]:
    return {"error": {"code": code, "message": message}}
