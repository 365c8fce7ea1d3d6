"""Recognises the `.pt` file of one plain matrix, so that it can be read without PyTorch.

`torch.save` writes a zip file of uncompressed records, each with its CRC-32:

    NAME/data.pkl    the pickle that says how to put the tensor together
    NAME/data/KEY    its numbers
    NAME/version     and further records that say how to read the two

A file is recognised only if it is, byte for byte, what `torch.save` writes for a contiguous
two-dimensional float tensor on the CPU, every CRC-32 included. Nothing is unpickled: the pickle is
compared with the one program there is for such a tensor. Any other file is PyTorch's to judge.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INT = rb"(K.|M..|J....)"
_PICKLE = re.compile(
    rb"\x80\x02ctorch\._utils\n_rebuild_tensor_v2\nq\x00\(\(X\x07\x00\x00\x00storageq\x01"
    rb"ctorch\n(Float|Half|Double)Storage\nq\x02X(.)\x00\x00\x00([0-9]{1,20})q\x03"
    rb"X\x03\x00\x00\x00cpuq\x04" + _INT + rb"tq\x05QK\x00" + 2 * _INT + rb"\x86q\x06" + 2 * _INT +
    rb"\x86q\x07\x89ccollections\nOrderedDict\nq\x08\)Rq\ttq\nRq\x0b\.",
    re.DOTALL,
)  # fmt: skip
_DTYPES: dict[bytes, np.dtype[Any]] = {
    b"Float": np.dtype("<f4"),
    b"Half": np.dtype("<f2"),
    b"Double": np.dtype("<f8"),
}

# The other records and what they must say; all but the version came with later releases.
_VERSION = b"version"
_SETTINGS = {
    _VERSION: re.compile(rb"3\n"),
    b"byteorder": re.compile(rb"little"),
    b".format_version": re.compile(rb"1"),
    b".storage_alignment": re.compile(rb"64"),
    b".data/serialization_id": re.compile(rb"[0-9]{1,64}"),
}
_ARCHIVE = re.compile(rb"[A-Za-z0-9_.-]{1,255}/")

# A record is a header, the lengths of name and padding, these two, its content and a descriptor.
# The directory, which comes last, has an entry for each record, followed by its name.
_HEADER = b"PK\3\4\0\0\x08\x08" + bytes(18)
_LENGTHS = struct.Struct("<HH")
_PADDING = struct.Struct("<2sH")
_DESCRIPTOR = struct.Struct("<4sLLL")
_ENTRY = struct.Struct("<16sLLLH12sL")
_ENTRY_HEAD = b"PK\1\2\0\0\0\0\x08\x08" + bytes(6)
_ENTRY_REST = bytes(12)
_ZIP64_END = struct.Struct("<4sQHHLLQQQQ 4sLQL")
_END = struct.Struct("<4sHHHHLLH")


def read_matrix(data: bytes) -> NDArray[Any] | None:
    """The matrix in the bytes of a `.pt` file, if the file is recognised.

    Returns:
        What `torch.load` would give, (T, F) and read-only; or None.
    """
    try:
        records = _records(data)
    except struct.error:
        # A field would lie beyond the end of the file.
        return None
    program = _PICKLE.fullmatch(records.pop(b"data.pkl", b""))
    if program is None:
        return None
    kind, key_size, key, *opcodes = program.groups()
    dtype = _DTYPES[kind]
    count, frames, n_mels, *strides = map(_integer, opcodes)
    numbers = records.pop(b"data/" + key, memoryview(b""))
    if not (
        key_size[0] == len(key)
        and min(frames, n_mels) > 0
        and strides == [n_mels, 1]
        and frames * n_mels == count
        and count * dtype.itemsize == len(numbers)
        and _are_usual(records)
    ):
        return None
    matrix: NDArray[Any] = np.frombuffer(numbers, dtype).reshape(frames, n_mels)
    return matrix


def _integer(opcode: bytes) -> int:
    return int.from_bytes(opcode[1:], "little", signed=opcode[:1] == b"J")


def _are_usual(settings: dict[bytes, memoryview]) -> bool:
    if _VERSION not in settings:
        return False
    return all(
        name in _SETTINGS and _SETTINGS[name].fullmatch(content)
        for name, content in settings.items()
    )


def _records(data: bytes) -> dict[bytes, memoryview]:
    """Content by name, if every byte of the file is as it should be; otherwise nothing."""
    count, start, end = _directory(data)
    found: dict[bytes, memoryview] = {}
    view, archive, reached, at = memoryview(data), b"", 0, start
    for _ in range(count):
        head, crc32, packed, size, name_size, rest, offset = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size + name_size
        name = data[at - name_size : at]
        if not found:
            archive = name[: name.find(b"/") + 1]
        head_size = _head_size(data, offset, name)
        begin = offset + head_size
        reached, before = begin + size + _DESCRIPTOR.size, reached
        short = name.removeprefix(archive)
        if not (
            (head, packed, rest, offset) == (_ENTRY_HEAD, size, _ENTRY_REST, before)
            and head_size > 0
            and data.startswith(_DESCRIPTOR.pack(b"PK\7\x08", crc32, size, size), begin + size)
            and zlib.crc32(view[begin : begin + size]) == crc32
            and short != name
            and short not in found
        ):
            return {}
        found[short] = view[begin : begin + size]
    whole = (reached, at) == (start, end) and _ARCHIVE.fullmatch(archive)
    return found if whole else {}


def _directory(data: bytes) -> tuple[int, int, int]:
    """Number of entries, begin and end of the directory; no entries if the end is not usual."""
    *_, count, size, start, _ = _END.unpack_from(data, max(len(data) - _END.size, 0))
    end = start + size
    tail = _ZIP64_END.pack(
        b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, size, start, b"PK\6\7", 0, end, 1
    ) + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)
    return (count, start, end) if data[end:] == tail else (0, 0, 0)


def _head_size(data: bytes, offset: int, name: bytes) -> int:
    """Bytes of what comes before a record's content; 0 if that is not usual."""
    padding = _LENGTHS.unpack_from(data, offset + len(_HEADER))[1]
    filler = _PADDING.pack(b"FB", padding - _PADDING.size).ljust(padding, b"Z")
    head = _HEADER + _LENGTHS.pack(len(name), padding) + name + filler
    return len(head) if data.startswith(head, offset) else 0
