"""The index of a split: its rows, written by a build and checked by readers.

Readers take the columns only if no row leads outside the shards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.format import codecs
from shardprep.format.limits import MAX_INFLATION, SMALL_MATRIX_BYTES
from shardprep.format.manifest import Manifest, SplitInfo
from shardprep.format.quantised import Scale, are_scales

NO_LABEL = -1
# A member's name, the key and ".mel.npy.zst", has at most the 100 bytes of a tar header.
MAX_KEY_BYTES = 88
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Index rows that are checked at a time.
_BLOCK = 1 << 18


def index_dtype(key_bytes: int, *, quantised: bool = False) -> np.dtype[Any]:
    """Dtype of an index row; see FORMAT.md for the meaning of its fields.

    Args:
        key_bytes: Bytes of the longest key.
        quantised: Whether the element type is uint8, and each row has a scale.
    """
    scale = [("minimum", "<f4"), ("step", "<f4")] if quantised else []
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("nbytes", "<u4"),
            ("frames", "<u4"),
            ("label", "<i4"),
            ("crc32", "<u4"),
            *scale,
            ("key", f"S{key_bytes}"),
        ]
    )


def key_fault(key: str, suffix: str | None = ".pt") -> str | None:
    """Why a key cannot name an utterance in a tar, with a remedy; None if it can.

    The rules are those of the readers: `webdataset` and `datasets` cut a name at the first dot
    after its last slash, and skip some names that begin with two underscores.

    Args:
        key: The key.
        suffix: What follows the key in the name of its file; None if the key is no name of a file.
    """
    folder, _, name = key.rpartition("/")
    first = folder.partition("/")[0]
    noun, rename = ("file name", "rename it") if suffix else ("key", "write another")
    if not name:
        return f"the file has no name before {suffix}" if suffix else "the key ends in no name"
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return f"the {noun} is not valid Unicode"
    if _CONTROL.search(key):
        where, remedy = ("path", "rename the file") if suffix else ("key", rename)
        return f"the {where} has control characters; {remedy}"
    if "." in name:
        where = f"a dot before {suffix}" if suffix else "a dot"
        return (
            f"the {noun} has {where}, where readers of tar files cut it; {rename}, "
            f"such as {'to ' if suffix else f'{folder}/' * bool(folder)}{name.replace('.', '-')}"
            f"{suffix or ''}"
        )
    if name.startswith("__"):
        return (
            f'the {noun} begins with "__", and Hugging Face datasets skips such files in a tar; '
            f"{rename}"
        )
    if first.startswith("__") and first.endswith("__"):
        return (
            f'the folder {first} begins and ends with "__", and webdataset skips such folders; '
            f"{rename}"
        )
    if size > MAX_KEY_BYTES:
        what = f"path without {suffix}" if suffix else "key"
        shorten = "the names of the file and its folders" if suffix else "it"
        return f"the {what} has {size} bytes, and a tar takes {MAX_KEY_BYTES}; shorten {shorten}"
    return None


def is_index(rows: NDArray[Any], *, quantised: bool = False) -> bool:
    """Whether an array is an index: one-dimensional, with the fields of `index_dtype`.

    Args:
        rows: The array.
        quantised: Whether the element type is uint8.
    """
    names = rows.dtype.names or ()
    if rows.ndim != 1 or "key" not in names or rows.dtype["key"].itemsize > MAX_KEY_BYTES:
        return False
    key_bytes = max(1, rows.dtype["key"].itemsize)
    return rows.dtype == index_dtype(key_bytes, quantised=quantised)


class IndexRow(msgspec.Struct, frozen=True, array_like=True):
    """An index row without its shard number; see FORMAT.md. Only rows of uint8 have a scale."""

    offset: int
    nbytes: int
    frames: int
    label: int
    crc32: int
    key: str
    scale: Scale | None = None


def scale_in(row: Any) -> Scale | None:
    """The scale in a row of an index; None where the element type is not uint8."""
    if "step" not in row.dtype.names:
        return None
    return Scale(float(row["minimum"]), float(row["step"]))


def index_bytes(shards: Iterable[Sequence[IndexRow]]) -> bytes:
    """The index file of a split: the rows of its shards, one after the other."""
    return encode_index(index_rows(shards))


def index_rows(shards: Iterable[Sequence[IndexRow]]) -> NDArray[Any]:
    """The index (N,) of some shards: their rows, one shard after the other."""
    rows = [(number, row) for number, own in enumerate(shards) for row in own]
    keys = [row.key.encode() for _, row in rows]
    return np.array(
        [
            (number, row.offset, row.nbytes, row.frames, row.label, row.crc32)
            + (row.scale or ())
            + (key,)
            for (number, row), key in zip(rows, keys, strict=True)
        ],
        index_dtype(max(map(len, keys), default=1), quantised=any(row.scale for _, row in rows)),
    )


def encode_index(rows: NDArray[Any]) -> bytes:
    """The bytes of an index file."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


