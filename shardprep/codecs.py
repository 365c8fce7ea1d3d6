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
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shardprep.format import CodecInfo

NPY_HEADER_BYTES = 128

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_FOOTER_BYTES = 9
ENTRY_BYTES = 8

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


def table_bytes_from_end(frames: NDArray[np.int64], chunk_frames: int) -> NDArray[np.int64]:
    """How many bytes before the end of its member an utterance's seek table begins, (B,).

    Entry 0 of the table is the npy header, so that chunk c is entry c + 1; the first four bytes
    of each entry are the size of its zstd frame.
    """
    distance: NDArray[np.int64] = _FOOTER_BYTES + ENTRY_BYTES * (1 + -(-frames // chunk_frames))
    return distance


def inflate_many(
    source: NDArray[np.uint8],
    at: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    inflated: NDArray[np.int64],
    threads: int = 1,
) -> Sequence[Any]:
    """Inflate independent zstd frames, all in one call that lets other threads run.

    Args:
        source: Bytes that hold the frames.
        at: Where each frame begins (N,).
        nbytes: Its size there (N,).
        inflated: Its size once inflated (N,).
        threads: Threads that share the work.

    Returns:
        The inflated frames as buffers.

    Raises:
        ValueError: One of them is damaged, or of another size.
    """
    if not len(at):
        return ()
    if not hasattr(_local, "decompressor"):
        # Not safe to share between threads.
        _local.decompressor = zstandard.ZstdDecompressor()
    segments = np.stack([at, nbytes], 1).astype("<u8").tobytes()
    try:
        frames = zstandard.BufferWithSegments(source.data, segments)
        chunks: Sequence[Any] = _local.decompressor.multi_decompress_to_buffer(
            frames, decompressed_sizes=inflated.astype("<u8").tobytes(), threads=threads
        )
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return chunks


def _seek_table(packed: list[bytes], plain: list[bytes]) -> bytes:
    entries = b"".join(
        struct.pack("<II", len(small), len(large))
        for small, large in zip(packed, plain, strict=True)
    )
    footer = struct.pack("<IBI", len(packed), 0, _SEEKABLE_MAGIC)
    return struct.pack("<II", _SKIPPABLE_MAGIC, len(entries) + len(footer)) + entries + footer
