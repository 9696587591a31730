"""What holds for every message, and for every way in which its bytes may come.

`test_protocol` has the round trips of ordinary messages and what arbitrary bytes raise. Here are
the extremes of each datatype, what is accepted by chance, how long errors get, how much memory
is taken, and that a session does not care how its bytes were cut.
"""

import functools
import itertools
import json
import math
import operator
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
from hypothesis import assume, example, given, settings
from numpy.typing import NDArray

from fuzz import driver
from gpu_service import datatypes, protocol
from gpu_service.messages import (
    Cancel,
    ErrorCode,
    Failure,
    ProtocolError,
    Request,
    Response,
    SessionInfo,
)
from tests.service.test_wire import BINARY, CLOSE, CONT, PING, PONG, TEXT, ws

# The most that decoding takes, in bytes for each byte of the message, beside FIXED_BYTES. Text of
# lists in lists costs most: a Python list of 64 bytes for the two of "[]".
TEXT_COST, BINARY_COST, FIXED_BYTES = 32, 24, 32_768

# Of an error's message, in characters, with what is put before a part that was cut.
LONGEST_ERROR = 600


def extremes(datatype: str) -> list[Any]:
    dtype = datatypes.NUMPY[datatype]
    if dtype.kind == "b":
        return [False, True]
    if dtype.kind in "iu":
        bounds = numpy.iinfo(dtype)
        return [bounds.min, 0, bounds.max]
    bounds_f = numpy.finfo(dtype)
    least = bounds_f.smallest_subnormal
    return [bounds_f.min, -least, -0.0, 0.0, least, bounds_f.tiny, bounds_f.eps, bounds_f.max]


def both_ways(request: Request) -> Request:
    payload = protocol.encode_request(request)
    return protocol.decode_request(payload if request.binary else payload.decode())


def same_arrays(left: NDArray[Any], right: NDArray[Any]) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", datatypes.NUMPY)
@pytest.mark.parametrize("shape", [[-1], [1] * (protocol.MAX_RANK - 1) + [-1], [-1, 1]])
def test_the_extremes_of_every_datatype_survive(
    datatype: str, shape: list[int], binary: bool
) -> None:
    array = numpy.array(extremes(datatype), datatypes.NUMPY[datatype]).reshape(shape)
    decoded = both_ways(Request(inputs={"x": array}, binary=binary))
    assert same_arrays(decoded.inputs["x"], array)


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_every_nan_survives_in_binary_bit_by_bit(datatype: str) -> None:
    dtype = datatypes.NUMPY[datatype]
    bits = numpy.array([-1, -2, 2**62 + 2**61 + 1], "<i8").astype(f"<i{dtype.itemsize}")
    bits |= numpy.array(numpy.inf, dtype).view(bits.dtype)
    decoded = both_ways(Request(inputs={"x": bits.view(dtype)}))
    assert same_arrays(decoded.inputs["x"], bits.view(dtype))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_inputs_survives(binary: bool, count: int) -> None:
    inputs = {str(n): numpy.full(n % 9, n % 100, "u1") for n in range(count)}
    decoded = both_ways(Request(inputs=inputs, id="i" * protocol.MAX_ID_CHARS, binary=binary))
    assert list(decoded.inputs) == list(inputs)
    assert all(same_arrays(decoded.inputs[name], inputs[name]) for name in inputs)


@given(
    st.builds(
        SessionInfo,
        id=st.text(st.characters(exclude_categories=["Cs"])),
        worker=st.text(st.characters(exclude_categories=["Cs"])),
        limits=st.dictionaries(st.text("abc"), st.integers(0, 2**53) | st.lists(st.integers(0, 9))),
        models=st.lists(
            st.fixed_dictionaries({"name": st.text("ab"), "version": st.just("1")})
        ).map(tuple),
    )
)
def test_what_a_session_begins_with_survives(info: SessionInfo) -> None:
    assert protocol.decode_reply(protocol.encode_session(info).decode()) == info


