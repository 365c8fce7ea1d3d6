"""How a mel matrix becomes the bytes of a tar member and back, all of it or a range of frames.

`none` stores an ordinary `.npy` file. `zstd` stores the same file as independent zstd frames: one
for the 128-byte npy header, then one for every `chunk_frames` mel frames, then a seek table in a
skippable frame, as in the zstd seekable format (facebook/zstd, contrib/seekable_format, 0.1.0).
Any zstd reader that reads across frames inflates all of it; a segment inflates only the chunks that
it has a part of.
"""

from __future__ import annotations

import io
import math
import struct
import threading
import tokenize
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError
from shardprep.format.limits import most_matrix_bytes
from shardprep.format.manifest import CodecInfo

NPY_HEADER_BYTES = 128
# The longest npy header that is read; ours has 128 bytes.
_MOST_HEADER_BYTES = 1 << 14
# A zstd frame names the memory that its reader needs, its window. Every reader must grant the
# first; the second is the most that zstd grants by default.
_USUAL_WINDOW_BYTES = 8 << 20
_MOST_WINDOW_BYTES = 128 << 20
_PIECE_BYTES = 1 << 20

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_FOOTER_BYTES = 9
ENTRY_BYTES = 8

# What NumPy raises for a faulty header, which it reads with Python's own parser.
NPY_FAULTS = (
    ValueError,
    SyntaxError,
    TypeError,
    EOFError,
    MemoryError,
    OverflowError,
    RecursionError,
    tokenize.TokenError,
)

_local = threading.local()


def member_suffix(codec: CodecInfo) -> str:
    """The end of a mel member's name, after the key."""
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


def decode(data: bytes | memoryview, codec: CodecInfo, most: int | None = None) -> NDArray[Any]:
    """Decode a member's payload to its (T, F) matrix.

    Args:
        data: The payload.
        codec: How it is stored.
        most: Most bytes of the matrix; by default `limits.most_matrix_bytes` of the payload.

    Raises:
        ValueError: The payload is not what `encode` writes, or the matrix is larger.
    """
    most = most_matrix_bytes(len(data)) if most is None else most
    if codec.name == "zstd":
        return _parse_npy(_inflate(data, most + _MOST_HEADER_BYTES), most)
    return _parse_npy(data, most)


def decode_npy(name: str, data: bytes) -> NDArray[Any] | None:
    """Decode a mel member for other readers: a handler for `webdataset.WebDataset(...).decode`.

        webdataset.WebDataset("shards/train-000000.tar").decode(shardprep.decode_npy)

    Nothing is unpickled, and a member that would fill the memory is refused.

    Args:
        name: Name of the member, or its extension: .mel.npy, .mel.npy.zst.
        data: Its bytes.

    Returns:
        The matrix (T, F) as stored; None for members of other names. Of element type uint8 these
        are whole numbers q, and the mel is minimum + step * q, with both from the JSON member.

    Raises:
        CorruptShardError: The member is damaged, or is no matrix of numbers.
    """
    for suffix, codec in ((".npy", CodecInfo("none")), (".npy.zst", CodecInfo("zstd"))):
        if f".{name}".lower().endswith(suffix):
            try:
                return decode(data, codec)
            except ValueError as error:
                what = f"the member cannot be decoded: {error}"[:300]
                raise CorruptShardError(what, key=name, remedy=REPAIR) from None
    return None


def _inflate(data: bytes | memoryview, most: int) -> bytearray:
    # Memory for the window that a frame asks for is taken before its content is known.
    window = min(max(most, _USUAL_WINDOW_BYTES), _MOST_WINDOW_BYTES)
    plain = bytearray()
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=window)
        reader = decompressor.stream_reader(data, read_across_frames=True)
        # A read takes memory for all that it asks for; mels shrink to no less than half.
        while part := reader.read(min(2 * len(data) + _MOST_HEADER_BYTES, _PIECE_BYTES)):
            plain += part
            if len(plain) > most:
                raise ValueError(f"it inflates to more than {most} bytes")
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return plain


