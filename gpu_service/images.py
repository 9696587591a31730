"""Greyscale and RGB images in PGM and PNG files: bytes to pixels, nothing more.

Pure. Reads the plain 8-bit forms alone, with zlib and numpy; anything else is an ImageError
that says how to convert it. Never takes more memory than MOST_PIXELS need.
"""

import re
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

MOST_PIXELS = 1 << 24

Pixels = NDArray[numpy.uint8]

_PNG = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")
_CHANNELS = {0: 1, 2: 3}
_KINDS = {3: "a palette", 4: "grey with alpha", 6: "colour with alpha"}
_CONVERT = "convert it to an 8-bit greyscale or RGB PNG without transparency or interlacing"

# Numbers of a PGM header, between white space and comments.
_PGM_HEADER = re.compile(
    rb"P5(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s"
)


class ImageError(Exception):
    """Bytes that are no image that can be read here; the message says why."""


def is_image(content: bytes) -> bool:
    """Whether this is what `decode` is for, going by its first bytes."""
    return content.startswith(_PNG) or re.match(rb"P[1-7]\s", content) is not None


def decode(content: bytes) -> Pixels:
    """Pixels 0…255: [height, width] of a greyscale image, [height, width, 3] of an RGB one.

    Raises ImageError, whatever the bytes are.
    """
    if content.startswith(_PNG):
        return _decode_png(content)
    if content.startswith(b"P5"):
        return _decode_pgm(content)
    raise ImageError("not an image that can be read here: an 8-bit PNG or a binary PGM (P5)")


def _decode_pgm(content: bytes) -> Pixels:
    header = _PGM_HEADER.match(content)
    if header is None:
        raise ImageError("damaged: its header is not that of a PGM file")
    width, height, most = map(int, header.groups())
    _check_size(width, height)
    if most != 255:
        raise ImageError(f"its white is {most}; only 8-bit PGM files, of 255, can be read")
    pixels = content[header.end() : header.end() + width * height]
    if len(pixels) < width * height:
        raise ImageError(f"truncated: {width} x {height} pixels were said, {len(pixels)} are there")
    return numpy.frombuffer(pixels, "u1").reshape(height, width)


def _decode_png(content: bytes) -> Pixels:
    header, compressed = _chunks(content)
    width, height, depth, kind, _, _, interlaced = _HEADER.unpack(header)
    _check_size(width, height)
    if depth != 8 or kind not in _CHANNELS or interlaced:
        found = _KINDS.get(kind, "grey" if kind == 0 else "colour")
        how = f"{depth} bits, {found}{', interlaced' if interlaced else ''}"
        raise ImageError(f"a PNG that cannot be read here ({how}): {_CONVERT}")
    channels = _CHANNELS[kind]
    size = height * (1 + width * channels)
    decompressor = zlib.decompressobj()
    try:
        # Bounded, because a few bytes may stand for very many.
        raw = decompressor.decompress(compressed, size)
    except zlib.error as error:
        raise ImageError(f"damaged: {error}") from None
    if len(raw) < size:
        raise ImageError(f"truncated: {size} bytes of pixels were said, {len(raw)} are there")
    rows = numpy.frombuffer(raw, "u1").reshape(height, 1 + width * channels)
    pixels = _unfiltered(rows[:, 0], rows[:, 1:], channels)
    return pixels.reshape(height, width) if channels == 1 else pixels.reshape(height, width, 3)


def _check_size(width: int, height: int) -> None:
    if not (width and height) or width * height > MOST_PIXELS:
        raise ImageError(f"{width} x {height} pixels; 1 to {MOST_PIXELS:,} can be read")


