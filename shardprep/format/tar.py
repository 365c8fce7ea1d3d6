"""Writes and reads the tar of a shard, whose members are plain files only.

`tarfile` also follows extended headers, sparse files and links. These may claim sizes that take
much memory, or lead elsewhere. A shard has none of them.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
# Two empty blocks end a tar; `tar` pads a file to records of 20 blocks.
RECORD = tarfile.RECORDSIZE

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
# The header of a member without name and content, and where its name, size and checksum go. The
# checksum is the sum of the header's bytes, with spaces in its own place.
_HEAD = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)
_HEAD_SUM = sum(_HEAD) - sum(_HEAD[148:156]) + 8 * ord(" ") - sum(_HEAD[_SIZE])


class Member(NamedTuple):
    """A plain file in a shard.

    Attributes:
        name: Its name.
        offset: Where its content begins, in bytes of the shard.
        size: Size of its content in bytes.
    """

    name: str
    offset: int
    size: int


def walk(file: io.BufferedReader, at: int = 0) -> Iterator[Member]:
    """The members of a shard, from the header at byte `at` to the end of the archive.

    Raises:
        tarfile.ReadError: While iterating: the file is not a complete tar of plain files.
    """
    total = os.fstat(file.fileno()).st_size
    while (head := _head(file, at)) != bytes(tarfile.BLOCKSIZE):
        try:
            found = tarfile.TarInfo.frombuf(head, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise tarfile.ReadError(f"the header at byte {at} is damaged ({error})") from None
        at += tarfile.BLOCKSIZE
        if found.type not in _PLAIN:
            raise tarfile.ReadError(f"{found.name[:100]!a} is not a plain file")
        if not 0 <= found.size <= total - at:
            raise tarfile.ReadError(f"{found.name[:100]!a} reaches beyond the end")
        yield Member(found.name, at, found.size)
        at += -(-found.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def content(file: io.BufferedReader, member: Member, most: int) -> bytes:
    """The bytes of a member.

    Raises:
        tarfile.ReadError: The member has more than `most` bytes.
    """
    if member.size > most:
        raise tarfile.ReadError(
            f"{member.name[:100]!a} has {member.size} bytes, expected at most {most}"
        )
    file.seek(member.offset)
    return file.read(member.size)


def _head(file: io.BufferedReader, at: int) -> bytes:
    file.seek(at)
    head = file.read(tarfile.BLOCKSIZE)
    if len(head) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end-of-archive block")
    return head


def _member_head(name: bytes, size: int) -> bytearray:
    """The header that `tarfile` writes for a member, in a fraction of the time."""
    assert len(name) <= 100
    assert size < 8**11
    digits = b"%011o" % size
    head = bytearray(_HEAD)
    head[_NAME] = name.ljust(100, b"\0")
    head[_SIZE] = digits
    head[_CHECKSUM] = b"%06o" % (_HEAD_SUM + sum(name) + sum(digits))
    return head


class TarWriter:
    """Appends members to a ustar archive; counts and hashes what it writes.

    Args:
        file: Opened for writing.

    Attributes:
        size: Bytes written so far.
        sha256: Hash of them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, payload: bytes) -> int:
        """Append a member; returns the offset of its payload."""
        self._write(_member_head(name.encode(), len(payload)))
        offset = self.size
        self._write(payload)
        self._write(bytes(-len(payload) % BLOCK))
        return offset

    def close(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % RECORD))

    def _write(self, data: bytes | bytearray) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
