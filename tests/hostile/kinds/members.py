"""Members of shards: zstd and npy."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import zstandard
from forge import (
    N_MELS,
    edit_payload,
    zstd_frames,
)

from kinds.registry import Canary, kind


def frame(size: int, known: bool = True) -> bytes:
    """A small zstd frame of `size` zeros."""
    data = zstandard.ZstdCompressor(level=3, write_content_size=known)
    writer = data.compressobj(size if known else -1)
    parts = [writer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join(parts) + writer.flush()


@kind("zstd")
def zstd_bomb(folder: Path) -> None:
    """a zstd frame of 16 KB inflates to 500 MB"""
    edit_payload(folder, lambda data: frame(500 << 20) + data)


@kind("zstd")
def zstd_bomb_of_unknown_size(folder: Path) -> None:
    """a zstd frame that does not say its size inflates to 500 MB"""
    edit_payload(folder, lambda data: frame(500 << 20, known=False) + data)


@kind("zstd")
def zstd_chunk_bomb(folder: Path) -> None:
    """the chunk of a segment inflates to 500 MB"""

    def bomb(data: bytes) -> bytes:
        head, body = zstd_frames(33), frame(500 << 20)
        first = struct.unpack_from("<I", head, len(head) - 9 - 16)[0]
        table = struct.pack("<IIII", first, 128, len(body), 330)
        return head[:first] + body + table + struct.pack("<IBI", 2, 0, 0x8F92EAB1)

    edit_payload(folder, bomb)


@kind("zstd")
def zstd_window_of_2_gb(folder: Path) -> None:
    """a zstd frame asks for a window of 2 GB"""
    window = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x03\x00\x00z"
    edit_payload(folder, lambda data: window + data)


@kind("zstd")
def zstd_skippable_frame_lies(folder: Path) -> None:
    """a skippable zstd frame claims 4 GB"""
    edit_payload(folder, lambda data: struct.pack("<II", 0x184D2A50, 2**32 - 1) + data)


@kind("zstd")
def zstd_seek_table_lies(folder: Path) -> None:
    """the seek table of a member leads beyond its end"""
    edit_payload(folder, lambda data: data[:-17] + b"\xff\xff\xff\x7f" + data[-13:])


@kind("plain")
def npy_pickle(folder: Path) -> None:
    """a mel member is a pickled array that runs a command"""

    def pickled(data: bytes) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Canary()], object), allow_pickle=True)
        return buffer.getvalue().ljust(len(data), b"\0")[: len(data)]

    edit_payload(folder, pickled)


@kind("plain")
def npy_of_2_60_frames(folder: Path) -> None:
    """the npy header of a mel member claims 2^60 frames"""

    def huge(data: bytes) -> bytes:
        text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({2**60}, {N_MELS}), }}"
        return data[:10] + text.encode().ljust(117) + b"\n" + data[128:]

    edit_payload(folder, huge)


@kind("plain")
def npy_header_nested(folder: Path) -> None:
    """the npy header of a mel member is code, nested 100 deep"""
    code = b"__import__('os').system('touch canary')" + b"(" * 78
    edit_payload(folder, lambda data: data[:10] + code + b"\n" + data[128:])
