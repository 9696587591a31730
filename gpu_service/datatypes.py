"""The tensor datatypes of the Open Inference Protocol and what they are in numpy.

Owns the one table that the wire, bundles and the engine share. Pure; no state.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy

# Little-endian on every machine, because that is what is on the wire and in safetensors.
NUMPY: Mapping[str, numpy.dtype[Any]] = MappingProxyType(
    {
        "BOOL": numpy.dtype("?"),
        "UINT8": numpy.dtype("u1"),
        "UINT16": numpy.dtype("<u2"),
        "UINT32": numpy.dtype("<u4"),
        "UINT64": numpy.dtype("<u8"),
        "INT8": numpy.dtype("i1"),
        "INT16": numpy.dtype("<i2"),
        "INT32": numpy.dtype("<i4"),
        "INT64": numpy.dtype("<i8"),
        "FP16": numpy.dtype("<f2"),
        "FP32": numpy.dtype("<f4"),
        "FP64": numpy.dtype("<f8"),
    }
)

_NAMES = {dtype.newbyteorder("="): name for name, dtype in NUMPY.items()}


def name_of(dtype: numpy.dtype[Any]) -> str:
    """The protocol's name of a numpy dtype of either byte order; ValueError if it has none."""
    try:
        return _NAMES[dtype.newbyteorder("=")]
    except KeyError:
        raise ValueError(
            f"numpy dtype {dtype} has no Open Inference Protocol datatype here; "
            f"convert to one of: {', '.join(NUMPY)}"
        ) from None
