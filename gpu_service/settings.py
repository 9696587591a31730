"""What a worker can be told: one dataclass, from which everything else about it is derived.

Owns the options of `serve`, their environment variables, their checks and their reference.
Pure: reads what it is handed, touches nothing.
"""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "GPU_SERVICE_"


class SettingsError(Exception):
    """Settings that cannot be used; `problems` holds all of them, one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _about(
    about: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """What help, reference and checks need to know; `pattern` is for the whole of a text."""
    return {
        "about": about,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "pattern": pattern,
    }


def _setting(default: Any, about: str, **checks: Any) -> Any:
    return dataclasses.field(default=default, metadata=_about(about, **checks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one worker. Where each came from does not matter to its reader."""

    bundle: Path = dataclasses.field(metadata=_about("folder of the model bundle to serve"))
    host: str = _setting("127.0.0.1", "address to listen on", pattern=r"\S+")
    port: int = _setting(9005, "TCP port to listen on; 0: any free one", at_least=0, at_most=65535)
    device: str = _setting(
        "auto",
        "`cpu`, `cuda:N`, or `auto`: the first GPU if there is one, else the CPU",
        pattern=r"auto|cpu|cuda(:\d{1,3})?",
    )
    threads: int = _setting(
        0, "CPU threads of the model; 0: one per core but one", at_least=0, at_most=1024
    )
    max_batch: int = _setting(
        64, "largest batch that runs at once", unit="samples", at_least=1, at_most=65536
    )
    max_delay_ms: float = _setting(
        0.0,
        "how long an idle device waits for a fuller batch; 0: not at all",
        unit="ms",
        at_least=0,
        at_most=10_000,
    )
    max_queue: int = _setting(
        1024,
        "samples that may wait for the device; requests beyond are refused",
        unit="samples",
        at_least=1,
        at_most=10_000_000,
    )
    max_message_bytes: int = _setting(
        1 << 20,
        "largest message of a client; a larger one closes its connection (1009)",
        unit="bytes",
        at_least=1024,
        at_most=1 << 30,
    )
    max_connections: int = _setting(
        20_000, "open WebSocket connections", at_least=1, at_most=1_000_000
    )
    max_in_flight_per_connection: int = _setting(
        64,
        "unanswered requests of one connection; beyond, it is not read",
        unit="requests",
        at_least=1,
        at_most=65536,
    )
    ping_interval_s: float = _setting(
        20.0, "time between pings to each client", unit="s", at_least=0.1, at_most=3600
    )
    ping_timeout_s: float = _setting(
        20.0, "a client that answers no ping is closed", unit="s", at_least=0.1, at_most=3600
    )
    drain_timeout_s: float = _setting(
        30.0, "time after SIGTERM to answer what is in flight", unit="s", at_least=0, at_most=3600
    )
    worker: str = _setting(
        "", "this worker's name for clients; empty: HOSTNAME:PORT", pattern=r"[\x21-\x7e]{0,128}"
    )
    deployment: str = _setting(
        "", "digest of what was deployed, shown by `GET /v2`", pattern=r"[\x21-\x7e]{0,128}"
    )


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def option_of(name: str) -> str:
    """The command line option of the setting `name`."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` every setting as an option. Values stay text: `load` reads and checks them."""
    for name, field in _FIELDS.items():
        parser.add_argument(option_of(name), metavar=_kind(field).upper(), help=_help(field))


def load(options: Mapping[str, str | None], environ: Mapping[str, str]) -> Settings:
    """Settings from options, else from GPU_SERVICE_… in `environ`, else their defaults.

    `options` holds the text of each option by the setting's name, None where it was not given.
    Raises SettingsError with every problem there is.
    """
    problems = _unknown(environ)
    values: dict[str, Any] = {}
    unread = set()
    for name, field in _FIELDS.items():
        text, source = options.get(name), option_of(name)
        if text is None:
            text, source = environ.get(PREFIX + name.upper()), PREFIX + name.upper()
        if text is not None:
            try:
                values[name] = _read(field, text)
            except ValueError as error:
                unread.add(name)
                problems.append(f"{source}: {error}")
        elif field.default is not dataclasses.MISSING:
            values[name] = field.default
        else:
            unread.add(name)
            about = field.metadata["about"]
            problems.append(f"{option_of(name)} (or {source}) is needed: {about}")
    if unread.isdisjoint({"max_queue", "max_batch"}) and values["max_queue"] < values["max_batch"]:
        problems.append(
            f"{option_of('max_queue')}: {values['max_queue']} is less than "
            f"{option_of('max_batch')} {values['max_batch']}, so no batch could ever be full"
        )
    if problems:
        raise SettingsError(problems)
    return Settings(**values)


def reference() -> str:
    """All settings as a Markdown table."""
    lines = [
        "| option | environment | default | unit | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, field in _FIELDS.items():
        cells = [
            f"`{option_of(name)}`",
            f"`{PREFIX}{name.upper()}`",
            _default(field),
            field.metadata["unit"],
            field.metadata["about"].replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(field: "dataclasses.Field[Any]") -> str:
    kinds: dict[Any, str] = {Path: "folder", int: "n", float: "number", str: "text"}
    return kinds[field.type]


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "(needed)"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _help(field: "dataclasses.Field[Any]") -> str:
    unit = f", in {field.metadata['unit']}" if field.metadata["unit"] else ""
    default = "" if field.default in (dataclasses.MISSING, "") else f" (default {field.default})"
    return f"{field.metadata['about']}{unit}{default}".replace("%", "%%")


def _read(field: "dataclasses.Field[Any]", text: str) -> Any:
    """The value of `field` in `text`; ValueError that says what is allowed."""
    if field.type is Path:
        if not text:
            raise ValueError("must not be empty")
        return Path(text)
    if field.type is str:
        pattern = field.metadata["pattern"]
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not allowed; {field.metadata['about']}")
        return text
    try:
        value = int(text) if field.type is int else float(text)
    except ValueError:
        kind = "a whole number" if field.type is int else "a number"
        raise ValueError(f"{text!r} is not {kind}") from None
    low, high = field.metadata["at_least"], field.metadata["at_most"]
    if not low <= value <= high:
        raise ValueError(f"{text} is not between {low} and {high}")
    return value


def _unknown(environ: Mapping[str, str]) -> list[str]:
    known = [PREFIX + name.upper() for name in _FIELDS]
    problems = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{name}: there is no such setting{hint}")
    return problems
