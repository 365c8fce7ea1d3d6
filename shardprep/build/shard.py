"""Write one shard: a plain POSIX tar of the utterances that the plan puts into it.

The members of an utterance are adjacent: KEY.mel.npy (or .mel.npy.zst), KEY.cls (the label, -1
where unknown) and KEY.json. Times, owners and modes are fixed, so equal contents are equal bytes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.build.plan import ShardTask
from shardprep.format import codecs
from shardprep.format.index import IndexRow
from shardprep.format.limits import MAX_MEMBER_BYTES, most_matrix_bytes
from shardprep.format.manifest import CodecInfo, Reject, ShardInfo
from shardprep.format.quantised import Scale, quantise
from shardprep.format.tar import TarWriter
from shardprep.source.contents import Matrix, Utterance
from shardprep.source.dataset import source_error

# Called after each utterance, with the bytes read for it.
Advance: TypeAlias = Callable[[int], None]

# Numbers from here on are rounded to infinity in float16.
_FLOAT16_LIMIT = 65520


class ShardRecord(msgspec.Struct, frozen=True):
    """The result of writing a shard. An unfinished build keeps it, to be resumed.

    Attributes:
        inputs: SHA-256 over everything that decided the bytes; see `ShardTask.inputs`.
        info: The shard's entry in the manifest.
        rows: Its index rows.
        rejects: Utterances that were left out.
        source_bytes: Bytes read of the source.
    """

    inputs: str
    info: ShardInfo
    rows: tuple[IndexRow, ...]
    rejects: tuple[Reject, ...]
    source_bytes: int


def write_shard(
    task: ShardTask, file: BinaryIO, advance: Advance = lambda nbytes: None
) -> ShardRecord:
    """Load, check and write the utterances of a shard.

    Args:
        task: What to write.
        file: Where to write it, in one pass from the beginning.
        advance: Called after each utterance, with the bytes read for it.

    Raises:
        SourceError: An utterance is faulty, and the task does not skip such.
    """
    tar = TarWriter(file)
    rows, rejects, source_bytes = [], [], 0
    for utterance, matrix in task.reader.read(task.plan.utterances, task.n_mels):
        try:
            payload, scale = encode_matrix(matrix, task.dtype, task.codec)
        except ValueError as fault:
            reject = reject_of(utterance, fault)
            if not task.skip:
                raise source_error(reject, task.reader.root) from None
            rejects.append(reject)
        else:
            suffix = codecs.member_suffix(task.codec)
            rows.append(add_utterance(tar, utterance, payload, suffix, scale))
        source_bytes += utterance.nbytes
        advance(utterance.nbytes)
    tar.close()
    frames = sum(row.frames for row in rows)
    info = ShardInfo(task.plan.file, len(rows), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord(task.inputs, info, tuple(rows), tuple(rejects), source_bytes)


def reject_of(utterance: Utterance, fault: ValueError) -> Reject:
    """The line of an utterance that cannot be packed."""
    split = "labelled" if utterance.entry is None else "test"
    return Reject(
        utterance.path, utterance.key, utterance.speaker, split, str(fault), utterance.entry
    )


def encode_matrix(mel: Matrix, dtype: str, codec: CodecInfo) -> tuple[bytes, Scale | None]:
    """Encode a matrix as the payload that a shard stores, with its scale if dtype is uint8.

    Args:
        mel: The matrix (T, F), or what is wrong with it, as a reader gives it.
        dtype: Element type to store.
        codec: How to store the matrix.

    Raises:
        ValueError: It cannot be stored; the message is meant for `Reject.reason`.
    """
    if isinstance(mel, ValueError):
        raise mel
    stored, scale = as_stored(mel, dtype)
    if stored.nbytes + codecs.NPY_HEADER_BYTES > MAX_MEMBER_BYTES:
        raise ValueError(f"takes {stored.nbytes} bytes, more than a member of a shard may have")
    payload = codecs.encode(stored, codec)
    if len(payload) > MAX_MEMBER_BYTES or stored.nbytes > most_matrix_bytes(len(payload)):
        raise ValueError(
            f"shrinks from {stored.nbytes} to {len(payload)} bytes, which readers would refuse; "
            "use --codec none"
        )
    return payload, scale


def as_stored(mel: NDArray[np.floating], dtype: str) -> tuple[NDArray[Any], Scale | None]:
    """A matrix in the element type that a shard stores, with its scale if that is uint8.

    Raises:
        ValueError: The type has no such numbers.
    """
    if dtype == "uint8":
        return quantise(mel)
    if dtype == "float16" and max(float(mel.max()), -float(mel.min())) >= _FLOAT16_LIMIT:
        raise ValueError("has values beyond the range of float16; use --dtype float32")
    return mel.astype(np.dtype(dtype).newbyteorder("<"), copy=False), None


def as_spooled(mel: NDArray[np.floating], dtype: str) -> NDArray[np.floating]:
    """A matrix (T, F) as it waits to be packed: of uint8, only packing makes whole numbers.

    Raises:
        ValueError: The type has no such numbers.
    """
    stored, scale = as_stored(mel, dtype)
    return stored if scale is None else mel.astype("<f4", copy=False)


def add_utterance(
    tar: TarWriter, utterance: Utterance, payload: bytes, suffix: str, scale: Scale | None
) -> IndexRow:
    """Append the members of an utterance; `payload` and `scale` are those of `encode_matrix`."""
    offset = tar.add(utterance.key + suffix, payload)
    # The same members and JSON types in every split: Hugging Face `datasets` takes the columns of
    # all splits from one.
    tar.add(f"{utterance.key}.cls", str(utterance.label).encode())
    about: dict[str, Any] = {
        "frames": utterance.frames,
        "source": f"{utterance.key}.pt",
        "speaker": utterance.speaker or "",
    }
    if scale is not None:
        about |= scale._asdict()
    tar.add(f"{utterance.key}.json", json.dumps(about, sort_keys=True).encode())
    return IndexRow(
        offset,
        len(payload),
        utterance.frames,
        utterance.label,
        zlib.crc32(payload),
        utterance.key,
        scale,
    )


def check_shard(task: ShardTask, advance: Advance) -> ShardRecord:
    """The record of a shard, for a dry run: nothing is written."""
    with open(os.devnull, "wb") as nowhere:
        return write_shard(task, nowhere, advance)
