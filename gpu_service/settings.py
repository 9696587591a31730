"""What a worker can be told: one dataclass, from which everything else about it is derived.

Owns the options of `serve`, their environment variables, their checks and their reference.
Pure: reads what it is handed, touches nothing.
"""

import argparse
import dataclasses
import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
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
    check: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What help, reference and checks need to know; `pattern` is for the whole of a text.

    `check` raises ValueError for each text of a comma-separated list that is not allowed.
    """
    return {
        "about": about,
        "unit": unit,
        "at_least": at_least,
        "at_most": at_most,
        "pattern": pattern,
        "check": check,
    }


def _check_factory(text: str) -> None:
    name = r"[^\W\d]\w*"
    if not re.fullmatch(rf"{name}(\.{name})*(:{name})?", text):
        raise ValueError("not package.module or package.module:factory")


def _check_cpus(text: str) -> None:
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", text):
        raise ValueError("not a CPU's number or a range such as 0-3")
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise ValueError(f"ends before it begins; {last}-{first} is meant")


def _check_origin(text: str) -> None:
    host = r"((\*\.)?[a-z0-9_.-]*[a-z0-9]|\[[0-9a-f:.]+\])"
    if not re.fullmatch(rf"[a-z][a-z0-9+.-]*://{host}(:\d{{1,5}})?", text):
        raise ValueError(
            "not an Origin as browsers send it: SCHEME://HOST or SCHEME://HOST:PORT in small "
            "letters, without a path; https://*.example.com allows all hosts below"
        )


def _check_network(text: str) -> None:
    ipaddress.ip_network(text)  # its ValueError says what is wrong, without the colon of others


def _setting(default: Any, about: str, **checks: Any) -> Any:
    return dataclasses.field(default=default, metadata=_about(about, **checks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one worker. Where each came from does not matter to its reader."""

    bundle: tuple[Path, ...] = dataclasses.field(
        metadata=_about(
            "folders of the model bundles to serve, `:` between them; the first is the default"
        )
    )
    host: str = _setting("127.0.0.1", "address to listen on", pattern=r"\S+")
    port: int = _setting(9005, "TCP port to listen on; 0: any free one", at_least=0, at_most=65535)
    unix_socket: str = _setting(
        "",
        "path of a Unix socket to listen on as well, for a proxy on the same host; empty: none",
        pattern=r"[^\0]{0,90}",
    )
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
    busy_poll_us: int = _setting(
        200,
        "for how long an idle worker polls instead of going to sleep, while requests follow one "
        "another so soon that this notices them: less latency, for a core that rests less; "
        "0: not at all",
        unit="µs",
        at_least=0,
        at_most=1_000_000,
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
        20.0,
        "time between pings to each client; the first after 0.5 to 1.5 times that, at random",
        unit="s",
        at_least=0.1,
        at_most=3600,
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
    factories: str = _setting(
        "",
        "what bundles may name as their architecture beside the registered ones, comma-separated: "
        "`package.module` or `package.module:factory`; empty: nothing",
        check=_check_factory,
    )
    precision: str = _setting(
        "fp32",
        "how the model computes: `fp32`, `tf32` or `bf16`; start says what it changes",
        pattern=r"fp32|tf32|bf16",
    )
    max_fused: int = _setting(
        24,
        "sizes of batch that get fused kernels on a CPU where these are faster, each at the cost "
        "of a copy of the weights; 0: none",
        at_least=0,
        at_most=1024,
    )
    cpus: str = _setting(
        "",
        "CPUs of the model's threads, such as `0-3,6`; empty: any",
        check=_check_cpus,
    )
    max_streams: int = _setting(
        1024,
        "sequences of one model that hold state on the device at once",
        unit="sequences",
        at_least=1,
        at_most=1_000_000,
    )
    max_streams_per_connection: int = _setting(
        64,
        "sequences of one connection that hold state at once",
        unit="sequences",
        at_least=1,
        at_most=1_000_000,
    )
    control: str = _setting(
        "",
        "path of the Unix socket that loads, unloads and reloads models; empty: none",
        pattern=r"[^\0]*",
    )
    tokens_file: str = _setting(
        "",
        "file with the SHA-256 of each token that may connect, one a line; empty: anybody may",
        pattern=r"[^\0]*",
    )
    origins: str = _setting(
        "",
        "Origins from which browsers may connect, comma-separated: exact, or with "
        "`https://*.example.com` all below; empty: any",
        check=_check_origin,
    )
    max_connections_per_client: int = _setting(
        0,
        "open WebSocket connections of one client, which is its token's name, else the subject of "
        "its certificate as a trusted gateway tells it, else its address; 0: no bound",
        at_least=0,
        at_most=1_000_000,
    )
    max_requests_per_s_per_client: float = _setting(
        0.0,
        "requests that one client may send, with bursts of a second's worth; 0: no bound",
        unit="1/s",
        at_least=0,
        at_most=1_000_000,
    )
    max_fragments: int = _setting(
        4096,
        "frames of one message; more close the connection (1008)",
        unit="frames",
        at_least=1,
        at_most=1 << 20,
    )
    trusted_proxies: str = _setting(
        "",
        "addresses or networks whose `X-Real-IP` and `X-Client-Name` (the subject of a client's "
        "certificate) are believed, comma-separated; those of loopback always are",
        check=_check_network,
    )
    otlp_endpoint: str = _setting(
        "",
        "OTLP/HTTP address that traces are sent to, such as `http://localhost:4318`; empty: none",
        pattern=r"(https?://[^\s/]+(/\S*)?)?",
    )
    otlp_sample: float = _setting(
        0.01,
        "share of the requests that are traced when their client asked for nothing",
        at_least=0,
        at_most=1,
    )


_FOLDERS = tuple[Path, ...]

_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def listed(text: str) -> tuple[str, ...]:
    """The items of a comma-separated setting."""
    return tuple(item.strip() for item in text.split(",")) if text.strip() else ()


def cpus_of(text: str) -> frozenset[int]:
    """The numbers in a list of CPUs such as `0-3,6`; none for an empty one."""
    numbers: set[int] = set()
    for item in listed(text):
        first, _, last = item.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def option_of(name: str) -> str:
    """The command line option of the setting `name`."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` every setting as an option. Values stay text: `load` reads and checks them."""
    for name, field in _FIELDS.items():
        parser.add_argument(option_of(name), metavar=_kind(field), help=_help(field))


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
    kinds: dict[Any, str] = {_FOLDERS: "FOLDER[:FOLDER…]", int: "N", float: "NUMBER", str: "TEXT"}
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
    if field.type == _FOLDERS:
        return _folders(text)
    if field.type is str:
        pattern, check = field.metadata["pattern"], field.metadata["check"]
        if check is not None:
            _check_items(text, check)
        elif not re.fullmatch(pattern, text):
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


def _folders(text: str) -> tuple[Path, ...]:
    if not text:
        raise ValueError("must not be empty")
    folders = text.split(":")
    if "" in folders:
        raise ValueError(f"{text!r} names an empty folder; `:` stands between folders")
    repeated = sorted({folder for folder in folders if folders.count(folder) > 1})
    if repeated:
        raise ValueError(f"names {', '.join(repeated)} more than once")
    return tuple(Path(folder) for folder in folders)


def _check_items(text: str, check: Callable[[str], None]) -> None:
    """Raises one ValueError for all items of a comma-separated list that are not allowed."""
    problems = []
    for item in listed(text):
        try:
            if not item:
                raise ValueError("an empty item; a comma stands between items")
            check(item)
        except ValueError as error:
            problems.append(f"{item!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))


def _unknown(environ: Mapping[str, str]) -> list[str]:
    known = [PREFIX + name.upper() for name in _FIELDS]
    problems = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{name}: there is no such setting{hint}")
    return problems
