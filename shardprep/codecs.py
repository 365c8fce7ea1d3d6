"""How a mel matrix becomes the bytes of a tar member and back, whole or by a range of frames.

`none` stores an ordinary `.npy` file. `zstd` stores the same file as independent zstd frames: one
for the 128-byte npy header, then one for every `chunk_frames` mel frames, then a seek table in a
skippable frame, as in the zstd seekable format (facebook/zstd, contrib/seekable_format, 0.1.0).
Any zstd reader that reads on across frames inflates the whole; a crop inflates what it touches.
"""

from __future__ import annotations

import io
import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shardprep.format import CodecInfo

NPY_HEADER_BYTES = 128

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_FOOTER_BYTES = 9
_ENTRY_BYTES = 8

_local = threading.local()


def member_suffix(codec: CodecInfo) -> str:
    """What follows the key in the name of a mel member."""
    return ".mel.npy.zst" if codec.name == "zstd" else ".mel.npy"


def encode(mel: NDArray[Any], codec: CodecInfo) -> bytes:
    """Encode a C-contiguous (T, F) matrix as the payload of its tar member."""
    header, body = npy_header(mel.shape, mel.dtype), mel.tobytes()
    if codec.name == "none":
        return header + body
    assert codec.level is not None
    assert codec.chunk_frames is not None
    step = codec.chunk_frames * mel.shape[1] * mel.itemsize
    compressor = zstandard.ZstdCompressor(level=codec.level, write_checksum=True)
    plain = [header, *(body[at : at + step] for at in range(0, len(body), step))]
    packed = [compressor.compress(part) for part in plain]
    return b"".join(packed) + _seek_table(packed, plain)


def decode(data: bytes | memoryview, codec: CodecInfo) -> NDArray[Any]:
    """Decode a member's payload to its (T, F) matrix.

    Raises:
        ValueError: The payload is not what `encode` writes.
    """
    if codec.name == "zstd":
        try:
            reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
            data = reader.read()
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
    matrix: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return matrix


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The npy 1.0 header of a C-ordered array, padded to NPY_HEADER_BYTES.

    NumPy writes the same bytes today; they are spelled out so that a later NumPy cannot change
    where the matrix begins.
    """
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    fields = "".join(f"{name!r}: {value!r}, " for name, value in sorted(head.items()))
    room = NPY_HEADER_BYTES - len(b"\x93NUMPY\x01\x00") - 2
    text = "{" + fields + "}"
    assert len(text) < room
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n"


def chunk_spans(
    table: bytes | memoryview, first: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the zstd frames of chunks first..last (inclusive) lie within their member.

    Args:
        table: The entries of the member's seek table; see `seek_table_bytes`.
        first: First chunk of mel frames, from 0.
        last: Last chunk of mel frames.

    Returns:
        Begin and end offsets in bytes, each (last - first + 1,).
    """
    sizes = np.frombuffer(table, "<u4")[::2]
    ends = np.cumsum(sizes, dtype=np.int64)
    # Entry 0 is the npy header, so that chunk c begins where entry c ends.
    return ends[first : last + 1], ends[first + 1 : last + 2]


def seek_table_bytes(frames: int, chunk_frames: int) -> int:
    """Bytes of the seek table's entries for an utterance; they end 9 bytes before the member."""
    return _ENTRY_BYTES * (1 + -(-frames // chunk_frames))


def seek_table_at(member: memoryview, frames: int, chunk_frames: int) -> memoryview:
    """The entries of the seek table at the end of a member."""
    end = len(member) - _FOOTER_BYTES
    return member[end - seek_table_bytes(frames, chunk_frames) : end]


def inflate_many(parts: list[memoryview]) -> list[memoryview]:
    """Inflate independent zstd frames, all in one call.

    Raises:
        ValueError: One of them is damaged.
    """
    if not parts:
        return []
    if not hasattr(_local, "decompressor"):
        # Not safe to share between threads.
        _local.decompressor = zstandard.ZstdDecompressor()
    try:
        inflated = _local.decompressor.multi_decompress_to_buffer(parts)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return [memoryview(inflated[i]) for i in range(len(parts))]


def _seek_table(packed: list[bytes], plain: list[bytes]) -> bytes:
    entries = b"".join(
        struct.pack("<II", len(small), len(large))
        for small, large in zip(packed, plain, strict=True)
    )
    footer = struct.pack("<IBI", len(packed), 0, _SEEKABLE_MAGIC)
    return struct.pack("<II", _SKIPPABLE_MAGIC, len(entries) + len(footer)) + entries + footer
