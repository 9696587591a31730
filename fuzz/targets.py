"""What is fuzzed: functions of arbitrary bytes that fail when a promise is broken; and seeds.

Without atheris, so that tests can call them. `run` feeds them.
"""

import asyncio
import copy
import itertools
import json
import random
import struct
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
import numpy
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, Protocol, Side

from fuzz import driver, world
from gpu_service import bundle, datatypes, protocol
from gpu_service.messages import Cancel, Failure, ProtocolError, Request, Response, SessionInfo

Target = Callable[[bytes], None]

# Of an error's message, in characters, and of a reply with it, in bytes.
LONGEST_ERROR = 600

# ----------------------------------------------------------------------------------- mutations


def mutate_json(text: bytes, *, seed: int) -> bytes | None:
    """`text` with one value of its JSON put in another's place; None where it is not JSON.

    Chance that changes bytes hardly gets past the parser.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    chance = random.Random(seed)  # noqa: S311
    places = list(_places(content))
    if not places:
        return None
    holder, key = chance.choice(places)
    what = chance.randrange(4)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif what == 2:
        other, other_key = chance.choice(places)
        holder[key] = copy.deepcopy(other[other_key])
    else:
        holder[key] = chance.choice(VALUES)
    return json.dumps(content).encode()


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list in `content`, with each of its keys."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 64, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1e308, "", "x", "é", "\0", "\ud800", "a/../b", "a" * 200, [], {}, [[]], [{}]),
    *("FP32", "BOOL", "INT8", [0], [1], [-1], [1, 2], ["x"], {"x": 1}, {"a": "x"}),
)

# ------------------------------------------------------------------------------------- frames

_TEXT, _BINARY, _FRAMED = range(3)


def frames(data: bytes) -> None:
    """Decode `data[1:]`; `data[0]` says as what.

    Nothing but ProtocolError may be raised, an error must be short and sendable, and what is
    accepted must survive being encoded.
    """
    message = _message(data)
    for decode in (protocol.decode_message, protocol.decode_reply):
        try:
            decoded = decode(message)
        except ProtocolError as error:
            _check_error(error)
        else:
            _check_accepted(decoded, binary=isinstance(message, bytes))


def _message(data: bytes) -> str | bytes:
    kind, rest = data[0] % 3 if data else _TEXT, data[1:]
    if kind == _TEXT:
        return rest.decode(errors="replace")
    if kind == _BINARY:
        return rest
    # With a length that is right, which chance hardly finds.
    header, _, tensors = rest.partition(b"\n")
    header += b" " * (-(4 + len(header)) % 8)
    return struct.pack("<I", len(header)) + header + tensors


def _check_error(error: ProtocolError) -> None:
    assert len(error.message) <= LONGEST_ERROR, len(error.message)
    failure = Failure(id=error.request_id, code=error.code, message=error.message)
    for binary in (True, False):
        payload = protocol.encode_failure(failure, binary=binary)
        assert protocol.decode_reply(payload if binary else payload.decode()) == failure


def _check_accepted(
    decoded: Request | Cancel | Response | Failure | SessionInfo, *, binary: bool
) -> None:
    if isinstance(decoded, Request):
        payload = protocol.encode_request(decoded)
        _check_same(decoded, protocol.decode_message(payload if binary else payload.decode()))
    elif isinstance(decoded, Response):
        # A server is trusted with the JSON that it sends, but not a client with what it gets.
        payload = protocol.encode_response(decoded, binary=True)
        _check_same(decoded, protocol.decode_reply(payload))


def _check_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    for field in left.__struct_fields__:
        if field == "final" and left.index is None:
            continue  # has no meaning then, so it is not sent
        if field == "layout":
            continue  # known or not, by what came before
        one, other = getattr(left, field), getattr(right, field)
        if field in ("inputs", "outputs") and one is not None and isinstance(one, dict):
            assert list(one) == list(other)
            for name in one:
                assert one[name].dtype == other[name].dtype
                assert one[name].shape == other[name].shape
                assert one[name].tobytes() == other[name].tobytes()
        else:
            assert one == other, field


def frame_seeds() -> Iterator[bytes]:
    """Requests and replies of all datatypes, as text and binary."""
    for request in _requests():
        kind = _BINARY if request.binary else _TEXT
        yield bytes([kind]) + protocol.encode_request(request)
        if request.binary:
            payload = protocol.encode_request(request)
            (length,) = struct.unpack_from("<I", payload)
            yield bytes([_FRAMED]) + payload[4 : 4 + length] + b"\n" + payload[4 + length :]
    outputs = {"y": numpy.ones((1, 2), "<f4")}
    for index in (None, 0):
        response = Response(
            id="1", model_name="m", model_version="1", outputs=outputs, index=index, final=False
        )
        yield bytes([_TEXT]) + protocol.encode_response(response, binary=False)
        yield bytes([_BINARY]) + protocol.encode_response(response, binary=True)
    failure = Failure(id=None, code="UNAVAILABLE", message="later", retry_after_ms=5)
    yield bytes([_TEXT]) + protocol.encode_failure(failure, binary=False)
    yield bytes([_TEXT]) + protocol.encode_cancel("1")
    info = SessionInfo(id="1", worker="w", limits={"a": 1}, models=({"name": "m"},))
    yield bytes([_TEXT]) + protocol.encode_session(info)


def _requests() -> Iterator[Request]:
    for binary in (True, False):
        for dtype in datatypes.NUMPY.values():
            yield Request(inputs={"x": numpy.zeros((1, 3), dtype)}, id="1", binary=binary)
        yield Request(
            inputs={"x": numpy.ones((2, 1), "<f4"), "é": numpy.zeros(0, "u1")},
            id="i" * 128,
            model_name="m",
            model_version="1",
            outputs=("y", "z"),
            parameters={"priority": 9, "timeout_ms": 1.5, "sequence_start": True, "a": "b"},
            binary=binary,
        )


# ---------------------------------------------------------------------------------- manifests


def manifests(data: bytes) -> None:
    """Read `data` as a bundle's manifest.

    Nothing but BundleError may be raised, an error must be short for what is short, and what
    is accepted must survive being written.
    """
    try:
        manifest = bundle.parse_manifest(data, where="here")
    except bundle.BundleError as error:
        assert len(str(error)) <= 1000 + 10 * len(data)
        return
    again = bundle.parse_manifest(msgspec.json.encode(manifest), where="here")
    assert again == manifest


def manifest_seeds() -> Iterator[bytes]:
    """Manifests with everything, and with as little as there may be."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 28, 28]}
    file = {"sha256": "0" * 64, "bytes": 8}
    least: dict[str, Any] = {
        "format": 1,
        "name": "digits",
        "version": "v1",
        "created": "2026-11-24T10:15:00Z",
        "architecture": {"name": "digits_cnn", "arguments": {}},
        "inputs": [tensor],
        "outputs": [tensor | {"name": "y", "shape": [10]}],
        "labels": [],
        "files": {"model.safetensors": file, "samples.safetensors": file},
    }
    training = {
        "dataset": "made up",
        "dataset_sha256": "0" * 64,
        "train_samples": 8,
        "test_samples": 4,
        "epochs": 1,
        "seed": 0,
        "world_size": 2,
        "backend": "gloo",
        "torch": "2.13.0",
        "metrics": {"test_accuracy": 0.75},
    }
    arguments = {"width": 8, "dropout": 0.5, "norm": True, "kind": "a", "sizes": [1, 2]}
    most: dict[str, Any] = {
        **least,
        "architecture": {"name": "package.module:factory", "arguments": arguments},
        "outputs": [
            tensor | {"name": "y"},
            {"name": "stop", "datatype": "BOOL", "shape": []},
        ],
        "training": training,
        "state": [{"name": "h", "datatype": "FP16", "shape": [4]}],
        "feedback": {"y": "x"},
        "done": "stop",
    }
    yield json.dumps(least).encode()
    yield json.dumps(least | {"training": training}).encode()
    yield json.dumps(most).encode()
    yield json.dumps(least | {"inputs": [tensor | {"shape": [-1]}]}).encode()


