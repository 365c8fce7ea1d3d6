"""Walks a tar that any program wrote, and splits its names into keys and extensions.

Such tars have headers of PAX and GNU, links and devices. `tarfile` reads them too, but takes memory
for whatever an extended header or a sparse file claims, and nests calls for headers of headers.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from shardprep.format.limits import MAX_TAR_HEADER_BYTES

# The bytes of a tar from a place on; fewer where the file ends.
ReadAt = Callable[[int, int], bytes]

_BLOCK = tarfile.BLOCKSIZE
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# As tarfile, which every reader of WebDataset uses, decides it: other types have no content.
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
# As webdataset does it: folders stay in the key, and the extension begins at the first dot.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
# No writer nests them deeper: a long name, a long link, PAX.
_MOST_HEADERS = 8
_PIECE = 1 << 20


class ForeignMember(NamedTuple):
    """A member of a tar.

    Attributes:
        name: Its name; bytes that are not UTF-8 are surrogates.
        offset: Where its content begins, in bytes of the tar.
        size: Size of its content in bytes.
        is_plain: Whether it is a file with content, not a link, a folder or a device.
    """

    name: str
    offset: int
    size: int
    is_plain: bool


class _Header(NamedTuple):
    """What a block of 512 bytes says before a member or an extended header."""

    type: bytes
    name: str
    size: int


def reader_of(file: io.BufferedReader) -> ReadAt:
    """Reads a tar that is open."""

    def read_at(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read_at


def pieces(read_at: ReadAt, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a tar from one place to another, at most 1 MiB at a time."""
    for at in range(begin, end, _PIECE):
        yield read_at(at, min(_PIECE, end - at))


def key_and_extension(name: str) -> tuple[str, str] | None:
    """The key of a member and its extension in lower case; None where readers pass over it."""
    found = _NAME.fullmatch(name)
    return None if found is None or _META.match(name) else (found[1], found[2].lower())


def walk_foreign(read_at: ReadAt, total: int) -> Iterator[ForeignMember]:
    """The members of a tar, in order, to the end of the archive.

    Args:
        read_at: Reads the tar; it is asked for places in ascending order.
        total: Size of the tar in bytes.

    Raises:
        tarfile.ReadError: While iterating: the file is no complete tar, has a sparse file, or has
            an extended header beyond the limits.
    """
    at = 0
    while at < total:
        said: dict[str, str] = {}
        for _ in range(_MOST_HEADERS):
            found = _header(read_at, at)
            if found is None:
                return
            at += _BLOCK
            if found.type not in _EXTENDED:
                break
            if not 0 <= found.size <= MAX_TAR_HEADER_BYTES:
                raise tarfile.ReadError(f"the extended header before byte {at} is too large")
            said |= _said(found, read_at(at, found.size))
            at += _padded(found.size)
        else:
            raise tarfile.ReadError(f"too many extended headers lie before byte {at}")
        member = _member(found, said, at, total)
        yield member
        at += _padded(member.size)
    raise tarfile.ReadError(
        "it ends without an end-of-archive block, as where its writer was killed; if it is "
        "complete, append 1,024 zero bytes"
    )


def _said(header: _Header, data: bytes) -> dict[str, str]:
    """What an extended header says of the next member: its path and size, where it does."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.split(b"\0")[0])}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    fields = _pax_fields(data)
    if header.type == tarfile.XGLTYPE and fields:
        raise tarfile.ReadError("a global header gives all members a name or a size")
    return fields


def _member(found: _Header, said: dict[str, str], at: int, total: int) -> ForeignMember:
    """The member of a header; `said` is what extended headers say of it."""
    name = said.get("path", found.name)
    if found.type == tarfile.DIRTYPE:
        name = name.rstrip("/")
    if found.type == tarfile.GNUTYPE_SPARSE:
        raise tarfile.ReadError(f"{name[:100]!a} is a sparse file")
    try:
        length = int(said.get("size", found.size))
    except ValueError:
        raise tarfile.ReadError(f"{name[:100]!a} has a size that is no number") from None
    if found.type in _WITHOUT_CONTENT:
        length = 0
    if not 0 <= length <= total - at:
        raise tarfile.ReadError(f"{name[:100]!a} reaches beyond the end of the tar")
    return ForeignMember(name, at, length, found.type in _PLAIN)


def _header(read_at: ReadAt, at: int) -> _Header | None:
    """The header at a place; None for the end of the archive.

    `tarfile.TarInfo` would read all its fields, in several times the time.
    """
    head = read_at(at, _BLOCK)
    if len(head) < _BLOCK:
        raise tarfile.ReadError("it ends within a header")
    if head == bytes(_BLOCK):
        return None
    try:
        if sum(head) - sum(head[148:156]) + 8 * ord(" ") != _number(head[148:156]):
            raise ValueError("its checksum is another")
        kind, size = head[156:157], _number(head[124:136])
    except ValueError as error:
        raise tarfile.ReadError(f"the header at byte {at} is damaged ({error})") from None
    name, prefix = (_text(head[a:b].split(b"\0", 1)[0]) for a, b in ((0, 100), (345, 500)))
    if kind == tarfile.AREGTYPE and name.endswith("/"):
        kind = tarfile.DIRTYPE
    if prefix and kind not in tarfile.GNU_TYPES:
        name = f"{prefix}/{name}"
    return _Header(kind, name, size)


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or in base 256 after a byte that says so."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:]) - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax_fields(data: bytes) -> dict[str, str]:
    """What a PAX header says of name and size. ReadError if it is damaged or of a sparse file."""
    fields, at = {}, 0
    while at < len(data) and data[at]:
        digits, _, rest = data[at : at + 20].partition(b" ")
        end = at + int(digits) if digits.isdigit() and rest else at
        key, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise tarfile.ReadError("a PAX header is damaged")
        if key.startswith(b"GNU.sparse."):
            raise tarfile.ReadError("it has a sparse file")
        if key in (b"path", b"size"):
            fields[key.decode()] = _text(value.rstrip(b"/"))
        at = end
    return fields


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
