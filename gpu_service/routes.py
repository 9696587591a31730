"""The plain HTTP side of a worker: health, metadata and metrics.

Pure: a request target and the worker's state in, an answer out. The server does the sockets.
"""

import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gpu_service import signature
from gpu_service.messages import ErrorCode
from gpu_service.metrics import CONTENT_TYPE as METRICS_TYPE
from gpu_service.signature import ModelInfo

_JSON_TYPE = "application/json"


class Answer(msgspec.Struct, frozen=True):
    """An HTTP answer: status code, content type, body."""

    status: int
    content_type: str
    body: bytes


class Routes:
    """Answers GET requests. `server` is what `/v2` says beside the models."""

    def __init__(
        self,
        *,
        models: Callable[[], Sequence[ModelInfo]],
        server: Mapping[str, Any],
        is_ready: Callable[[], bool],
        metrics: Callable[[], bytes],
    ) -> None:
        self._models = models
        self._server = server
        self._is_ready = is_ready
        self._table: dict[str, Callable[[], Answer]] = {
            "/metrics": lambda: Answer(200, METRICS_TYPE, metrics()),
            "/v2": self._described,
            "/v2/health/live": lambda: _json(200, {"live": True}),
            "/v2/health/ready": self._ready,
        }

    def answer(self, target: str, *, upgrade: bool) -> Answer | None:
        """The answer for a request target such as `/v2/models/digits?x=y`.

        None for what is left to WebSocket: any other path, with or without an upgrade; without
        one, unknown paths of the protocol (`/v2/…`) are answered with 404.
        """
        path = urllib.parse.unquote(target.partition("?")[0]).rstrip("/")
        if path in self._table:
            return self._table[path]()
        found = self._of_model(path) if path.startswith("/v2/models/") else None
        if found is None and path.startswith("/v2/") and not upgrade:
            return refusal(404, ErrorCode.NOT_FOUND, f"nothing at {path[:200]}")
        return found

    def _described(self) -> Answer:
        models = [
            {"name": model.name, "version": model.version, "digest": model.digest}
            for model in self._models()
        ]
        return _json(200, {**self._server, "models": models})

    def _ready(self) -> Answer:
        is_so = self._is_ready()
        return _json(200 if is_so else 503, {"ready": is_so})

    def _of_model(self, path: str) -> Answer | None:
        """What there is at `/v2/models/NAME[/versions/VERSION][/ready]`."""
        match path.removeprefix("/v2/models/").split("/"):
            case [name, "versions", version, *rest]:
                wanted: str | None = version
            case [name, *rest]:
                wanted = None
        versions = [model for model in self._models() if model.name == name]
        chosen = [model for model in versions if wanted in (None, model.version)]
        if chosen and rest == ["ready"]:
            return self._ready()
        if chosen and not rest:
            described = signature.metadata(chosen[0])
            described["versions"] = [model.version for model in versions]
            return _json(200, described)
        return None


def refusal(status: int, code: str, message: str) -> Answer:
    """An error in the form that errors have on the WebSocket, too."""
    return _json(status, {"error": {"code": code, "message": message}})


def _json(status: int, content: Mapping[str, Any]) -> Answer:
    return Answer(status, _JSON_TYPE, msgspec.json.encode(content))
