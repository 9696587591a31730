import contextlib
import struct
import zlib
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from gpu_service import images
from gpu_service.images import ImageError, Pixels

SIZES = st.integers(1, 8)
GREY = st.tuples(SIZES, SIZES).flatmap(lambda shape: arrays("u1", shape))
RGB = st.tuples(SIZES, SIZES, st.just(3)).flatmap(lambda shape: arrays("u1", shape))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    header: tuple[int, ...], rows: bytes, *, more: bytes = b"", cut_idat_at: int | None = None
) -> bytes:
    compressed = zlib.compress(rows)
    parts = (
        [compressed]
        if cut_idat_at is None
        else [compressed[:cut_idat_at], compressed[cut_idat_at:]]
    )
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *header)),
            chunk(b"tEXt", b"Comment\0none"),
            more,
            *(chunk(b"IDAT", part) for part in parts),
            chunk(b"IEND", b""),
        ]
    )


def filtered(pixels: Pixels, kinds: list[int]) -> bytes:
    """The rows of an image, filtered as the PNG specification says, pixel by pixel."""
    height, width = pixels.shape[:2]
    channels = 3 if pixels.ndim == 3 else 1
    raw = pixels.reshape(height, width * channels).astype(int)
    out = bytearray()
    for y in range(height):
        kind = kinds[y % len(kinds)]
        out.append(kind)
        for x in range(width * channels):
            left = raw[y, x - channels] if x >= channels else 0
            up = raw[y - 1, x] if y else 0
            corner = raw[y - 1, x - channels] if y and x >= channels else 0
            guess = left + up - corner
            nearest = min((left, up, corner), key=lambda value, guess=guess: abs(guess - value))
            predicted = [0, left, up, (left + up) // 2, nearest][kind]
            out.append((raw[y, x] - predicted) % 256)
    return bytes(out)


def encoded(pixels: Pixels, kinds: list[int], cut_idat_at: int | None = None) -> bytes:
    height, width = pixels.shape[:2]
    header = (width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return png(header, filtered(pixels, kinds), cut_idat_at=cut_idat_at)


@given(
    GREY | RGB, st.lists(st.integers(0, 4), min_size=1, max_size=8), st.none() | st.integers(0, 9)
)
def test_png_of_any_filter_is_read(pixels: Pixels, kinds: list[int], cut: int | None) -> None:
    content = encoded(pixels, kinds, cut)
    assert images.is_image(content)
    decoded = images.decode(content)
    assert decoded.dtype == numpy.uint8
    assert decoded.tolist() == pixels.tolist()


@given(GREY, st.sampled_from([b"P5 %d %d 255 ", b"P5\n# made by hand\n%d %d\n# white:\n255\n"]))
def test_pgm_is_read(pixels: Pixels, header: bytes) -> None:
    height, width = pixels.shape
    content = header % (width, height) + pixels.tobytes()
    assert images.is_image(content)
    assert images.decode(content).tolist() == pixels.tolist()


@given(st.sampled_from([b"", b"P5", b"P5 1 1 255\n", b"\x89PNG\r\n\x1a\n"]), st.binary())
def test_nothing_but_an_image_error_comes_of_any_bytes(start: bytes, rest: bytes) -> None:
    with contextlib.suppress(ImageError):
        images.decode(start + rest)


@given(st.data())
def test_damage_is_found(data: st.DataObject) -> None:
    content = bytearray(encoded(numpy.arange(48, dtype="u1").reshape(4, 4, 3), [4, 3]))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ImageError):
        images.decode(bytes(content))
    with pytest.raises(ImageError):
        images.decode(bytes(content[:at]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png((2, 2, 8, 3, 0, 0, 0), b""), "8 bits, a palette.*convert it to an 8-bit"),
        (png((2, 2, 8, 6, 0, 0, 0), b""), "colour with alpha"),
        (png((2, 2, 16, 0, 0, 0, 0), b""), "16 bits, grey"),
        (png((2, 2, 8, 0, 0, 0, 1), b""), "interlaced"),
        (png((2, 2, 8, 0, 0, 0, 0), b"", more=chunk(b"tRNS", b"\0\0")), "transparency"),
        (png((0, 2, 8, 0, 0, 0, 0), b""), "0 x 2 pixels"),
        (png((9999, 9999, 8, 0, 0, 0, 0), b""), r"9999 x 9999 pixels; 1 to 16,777,216"),
        (png((2, 2, 8, 0, 0, 0, 0), bytes(5)), "truncated: 6 bytes of pixels were said, 5"),
        (png((2, 2, 8, 0, 0, 0, 0), b"\x05\0\0\0\0\0"), "no filter 5"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "does not begin with an image header"),
        (b"P5 2 2 65535 ", "its white is 65535"),
        (b"P5 2 2 255 abc", "truncated: 2 x 2 pixels were said, 3"),
        (b"P5 two 2 255 ", "not that of a PGM file"),
        (b"P2 1 1 255 7", "an 8-bit PNG or a binary PGM"),
        (b"\xff\xd8\xff", "an 8-bit PNG or a binary PGM"),
    ],
)
def test_what_cannot_be_read_says_why(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        images.decode(content)


def test_few_bytes_do_not_become_many() -> None:
    bomb = png((4, 4, 8, 0, 0, 0, 0), bytes(50_000_000))
    assert len(bomb) < 100_000
    assert images.decode(bomb).shape == (4, 4)  # the rest is never unpacked


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((5, 4), [5, 4]),
        ((5, 4), [1, 5, 4]),
        ((5, 4), [5, 4, 1]),
        ((5, 4, 3), [5, 4, 3]),
        ((5, 4, 3), [3, 5, 4]),
        ((5, 4), [1, -1, -1]),
        ((5, 4), [-1, -1, 1]),
        ((5, 4, 3), [3, -1, -1]),
        ((1, 4), [4]),
    ],
)
def test_pixels_become_a_sample(size: tuple[int, ...], shape: list[int]) -> None:
    pixels: NDArray[Any] = numpy.arange(numpy.prod(size), dtype="u1").reshape(size)
    pixels.flat[-1] = 255
    floats = images.as_input(pixels, numpy.dtype("<f4"), shape)
    assert floats.ndim == 1 + len(shape)
    assert images.fits(floats.shape[1:], shape)
    assert floats.dtype == numpy.dtype("<f4")
    assert floats.min() == 0
    assert floats.max() == 1
    bytes_ = images.as_input(pixels, numpy.dtype("u1"), shape)
    moved = pixels.transpose(2, 0, 1) if shape[0] == 3 else pixels
    assert bytes_.ravel().tolist() == moved.ravel().tolist()
    assert numpy.allclose(floats * 255, bytes_)


def test_a_wrong_size_or_kind_is_said() -> None:
    grey: Pixels = numpy.zeros((5, 4), "u1")
    f4 = numpy.dtype("<f4")
    with pytest.raises(ImageError, match=r"5 pixels high and 4 wide, does not fit.*not resized"):
        images.as_input(grey, f4, [1, 28, 28])
    with pytest.raises(ImageError, match="greyscale"):
        images.as_input(grey, f4, [4, 5])
    with pytest.raises(ImageError, match="RGB"):
        images.as_input(numpy.zeros((5, 4, 3), "u1"), f4, [5, 4])
    with pytest.raises(ImageError, match="takes int64"):
        images.as_input(grey, numpy.dtype("<i8"), [5, 4])