@given(
    st.booleans(), st.integers(0, 2**31), st.booleans(), st.dictionaries(st.text("ab"), st.text())
)
def test_one_of_many_responses_survives(
    binary: bool, index: int, final: bool, parameters: dict[str, Any]
) -> None:
    assume(_is_unicode(*parameters.values()))
    response = Response(
        id="i",
        model_name="m",
        model_version="1",
        outputs={},
        parameters=parameters,
        index=index,
        final=final,
    )
    payload = protocol.encode_response(response, binary=binary)
    assert protocol.decode_reply(payload if binary else payload.decode()) == response


def _is_unicode(*texts: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)


# ------------------------------------------------------------------------------ both forms agree

values = st.one_of(
    st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6, allow_subnormal=False), st.booleans()
)


@st.composite
def nested(draw: st.DrawFn) -> tuple[list[int], Any, list[Any]]:
    """A shape, data of that shape as lists of lists, and the same data flat."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
    rows: list[Any] = flat
    for size in reversed(shape[1:]):
        rows = [rows[at : at + size] for at in range(0, len(rows), size)]
    return shape, rows, flat


def decoded_text(shape: list[int], data: Any, datatype: str, **form: Any) -> Any:
    tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
    try:
        return protocol.decode_request(json.dumps({"inputs": [tensor]}, **form)).inputs["x"]
    except ProtocolError as error:
        return error.code


@given(nested(), st.sampled_from(["BOOL", "UINT8", "INT32", "FP16", "FP64"]))
@example(([1, 1], [[1]], [1]), "UINT8")
@example(([2, 1], [[True], [False]], [True, False]), "BOOL")
def test_nested_data_mean_what_flat_data_mean(
    data: tuple[list[int], Any, list[Any]], datatype: str
) -> None:
    shape, rows, flat = data
    forms = [
        decoded_text(shape, each, datatype, indent=i) for each in (rows, flat) for i in (0, None)
    ]
    if isinstance(forms[0], ErrorCode):
        assert set(forms) == {ErrorCode.INVALID_ARGUMENT}
    else:
        assert all(same_arrays(forms[0], form) for form in forms)


@given(nested(), st.data())
def test_rows_that_do_not_fit_the_shape_are_refused(
    data: tuple[list[int], Any, list[Any]], draw: st.DataObject
) -> None:
    shape, rows, _ = data
    assume(len(shape) > 1)
    other = draw.draw(st.permutations(shape).filter(lambda each: each != shape))
    assert decoded_text(other, rows, "FP64") is ErrorCode.INVALID_ARGUMENT


@given(nested())
def test_text_and_binary_mean_the_same(data: tuple[list[int], Any, list[Any]]) -> None:
    shape, _, flat = data
    as_text = decoded_text(shape, [float(value) for value in flat], "FP32")
    array = numpy.array(flat, "<f4").reshape(shape)
    assert same_arrays(as_text, both_ways(Request(inputs={"x": array})).inputs["x"])


# -------------------------------------------------------------------------------- almost valid


def some_request(draw: st.DrawFn, *, binary: bool) -> bytes:
    inputs = {}
    for name in draw(st.lists(st.sampled_from("xyz"), max_size=2, unique=True)):
        dtype = datatypes.NUMPY[draw(st.sampled_from(sorted(datatypes.NUMPY)))]
        inputs[name] = numpy.zeros(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)), dtype)
    parameters = draw(st.dictionaries(st.sampled_from(["priority", "a"]), st.integers(-1, 10)))
    request_id = draw(st.none() | st.sampled_from(["1", "é", "\U0001f600"]))
    return protocol.encode_request(
        Request(inputs=inputs, id=request_id, parameters=parameters, binary=binary)
    )


# What a mutation puts in: structure, and tokens that mean something in these messages.
TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\xff", b"\0"),
    *(
        b"null",
        b"true",
        b"-1",
        b"1e400",
        b"9" * 400,
        b"2147483648",
        b'"id":"',
        b'"cancel":{}',
        b" ",
    ),
    *(b'"parameters":{"binary_data_size":', b'"data":[', b'"shape":[', b"NaN", b'"session":{'),
)


@st.composite
def damaged(draw: st.DrawFn) -> str | bytes:
    """A message that was valid before up to four tokens were put in, cut out or repeated."""
    binary = draw(st.booleans())
    message = some_request(draw, binary=binary)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(message)))
        end = draw(st.integers(start, min(len(message), start + 20)))
        new = draw(st.sampled_from(TOKENS) | st.just(message[start:end] * 2) | st.just(b""))
        message = message[:start] + new + message[end:]
    return message if binary else message.decode(errors="surrogateescape")


def refusal(decode: Callable[[str | bytes], Any], message: str | bytes) -> ProtocolError | None:
    try:
        decode(message)
    except ProtocolError as error:
        return error
    return None


@given(damaged() | st.text(max_size=50) | st.binary(max_size=50))
def test_every_refusal_is_short_and_can_be_sent(message: str | bytes) -> None:
    for decode in (protocol.decode_message, protocol.decode_reply):
        error = refusal(decode, message)
        if error is None:
            continue
        assert len(error.message) <= LONGEST_ERROR
        assert error.request_id is None or 0 < len(error.request_id) <= protocol.MAX_ID_CHARS
        failure = Failure(id=error.request_id, code=error.code, message=error.message)
        for binary in (True, False):
            payload = protocol.encode_failure(failure, binary=binary)
            assert protocol.decode_reply(payload if binary else payload.decode()) == failure


@given(damaged())
def test_what_is_accepted_although_damaged_can_be_sent_on(message: str | bytes) -> None:
    try:
        decoded = protocol.decode_message(message)
    except ProtocolError:
        return
    if isinstance(decoded, Cancel):
        return
    again = both_ways(decoded)
    assert {name: array.shape for name, array in again.inputs.items()} == {
        name: array.shape for name, array in decoded.inputs.items()
    }
    assert (again.id, again.parameters, again.outputs, again.binary) == (
        *(decoded.id, decoded.parameters, decoded.outputs, decoded.binary),
    )


def told(message: str | bytes) -> tuple[object, ...]:
    """What a message is decoded to, or how it is refused, in a form that can be compared."""
    try:
        decoded = protocol.decode_message(message)
    except ProtocolError as error:
        return error.code, error.message, error.request_id
    if isinstance(decoded, Cancel):
        return (decoded,)
    arrays = [
        (name, array.dtype, array.shape, array.tobytes()) for name, array in decoded.inputs.items()
    ]
    fields = (name for name in decoded.__struct_fields__ if name not in ("inputs", "layout"))
    return arrays, *(getattr(decoded, name) for name in fields)


# What may stand between the quotes of an id, right or wrong.
IDS = (
    *(
        b"",
        b"2",
        b"a b",
        b"\\u0061",
        b"\\n",
        b'\\"',
        b'"',
        b"\\",
        b"\xc3\xa9",
        b"\xff",
        b"\x7f",
        b"\0",
    ),
    *(b"x" * 128, b"x" * 129, b'2","id":"3', b'2","inputs":[]', b"2" * 5000),
)


@st.composite
def headers_that_came_before(draw: st.DrawFn, request_id: bytes) -> tuple[bytes, bytes]:
    """A request, and bytes that begin with the same header but for its id."""
    dtype = draw(st.sampled_from(["u1", "<i2", "<f4", "?"]))
    inputs = {
        name: numpy.zeros(draw(st.lists(st.integers(0, 4), min_size=1, max_size=2)), dtype)
        for name in draw(st.lists(st.sampled_from("xy"), min_size=1, max_size=2, unique=True))
    }
    parameters = draw(st.sampled_from([{}, {"priority": 3}, {"a": "\\"}]))
    name = draw(st.sampled_from([None, "", "m"]))
    first = protocol.encode_request(
        Request(inputs=inputs, id="1", parameters=parameters, model_name=name)
    )
    (length,) = struct.unpack_from("<I", first)
    changed = b'"id":"' + request_id + b'"'
    header = first[4 : 4 + length].replace(b'"id":"1"', changed)
    size = len(first) - 4 - length + draw(st.sampled_from([0, 0, 0, *range(-9, 10)]))
    values = bytes(-(4 + len(header)) % 8) + bytes(max(0, size))
    return first, struct.pack("<I", len(header)) + header + values


def forget_forms() -> None:
    protocol._known_forms.clear()
    protocol._last.rest, protocol._last.form = b"", None


@pytest.mark.parametrize("request_id", IDS, ids=ascii)
@settings(max_examples=30)
@given(data=st.data())
def test_what_came_before_changes_nothing(request_id: bytes, data: st.DataObject) -> None:
    first, second = data.draw(headers_that_came_before(request_id))
    forget_forms()
    cold = told(second)
    forget_forms()
    told(first)
    assert told(second) == cold
    assert told(second) == cold


@given(
    a=st.sampled_from([(1, 2), (2, 1), (2,)]),
    b=st.sampled_from([(1, 2), (2, 1), (2,)]),
    wanted=st.sampled_from([None, ("y",)]),
)
def test_the_layout_tells_requests_apart_that_differ_by_more_than_id_and_values(
    a: tuple[int, ...], b: tuple[int, ...], wanted: tuple[str, ...] | None
) -> None:
    forget_forms()
    numbers = itertools.count()

    def layout(shape: tuple[int, ...], outputs: tuple[str, ...] | None) -> object:
        number = next(numbers)
        inputs = {"x": numpy.full(shape, number, "<f4")}
        frame = protocol.encode_request(Request(inputs=inputs, id=str(number), outputs=outputs))
        return protocol.decode_request(frame).layout

    assert layout(a, None) is None  # nobody sent such a one before
    layout(b, wanted)
    first = layout(a, None)
    assert first is not None
    assert (layout(b, wanted) is first) == (a == b and wanted is None)
    assert layout(a, None) is first


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, NDArray[Any]], list[int]]:
    """Outputs of a batch, and how many of its samples were whose."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    outputs = {}
    for name in draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=2, unique=True)):
        dtype = draw(st.sampled_from(["?", "u1", "<i2", ">i4", "<f2", "<f4", "<f8"]))
        shape = (sum(counts), *draw(st.lists(st.integers(0, 3), max_size=2)))
        values = numpy.arange(math.prod(shape)).reshape(shape).astype(dtype)
        is_odd = draw(st.booleans())
        outputs[name] = numpy.asfortranarray(values) if is_odd else values
    return outputs, counts