# ----------------------------------------------------------------------------------- sessions

_RAW = 0x80

_loop: asyncio.AbstractEventLoop | None = None


def session(data: bytes) -> None:
    """Send `data[2:]` to a session, and how, by `data[:2]`.

    It must not raise, must not hold more than it may, must write the same however its bytes are
    cut and whenever they are read, and nothing but valid frames with valid replies.
    """
    _run(_session(data))


async def _session(data: bytes) -> None:
    how, seed = (data[0], data[1]) if len(data) > 1 else (0, 0)
    stream = data[2:] if how & _RAW else driver.HANDSHAKE + b"".join(_framed(data[2:]))
    whole = await driver.drive([stream], look=driver.check_bounds)
    chance = random.Random(seed)  # noqa: S311
    places = sorted(chance.choices(range(len(stream) + 1), k=chance.randrange(8)))
    pieces = [stream[start:end] for start, end in itertools.pairwise([0, *places, len(stream)])]
    clogged = [number for number in range(len(pieces)) if chance.random() < 0.3]
    assert await driver.drive(pieces, clogged=clogged, look=driver.check_bounds) == whole
    head, end, frames_ = whole.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 101"):
        assert end
        _check_answers(frames_)


def _framed(data: bytes) -> Iterator[bytes]:
    """Frames of a first byte and a length each, as the fuzzer likes, without a mask to speak of."""
    at = 0
    while at < len(data):
        first, length = data[at], int.from_bytes(data[at + 1 : at + 3])
        payload = data[at + 3 : at + 3 + length % 5000]
        at += 3 + length % 5000
        if len(payload) < 126:
            yield bytes([first, 0x80 | len(payload)]) + bytes(4) + payload
        else:
            yield struct.pack(">BBH", first, 0x80 | 126, len(payload)) + bytes(4) + payload


