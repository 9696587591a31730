"""Frames of the Open Inference Protocol v2 over WebSocket: bytes to messages and back.

Sans-I/O and stateless: pure functions, safe from any thread. Tensors of a decoded binary frame
are views into that frame, never copies. Nothing but ProtocolError leaves the decoders.
"""

import functools
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec
import numpy
from numpy.typing import NDArray

from gpu_service import datatypes
from gpu_service.messages import (
    Cancel,
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Response,
    Scalar,
    SessionInfo,
)
from gpu_service.wire import ID_DECODER, REPLY_DECODER, REQUEST_DECODER, Tensor

SUBPROTOCOL = "open-inference.v2"

MAX_ID_CHARS: Final = 128
MAX_RANK = 32

# Final: compiled, they are C's own, and no look-up in a dictionary.
_ALIGNMENT: Final = 8
_BINARY_SIZE = "binary_data_size"
_INDEX = "response_index"
_FINAL = "final"
_HEADER_LENGTH: Final = struct.Struct("<I")
_MAX_MESSAGE_CHARS = 500
_PADDING: Final = bytes(_ALIGNMENT)
_SPACES: Final = b" " * _ALIGNMENT
_WHITESPACE = b" \t\r\n"
_NO_STRUCTURE = bytes(set(range(256)) - set(b"[],"))

_WIRE_DTYPES = frozenset(datatypes.NUMPY.values())

_T = TypeVar("_T")


class _Label:
    """Which tensor an error is about; put together only where there is one."""

    __slots__ = ("_name", "_where")

    def __init__(self, where: str, name: str) -> None:
        self._where = where
        self._name = name

    def __str__(self) -> str:
        return f"{self._where}: {quote(self._name)}"


class _Parts:
    """A message taken apart: its JSON, and for binary ones the frame and where data starts."""

    __slots__ = ("data_start", "frame", "header")

    def __init__(
        self, header: str | memoryview, frame: memoryview | None = None, data_start: int = 0
    ) -> None:
        self.header = header
        self.frame = frame
        self.data_start = data_start


def quote(text: str) -> str:
    """`text` out of a message, cut and escaped so that an error message may contain it."""
    return repr(text if len(text) <= 64 else text[:64] + "…")


# ------------------------------------------------------------------------------ decoding


# What the decoder of this library raises for arbitrary input: malformed or unexpected JSON,
# invalid UTF-8, unpaired surrogates in a str, and nesting deeper than Python's stack.
_JSON_ERRORS = (msgspec.DecodeError, UnicodeError, RecursionError, ValueError)


def decode_request(message: str | bytes) -> Request:
    """The request in a text (`str`) or binary (`bytes`) message; as `decode_message`."""
    decoded = decode_message(message)
    if isinstance(decoded, Cancel):
        raise _invalid("'cancel' is not a request")
    return decoded


def decode_message(message: str | bytes) -> Request | Cancel:
    """What a client sent, as a text (`str`) or binary (`bytes`) message.

    Checks the frame and its tensors in themselves; whether a model takes them is not known
    here (see `signature`). Raises ProtocolError with INVALID_ARGUMENT, and with the request's
    id wherever that can still be read.
    """
    known = decode_known(message) if isinstance(message, bytes) else None
    return decode_anew(message) if known is None else known