@given(batches(), st.none() | st.text(max_size=9))
def test_replies_of_a_batch_are_those_that_each_would_get(
    batch: tuple[dict[str, NDArray[Any]], list[int]], request_id: str | None
) -> None:
    outputs, counts = batch
    form = protocol.ReplyForm(model_name="m", model_version="1", parameters={"worker": "w"})
    for _ in range(2):  # the second time, from what was kept
        replies = form.of_batch(outputs)
        start = 0
        for samples in counts:
            rows = {name: array[start : start + samples] for name, array in outputs.items()}
            alone = protocol.encode_response(
                Response(
                    id=request_id,
                    model_name="m",
                    model_version="1",
                    outputs=rows,
                    parameters={"worker": "w"},
                ),
                binary=True,
            )
            assert form.encode(request_id, rows) == alone
            if replies is not None:
                pieces = replies.encode(request_id, start=start, samples=samples)
                assert b"".join(pieces) == alone
            start += samples


def test_a_contiguous_batch_is_encoded_as_one() -> None:
    form = protocol.ReplyForm(model_name="m", model_version="1", parameters={})
    values = numpy.ones((4, 3), "<f4")
    assert form.of_batch({"y": values}) is not None
    assert form.of_batch({"y": values.T}) is None
    assert form.of_batch({"y": values.astype(">f4")}) is None


