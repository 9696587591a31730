"""What is said over the WebSocket, as values; `protocol` turns them into bytes and back.

Pure; immutable, and without behaviour.
"""

import enum
from collections.abc import Mapping
from typing import Any

import msgspec
from numpy.typing import NDArray

Scalar = str | int | float | bool  # what the value of a parameter may be


class ErrorCode(enum.StrEnum):
    """Stable codes of error replies; programs may depend on them, unlike on messages."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"  # this request can never succeed as it is
    NOT_FOUND = "NOT_FOUND"  # no such model or version here
    UNAVAILABLE = "UNAVAILABLE"  # not now; `retry_after_ms` says when to come back
    INTERNAL = "INTERNAL"  # the model or the service failed on a valid request
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"  # its `timeout_ms` was over before it could start
    CANCELLED = "CANCELLED"  # as its client wished
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"  # this client's own share is used up


class ProtocolError(Exception):
    """A message that breaks the protocol. `request_id` is None where it could not be read."""

    def __init__(self, code: ErrorCode, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.request_id = request_id


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One inference request. Every input includes the batch dimension: [n, …].

    `outputs` names those wanted, None means all. `binary` is how it came, and how to answer.
    `layout` is one object for all requests that differ by their ids and values only; None: no
    such object is known.
    """

    inputs: Mapping[str, NDArray[Any]]
    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    outputs: tuple[str, ...] | None = None
    parameters: Mapping[str, Scalar] = {}
    binary: bool = True
    layout: object = None


class Cancel(msgspec.Struct, frozen=True):
    """A client's wish that its request of this id, or its whole sequence, be forgotten."""

    id: str | None = None
    sequence_id: str | int | None = None


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to one request. Every output includes the batch dimension: [n, …].

    `index` and `final` are parameters on the wire.
    """

    id: str | None
    model_name: str
    model_version: str
    outputs: Mapping[str, NDArray[Any]]
    parameters: Mapping[str, Scalar] = {}
    index: int | None = None  # of many responses to one request; None: it is the only one
    final: bool = True


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error reply; `id` is None when the request's could not be read.

    `code` is a plain str because a newer server may send codes that this version lacks.
    """

    id: str | None
    code: str
    message: str
    retry_after_ms: int | None = None


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a server says first to a client that asked for its sub-protocol.

    `id` is the session's name in the logs of gateway and worker. `limits` are those of `GET /v2`.
    """

    id: str
    worker: str = ""
    limits: Mapping[str, Any] = {}
    models: tuple[Mapping[str, str], ...] = ()