class Columns(NamedTuple):
    """The columns of an index that readers need, one value for each utterance.

    Attributes:
        labels: Speaker numbers (N,); -1 where unknown.
        frames: Lengths in mel frames (N,).
        begin: Where its payload begins (N,), in bytes of the mapped shards.
        minimum: Of element type uint8, the value of 0 (N,); otherwise None.
        step: Of element type uint8, the distance of two levels (N,); otherwise None.
    """

    labels: NDArray[np.int32]
    frames: NDArray[np.int64]
    begin: NDArray[np.int64]
    minimum: NDArray[np.float32] | None = None
    step: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, count: int, *, quantised: bool) -> Columns:
        """Columns of `count` utterances, to be filled."""
        scale = (np.empty(count, np.float32), np.empty(count, np.float32)) if quantised else ()
        return cls(
            np.empty(count, np.int32), np.empty(count, np.int64), np.empty(count, np.int64), *scale
        )


def load_columns(
    rows: NDArray[Any], split: SplitInfo, manifest: Manifest, begins: NDArray[np.int64]
) -> Columns:
    """Check an index and take its columns, by blocks, so that a large index needs little memory.

    Args:
        rows: The index (N,).
        split: The split in the manifest.
        manifest: Manifest of the set.
        begins: Where each shard begins (shards,), in bytes of the mapped shards.

    Raises:
        ValueError: A row leads outside the shards, or does not fit the manifest; the message is
            the name of the field.
    """
    sizes = np.array([shard.bytes for shard in split.shards], np.int64)
    count, total = len(rows), 0
    columns = Columns.empty(count, quantised=manifest.is_quantised)
    for at in range(0, count, _BLOCK):
        block = slice(at, at + _BLOCK)
        some = rows[block]
        frames = some["frames"].astype(np.int64)
        for what, good in _checks(some, frames, sizes, manifest):
            if not good.all():
                raise ValueError(what)
        total += int(frames.sum())
        columns.frames[block], columns.labels[block] = frames, some["label"]
        columns.begin[block] = begins[some["shard"]] + some["offset"].astype(np.int64)
        if columns.minimum is not None and columns.step is not None:
            columns.minimum[block], columns.step[block] = some["minimum"], some["step"]
    if count != split.samples:
        raise ValueError("number of utterances")
    if total != split.frames:
        raise ValueError("number of frames")
    return columns


def _checks(
    rows: NDArray[Any], frames: NDArray[np.int64], sizes: NDArray[np.int64], manifest: Manifest
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What must hold for every row: the name of a field, and whether it is valid (N,)."""
    yield "shard number", rows["shard"] < len(sizes)
    yield "label", (rows["label"] >= NO_LABEL) & (rows["label"] < len(manifest.speakers))
    yield "number of frames", frames > 0
    nbytes, chunk = rows["nbytes"].astype(np.int64), manifest.codec.chunk_frames
    matrix = frames * manifest.n_mels * manifest.numpy_dtype.itemsize
    if chunk is None:
        yield "size", nbytes == codecs.NPY_HEADER_BYTES + matrix
    else:
        yield "size", nbytes > codecs.table_bytes_from_end(frames, chunk)
        most = np.maximum(SMALL_MATRIX_BYTES, MAX_INFLATION * nbytes)
        yield "number of frames for what is stored", matrix <= most
    if manifest.is_quantised:
        yield "minimum or step", are_scales(rows["minimum"], rows["step"])
    offset = rows["offset"].astype(np.int64)
    aligned = (offset >= 0) & (offset % 512 == 0)
    yield "offset", aligned & (offset <= sizes[rows["shard"]] - nbytes)
