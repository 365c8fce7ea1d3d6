"""Walks the members of a shard by their headers, and knows no members but plain files.

`tarfile` also follows extended headers, sparse files and links, whose sizes and places are claims
that cost memory or lead elsewhere. A shard has none of them.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from shardprep.storage.local import read_bytes

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


class Member(NamedTuple):
    """A plain file in a shard: its name, and where its content lies in bytes of the shard."""

    name: str
    offset: int
    size: int


def walk(file: io.FileIO, at: int = 0) -> Iterator[Member]:
    """The members of a shard from the header at byte `at` up to its end, each within the file.

    Raises:
        tarfile.ReadError: While iterating: it is no whole tar of plain files.
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


def content(file: io.FileIO, member: Member, most: int) -> bytes:
    """The bytes of a member.

    Raises:
        tarfile.ReadError: It has more than `most`.
    """
    if member.size > most:
        raise tarfile.ReadError(
            f"{member.name[:100]!a} has {member.size} bytes, expected at most {most}"
        )
    file.seek(member.offset)
    return read_bytes(file, member.size)


def _head(file: io.FileIO, at: int) -> bytes:
    file.seek(at)
    head = read_bytes(file, tarfile.BLOCKSIZE)
    if len(head) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without an end-of-archive block")
    return head
