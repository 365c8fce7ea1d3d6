"""One shard: a plain POSIX tar of the utterances that a plan puts into it.

For each utterance, adjacent: KEY.mel.npy (or .mel.npy.zst), KEY.cls (the label; absent where
unknown) and KEY.json. Times, owners and modes are fixed, so equal contents are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from shardprep import codecs
from shardprep.format import NO_LABEL, CodecInfo, ShardInfo
from shardprep.plan import ShardPlan
from shardprep.source import Reject, Utterance, load_features

BLOCK = tarfile.BLOCKSIZE
# Two empty blocks end a tar; `tar` pads a file to records of 20 blocks.
RECORD = tarfile.RECORDSIZE


class IndexRow(msgspec.Struct, frozen=True, array_like=True):
    """An index row without its shard number; see FORMAT.md."""

    offset: int
    nbytes: int
    frames: int
    label: int
    crc32: int
    key: str


class ShardRecord(msgspec.Struct, frozen=True):
    """What came of writing a shard; kept beside an unfinished build to resume from.

    Attributes:
        inputs: SHA-256 over everything that decided the bytes; see `inputs_of`.
        info: The shard's entry in the manifest.
        rows: Its index rows.
        rejects: Utterances that were left out.
        source_bytes: Bytes of the `.pt` files read.
    """

    inputs: str
    info: ShardInfo
    rows: tuple[IndexRow, ...]
    rejects: tuple[Reject, ...]
    source_bytes: int


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write a shard.

    Attributes:
        plan: File name, split and utterances.
        root: The data set's folder.
        n_mels: Mel bins F.
        dtype: "float16" or "float32".
        codec: How matrices are stored.
        skip: Whether faulty utterances are left out; otherwise the first one raises.
    """

    plan: ShardPlan
    root: Path
    n_mels: int
    dtype: str
    codec: CodecInfo
    skip: bool

    @property
    def inputs(self) -> str:
        """SHA-256 over all that decides the bytes; file contents count by size and time."""
        codec = msgspec.to_builtins(self.codec)
        listed = [self.plan.utterances, self.n_mels, self.dtype, codec, self.skip]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def write_shard(
    task: ShardTask, file: BinaryIO, advance: Callable[[int], None] = lambda nbytes: None
) -> ShardRecord:
    """Load, check and write the utterances of a shard.

    Args:
        task: What to write.
        file: Where to; written in one pass from its beginning.
        advance: Called after each utterance with the bytes read for it.

    Raises:
        SourceError: An utterance is faulty and the task does not skip.
    """
    tar = _TarWriter(file)
    rows, rejects, source_bytes = [], [], 0
    for utterance in task.plan.utterances:
        try:
            payload = _encode(task, utterance)
        except ValueError as fault:
            split = "test" if utterance.speaker is None else "labelled"
            reject = Reject(utterance.path, utterance.key, utterance.speaker, split, str(fault))
            if not task.skip:
                raise reject.error(task.root) from None
            rejects.append(reject)
        else:
            rows.append(_add_sample(tar, utterance, payload, codecs.member_suffix(task.codec)))
        source_bytes += utterance.nbytes
        advance(utterance.nbytes)
    tar.close()
    frames = sum(row.frames for row in rows)
    info = ShardInfo(task.plan.file, len(rows), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord(task.inputs, info, tuple(rows), tuple(rejects), source_bytes)


def _encode(task: ShardTask, utterance: Utterance) -> bytes:
    mel = load_features(task.root / utterance.path, n_mels=task.n_mels, frames=utterance.frames)
    with np.errstate(over="ignore"):
        stored = mel.astype(np.dtype(task.dtype).newbyteorder("<"))
    if not np.isfinite(stored).all():
        raise ValueError("has values beyond the range of float16; use --dtype float32")
    return codecs.encode(stored, task.codec)


def _add_sample(tar: _TarWriter, utterance: Utterance, payload: bytes, suffix: str) -> IndexRow:
    offset = tar.add(utterance.key + suffix, payload)
    if utterance.label != NO_LABEL:
        tar.add(f"{utterance.key}.cls", str(utterance.label).encode())
    about = {"frames": utterance.frames, "source": utterance.path, "speaker": utterance.speaker}
    tar.add(f"{utterance.key}.json", json.dumps(about, sort_keys=True).encode())
    return IndexRow(
        offset,
        len(payload),
        utterance.frames,
        utterance.label,
        zlib.crc32(payload),
        utterance.key,
    )


class _TarWriter:
    """Appends members to a ustar archive, counting and hashing what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def add(self, name: str, payload: bytes) -> int:
        """Append a member; returns the offset of its payload."""
        head = tarfile.TarInfo(name)
        head.size = len(payload)
        self._write(head.tobuf(tarfile.USTAR_FORMAT, encoding="utf-8"))
        offset = self.size
        self._write(payload)
        self._write(bytes(-len(payload) % BLOCK))
        return offset

    def close(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % RECORD))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
