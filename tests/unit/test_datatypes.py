import numpy
import pytest

from gpu_service import datatypes


@pytest.mark.parametrize("name", datatypes.NUMPY)
def test_every_datatype_is_found_by_its_numpy_dtype_in_either_byte_order(name: str) -> None:
    dtype = datatypes.NUMPY[name]
    assert datatypes.name_of(dtype) == name
    assert datatypes.name_of(dtype.newbyteorder(">")) == name


@pytest.mark.parametrize("name", [name for name in datatypes.NUMPY if name != "BOOL"])
def test_multi_byte_datatypes_are_little_endian(name: str) -> None:
    one = numpy.array([1], datatypes.NUMPY[name].newbyteorder("<"))
    assert one.astype(datatypes.NUMPY[name]).tobytes() == one.tobytes()


def test_a_dtype_without_a_name_is_refused_with_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"complex128 has no .*FP32"):
        datatypes.name_of(numpy.dtype("c16"))
