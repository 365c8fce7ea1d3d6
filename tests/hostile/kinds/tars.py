"""Shards as tars."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge import (
    holes,
    pipe,
    sign,
    write_tar,
)

from kinds.registry import GB, kind, register


def member(**values: Any) -> Callable[[tarfile.TarInfo, int], None]:
    def change(info: tarfile.TarInfo, number: int) -> None:
        if number == 1:
            for name, value in values.items():
                setattr(info, name, value)

    return change


def tar(name: str, sentence: str, /, **values: Any) -> None:
    register(name, sentence, lambda folder: write_tar(folder, member(**values)))


tar(
    "tar_symbolic_link",
    "a member of a shard is a symbolic link to ../outside/secret",
    type=b"2",
    linkname="../outside/secret",
    size=0,
)
tar(
    "tar_hard_link",
    "a member of a shard is a hard link to /etc/passwd",
    type=b"1",
    linkname="/etc/passwd",
    size=0,
)
tar(
    "tar_device",
    "a member of a shard is the device /dev/zero",
    type=b"3",
    devmajor=1,
    devminor=5,
    size=0,
)
tar("tar_parent_folder", "a member of a shard is named ../outside/secret", name="../outside/secret")
tar("tar_absolute_name", "a member of a shard is named /tmp/canary", name="/tmp/canary.json")
tar("tar_size_beyond_64_bits", "a member of a shard claims 2^70 bytes, in base 256", size=2**70)
tar("tar_negative_size", "a member of a shard claims -1 bytes", size=-(2**40))


@kind("plain")
def tar_sparse(folder: Path) -> None:
    """a member of a shard is a GNU sparse file of 10 GB"""

    def change(info: tarfile.TarInfo, number: int) -> bytes:
        if number != 1:
            return b""
        # Its map of the old GNU kind: one piece of 1 byte, and a real size of 10 GB.
        head = bytearray(tarfile.TarInfo("sparse.json").tobuf(tarfile.GNU_FORMAT))
        head[156:157] = b"S"
        head[386:410] = b"%011o\0%011o\0" % (0, 0)
        head[483:495] = b"\x80" + (10 * GB).to_bytes(11, "big")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        return bytes(head)

    write_tar(folder, change)


def long_header(name: str, sentence: str, title: str, kind_of_header: bytes) -> None:
    """Register a shard with a header of 400 MB for the member that follows."""

    def change(info: tarfile.TarInfo, number: int) -> bytes:
        if number != 1:
            return b""
        head = tarfile.TarInfo(title)
        head.type, head.size = kind_of_header, 400 << 20
        return head.tobuf(tarfile.GNU_FORMAT)

    def make(folder: Path) -> None:
        write_tar(folder, change)
        holes(folder / "test-000000.tar", 600 << 20)
        sign(folder)

    register(name, sentence, make)


long_header("tar_extended_header", "a shard has an extended (pax) header of 400 MB", "pax", b"x")
long_header("tar_long_name", "a shard has a member name of 400 MB", "././@LongLink", b"L")


@kind("plain")
def tar_gzip_bomb(folder: Path) -> None:
    """a shard is a gzip bomb"""
    (folder / "test-000000.tar").write_bytes(gzip.compress(bytes(300 << 20), 1))
    sign(folder)


@kind("plain")
def tar_json_of_500_mb(folder: Path) -> None:
    """a .json member has 500 MB, all holes"""
    write_tar(folder, member(size=500 << 20))
    holes(folder / "test-000000.tar", 600 << 20)
    sign(folder)


@kind("plain")
def shard_pipe(folder: Path) -> None:
    """a shard is a named pipe"""
    pipe(folder / "test-000000.tar")


@kind("plain")
def shard_folder(folder: Path) -> None:
    """a shard is a folder"""
    (folder / "test-000000.tar").unlink()
    (folder / "test-000000.tar").mkdir()
