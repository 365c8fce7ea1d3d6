"""Checks that a file is what `torch.save` writes of plain values and tensors, and no trap.

Checked before `torch.load(weights_only=True)` reads a checkpoint, which may come from a stranger.
PyTorch runs no code of a file. What it does not do is here: it compares no checksums, inflates
compressed records, and makes a bytearray of any size, or copies of one dict, that a file asks for.
A file that passes takes memory in proportion to its size. Faults of the container, as a torn or
flipped byte makes them, are `zipfile.BadZipFile`; contents that no checkpoint has are
`pickle.UnpicklingError`.
"""

from __future__ import annotations

import pickletools
import re
import struct
import warnings
import zipfile
from pickle import UnpicklingError
from typing import Any, BinaryIO

from torch import Tensor

# Bounds on what reading takes: some 70,000 tensors, or half a million speakers.
_DIRECTORY_BYTES = 2**22
_PICKLE_BYTES = 2**24
_PICKLE_OPERATIONS = 2**21
_DEPTH = 16

_FIRST = b"PK\x03\x04"
_RECORD = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]+)"
)
# What the pickle may name. PyTorch's own list is longer: it has bytearray.
_GLOBAL = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
# What a checkpoint never has, but PyTorch makes: an OrderedDict without a call, and a set.
_UNUSED = {"NEWOBJ", "EMPTY_SET"}
# What may be used again: a file that copies a container often takes the memory of all the copies.
_SHARED = {"GLOBAL", "BINUNICODE"}
_PUT = {"BINPUT", "LONG_BINPUT"}
_GET = {"BINGET", "LONG_BINGET"}


def vet(file: BinaryIO) -> None:
    """Look through a checkpoint's bytes; leaves the file at its beginning.

    Args:
        file: Opened for reading; all of it is read, in small pieces.

    Raises:
        zipfile.BadZipFile: It is damaged, or its container is not as `torch.save` writes it.
        pickle.UnpicklingError: It names or does something that no checkpoint needs.
    """
    size = file.seek(0, 2)
    count = _count_records(file, size)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        _check_records(records, size)
        if len(records) != count:
            raise zipfile.BadZipFile(f"{len(records)} records found, {count} expected")
        # PyTorch writes checksums but does not compare them when it reads.
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles)} records data.pkl found, 1 expected")
        if pickles[0].file_size > _PICKLE_BYTES:
            raise UnpicklingError(f"its values take {pickles[0].file_size:,} bytes")
        _check_pickle(archive.read(pickles[0]), len(records))
    file.seek(0)


def _count_records(file: BinaryIO, size: int) -> int:
    """How many records the end of the file announces, before anyone reads its directory."""
    file.seek(0)
    first = file.read(len(_FIRST))
    file.seek(max(0, size - 98))
    # The large end record (56 bytes), its locator (20) and the plain end record (22).
    tail = file.read(98).rjust(98, b"\0")
    count, length, start, comment = struct.unpack("<10xHIIH", tail[76:])
    ends = size - 22
    if tail[56:60] == b"PK\x06\x07":
        (ends,) = struct.unpack("<8xQ4x", tail[56:76])
        count, length, start = struct.unpack("<32xQQQ", tail[:56])
        if ends != size - 98 or tail[:4] != b"PK\x06\x06":
            raise zipfile.BadZipFile("its last bytes are not the end of a checkpoint")
    if first != _FIRST or tail[76:80] != b"PK\x05\x06" or comment or start + length != ends:
        raise zipfile.BadZipFile("its last bytes are not the end of a checkpoint")
    if length > _DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its directory takes {length:,} bytes")
    return int(count)


def _check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    """Every record is stored as it is, once, under a name of `torch.save`."""
    names = {record.orig_filename for record in records}
    roots = {name.split("/")[0] for name in names}
    if len(names) != len(records) or len(roots) != 1:
        raise zipfile.BadZipFile("its records are not those of one checkpoint")
    for record in records:
        if not _RECORD.fullmatch(record.orig_filename):
            raise zipfile.BadZipFile(f"it has a record {record.orig_filename[:80]!r}")
        stored = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1
        if not stored or record.compress_size != record.file_size:
            raise zipfile.BadZipFile(f"{record.filename} is compressed")
    if sum(record.file_size for record in records) > size:
        raise zipfile.BadZipFile("its records overlap")


def _check_pickle(data: bytes, records: int) -> None:
    """Only plain values, and calls that put together about as many tensors as there are records."""
    calls, before, shared = 0, "", set[object]()
    with warnings.catch_warnings():
        # Python warns of escapes in strings that no checkpoint has.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if opcode.name == "GLOBAL" and not _GLOBAL.fullmatch(str(argument)):
                    raise UnpicklingError(f"it names {str(argument)[:80].replace(' ', '.')}")
                if opcode.name in _UNUSED:
                    raise UnpicklingError(f"its values are made by {opcode.name}")
                if opcode.name in _PUT:
                    (shared.add if before in _SHARED else shared.discard)(argument)
                if opcode.name in _GET and argument not in shared:
                    raise UnpicklingError("a value other than text lies in several places")
                calls += opcode.name == "REDUCE"
                if calls > 4 * records + 64 or number > _PICKLE_OPERATIONS:
                    raise UnpicklingError("it makes more values than its size allows")
                before = opcode.name
        except ValueError as error:
            raise UnpicklingError(str(error)) from error


def check_values(state: object) -> None:
    """Make sure that what was read is plain, and no larger when walked through than in memory.

    Raises:
        pickle.UnpicklingError: A value is of another kind, a tensor claims more than its bytes,
            or a container lies in several places, or in itself.
    """
    seen: set[int] = set()
    level: list[Any] = [state]
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise UnpicklingError("a tensor is larger than its bytes")
            elif isinstance(value, dict | list | tuple):
                if value and id(value) in seen:
                    raise UnpicklingError("a container lies in several places")
                seen.add(id(value))
                inner += [*value.keys(), *value.values()] if isinstance(value, dict) else value
            elif not isinstance(value, str | int | float | None):
                raise UnpicklingError(f"a value is a {type(value).__name__}")
        if not inner:
            return
        level = inner
    raise UnpicklingError(f"its values lie more than {_DEPTH} deep")
