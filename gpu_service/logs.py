"""Logs: one JSON object a line on stderr, for journald and whatever reads it.

Owns the format and the root logger's one handler. Never the payload of a request.
"""

import datetime
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

_FIELDS = "gpu_service_fields"


class JsonFormatter(logging.Formatter):
    """`time` (UTC), `level`, `event`, then the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.name != "gpu_service":
            line["logger"] = record.name  # a library's: its event is a sentence
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure(stream: TextIO = sys.stderr) -> None:
    """Send all logging of this process to `stream`, from INFO up; of libraries from WARNING."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _logger.setLevel(logging.INFO)


_logger = logging.getLogger("gpu_service")


def info(event: str, **fields: object) -> None:
    """Something that an operator may want to see."""
    _logger.info(event, extra={_FIELDS: fields})


def warning(event: str, **fields: object) -> None:
    """Something that an operator should look at; the service goes on."""
    _logger.warning(event, extra={_FIELDS: fields})


def error(event: str, *, cause: BaseException | None = None, **fields: object) -> None:
    """A failure. `cause` adds its traceback: for bugs, never for a user's mistake."""
    _logger.error(event, extra={_FIELDS: fields}, exc_info=cause)


class RateLimit:
    """Lets the first `most` lines of each `per_s` seconds through, and counts the rest."""

    def __init__(
        self, *, most: int, per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._per_s = per_s
        self._clock = clock
        self._since = clock()
        self._lines = 0

    def admit(self) -> int | None:
        """None to keep quiet, else how many lines were kept back since the last one."""
        now = self._clock()
        kept_back = 0
        if now - self._since >= self._per_s:
            kept_back = max(0, self._lines - self._most)
            self._since, self._lines = now, 0
        self._lines += 1
        return kept_back if self._lines <= self._most else None