@given(st.integers(1, 20), st.integers(1, 20))
def test_no_beginning_of_a_frame_is_taken_for_the_whole(first: int, second: int) -> None:
    inputs = {"a": numpy.ones(first, "u1"), "b": numpy.ones(second, "<i8")}
    frame = protocol.encode_request(Request(inputs=inputs, id="i"))
    for end in range(len(frame)):
        assert refusal(protocol.decode_request, frame[:end]) is not None


LONG = 200_000
ESCAPED = ["\x00", "\x1f", "\x7f", '"', "\\", "'", "\u2028", "é", "\U0001f600", "\ufeff", "y"]


@pytest.mark.parametrize("character", ESCAPED)
@pytest.mark.parametrize("binary", [True, False])
def test_no_error_repeats_a_long_text(character: str, binary: bool) -> None:
    long = character * (LONG // len(character.encode()))
    plain = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}
    contents: list[dict[str, Any]] = [
        {"id": long, "inputs": []},
        {"id": "i", long: 1},
        {"id": "i", "inputs": [plain | {long: 1}]},
        {"id": "i", "inputs": [plain | {"datatype": long}]},
        {"id": "i", "inputs": [plain | {"name": long, "data": [1, 2]}]},
        {"id": "i", "inputs": [plain | {"name": long}] * 2},
        {"id": "i", "inputs": [plain | {"data": [long]}]},
        {"id": "i", "inputs": [plain | {"parameters": {"binary_data_size": long}}]},
        {"id": "i", "inputs": [], "parameters": {long: {}}},
        {"id": "i", "inputs": [], "outputs": [{long: 1}]},
        {"id": "i", "cancel": {long: 1}},
    ]
    for content in contents:
        text = json.dumps(content, ensure_ascii=False)
        encoded = text.encode()
        frame = len(encoded).to_bytes(4, "little") + encoded
        error = refusal(protocol.decode_message, frame if binary else text)
        assert error is not None
        assert len(error.message) <= LONGEST_ERROR
        failure = Failure(id=error.request_id, code=error.code, message=error.message)
        # Six bytes is what JSON makes of a control character.
        assert len(protocol.encode_failure(failure, binary=binary)) < 6 * LONGEST_ERROR