def decode_anew(message: str | bytes) -> Request | Cancel:
    """As `decode_message`, for a message of which `decode_known` said nothing."""
    parts = _split(message)
    wire = _parse(parts.header, REQUEST_DECODER)
    if wire.id is not None and len(wire.id) > MAX_ID_CHARS:
        raise _invalid(f"id has {len(wire.id)} characters, at most {MAX_ID_CHARS} are allowed")
    if wire.cancel is not None:
        if wire.inputs is not None:
            raise _invalid("a message has either 'inputs' or 'cancel'", request_id=wire.id)
        if (wire.cancel.id is None) == (wire.cancel.sequence_id is None):
            raise _invalid("'cancel' needs either 'id' or 'sequence_id'", request_id=wire.id)
        return Cancel(wire.cancel.id, wire.cancel.sequence_id)
    if wire.inputs is None:
        raise _invalid("not a message: it has no `inputs`", request_id=wire.id)
    outputs = None if wire.outputs is None else tuple(item.name for item in wire.outputs)
    try:
        inputs = _tensors("inputs", wire.inputs, parts)
    except ProtocolError as error:
        raise _invalid(error.message, request_id=wire.id) from None
    request = Request(
        inputs=inputs,
        id=wire.id,
        model_name=wire.model_name,
        model_version=wire.model_version,
        outputs=outputs,
        parameters=wire.parameters,
        binary=parts.frame is not None,
    )
    if isinstance(message, bytes) and (end_of_id := _end_of_id(message)):
        end = _HEADER_LENGTH.size + len(parts.header)
        if end <= _LONGEST_FORM:
            _remember(message[end_of_id:end], request, wire.inputs)
    return request


class _Form:
    """A header that came before, but for its id: what it says need not be read again."""

    __slots__ = ("_is_plain", "_like", "_size", "_tensors")

    def __init__(self, like: Request, wires: Iterable[Tensor]) -> None:
        self._like = like
        names = (like.model_name, like.model_version, like.outputs)
        self._is_plain = names == (None, None, None) and not like.parameters
        self._tensors: list[tuple[str, numpy.dtype[Any], int, tuple[int, ...]]] = []
        offset = end = 0
        for wire in wires:
            dtype, count = datatypes.NUMPY[wire.datatype], math.prod(wire.shape)
            self._tensors.append((wire.name, dtype, offset, tuple(wire.shape)))
            end = offset + count * dtype.itemsize
            offset = _aligned(end)
        self._size = end

    def read(self, frame: bytes, request_id: str, start: int) -> Request | None:
        """The request in `frame`; None where its tensors are not of the header's size.

        `start` is the first byte behind the header.
        """
        start += -start % _ALIGNMENT
        surplus = len(frame) - start - self._size
        if surplus and not (0 < surplus < _ALIGNMENT and len(frame) % _ALIGNMENT == 0):
            return None
        inputs: dict[str, NDArray[Any]] = {}
        for name, dtype, offset, shape in self._tensors:
            inputs[name] = _ndarray(shape, dtype, frame, start + offset)
        if self._is_plain:
            return _Request(inputs=inputs, id=request_id, layout=self)
        like = self._like
        return _Request(
            inputs=inputs,
            id=request_id,
            model_name=like.model_name,
            model_version=like.model_version,
            outputs=like.outputs,
            parameters=like.parameters,
            layout=self,
        )