def _check_answers(written: bytes) -> None:
    client = Protocol(Side.CLIENT, state=OPEN, max_size=None)
    client.receive_data(written)
    client.receive_eof()
    assert client.parser_exc is None or isinstance(client.parser_exc, EOFError), client.parser_exc
    for event in client.events_received():
        assert isinstance(event, Frame)
        if event.opcode is Opcode.TEXT:
            protocol.decode_reply(bytes(event.data).decode())
        elif event.opcode is Opcode.BINARY:
            protocol.decode_reply(bytes(event.data))


def session_seeds() -> Iterator[bytes]:
    """Streams of good and bad frames, whole and in fragments, and handshakes."""
    text, binary, cont, close, ping, pong, fin = 1, 2, 0, 8, 9, 10, 0x80

    def sent(*parts: tuple[int, bytes]) -> bytes:
        return b"".join(
            bytes([first]) + len(payload).to_bytes(2) + payload for first, payload in parts
        )

    good = [protocol.encode_request(request) for request in _requests() if request.binary]
    slow = protocol.encode_request(
        Request(inputs={}, id="1", parameters={driver.SLOW: True}, binary=False)
    )
    cancel = protocol.encode_cancel("1")
    streams = [
        sent(*((fin | binary, each) for each in good[:5])),
        sent((fin | text, slow), (fin | text, cancel), (fin | text, slow)),
        sent(*[(fin | text, slow.replace(b'"1"', b'"%d"' % n)) for n in range(5)]),
        sent((binary, good[0][:9]), (fin | ping, b"x"), (cont, good[0][9:]), (fin | cont, b"")),
        sent((fin | ping, b"a"), (fin | pong, b"b"), (fin | close, b"\x03\xe8bye")),
        sent((fin | text, b"\xff")),
        sent((fin | 3, b"")),
        sent((text, b"{}"), *[(cont, b"")] * 8),
        sent((fin | binary, bytes(4097))),
    ]
    for number, stream in enumerate(streams):
        yield bytes([0, number]) + stream
        yield bytes([_RAW, number]) + driver.HANDSHAKE + b"".join(_framed(stream))
    yield bytes([_RAW, 1]) + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    yield bytes([_RAW, 1]) + driver.HANDSHAKE.replace(b": 13", b": 8")
    yield bytes([_RAW, 1]) + driver.HANDSHAKE.replace(
        b"Host", b"Sec-WebSocket-Protocol: a, b\r\nHost"
    )


# ---------------------------------------------------------------------------------- the service


def service(data: bytes) -> None:
    """Live through `data`: requests, sequences, cancellations, slow readers, reloads, failures.

    Every message must be answered to its end, once, and nothing of it be kept.
    """
    _run(world.live(data))


def service_seeds() -> Iterator[bytes]:
    """A few worlds at random, always the same."""
    chance = random.Random(0)  # noqa: S311
    for length in range(10, 400, 20):
        yield chance.randbytes(length)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    global _loop
    _loop = _loop or asyncio.new_event_loop()
    _loop.run_until_complete(coroutine)


def close() -> None:
    """Give the event loop back that the targets share."""
    global _loop
    if _loop is not None:
        _loop.close()
        _loop = None


TARGETS: dict[str, tuple[Target, Callable[[], Iterator[bytes]]]] = {
    "frames": (frames, frame_seeds),
    "manifests": (manifests, manifest_seeds),
    "service": (service, service_seeds),
    "session": (session, session_seeds),
}

# What the fuzzer puts in beside single bytes.
WORDS = (
    *("id", "inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "cancel"),
    *("binary_data_size", "model_name", "model_version", "priority", "timeout_ms", "error"),
    *("sequence_id", "sequence_start", "sequence_end", "max_responses", "session", "limits"),
    *("format", "architecture", "arguments", "labels", "training", "files", "sha256", "bytes"),
    *("state", "feedback", "done", "version", "created", "metrics", "slow", "null", "true", "1e9"),
    *datatypes.NUMPY,
)
