"""The records of a zip file that `torch.save` wrote: uncompressed, each with its CRC-32."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

ZIP_MAGIC = b"PK\3\4"

# Far more than the file of a tensor has.
_MOST_RECORDS = 4_096

_END = struct.Struct("<4sHHHHLLH")
_ENTRY = struct.Struct("<4s6xH4xLLLHHH8xL")
_HEAD = struct.Struct("<4s22xHH")


class DamagedRecord(ValueError):
    """A record of a file does not match its CRC-32."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"is damaged: the CRC-32 of its record {name} is another; copy or make the file again"
        )


def read_records(data: bytes) -> dict[str, memoryview]:
    """The content of each record, by its name without the name of the archive.

    Raises:
        DamagedRecord: A content does not match its CRC-32.
        ValueError: The file is not a zip file, or `torch.save` would not write such a zip file.
    """
    found: dict[str, memoryview] = {}
    sums: dict[str, int] = {}
    for name, method, crc32, packed, size, offset in _entries(data):
        mark, name_size, extra = _unpack(_HEAD, data, offset)
        begin = offset + _HEAD.size + name_size + extra
        if mark != ZIP_MAGIC or begin + size > len(data):
            raise ValueError(f"its record {name} is cut off")
        if method or packed != size:
            raise ValueError(
                f"its record {name} is compressed, which torch.save never does; save it again"
            )
        short = name.partition("/")[2]
        if short in found:
            raise ValueError(f"it has the record {name} twice")
        found[short] = memoryview(data)[begin : begin + size]
        sums[name] = crc32
    # torch.save can be told not to compute checksums. It then writes zeros.
    if any(sums.values()):
        for (name, crc32), content in zip(sums.items(), found.values(), strict=True):
            if zlib.crc32(content) != crc32:
                raise DamagedRecord(name)
    return found


def record_names(data: bytes) -> list[str]:
    """The names of the records of any zip file. ValueError if its directory cannot be read."""
    return [name for name, *_ in _entries(data)]


def _entries(data: bytes) -> Iterator[tuple[str, int, int, int, int, int]]:
    """Name, method, CRC-32, stored size, size and place of each record of a zip file."""
    mark, *_, count, size, at, comment = _unpack(_END, data, max(len(data) - _END.size, 0))
    if mark != b"PK\5\6" or comment or at + size > len(data):
        raise ValueError("it is a zip file without an end")
    if count > _MOST_RECORDS:
        raise ValueError(f"it has {count} records, more than the file of a tensor")
    for _ in range(count):
        mark, method, *facts, name_size, extra, comment, offset = _unpack(_ENTRY, data, at)
        if mark != b"PK\1\2":
            raise ValueError("its directory is damaged")
        at += _ENTRY.size
        name = data[at : at + name_size].decode("utf-8", "backslashreplace")
        at += name_size + extra + comment
        yield name, method, *facts, offset


def _unpack(layout: struct.Struct, data: bytes, at: int) -> tuple[Any, ...]:
    if at + layout.size > len(data):
        raise ValueError("it is cut off")
    return layout.unpack_from(data, at)