class _Last:
    """What was looked up last: most often the next one too, and comparing is less than hashing."""

    __slots__ = ("form", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.form: _Form | None = None


_last: Final = _Last()
_ndarray: Final[Any] = numpy.ndarray
_Request: Final = Request

# By what follows their id. Most requests of a client have the same, so most are found here.
_known_forms: Final[dict[bytes, _Form]] = {}
_MOST_FORMS: Final = 256
_LONGEST_FORM: Final = 1024
_ID_FIRST: Final = b'{"id":"'
_ID_AT: Final = 4 + 7  # behind the header's length, and that

_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")
_SPACE: Final = ord(" ")
_DELETE: Final = 127


def decode_known(frame: bytes) -> Request | None:
    """The request in a binary message whose header came before, but for its id.

    None says nothing about it: see `decode_message`.
    """
    end_of_id = _end_of_id(frame)
    if not end_of_id:
        return None
    end = 4 + (frame[0] | frame[1] << 8 | frame[2] << 16 | frame[3] << 24)
    # A header that ends within its own id is damaged: it has no rest.
    if end < end_of_id or end > _LONGEST_FORM or end > len(frame):
        return None
    rest = frame[end_of_id:end]
    form = _last.form
    if rest != _last.rest:
        form = _known_forms.get(rest)
        _last.rest, _last.form = rest, form
    return None if form is None else form.read(frame, frame[_ID_AT:end_of_id].decode("ascii"), end)


def _end_of_id(frame: bytes) -> int:
    """Where the id ends that a frame's header begins with; 0 if it does not, or is not so plain:
    printable ASCII without escapes.
    """
    most = min(len(frame), _ID_AT + MAX_ID_CHARS + 1)
    if most <= _ID_AT or frame[4:_ID_AT] != _ID_FIRST:
        return 0
    # Byte by byte, because compiled that is quicker than any method of bytes.
    at = _ID_AT
    while at < most:
        byte = frame[at]
        if byte == _QUOTE:
            return at
        if byte < _SPACE or byte >= _DELETE or byte == _BACKSLASH:
            return 0
        at += 1
    return 0


def _remember(rest: bytes, request: Request, wires: Iterable[Tensor]) -> None:
    """Keep the form of a header, if it is one that tells all but the id."""
    # A second id, maybe written with escapes, would be the one that counts. BOOLs are looked at.
    if b'"id"' in rest or b"\\" in rest:
        return
    if any(array.dtype.kind == "b" or not array.nbytes for array in request.inputs.values()):
        return
    if len(_known_forms) >= _MOST_FORMS:
        _known_forms.clear()
    # Without the tensors, which would keep the frame.
    form = _Form(msgspec.structs.replace(request, inputs={}), wires)
    _known_forms[rest] = form
    _last.rest, _last.form = rest, form


def decode_reply(message: str | bytes) -> Response | Failure | SessionInfo:
    """What a server answered, or said first. Raises ProtocolError for anything else."""
    parts = _split(message)
    wire = _parse(parts.header, REPLY_DECODER)
    if wire.session is not None:
        return wire.session
    if wire.error is not None:
        return Failure(
            id=wire.id,
            code=wire.error.code,
            message=wire.error.message,
            retry_after_ms=wire.error.retry_after_ms,
        )
    try:
        outputs = _tensors("outputs", wire.outputs, parts)
    except ProtocolError as error:
        raise _invalid(error.message, request_id=wire.id) from None
    return Response(
        id=wire.id,
        model_name=wire.model_name,
        model_version=wire.model_version,
        outputs=outputs,
        **_split_parameters(wire.parameters),
    )


def _split_parameters(parameters: dict[str, Scalar]) -> dict[str, Any]:
    index, final = parameters.pop(_INDEX, None), parameters.pop(_FINAL, True)
    return {
        "parameters": parameters,
        "index": index if isinstance(index, int) and not isinstance(index, bool) else None,
        "final": final is not False,
    }


def _invalid(message: str, *, request_id: str | None = None) -> ProtocolError:
    # Parsers quote what they were given: a reply must not echo a megabyte of it.
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[:_MAX_MESSAGE_CHARS] + "…"
    return ProtocolError(ErrorCode.INVALID_ARGUMENT, message, request_id=request_id)


def _split(message: str | bytes) -> _Parts:
    if isinstance(message, str):
        return _Parts(message)
    frame = memoryview(message)
    if len(frame) < _HEADER_LENGTH.size:
        raise _invalid(f"a binary frame starts with a header length of 4 bytes, got {len(frame)}")
    (length,) = _HEADER_LENGTH.unpack_from(frame)
    end = _HEADER_LENGTH.size + length
    if end > len(frame):
        raise _invalid(f"header length {length} reaches past the frame of {len(frame)} bytes")
    return _Parts(frame[_HEADER_LENGTH.size : end], frame, _aligned(end))


def _aligned(offset: int) -> int:
    return offset + -offset % _ALIGNMENT


def _parse(header: str | memoryview, decoder: "msgspec.json.Decoder[_T]") -> _T:
    try:
        return decoder.decode(header)
    except _JSON_ERRORS as error:
        raise _invalid(f"not a message: {error}", request_id=_readable_id(header)) from None


def _readable_id(header: str | memoryview) -> str | None:
    try:
        request_id = ID_DECODER.decode(header).id
    except _JSON_ERRORS:
        return None
    return request_id if request_id and len(request_id) <= MAX_ID_CHARS else None


def _tensors(where: str, wires: Iterable[Tensor], parts: _Parts) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    offset = parts.data_start
    for wire in wires:
        name = _Label(where, wire.name)
        if wire.name in tensors:
            raise _invalid(f"{name} occurs twice")
        dtype = datatypes.NUMPY.get(wire.datatype)
        if dtype is None:
            known = ", ".join(datatypes.NUMPY)
            raise _invalid(f"{name}: unknown datatype {quote(wire.datatype)}; known: {known}")
        if not 1 <= len(wire.shape) <= MAX_RANK:
            raise _invalid(f"{name}: {len(wire.shape)} dimensions; 1 to {MAX_RANK} are allowed")
        if parts.frame is None:
            tensors[wire.name] = _from_json(name, wire, dtype)
        else:
            tensors[wire.name] = _from_frame(name, wire, dtype, parts.frame, offset)
            offset = _aligned(offset + tensors[wire.name].nbytes)
    # The last tensor's own padding may be there or not.
    if parts.frame is not None and _aligned(len(parts.frame)) != offset:
        raise _invalid(
            f"{where}: header and tensors take {offset} bytes, the frame has {len(parts.frame)}"
        )
    return tensors


def _from_frame(
    name: _Label, wire: Tensor, dtype: numpy.dtype[Any], frame: memoryview, offset: int
) -> NDArray[Any]:
    size = wire.parameters.get(_BINARY_SIZE)
    if wire.data is not msgspec.UNSET or not isinstance(size, int) or isinstance(size, bool):
        raise _invalid(
            f"{name}: in a binary frame a tensor has no 'data', but the number of its bytes as "
            f"'{_BINARY_SIZE}' in its 'parameters'"
        )
    count = math.prod(wire.shape)
    if size != count * dtype.itemsize:
        raise _invalid(
            f"{name}: {_BINARY_SIZE} is {size}, but {wire.datatype} of shape {wire.shape} has "
            f"{count * dtype.itemsize} bytes"
        )
    if offset + size > len(frame):
        raise _invalid(
            f"{name}: truncated; its {size} bytes start at {offset}, the frame has {len(frame)}"
        )
    if size == 0:
        return numpy.empty(wire.shape, dtype)
    if dtype.kind == "b" and numpy.frombuffer(frame, "u1", count, offset).max() > 1:
        raise _invalid(f"{name}: a BOOL must be the byte 0 or 1")
    return numpy.frombuffer(frame, dtype, count, offset).reshape(wire.shape)


def _from_json(name: _Label, wire: Tensor, dtype: numpy.dtype[Any]) -> NDArray[Any]:
    if wire.data is msgspec.UNSET or _BINARY_SIZE in wire.parameters:
        raise _invalid(
            f"{name}: in a text frame a tensor has 'data', a flat or nested list of its values, "
            f"and no '{_BINARY_SIZE}'"
        )
    depth = _depth(wire.data)
    if depth not in (1, len(wire.shape)):
        raise _invalid(
            f"{name}: data is nested {depth} deep; allowed is a flat list, or one list per "
            f"dimension of shape {wire.shape}"
        )
    data = bytes(wire.data)
    if depth > 1:
        if not _is_nested_as(wire.shape, data):
            raise _invalid(f"{name}: data is not nested as shape {wire.shape} says")
        # Without the inner lists: each would become an object of its own, larger than its text.
        data = b"[" + data.translate(None, b"[]") + b"]" if math.prod(wire.shape) else b"[]"
    try:
        values = _values_decoder(dtype.kind).decode(data)
        with numpy.errstate(over="raise"):
            array: NDArray[Any] = numpy.array(values, dtype)
    except (*_JSON_ERRORS, OverflowError, FloatingPointError) as error:
        raise _invalid(f"{name}: data does not fit {wire.datatype}: {error}") from None
    if array.size != math.prod(wire.shape):
        raise _invalid(
            f"{name}: shape {wire.shape} has {math.prod(wire.shape)} values, data has {array.size}"
        )
    return array.reshape(wire.shape)


def _is_nested_as(shape: list[int], data: bytes) -> bool:
    """Whether the brackets and commas of `data`, which is valid JSON, are those of `shape`."""
    found = data.translate(None, _NO_STRUCTURE)
    expected = b""
    for size in reversed(shape):
        if size * (len(expected) + 1) > len(found):
            return False  # before anything is made that is larger than the message
        expected = b"[" + ((b"," + expected) * size)[1:] + b"]"
    return found == expected


def _depth(data: memoryview | msgspec.Raw) -> int:
    """How many lists deep the JSON in `data` starts; more than MAX_RANK is not counted."""
    depth = 0
    for byte in memoryview(data):
        if byte == ord("["):
            depth += 1
        elif byte not in _WHITESPACE:
            break
        if depth > MAX_RANK:
            break
    return depth


@functools.cache
def _values_decoder(kind: str) -> "msgspec.json.Decoder[Any]":
    # Typed, because numpy alone would take "1" for 1.0, null for NaN and 1.5 for the int 1.
    values: Any = {"b": bool, "i": int, "u": int, "f": float}[kind]
    return msgspec.json.Decoder(list[values])


# ------------------------------------------------------------------------------ encoding

_encoder: Final = msgspec.json.Encoder()
_encode_json: Final = _encoder.encode
_ID_KEY: Final = b'{"id":'


def encode_request(request: Request) -> bytes:
    """One message: a binary frame, or the UTF-8 of a text frame where `binary` is False.

    Raises ProtocolError for a tensor that the frame cannot carry.
    """
    header: dict[str, Any] = {
        key: value
        for key, value in (
            ("id", request.id),
            ("model_name", request.model_name),
            ("model_version", request.model_version),
        )
        if value is not None
    }
    if request.outputs is not None:
        header["outputs"] = [{"name": name} for name in request.outputs]
    if request.parameters:
        header["parameters"] = request.parameters
    return _encode(header, "inputs", request.inputs, binary=request.binary)


def encode_cancel(request_id: str) -> bytes:
    """The UTF-8 of a text frame that cancels the request of this id."""
    return _json({"cancel": {"id": request_id}})


def encode_cancel_sequence(sequence_id: str | int) -> bytes:
    """The UTF-8 of a text frame that drops what is under way of a sequence, and ends it."""
    return _json({"cancel": {"sequence_id": sequence_id}})


def encode_session(info: SessionInfo) -> bytes:
    """The UTF-8 of the text frame that begins a session."""
    return _json({"session": info})


def encode_response(response: Response, *, binary: bool) -> bytes:
    """One message, binary or the UTF-8 of a text frame.

    Raises ProtocolError for NaN and infinities in text, which JSON cannot carry.
    """
    if not binary or response.index is not None:
        parameters = dict(response.parameters)
        if response.index is not None:
            parameters |= {_INDEX: response.index, _FINAL: response.final}
        header: dict[str, Any] = {
            "id": response.id,
            "model_name": response.model_name,
            "model_version": response.model_version,
            "parameters": parameters,
        }
        return _encode(header, "outputs", response.outputs, binary=binary)
    arrays = [_on_wire(f"outputs: {name}", array) for name, array in response.outputs.items()]
    rest = _rest_of_header(
        response.model_name,
        response.model_version,
        tuple(response.parameters.items()),
        tuple(response.outputs),
        tuple([(array.shape, array.dtype) for array in arrays]),
    )
    return _framed(_ID_KEY + _json(response.id) + rest, arrays)


@functools.lru_cache(maxsize=256)
def _rest_of_header(
    model_name: str,
    model_version: str,
    parameters: tuple[tuple[str, Scalar], ...],
    names: tuple[str, ...],
    kinds: "tuple[tuple[tuple[int, ...], numpy.dtype[Any]], ...]",
) -> bytes:
    """The header of a binary reply, from behind its id on: the same for most of them."""
    outputs = [
        {
            "name": name,
            "shape": shape,
            "datatype": datatypes.name_of(dtype),
            "parameters": {_BINARY_SIZE: math.prod(shape) * dtype.itemsize},
        }
        for name, (shape, dtype) in zip(names, kinds, strict=True)
    ]
    header = {
        "model_name": model_name,
        "model_version": model_version,
        "parameters": dict(parameters),
        "outputs": outputs,
    }
    return b"," + _json(header)[1:]


class ReplyForm:
    """Encodes binary replies of one model as `encode_response`, at a fraction of its cost.

    Most replies of a model differ by their id and values alone.
    """

    def __init__(
        self, *, model_name: str, model_version: str, parameters: Mapping[str, Scalar]
    ) -> None:
        self._model = (model_name, model_version)
        self._parameters = tuple(parameters.items())
        self._rests: dict[Any, bytes] = {}
        self._frames: dict[Any, dict[int, _RowsFrame]] = {}

    def encode(self, request_id: str | None, outputs: Mapping[str, NDArray[Any]]) -> bytes:
        """One binary message; raises ProtocolError as `encode_response`."""
        key = tuple([(name, array.shape, array.dtype) for name, array in outputs.items()])
        rest = self._rests.get(key)
        arrays: Iterable[NDArray[Any]] = outputs.values()
        if rest is None or not all(array.flags.c_contiguous for array in arrays):
            arrays = [_on_wire(f"outputs: {name}", array) for name, array in outputs.items()]
            rest = self._rest(outputs, arrays)
            if len(self._rests) >= _MOST_FORMS:
                self._rests.clear()
            if all(array.dtype in _WIRE_DTYPES and array.ndim for array in outputs.values()):
                self._rests[key] = rest
        return _framed(_ID_KEY + _encoder.encode(request_id) + rest, arrays)

    def of_batch(self, outputs: Mapping[str, NDArray[Any]]) -> "BatchReplies | None":
        """Encodes the replies to those who ran in one batch; `outputs` are those of all.

        None if these have to be encoded one by one.
        """
        for array in outputs.values():
            if not (array.ndim and array.dtype in _WIRE_DTYPES and array.flags.c_contiguous):
                return None
        key = tuple([(name, array.shape[1:], array.dtype) for name, array in outputs.items()])
        frames = self._frames.get(key)
        if frames is None:
            if len(self._frames) >= _MOST_FORMS:
                self._frames.clear()
            frames = self._frames[key] = {}
        return BatchReplies(self, outputs, frames)

    def frame_of(self, outputs: Mapping[str, NDArray[Any]], samples: int) -> "_RowsFrame":
        """What is around the values of a reply to so many samples."""
        arrays = [array[:samples] for array in outputs.values()]
        return _RowsFrame(self._rest(outputs, arrays), [a.nbytes for a in arrays], samples)

    def _rest(self, outputs: Mapping[str, NDArray[Any]], arrays: Iterable[NDArray[Any]]) -> bytes:
        return _rest_of_header(
            *self._model,
            self._parameters,
            tuple(outputs),
            tuple([(array.shape, array.dtype) for array in arrays]),
        )


class BatchReplies:
    """Encodes the replies to all who ran in one batch; made by `ReplyForm.of_batch`.

    Everything that does not differ between them is looked up once.
    """

    __slots__ = ("_form", "_frames", "_outputs", "_values")

    def __init__(
        self,
        form: ReplyForm,
        outputs: Mapping[str, NDArray[Any]],
        frames: "dict[int, _RowsFrame]",
    ) -> None:
        self._form = form
        self._outputs = outputs
        self._frames = frames
        self._values = [_bytes_of(array) for array in outputs.values()]

    def encode(self, request_id: str | None, *, start: int, samples: int) -> list[Any]:
        """The binary message with rows `start` to `start + samples` of each output.

        As buffers one after another, of bytes each: who sends them copies them together with what
        goes before. Valid for as long as the outputs are.
        """
        frame = self._frames.get(samples)
        if frame is None:
            frame = self._frames[samples] = self._form.frame_of(self._outputs, samples)
        return frame.around(_encode_json(request_id), self._values, start)


class _RowsFrame:
    """What is around the values of binary replies that differ by those, and by their id."""

    __slots__ = ("_edges", "_paddings", "_rest", "_row_sizes", "_sizes")

    def __init__(self, rest: bytes, sizes: list[int], samples: int) -> None:
        self._rest = rest
        self._sizes = sizes  # bytes of each output
        self._row_sizes = [size // samples for size in sizes]
        self._paddings = [_PADDING[: -size % _ALIGNMENT] for size in sizes]
        self._edges: dict[int, tuple[bytes, bytes]] = {}  # by the length of the id

    def around(self, request_id: bytes, values: list[memoryview], start: int) -> list[Any]:
        """The message's buffers, of an id as JSON and the rows of each output from `start` on."""
        edges = self._edges.get(len(request_id))
        if edges is None:
            edges = self._edges[len(request_id)] = self._edges_of(len(request_id))
        pieces: list[Any] = [edges[0], request_id, edges[1]]
        for number, view in enumerate(values):
            at = start * self._row_sizes[number]
            pieces.append(view[at : at + self._sizes[number]])
            padding = self._paddings[number]
            if padding:
                pieces.append(padding)
        return pieces

    def _edges_of(self, length: int) -> tuple[bytes, bytes]:
        """The header before and after an id of `length` bytes, and how long it is."""
        size = len(_ID_KEY) + length + len(self._rest)
        spaces = -(_HEADER_LENGTH.size + size) % _ALIGNMENT
        return _HEADER_LENGTH.pack(size + spaces) + _ID_KEY, self._rest + _SPACES[:spaces]


def _bytes_of(array: NDArray[Any]) -> memoryview:
    """The values of a contiguous array."""
    return array.reshape(-1).view("u1").data


def encode_failure(failure: Failure, *, binary: bool) -> bytes:
    """One message, binary (a header without tensors) or the UTF-8 of a text frame."""
    error: dict[str, Any] = {"code": failure.code, "message": failure.message}
    if failure.retry_after_ms is not None:
        error["retry_after_ms"] = failure.retry_after_ms
    header = {"id": failure.id, "error": error}
    return _frame(header, []) if binary else _json(header)


def _encode(
    header: dict[str, Any], where: str, tensors: Mapping[str, NDArray[Any]], *, binary: bool
) -> bytes:
    arrays = {name: _on_wire(f"{where}: {name}", array) for name, array in tensors.items()}
    described = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": datatypes.name_of(array.dtype),
            **(
                {"parameters": {_BINARY_SIZE: array.nbytes}}
                if binary
                else {"data": _values(f"{where}: {name}", array)}
            ),
        }
        for name, array in arrays.items()
    ]
    header[where] = described
    return _frame(header, arrays.values()) if binary else _json(header)


