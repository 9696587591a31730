import json
import math
import struct
from typing import Any

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import numpy
import pytest
from hypothesis import example, given
from numpy.typing import NDArray

from gpu_service import datatypes, protocol
from gpu_service.messages import Cancel, ErrorCode, Failure, ProtocolError, Request, Response

# How long an example takes says nothing on a machine that does other things, too.

scalars = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**53), 2**53),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)
ids = st.one_of(st.none(), st.text(max_size=protocol.MAX_ID_CHARS))
names = st.text(min_size=1, max_size=8)
shapes = numpy_strategies.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn, *, finite: bool) -> NDArray[Any]:
    dtype = datatypes.NUMPY[draw(st.sampled_from(sorted(datatypes.NUMPY)))]
    elements = None
    if dtype.kind == "f":
        width = dtype.itemsize * 8
        elements = st.floats(width=width, allow_nan=not finite, allow_infinity=not finite)  # type: ignore[arg-type]
    array: NDArray[Any] = draw(numpy_strategies.arrays(dtype, shapes, elements=elements))
    return array


def requests(*, binary: bool) -> st.SearchStrategy[Request]:
    return st.builds(
        Request,
        inputs=st.dictionaries(names, arrays(finite=not binary), max_size=3),
        id=ids,
        model_name=st.none() | names,
        model_version=st.none() | names,
        outputs=st.none() | st.lists(names, max_size=3).map(tuple),
        parameters=st.dictionaries(names, scalars, max_size=3),
        binary=st.just(binary),
    )


