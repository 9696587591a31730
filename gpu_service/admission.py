"""Who may connect, and how much of the worker one client may use.

Owns the tokens, the allowed Origins, and what each client has used up. The policy is pure, with
its clock handed in; only `Tokens` reads a file. All of it runs on the event loop, in handshakes
but for `Client.take`, which each request passes where there is a limit on their rate.

A client is the name of its token, else the subject of its certificate as a trusted gateway tells
it, else its address. Addresses of IPv6 count by their /64: one client has all of it.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import stat
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import msgspec
from websockets.datastructures import Headers

from gpu_service import logs
from gpu_service.device import StartupError
from gpu_service.messages import ErrorCode
from gpu_service.settings import Settings, listed

# How browsers, which cannot set headers of a WebSocket, send a token: as a sub-protocol. Tokens
# are base64url, so nothing in them needs an escape.
_BEARER = "bearer."

# Beside the protocol's codes: only handshakes are refused with them.
UNAUTHENTICATED = "UNAUTHENTICATED"
PERMISSION_DENIED = "PERMISSION_DENIED"

_TOKEN_BYTES = 32
_IN_ADDRESS = frozenset(
    {"access_token", "api_key", "apikey", "auth", "authorization", "bearer", "token"}
)

_LONGEST_NAME = 256  # of a certificate; each session keeps it
_LONGEST_TRACE_PARENT = 128  # versions of it to come may be longer than today's 55
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TOKEN_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+([\x21-\x7e]{1,128}))?")

# A client that has gone is remembered until its rate is whole again, or until so many went later.
_MOST_GONE = 65536

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refusal(msgspec.Struct, frozen=True):
    """Why a handshake is refused: HTTP status, code and text of its error."""

    status: int
    code: str
    message: str


class Visitor(msgspec.Struct, kw_only=True):
    """Who asks to connect.

    `request_id` names its session in logs, `client` is the key under which it is counted: its
    address's, until its certificate or its token has a `name`.
    """

    request_id: str
    address: str
    client: str
    name: str = ""
    is_browser: bool = False  # without a gateway between: it is shown no refused handshake
    trace_parent: str | None = None  # of the handshake; not looked at here


class Client:
    """What one client has used up of what it may: connections, and requests by a token bucket.

    The bucket holds a second's worth of requests, and one at least.
    """

    __slots__ = ("_at", "_burst", "_clock", "_level", "_rate", "connections", "left_at")

    def __init__(self, *, requests_per_s: float, clock: Callable[[], float]) -> None:
        self.connections = 0
        self.left_at = 0.0  # when its last connection closed
        self._rate = requests_per_s
        self._burst = self._level = max(1.0, requests_per_s)
        self._clock = clock
        self._at = clock()

    def take(self) -> float:
        """Count one request: 0, or the seconds after which one may come again."""
        now = self._clock()
        level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if level >= 1:
            self._level = level - 1
            return 0.0
        self._level = level
        return (1 - level) / self._rate


class Clients:
    """The clients that are there, and those that left less than a full bucket ago.

    A bound of 0 is none; without any, nothing is remembered.
    """

    def __init__(
        self,
        *,
        max_connections: int = 0,
        max_requests_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_connections = max_connections
        self._rate = max_requests_per_s
        self._refill_s = max(1.0, max_requests_per_s) / max_requests_per_s if self._rate else 0.0
        self._clock = clock
        self._present: dict[str, Client] = {}
        self._gone: dict[str, Client] = {}  # who left first comes first

    def __len__(self) -> int:
        """How many are remembered."""
        return len(self._present) + len(self._gone)

    def is_full(self, key: str) -> bool:
        """Whether this client has as many connections as it may."""
        client = self._present.get(key)
        return (
            self._max_connections > 0
            and client is not None
            and client.connections >= self._max_connections
        )

    def enter(self, key: str) -> Client | None:
        """Count a connection of this client; the client if the rate of its requests is bounded."""
        if not self._max_connections and not self._rate:
            return None
        self._forget()
        client = self._present.get(key) or self._gone.pop(key, None)
        if client is None:
            client = Client(requests_per_s=self._rate, clock=self._clock)
        self._present[key] = client
        client.connections += 1
        return client if self._rate else None

    def leave(self, key: str) -> None:
        """The end of a connection that was counted."""
        client = self._present.get(key)
        if client is None:
            return
        client.connections -= 1
        if client.connections:
            return
        del self._present[key]
        if self._rate:
            client.left_at = self._clock()
            self._gone[key] = client
            self._forget()

    def _forget(self) -> None:
        """Forget whose bucket is full again: it would be as a new one."""
        now = self._clock()
        while self._gone:
            key = next(iter(self._gone))
            if now - self._gone[key].left_at < self._refill_s and len(self._gone) <= _MOST_GONE:
                return
            del self._gone[key]


class Origins:
    """The Origins from which pages may connect; empty: all. As the setting `origins` has them."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._exact = frozenset(origin for origin in allowed if "*" not in origin)
        self._below = tuple(
            re.compile(re.escape(origin).replace(r"\*\.", r"([a-z0-9_-]+\.)+"))
            for origin in allowed
            if "*" in origin
        )

    def allow(self, origins: Sequence[str]) -> bool:
        """Whether a handshake with these Origin headers may pass. None are no browser's."""
        if not origins or not (self._exact or self._below):
            return True
        if len(origins) > 1:
            return False
        origin = origins[0].lower()
        return origin in self._exact or any(below.fullmatch(origin) for below in self._below)