# -------------------------------------------------------------------------------------- memory

SIZE = 100_000


def repeated(unit: str) -> str:
    return ",".join([unit] * (SIZE // (len(unit) + 1)))


def numbered(form: str, count: int = SIZE // 16) -> str:
    return ",".join(form.format(number) for number in range(count))


def with_data(data: str, *, rank: int = 1, datatype: str = "FP64") -> str:
    shape = [max(1, data.count(","))] + [1] * (rank - 1)
    return f'{{"inputs":[{{"name":"x","shape":{shape},"datatype":"{datatype}","data":{data}}}]}}'


EMPTY_NAME = '{"name":""}'

GREEDY = {
    "numbers": with_data(f"[{repeated('0')}]"),
    "small numbers": with_data(f"[{repeated('0')}]", datatype="INT8"),
    "large numbers": with_data(f"[{repeated('9' * 18)}]", datatype="INT64"),
    "truths": with_data(f"[{repeated('true')}]", datatype="BOOL"),
    "rows of nothing": with_data(f"[{repeated('[]')}]", rank=2),
    "rows of one": with_data(f"[{repeated('[0]')}]", rank=2),
    "rows 16 deep": with_data(f"[{repeated('[' * 15 + '0' + ']' * 15)}]", rank=16),
    "rows 32 deep": with_data(f"[{repeated('[' * 31 + ']' * 31)}]", rank=32),
    "nothing but depth": "[" * SIZE,
    "depth in data": with_data("[" * SIZE + "]" * SIZE),
    "digits": with_data(f"[{'9' * SIZE}]"),
    "a shape": f'{{"inputs":[{{"name":"x","shape":[{repeated("1")}],"datatype":"INT8"}}]}}',
    "inputs": f'{{"inputs":[{repeated("{}")}]}}',
    "distinct inputs": '{"inputs":['
    + numbered('{{"name":"{}","shape":[0],"datatype":"INT8","data":[]}}', SIZE // 60)
    + "]}",
    "parameters": '{"inputs":[],"parameters":{' + numbered('"{0}":{0}') + "}}",
    "unknown fields": "{" + numbered('"{}":1') + "}",
    "outputs": f'{{"inputs":[],"outputs":[{repeated(EMPTY_NAME)}]}}',
    "limits of a session": f'{{"session":{{"id":"","limits":{{"a":[{repeated("[]")}]}}}}}}',
    "an id": json.dumps({"id": "y" * SIZE, "inputs": []}),
    "an id that gets wide": json.dumps({"id": "y" * SIZE + "\U0001f600", "inputs": []}),
    "a name that gets wide": with_data("[]").replace('"x"', f'"{"y" * SIZE}\U0001f600"'),
    "white space": " " * SIZE + "{}",
}


def peak_of(decode: Callable[[str | bytes], Any], message: str | bytes) -> int:
    refusal(decode, message)  # once untraced: caches and decoders are not the message's
    tracemalloc.start()
    refusal(decode, message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("decode", [protocol.decode_message, protocol.decode_reply])
@pytest.mark.parametrize("text", GREEDY.values(), ids=GREEDY.keys())
def test_decoding_takes_a_bounded_multiple_of_the_message(
    text: str, decode: Callable[[str | bytes], Any]
) -> None:
    encoded = text.encode()
    assert peak_of(decode, text) <= TEXT_COST * len(encoded) + FIXED_BYTES
    frame = len(encoded).to_bytes(4, "little") + encoded
    assert peak_of(decode, frame) <= BINARY_COST * len(encoded) + FIXED_BYTES


@given(damaged())
def test_damaged_messages_take_a_bounded_multiple_too(message: str | bytes) -> None:
    size = len(message) if isinstance(message, bytes) else len(message.encode(errors="replace"))
    assert peak_of(protocol.decode_message, message) <= TEXT_COST * size + FIXED_BYTES


@pytest.mark.parametrize("datatype", datatypes.NUMPY)
def test_binary_tensors_take_nothing_of_their_own(datatype: str) -> None:
    arrays = {name: numpy.zeros(1 << 20, datatypes.NUMPY[datatype]) for name in "xyz"}
    frame = protocol.encode_request(Request(inputs=arrays, id="i"))
    assert refusal(protocol.decode_message, frame) is None
    assert peak_of(protocol.decode_message, frame) <= FIXED_BYTES


@pytest.mark.parametrize("sizes", [[2**31 - 1], [2**31 - 1] * 32, [0, 2**31 - 1], [2**31 - 1, 0]])
@pytest.mark.parametrize("data", [[], [0], [[]], [[], []]])
def test_a_shape_promises_no_memory(sizes: list[int], data: list[Any]) -> None:
    text = json.dumps({"inputs": [{"name": "x", "shape": sizes, "datatype": "FP64", "data": data}]})
    assert peak_of(protocol.decode_message, text) <= FIXED_BYTES
    tensor = {"name": "x", "shape": sizes, "datatype": "FP64"}
    for size in (0, 8, 8 * functools.reduce(operator.mul, sizes)):
        header = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": size}}]})
        frame = len(header).to_bytes(4, "little") + header.encode()
        assert peak_of(protocol.decode_message, frame) <= FIXED_BYTES


# ---------------------------------------------------------------------------------- sessions


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """What a client may send in one go: mostly messages, some in fragments, some wrong."""
    kind = draw(st.sampled_from(["request"] * 6 + ["ping", "cancel", "close", "wrong", "bytes"]))
    if kind == "ping":
        return ws(draw(st.sampled_from([PING, PONG])), draw(st.binary(max_size=8)))
    if kind == "cancel":
        return ws(TEXT, protocol.encode_cancel(draw(st.sampled_from("123"))))
    if kind == "close":
        return ws(CLOSE, draw(st.sampled_from([b"", b"\x03\xe8", b"\x03\xe8bye", b"\x03"])))
    if kind == "wrong":
        return draw(st.sampled_from(WRONG_FRAMES))
    if kind == "bytes":
        return draw(st.binary(max_size=20))
    return b"".join(_fragments(draw, *_message(draw)))


WRONG_FRAMES = (
    ws(3, b""),
    ws(CONT, b"x"),
    ws(PING, bytes(126)),
    ws(PING, b"", fin=False),
    ws(TEXT, b"\xff"),
    ws(TEXT, b"{}", fin=False),
    ws(BINARY, b"", fin=False) + ws(CONT, b"", fin=False) * 9,
    ws(BINARY, bytes(5000)),
    bytes([0x82, 2]) + b"xx",
    b"\x82\xff" + b"\xff" * 12,
    b"\xc2\x80" + bytes(4),
)


def _message(draw: st.DrawFn) -> tuple[int, bytes]:
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from([TEXT, BINARY])), draw(st.sampled_from([b"", b"{}", bytes(4)]))
    binary = draw(st.booleans())
    request = Request(
        inputs={"x": numpy.zeros(draw(st.sampled_from([0, 1, 30, 300])), "<f4")},
        id=draw(st.none() | st.sampled_from("123")),
        parameters={driver.SLOW: True} if draw(st.booleans()) else {},
        binary=binary,
    )
    return BINARY if binary else TEXT, protocol.encode_request(request)


def _fragments(draw: st.DrawFn, opcode: int, message: bytes) -> Iterator[bytes]:
    """The message in one frame or some, with a ping between two now and then."""
    cuts = sorted(draw(st.lists(st.integers(0, len(message)), max_size=3)))
    starts, ends = [0, *cuts], [*cuts, len(message)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if number and draw(st.booleans()):
            yield ws(PING, b"between")
        yield ws(CONT if number else opcode, message[start:end], fin=number == len(cuts))


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    places = sorted({min(place, len(stream)) for place in at} | {0, len(stream)})
    return [stream[start:end] for start, end in itertools.pairwise(places)]


places = st.lists(st.integers(0, 2000), max_size=12)


@given(st.lists(frames(), max_size=8), st.sampled_from([b"", b"Sec-WebSocket-Protocol: "]), places)
@example([ws(BINARY, bytes(4))] * 600, b"", [])  # more than a session looks at in one turn
@example([ws(PING, b"")] * 600, b"", [7, 300])
async def test_a_session_does_not_care_how_its_bytes_are_cut(
    sent: list[bytes], asks: bytes, at: list[int]
) -> None:
    handshake = driver.HANDSHAKE
    if asks:
        handshake = handshake[:-2] + asks + protocol.SUBPROTOCOL.encode() + b"\r\n\r\n"
    stream = handshake + b"".join(sent)
    whole = await driver.drive([stream])
    assert await driver.drive(cut(stream, at)) == whole
    assert await driver.drive(stream[at : at + 1] for at in range(len(stream))) == whole
    assert whole.startswith(b"HTTP/1.1 101 ")


@given(st.lists(frames(), max_size=8), places, st.sets(st.integers(0, 12)))
async def test_a_session_does_not_care_when_it_is_read(
    sent: list[bytes], at: list[int], clogged: set[int]
) -> None:
    stream = driver.HANDSHAKE + b"".join(sent)
    whole = await driver.drive([stream])
    assert await driver.drive(cut(stream, at), clogged=clogged) == whole


@given(st.binary(max_size=300), places)
@example(b"\r\n\r\n", [1, 2, 3])
@example(b"GET / HTTP/1.1\r\n\r\n" + ws(TEXT, b"{}"), [3])
@example(b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", [])
@example(b"GET /" + b"a" * 40_000, [500])
async def test_a_session_survives_what_is_no_handshake(stream: bytes, at: list[int]) -> None:
    whole = await driver.drive([stream])
    assert await driver.drive(cut(stream, at)) == whole
    assert not whole.startswith(b"HTTP/1.1 101 ")