def _parse_npy(data: bytes | bytearray | memoryview, most: int) -> NDArray[Any]:
    """The matrix of an npy file of format 1 or 2, in memory of its own."""
    file = io.BytesIO(data[:_MOST_HEADER_BYTES])
    try:
        shape, fortran, dtype = read_npy_header(file)
    except NPY_FAULTS as error:
        raise ValueError(f"its npy header is damaged ({error})") from None
    if dtype.kind not in "fiu" or dtype.subdtype is not None:
        raise ValueError(f"its npy header says {dtype}, not numbers; nothing is ever unpickled")
    if fortran or len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"its npy header says {shape}, not a matrix in C order")
    size, begin = math.prod(shape) * dtype.itemsize, file.tell()
    if size > most:
        raise ValueError(f"its npy header says {shape}, more than {most} bytes")
    if begin + size != len(data):
        raise ValueError(f"{len(data) - begin} bytes follow its npy header, expected {size}")
    matrix: NDArray[Any] = np.frombuffer(data, dtype, offset=begin).reshape(shape)
    own = isinstance(data, bytearray) and matrix.flags.aligned
    return matrix if own else matrix.copy()


def read_npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and dtype of an npy file of format 1 or 2.

    The file then stands where the numbers begin. For a faulty header, NumPy raises NPY_FAULTS.
    """
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The npy 1.0 header of a C-ordered array, padded to NPY_HEADER_BYTES.

    NumPy writes the same bytes today. They are written here so that a later NumPy cannot change
    where the matrix begins.
    """
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    fields = "".join(f"{name!r}: {value!r}, " for name, value in sorted(head.items()))
    room = NPY_HEADER_BYTES - len(b"\x93NUMPY\x01\x00") - 2
    text = "{" + fields + "}"
    assert len(text) < room
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", room) + text.ljust(room - 1).encode() + b"\n"


def table_bytes_from_end(frames: NDArray[np.int64], chunk_frames: int) -> NDArray[np.int64]:
    """How many bytes before the end of its member each utterance's seek table begins (B,).

    Entry 0 of the table is the npy header, and chunk c is entry c + 1. The first four bytes of
    each entry are the size of its zstd frame.

    Args:
        frames: Lengths of the utterances (B,), in mel frames.
        chunk_frames: Mel frames a chunk.
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
    """Inflate independent zstd frames in one call, during which other threads can run.

    Args:
        source: Bytes that hold the frames.
        at: Where each frame begins (N,).
        nbytes: Its size there (N,).
        inflated: Its size when it is inflated (N,).
        threads: Threads that share the work.

    Returns:
        The inflated frames as buffers.

    Raises:
        ValueError: A frame is damaged, or has another size.
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


def inflate_joined(
    source: NDArray[np.uint8],
    at: NDArray[np.int64],
    nbytes: NDArray[np.int64],
    inflated: NDArray[np.int64],
) -> memoryview:
    """Inflate independent zstd frames as `inflate_many` does, one after another in memory.

    Args:
        source: Bytes that hold the frames.
        at: Where each frame begins (N,).
        nbytes: Its size there (N,).
        inflated: Its size when it is inflated (N,).

    Returns:
        All inflated bytes.

    Raises:
        ValueError: A frame is damaged, or has another size.
    """
    chunks = inflate_many(source, at, nbytes, inflated)
    total = int(inflated.sum())
    # The library fills one piece of memory after another, nearly always one only. In that one, the
    # offset of a chunk is the size of all before it.
    if len(chunks) and chunks[-1].offset + len(chunks[-1]) == total:
        interface = np.frombuffer(chunks[0], np.uint8).__array_interface__
        return np.asarray(_Memory({**interface, "shape": (total,)}, chunks[0])).data
    return memoryview(b"".join(chunks))


class _Memory:
    """Memory, for NumPy, that its owner keeps."""

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner


def _seek_table(packed: list[bytes], plain: list[bytes]) -> bytes:
    entries = b"".join(
        struct.pack("<II", len(small), len(large))
        for small, large in zip(packed, plain, strict=True)
    )
    footer = struct.pack("<IBI", len(packed), 0, _SEEKABLE_MAGIC)
    return struct.pack("<II", _SKIPPABLE_MAGIC, len(entries) + len(footer)) + entries + footer