def same(left: Any, right: Any) -> bool:
    """Equality of messages with arrays in them, bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, numpy.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return left.tobytes() == right.tobytes()
    if isinstance(left, Request | Response):
        # Not `layout`: how it was read, which depends on what came before.
        said = [field for field in left.__struct_fields__ if field != "layout"]
        return all(same(getattr(left, field), getattr(right, field)) for field in said)
    return bool(left == right)


def on_wire(payload: bytes, *, binary: bool) -> str | bytes:
    return payload if binary else payload.decode()


@given(requests(binary=True))
def test_binary_requests_survive_the_round_trip(request: Request) -> None:
    frame = protocol.encode_request(request)
    assert same(protocol.decode_request(frame), request)


@given(requests(binary=False))
def test_text_requests_survive_the_round_trip(request: Request) -> None:
    text = protocol.encode_request(request).decode()
    decoded = protocol.decode_request(text)
    assert same(decoded, request)


@given(
    st.booleans(),
    ids,
    names,
    st.dictionaries(names, arrays(finite=True), max_size=3),
    st.dictionaries(names, scalars, max_size=3),
)
def test_responses_survive_the_round_trip(
    binary: bool,
    request_id: str | None,
    model: str,
    outputs: dict[str, NDArray[Any]],
    parameters: dict[str, Any],
) -> None:
    response = Response(
        id=request_id,
        model_name=model,
        model_version="1",
        outputs=outputs,
        parameters=parameters,
    )
    payload = protocol.encode_response(response, binary=binary)
    assert same(protocol.decode_reply(on_wire(payload, binary=binary)), response)


@given(st.booleans(), ids, st.text(), st.none() | st.integers(0, 10**6))
def test_failures_survive_the_round_trip(
    binary: bool, request_id: str | None, message: str, retry_after_ms: int | None
) -> None:
    failure = Failure(
        id=request_id, code="UNAVAILABLE", message=message, retry_after_ms=retry_after_ms
    )
    payload = protocol.encode_failure(failure, binary=binary)
    assert protocol.decode_reply(on_wire(payload, binary=binary)) == failure


def only_protocol_errors(message: str | bytes) -> None:
    for decode in (protocol.decode_request, protocol.decode_reply):
        try:
            decode(message)
        except ProtocolError as error:
            assert error.code in ErrorCode
            assert len(error.message) < 1000


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00\x00\x00\x00")
@example(b"\xff\xff\xff\xff{}")
@example(struct.pack("<I", 200_000) + b"[" * 200_000)
def test_arbitrary_bytes_raise_protocol_errors_only(message: bytes) -> None:
    only_protocol_errors(message)


@given(st.text(alphabet=st.characters(), max_size=200))
@example("\ud800")
@example('{"id": "\\ud800", "inputs": []}')
@example("[" * 200_000)
@example('{"inputs":' + "[" * 200_000)
@example('{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + "[" * 200_000)
@example('{"inputs":[{"name":"x","shape":[' + "9" * 10_000 + '],"datatype":"FP32","data":[]}]}')
@example('{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":[' + "9" * 10_000 + "]}]}")
def test_arbitrary_text_raises_protocol_errors_only(message: str) -> None:
    only_protocol_errors(message)


@given(requests(binary=True), st.data())
def test_damaged_frames_raise_protocol_errors_only(request: Request, data: st.DataObject) -> None:
    frame = bytearray(protocol.encode_request(request))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    only_protocol_errors(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "inputs", "name", "shape", "datatype", "data", "outputs"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_arbitrary_json_raises_protocol_errors_only(content: Any) -> None:
    only_protocol_errors(json.dumps(content))


def tensor(**changes: Any) -> dict[str, Any]:
    plain = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]} | changes
    return {key: value for key, value in plain.items() if value is not None}


BAD_TEXT = {
    "unknown datatype": [tensor(datatype="FP8")],
    "lower-case datatype": [tensor(datatype="fp32")],
    "too few values": [tensor(data=[1.0])],
    "too many values": [tensor(data=[1.0, 2.0, 3.0])],
    "nested, other shape": [tensor(data=[[1.0], [2.0]])],
    "nested, ragged": [tensor(shape=[2, 2], data=[[1.0, 2.0], [3.0]])],
    "nested too deep": [tensor(data=[[[1.0, 2.0]]])],
    "a number is no list": [tensor(data=1.0)],
    "string for a number": [tensor(data=["1", "2"])],
    "null for a number": [tensor(data=[1.0, None])],
    "true for a number": [tensor(data=[1.0, True])],
    "fraction for an integer": [tensor(datatype="INT32", data=[1.0, 1.5])],
    "too large for FP32": [tensor(data=[1.0, 1e39])],
    "too large for UINT8": [tensor(datatype="UINT8", data=[1, 256])],
    "negative for UINT8": [tensor(datatype="UINT8", data=[1, -1])],
    "too large for INT64": [tensor(datatype="INT64", data=[1, 2**63])],
    "number for a BOOL": [tensor(datatype="BOOL", data=[0, 1])],
    "no shape": [tensor(shape=None)],
    "no dimensions": [tensor(shape=[], data=[1.0])],
    "too many dimensions": [tensor(shape=[1] * 33, data=[1.0])],
    "negative size": [tensor(shape=[-1, 2])],
    "huge size": [tensor(shape=[2**31, 2])],
    "no data": [tensor(data=None)],
    "binary size in text": [tensor(parameters={"binary_data_size": 8})],
    "unknown field": [tensor(dtype="FP32")],
    "same name twice": [tensor(), tensor()],
    "no list of inputs": {"x": [1.0]},
}


@pytest.mark.parametrize("inputs", BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_a_bad_text_request_is_refused_under_its_id(inputs: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_request(json.dumps({"id": "the-id", "inputs": inputs}))
    assert caught.value.request_id == "the-id"
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def frame_of(header: dict[str, Any], data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(4 + len(encoded)) % 8)
    return struct.pack("<I", len(encoded)) + encoded + data


def binary_tensor(size: Any, **changes: Any) -> dict[str, Any]:
    return tensor(data=None, parameters={"binary_data_size": size}, **changes)


BAD_BINARY = {
    "truncated": ([binary_tensor(8)], bytes(4)),
    "no data at all": ([binary_tensor(8)], b""),
    "too long": ([binary_tensor(8)], bytes(24)),
    "size disagrees with the shape": ([binary_tensor(4)], bytes(8)),
    "negative size": ([binary_tensor(-8)], bytes(8)),
    "size is true": ([binary_tensor(True, shape=[1], datatype="UINT8")], bytes(8)),
    "size is text": ([binary_tensor("8")], bytes(8)),
    "data in the header": ([tensor()], b""),
    "no size": ([tensor(data=None)], bytes(8)),
    "a BOOL of 2": ([binary_tensor(2, datatype="BOOL")], b"\x01\x02"),
}


@pytest.mark.parametrize(("inputs", "data"), BAD_BINARY.values(), ids=BAD_BINARY.keys())
def test_a_bad_binary_request_is_refused_under_its_id(inputs: Any, data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_request(frame_of({"id": "the-id", "inputs": inputs}, data))
    assert caught.value.request_id == "the-id"
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_an_unknown_field_of_a_request_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="input_data") as caught:
        protocol.decode_request('{"id": "7", "inputs": [], "input_data": []}')
    assert caught.value.request_id == "7"


def test_an_unknown_field_of_a_reply_is_left_to_newer_clients() -> None:
    reply = protocol.decode_reply('{"id": "7", "model_name": "m", "outputs": [], "new": {"a": 1}}')
    assert isinstance(reply, Response)
    assert reply.id == "7"


def test_an_overlong_id_is_refused_and_not_repeated() -> None:
    with pytest.raises(ProtocolError, match="at most 128") as caught:
        protocol.decode_request(json.dumps({"id": "x" * 129, "inputs": []}))
    assert caught.value.request_id is None


def test_error_messages_do_not_echo_a_long_message() -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_request(json.dumps({"inputs": [], "y" * 100_000: 1}))
    assert len(caught.value.message) < 600


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_a_cancellation_survives_the_round_trip(request_id: str) -> None:
    encoded = protocol.encode_cancel(request_id)
    assert protocol.decode_message(encoded.decode()) == Cancel(request_id)
    frame = struct.pack("<I", len(encoded)) + encoded
    assert protocol.decode_message(frame) == Cancel(request_id)
    with pytest.raises(ProtocolError, match="not a request"):
        protocol.decode_request(frame)


def test_tensors_are_views_into_the_frame() -> None:
    array = numpy.arange(6, dtype="<f4").reshape(2, 3)
    frame = protocol.encode_request(Request(inputs={"a": array, "b": array}))
    decoded = protocol.decode_request(frame)
    whole = numpy.frombuffer(frame, "u1")
    for name in ("a", "b"):
        assert numpy.shares_memory(decoded.inputs[name], whole)


@given(st.text(max_size=20), st.integers(0, 9), st.integers(0, 9))
def test_every_tensor_starts_at_a_multiple_of_8(request_id: str, first: int, second: int) -> None:
    inputs = {"a": numpy.ones(first, "u1"), "b": numpy.full(second, 2, "u1")}
    frame = protocol.encode_request(Request(inputs=inputs, id=request_id))
    (length,) = struct.unpack_from("<I", frame)
    start = 4 + length
    assert start % 8 == 0
    assert frame[start : start + first] == b"\x01" * first
    second_start = start + math.ceil(first / 8) * 8
    assert frame[second_start : second_start + second] == b"\x02" * second


def test_the_last_padding_may_be_left_out() -> None:
    frame = protocol.encode_request(Request(inputs={"a": numpy.ones(3, "u1")}))
    assert len(frame) % 8 == 0
    decoded = protocol.decode_request(frame[:-5])
    assert decoded.inputs["a"].tolist() == [1, 1, 1]


def test_a_header_that_is_not_padded_is_read_too() -> None:
    header = {"inputs": [binary_tensor(2, shape=[2], datatype="UINT8")]}
    encoded = json.dumps(header).encode()
    encoded += b" " * ((3 - 4 - len(encoded)) % 8)  # so that 5 bytes of padding follow
    frame = struct.pack("<I", len(encoded)) + encoded + bytes(5) + b"\x07\x08"
    assert protocol.decode_request(frame).inputs["x"].tolist() == [7, 8]


def test_flat_and_nested_text_data_are_the_same() -> None:
    flat = tensor(shape=[2, 2], data=[1, 2, 3, 4])
    nested = tensor(shape=[2, 2], data=[[1, 2], [3, 4]])
    decoded = [
        protocol.decode_request(json.dumps({"inputs": [each]})).inputs["x"]
        for each in (flat, nested)
    ]
    assert decoded[0].tolist() == decoded[1].tolist() == [[1, 2], [3, 4]]
    assert decoded[0].dtype == numpy.dtype("<f4")


def test_big_endian_and_strided_arrays_are_sent_as_what_they_hold() -> None:
    array = numpy.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    decoded = protocol.decode_request(protocol.encode_request(Request(inputs={"a": array})))
    assert decoded.inputs["a"].tolist() == array.tolist()


def test_nan_goes_in_binary_and_is_refused_in_text() -> None:
    outputs = {"y": numpy.array([math.nan, math.inf], "<f4")}
    response = Response(id="1", model_name="m", model_version="1", outputs=outputs)
    reply = protocol.decode_reply(protocol.encode_response(response, binary=True))
    assert isinstance(reply, Response)
    assert math.isnan(reply.outputs["y"][0])
    with pytest.raises(ProtocolError, match="JSON cannot carry"):
        protocol.encode_response(response, binary=False)


def test_a_dtype_that_the_protocol_lacks_is_refused_by_the_encoder() -> None:
    with pytest.raises(ProtocolError, match="a: numpy dtype complex64"):
        protocol.encode_request(Request(inputs={"a": numpy.ones(1, "c8")}))


def test_a_header_that_ends_within_its_own_id_is_damaged() -> None:
    frame = struct.pack("<I", 9) + b'{"id":"a long one","inputs":[]}  '
    with pytest.raises(ProtocolError, match="not a message"):
        protocol.decode_request(frame)