def _on_wire(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype in _WIRE_DTYPES and array.ndim and array.flags.c_contiguous:
        return array
    try:
        dtype = datatypes.NUMPY[datatypes.name_of(array.dtype)]
    except ValueError as error:
        raise _invalid(f"{name}: {error}") from None
    return numpy.ascontiguousarray(array, dtype)


def _values(name: str, array: NDArray[Any]) -> list[Any]:
    if array.dtype.kind == "f" and not numpy.isfinite(array).all():
        raise _invalid(f"{name} holds NaN or infinity, which JSON cannot carry; use binary frames")
    values: list[Any] = array.ravel().tolist()
    return values


def _json(header: Mapping[str, Any] | str | None) -> bytes:
    try:
        return _encoder.encode(header)
    except UnicodeError as error:  # an unpaired surrogate in a name of the caller's
        raise _invalid(f"a name is not valid Unicode: {error}") from None


def _frame(header: dict[str, Any], arrays: Iterable[NDArray[Any]]) -> bytes:
    return _framed(_json(header), arrays)


def _framed(header: bytes, arrays: Iterable[NDArray[Any]]) -> bytes:
    spaces = -(_HEADER_LENGTH.size + len(header)) % _ALIGNMENT
    pieces: list[Any] = [_HEADER_LENGTH.pack(len(header) + spaces), header, _SPACES[:spaces]]
    for array in arrays:
        # Buffers: the join below is the only copy.
        pieces.append(array)
        if padding := -array.nbytes % _ALIGNMENT:
            pieces.append(_PADDING[:padding])
    return b"".join(pieces)