class Tokens:
    """The tokens that may connect, by their SHA-256, read anew when their file changes.

    A line is 64 hexadecimal digits, and behind them a name if it has one; `#` begins a comment.
    Raises StartupError for a file that cannot be used. Where one becomes so later, that is logged,
    and the tokens before stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _version(path)
        self._names = _read_tokens(path)

    def name_of(self, token: str) -> str | None:
        """The name of this token, "" if it has none; None for a token that may not connect."""
        self._refresh()
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self._names.items():
            # All of them, whichever it is: the time it takes tells nothing.
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        seen = _version(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._names = _read_tokens(self._path)
        except StartupError as error:
            logs.error("tokens_file_unusable", reason=str(error), action="the tokens before stay")
        else:
            logs.info("tokens_read", file=str(self._path), tokens=len(self._names))


class Admission:
    """Judges handshakes, as the settings say."""

    def __init__(
        self,
        *,
        clients: Clients,
        tokens: Tokens | None = None,
        origins: Sequence[str] = (),
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        self.clients = clients
        self._tokens = tokens
        self._origins = Origins(origins)
        self._trusted = tuple(ipaddress.ip_network(proxy) for proxy in trusted_proxies)
        self._warned = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What `settings` ask for. Raises StartupError for a tokens file that cannot be used."""
        return cls(
            clients=Clients(
                max_connections=settings.max_connections_per_client,
                max_requests_per_s=settings.max_requests_per_s_per_client,
            ),
            tokens=Tokens(Path(settings.tokens_file)) if settings.tokens_file else None,
            origins=listed(settings.origins),
            trusted_proxies=listed(settings.trusted_proxies),
        )

    def visitor(self, headers: Headers, peer: str) -> Visitor:
        """Who sends a handshake, as far as can be told before it is judged.

        `peer` is the address at the other end of the TCP connection, "" for a Unix socket.
        """
        address = self._address(headers, peer)
        certificate = self._certificate(headers, peer)
        return Visitor(
            request_id=_request_id(headers),
            address=str(address or peer),
            name=certificate,
            client=f"certificate {certificate}"
            if certificate
            else f"address {_counted_as(address)}",
            is_browser="Origin" in headers and "X-Real-IP" not in headers,
            trace_parent=_trace_parent(headers),
        )

    def judge(self, visitor: Visitor, *, target: str, headers: Headers) -> Refusal | None:
        """Why a handshake is refused; if it is not, its visitor has the name of its token.

        `target` is its path with the query.
        """
        if not self._origins.allow(headers.get_all("Origin")):
            return Refusal(403, PERMISSION_DENIED, "pages of this Origin may not connect")
        if self._tokens is not None:
            try:
                name = self._tokens.name_of(_presented(target, headers))
            except ValueError as error:
                return Refusal(401, UNAUTHENTICATED, str(error))
            if name is None:
                return Refusal(401, UNAUTHENTICATED, "this token is not known here")
            if name:
                visitor.name = name
                visitor.client = f"token {name}"
        if self.clients.is_full(visitor.client):
            message = f"{visitor.name or visitor.address} has as many connections as it may"
            return Refusal(429, ErrorCode.RESOURCE_EXHAUSTED, message)
        return None

    def _address(self, headers: Headers, peer: str) -> _Address | None:
        """The client's address; None if it has none that could be read."""
        address = _parsed(peer)
        real = headers.get_all("X-Real-IP")
        if len(real) != 1 or (told := _parsed(real[0])) is None:
            return address
        if self._is_proxy(address):
            return told
        if not self._warned:
            self._warned = True
            action = "if it is a gateway, name it in trusted_proxies: its clients count as one"
            logs.warning("proxy_not_trusted", address=str(address), action=action)
        return address

    def _certificate(self, headers: Headers, peer: str) -> str:
        """Whose certificate a gateway has checked; empty if nobody's, or nobody trusted says so."""
        told = headers.get_all("X-Client-Name")
        if len(told) != 1 or len(told[0]) > _LONGEST_NAME or not self._is_proxy(_parsed(peer)):
            return ""
        return told[0]

    def _is_proxy(self, address: _Address | None) -> bool:
        # Who reaches a Unix socket is on this machine, as on loopback.
        if address is None or address.is_loopback:
            return True
        return any(address in network for network in self._trusted)


