"""Reads the array of a `.npy` file, without unpickling the objects that such a file may hold."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.storage.sniff import sniff

_MAGIC = b"\x93NUMPY"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_AS_FLOATS = "save numpy.asarray(array, numpy.float32)"


def read_npy(data: bytes) -> NDArray[Any]:
    """The array in the bytes of a `.npy` file, as a view of them.

    Raises:
        ValueError: The file does not hold exactly one array of floating-point numbers. The message
            completes a sentence that begins with the file's name.
    """
    if not data.startswith(_MAGIC):
        found = sniff(data)
        if found is not None and found.kind != "text":
            raise ValueError(found.what)
        raise ValueError(f"not a NumPy file: it begins with the bytes {data[:4].hex(' ')}")
    file = io.BytesIO(data)
    try:
        shape, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:
        # The header is a text of at most 10,000 characters that NumPy reads as a literal.
        raise ValueError(f"its NumPy header cannot be read ({str(error)[:100]})") from None
    if dtype.hasobject:
        raise ValueError(f"holds Python objects, and nothing is unpickled; {_AS_FLOATS}")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"holds {str(dtype)[:60]} numbers, expected floating point; {_AS_FLOATS}")
    if min(shape, default=1) < 1:
        raise ValueError(f"has shape {shape}, expected numbers")
    begin, expected = file.tell(), math.prod(shape) * dtype.itemsize
    if len(data) - begin < expected:
        raise ValueError(f"ends early, after {len(data)} bytes; copy or download it again")
    if len(data) - begin > expected:
        raise ValueError("goes on after the end of its array; save the array again")
    return np.ndarray(shape, dtype, data, begin, order="F" if fortran else "C")
