"""What the members of an utterance say, in a tar of another program: its matrix and its speaker.

A matrix can be mapped if it is stored as our own tars store it: an `.npy` file in C order with a
header of 128 bytes.
"""

from __future__ import annotations

import functools
import io
import json
import math
import zlib
from typing import Literal, NamedTuple

import numpy as np

from shardprep.format.codecs import NPY_FAULTS, NPY_HEADER_BYTES, read_npy_header
from shardprep.format.foreign_tar import ForeignMember, ReadAt, pieces
from shardprep.format.index import NO_LABEL
from shardprep.format.limits import MAX_FOREIGN_TEXT_BYTES, MAX_MEMBER_BYTES, MAX_N_MELS
from shardprep.storage.sniff import sniff

Dtype = Literal["float16", "float32"]

_MOST_NAME = 200
_DTYPES: dict[str, Dtype] = {"<f2": "float16", "<f4": "float32"}
# Other ways to store an array, by the end of an extension.
_OTHER_FORMS = {
    "npz": "an .npz archive",
    "npy.gz": "compressed",
    "npy.zst": "compressed",
    "npy.xz": "compressed",
    "npy.bz2": "compressed",
    "pth": "a pickle",
    "pt": "a pickle",
    "pkl": "a pickle",
    "pickle": "a pickle",
    "pyd": "a pickle",
}


def other_form(extension: str) -> str | None:
    """How a member with this extension stores an array, in words, if not as `.npy`."""
    forms = (form for end, form in _OTHER_FORMS.items() if f".{extension}".endswith(f".{end}"))
    return next(forms, None)


def read_text(read_at: ReadAt, member: ForeignMember, extension: str) -> str:
    """The text of a small member. ValueError if it is none."""
    if member.size > MAX_FOREIGN_TEXT_BYTES:
        raise ValueError(f"its member .{extension} has {member.size} bytes, far too many")
    try:
        return read_at(member.offset, member.size).decode()
    except UnicodeDecodeError:
        raise ValueError(f"its member .{extension} is no text in UTF-8") from None


class Matrix(NamedTuple):
    """A matrix that can be mapped; see `Found`."""

    offset: int
    nbytes: int
    frames: int
    n_mels: int
    dtype: Dtype
    crc32: int


def read_matrix(read_at: ReadAt, member: ForeignMember) -> Matrix:
    """Read a member and check that it can be mapped.

    Raises:
        ValueError: It cannot; the message says why.
    """
    if not member.is_plain:
        raise ValueError("its matrix is a link, a folder or a device")
    head = read_at(member.offset, min(member.size, NPY_HEADER_BYTES))
    frames, n_mels, dtype = npy_matrix(head, member.size)
    crc, finite = zlib.crc32(head), True
    for piece in pieces(read_at, member.offset + NPY_HEADER_BYTES, member.offset + member.size):
        crc = zlib.crc32(piece, crc)
        finite = finite and bool(np.isfinite(np.frombuffer(piece, dtype)).all())
    if not finite:
        raise ValueError("contains NaN or infinity")
    return Matrix(member.offset, member.size, frames, n_mels, dtype, crc)


@functools.lru_cache(4096)
def npy_matrix(head: bytes, size: int) -> tuple[int, int, Dtype]:
    """Rows, columns and dtype of an `.npy` file, if readers can map it.

    Args:
        head: Its first 128 bytes.
        size: Its size in bytes.

    Raises:
        ValueError: It cannot be mapped; the message says why.
    """
    if not head.startswith(b"\x93NUMPY"):
        found = sniff(head)
        raise ValueError("is no .npy file" if found is None else f"is no .npy file: {found.what}")
    version = head[6:8]
    if version not in (b"\1\0", b"\2\0") or len(head) < NPY_HEADER_BYTES:
        raise ValueError("has no npy header of version 1.0 or 2.0")
    width = 2 if version == b"\1\0" else 4
    begin = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if begin != NPY_HEADER_BYTES:
        raise ValueError(
            f"has an npy header of {begin} bytes, expected {NPY_HEADER_BYTES}: write it again with "
            "numpy.save"
        )
    try:
        shape, fortran, dtype = read_npy_header(io.BytesIO(head))
    except NPY_FAULTS as error:
        raise ValueError(f"has a damaged npy header ({error})"[:200]) from None
    if dtype.str not in _DTYPES:
        what = "Python objects, a pickle" if dtype.hasobject else str(dtype)[:60]
        if dtype == np.uint8:
            what += ", whose minimum and step nobody knows"
        raise ValueError(f"holds {what}, expected little-endian float16 or float32")
    if len(shape) != 2 or not 1 <= shape[1] <= MAX_N_MELS or shape[0] < 1:
        raise ValueError(f"has the shape {shape}, expected (frames, n_mels)"[:200])
    if fortran:
        raise ValueError("is in Fortran order: write it again with numpy.ascontiguousarray")
    expected = begin + math.prod(shape) * dtype.itemsize
    if size != expected or size > MAX_MEMBER_BYTES:
        raise ValueError(f"has {size} bytes, and its header says {expected}")
    return shape[0], shape[1], _DTYPES[dtype.str]


def speaker_field(text: str, field: str) -> str | None:
    """The speaker that a `.json` member names; None if it names none."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its member .json is no JSON") from None
    value = about.get(field) if isinstance(about, dict) else None
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"the field {field!r} of its .json is neither a text nor a whole number")
    return _checked_name(str(value), f"the field {field!r} of its .json")


def class_number(text: str) -> str | None:
    """The text of a `.cls` member; None where the class is unknown."""
    name = text.strip()
    return None if name in ("", str(NO_LABEL)) else _checked_name(name, "its .cls")


def _checked_name(name: str, where: str) -> str:
    if len(name) > _MOST_NAME or not name.isprintable() or name != name.strip():
        raise ValueError(f"{where} is no name of a speaker: {name[:60]!a}")
    return name