def new_token(name: str = "") -> tuple[str, str]:
    """A new random token, and its line for the tokens file."""
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    return token, f"{hashlib.sha256(token.encode()).hexdigest()} {name}".rstrip()


def _presented(target: str, headers: Headers) -> str:
    """The token of a handshake; ValueError says how to send it."""
    query = urllib.parse.parse_qsl(target.partition("?")[2])
    if any(name.lower() in _IN_ADDRESS for name, _ in query):
        raise ValueError(
            "a token does not belong in an address, which logs and histories keep: replace this "
            "one, and send the new one as the header `Authorization: Bearer TOKEN`"
        )
    authorization = headers.get_all("Authorization")
    if authorization:
        scheme, _, token = authorization[0].strip().partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer" or not token.strip():
            raise ValueError("the one header must be `Authorization: Bearer TOKEN`")
        return token.strip()
    offered = [
        protocol.strip()
        for value in headers.get_all("Sec-WebSocket-Protocol")
        for protocol in value.split(",")
    ]
    tokens = [protocol for protocol in offered if protocol.startswith(_BEARER)]
    if len(tokens) != 1:
        raise ValueError(
            "one token is needed: as the header `Authorization: Bearer TOKEN`, or from a browser "
            "as the sub-protocol `bearer.TOKEN` beside the one that it speaks"
        )
    return tokens[0].removeprefix(_BEARER)


def _request_id(headers: Headers) -> str:
    told = headers.get_all("X-Request-ID")
    if len(told) == 1 and _REQUEST_ID.fullmatch(told[0]):
        return told[0]
    return secrets.token_hex(16)


def _trace_parent(headers: Headers) -> str | None:
    told = headers.get_all("traceparent")
    # Each session keeps it: a client must not have the worker keep kilobytes.
    return told[0] if len(told) == 1 and len(told[0]) <= _LONGEST_TRACE_PARENT else None


def _parsed(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _counted_as(address: _Address | None) -> _Address | _Network | None:
    if isinstance(address, ipaddress.IPv6Address):
        return ipaddress.IPv6Network((int(address), 64), strict=False)
    return address


def _version(path: Path) -> tuple[int, ...] | None:
    """Another one when the file was changed or replaced; None where there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    # ctime: permissions that were mended count, too.
    return about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size


def _read_tokens(path: Path) -> dict[bytes, str]:
    """Names by SHA-256."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise StartupError(f"tokens file {path} is not a file")
        if about.st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise StartupError(
                f"tokens file {path} is open to everybody on this machine: `chmod o-rwx {path}`"
            )
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise StartupError(f"tokens file {path} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise StartupError(f"tokens file {path} is not text") from None
    names: dict[bytes, str] = {}
    wrong = []
    for number, line in enumerate(lines, start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _TOKEN_LINE.fullmatch(content)
        if match is None:
            wrong.append(str(number))  # never its content: it may be a token
        else:
            names[bytes.fromhex(match[1])] = match[2] or ""
    if wrong:
        raise StartupError(
            f"tokens file {path}, line {', '.join(wrong)}: not a SHA-256 in 64 hexadecimal digits "
            "with at most one name behind it; `python -m gpu_service token` prints such a line"
        )
    if not names:
        raise StartupError(
            f"tokens file {path} holds no token, so nobody could connect; "
            "`python -m gpu_service token` prints a line for it"
        )
    return names