def _chunks(content: bytes) -> tuple[bytes, bytes]:
    """The header and the compressed pixels; every chunk's checksum is right."""
    header, compressed = b"", []
    offset = len(_PNG)
    while True:
        length, name = struct.unpack_from(">I4s", content.ljust(offset + 8, b"\0"), offset)
        end = offset + 8 + length
        if end + 4 > len(content):
            raise ImageError("truncated: its last chunk is not whole")
        body = content[offset + 8 : end]
        if zlib.crc32(content[offset + 4 : end]) != int.from_bytes(content[end : end + 4]):
            raise ImageError(f"damaged: the checksum of chunk {name!r} is wrong")
        if offset == len(_PNG) and (name != b"IHDR" or length != _HEADER.size):
            raise ImageError("damaged: it does not begin with an image header")
        if name == b"IHDR":
            header = body
        elif name == b"IDAT":
            compressed.append(body)
        elif name == b"tRNS":
            raise ImageError(f"a PNG with transparency cannot be read here: {_CONVERT}")
        elif name == b"IEND":
            return header, b"".join(compressed)
        offset = end + 4


def _unfiltered(filters: Pixels, rows: Pixels, channels: int) -> Pixels:
    """Each row as it was before PNG's filters took the differences to its neighbours."""
    done = numpy.zeros((len(rows) + 1, rows.shape[1]), "u1")
    for number, (kind, row) in enumerate(zip(filters.tolist(), rows, strict=True)):
        above, target = done[number], done[number + 1]
        if kind == 0:
            target[:] = row
        elif kind == 1:
            pixels = row.reshape(-1, channels)
            target[:] = numpy.cumsum(pixels, axis=0, dtype="u1").ravel()
        elif kind == 2:
            target[:] = row + above
        elif kind == 3:
            target[:] = _averaged(row.tolist(), above.tolist(), channels)
        elif kind == 4:
            target[:] = _paeth(row.tolist(), above.tolist(), channels)
        else:
            raise ImageError(f"damaged: there is no filter {kind}")
    return done[1:]


def _averaged(row: list[int], above: list[int], channels: int) -> list[int]:
    done = [0] * channels
    for value, up in zip(row, above, strict=True):
        done.append((value + (done[-channels] + up) // 2) & 255)
    return done[channels:]


def _paeth(row: list[int], above: list[int], channels: int) -> list[int]:
    done = [0] * channels
    corners = [0] * channels + above
    for value, up, corner in zip(row, above, corners, strict=False):
        left = done[-channels]
        guess = left + up - corner
        to_left, to_up, to_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
        if to_left <= to_up and to_left <= to_corner:
            nearest = left
        else:
            nearest = up if to_up <= to_corner else corner
        done.append((value + nearest) & 255)
    return done[channels:]


def as_input(pixels: Pixels, dtype: numpy.dtype[Any], shape: list[int]) -> NDArray[Any]:
    """One sample of a model's input: [1, …], of `shape` without the batch (-1: any size).

    Floating-point models get 0…1, those of UINT8 the pixels as they are. RGB goes to either
    [3, height, width] or [height, width, 3]. Nothing is resized: raises ImageError.
    """
    if dtype.kind == "f":
        values: NDArray[Any] = pixels.astype(dtype) / dtype.type(255)
    elif dtype == numpy.dtype("u1"):
        values = pixels
    else:
        raise ImageError(f"the model takes {dtype.name}; images go to float and uint8 inputs alone")
    if pixels.ndim == 3:
        arrangements = [values, values.transpose(2, 0, 1)]
    else:
        arrangements = [values, values[None], values[:, :, None]]
    for arranged in arrangements:
        if fits(arranged.shape, shape):
            return numpy.ascontiguousarray(arranged).reshape([1, *arranged.shape])
    if -1 not in shape and _larger(values.shape) == _larger(shape):
        return values.reshape([1, *shape])  # a line of pixels, say, for a flat input
    height, width = pixels.shape[:2]
    kind = "RGB" if pixels.ndim == 3 else "greyscale"
    raise ImageError(
        f"{kind}, {height} pixels high and {width} wide, does not fit the model's input {shape}; "
        "images are not resized here"
    )


def fits(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether an array of these sizes has this shape, in which -1 is any size."""
    return len(sizes) == len(shape) and all(
        wanted in (-1, size) for size, wanted in zip(sizes, shape, strict=True)
    )


def _larger(sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size != 1]
