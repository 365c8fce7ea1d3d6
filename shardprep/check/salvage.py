"""Get out of the files of a damaged set what is still whole."""

from __future__ import annotations

import contextlib
import io
import itertools
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shardprep.build.shard import ShardRecord, add_sample, encode_file, fetch_file
from shardprep.errors import CorruptShardError
from shardprep.format import codecs
from shardprep.format.codecs import NPY_FAULTS
from shardprep.format.index import MAX_KEY_BYTES, NO_LABEL, IndexRow, is_index
from shardprep.format.manifest import Manifest, Reject, ShardInfo
from shardprep.format.tar import BLOCK, TarWriter, content, walk
from shardprep.source.dataset import Utterance, scan_dataset
from shardprep.storage.local import open_regular, read_at_most
from shardprep.storage.remote import Location

Supply = Callable[[str, int], bytes | None]

# Bytes of a number in decimal text.
_MOST_LABEL = 20


def index_of_tar(path: Path, manifest: Manifest) -> tuple[IndexRow, ...]:
    """The index rows of a shard that is whole, by its own headers.

    Raises:
        CorruptShardError: It is no tar of a build.
    """
    try:
        with open_regular(path) as tar:
            return tuple(_rows(tar, manifest))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise CorruptShardError(f"is not a shard of a build ({error})", file=path) from None


def _rows(tar: io.BufferedReader, manifest: Manifest) -> Iterator[IndexRow]:
    suffix = codecs.member_suffix(manifest.codec)
    members = walk(tar)
    for mel in members:
        key = mel.name.removesuffix(suffix)
        about = next(members, None)
        label = NO_LABEL
        if about is not None and about.name == f"{key}.cls":
            label, about = int(content(tar, about, _MOST_LABEL)), next(members, None)
        if key == mel.name or about is None or about.name != f"{key}.json":
            raise tarfile.ReadError(f"{mel.name!a} is not the first member of an utterance")
        payload = content(tar, mel, mel.size)
        frames = len(codecs.decode(payload, manifest.codec))
        size = len(key.encode())
        if "." in key or not 0 < size <= MAX_KEY_BYTES or not -1 <= label < len(manifest.speakers):
            raise tarfile.ReadError(f"{mel.name!a} is not an utterance of this set")
        yield IndexRow(mel.offset, mel.size, frames, label, zlib.crc32(payload), key)


def vouched_rows(
    path: Path, size: int, number: int, shard: Path, manifest: Manifest
) -> NDArray[Any] | None:
    """Those rows of a damaged index that a shard bears out, however damaged both are.

    A row counts if its crc32 is that of the bytes that it points to, and if name, length and label
    are those that the members there say.

    Args:
        path: The index file.
        size: Its size by the manifest.
        number: The shard's number in its split.
        shard: Its file.
        manifest: Of the set.

    Returns:
        The rows, or None where the index cannot be read at all.
    """
    try:
        data = read_at_most(path, size)
        file = io.BytesIO(data)
        np.lib.format.read_magic(file)
        dtype = np.lib.format.read_array_header_1_0(file)[2]
        count = (len(data) - file.tell()) // dtype.itemsize
        rows: NDArray[Any] = np.frombuffer(data, dtype, count, file.tell())
        if not is_index(rows):
            return None
    except (OSError, *NPY_FAULTS):
        return None
    rows = rows[rows["shard"] == number]
    borne_out = np.zeros(len(rows), bool)
    with contextlib.suppress(OSError), open_regular(shard) as tar:
        for place, row in enumerate(rows):
            borne_out[place] = _is_borne_out(row, tar, manifest)
    rows = rows[borne_out]
    # A key comes once, and rows in the order of the shard.
    rows = rows[np.sort(np.unique(rows["key"], return_index=True)[1])]
    return rows


def _is_borne_out(row: Any, tar: io.BufferedReader, manifest: Manifest) -> bool:
    try:
        key = row["key"].decode()
        offset, label = int(row["offset"]), int(row["label"])
        mel, after, *_ = itertools.islice(walk(tar, offset - BLOCK), 2)
        own_label = NO_LABEL
        if after.name == f"{key}.cls":
            own_label = int(content(tar, after, _MOST_LABEL))
        payload = content(tar, mel, mel.size)
        return (
            mel == (key + codecs.member_suffix(manifest.codec), offset, int(row["nbytes"]))
            and zlib.crc32(payload) == row["crc32"]
            and len(codecs.decode(payload, manifest.codec)) == row["frames"]
            and label == own_label < len(manifest.speakers)
        )
    except (OSError, tarfile.TarError, ValueError, OverflowError):
        return False


def rewrite_shard(
    damaged: Path,
    info: ShardInfo,
    rows: NDArray[Any],
    manifest: Manifest,
    file: BinaryIO,
    supply: Supply | None = None,
) -> ShardRecord:
    """Write a shard anew with those of its utterances whose stored bytes match their crc32.

    What lies between the matrices (headers, labels, the JSON members) follows from the index, so
    that a shard which was damaged there only comes out as it was built.

    Args:
        damaged: The shard as it is found; it may be missing.
        info: Its entry in the manifest.
        rows: Its rows of the index, as they are vouched for.
        manifest: Of the set.
        file: Where to.
        supply: Gives the stored bytes of an utterance from elsewhere, by key and frames, or None;
            asked for those that are damaged here.

    Returns:
        The record of the new shard; its rejects are the utterances that are lost.
    """
    tar = TarWriter(file)
    suffix = codecs.member_suffix(manifest.codec)
    kept: list[IndexRow] = []
    lost: list[Reject] = []
    for row, stored in zip(rows, _payloads(damaged, rows), strict=True):
        utterance, payload = _utterance(row, manifest), _true(stored, row)
        if payload is None and supply is not None:
            payload = _true(supply(utterance.key, utterance.frames), row)
        if payload is not None:
            kept.append(add_sample(tar, utterance, payload, suffix))
        else:
            lost.append(_lost(utterance, info.file))
    tar.close()
    frames = sum(row.frames for row in kept)
    new = ShardInfo(info.file, len(kept), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord("", new, tuple(kept), tuple(lost), 0)


def _true(payload: bytes | None, row: Any) -> bytes | None:
    """Stored bytes, if they are those that a row of the index tells of."""
    return payload if payload is not None and zlib.crc32(payload) == row["crc32"] else None


def _lost(utterance: Utterance, shard: str) -> Reject:
    split = "test" if shard.startswith("test-") else "labelled"
    reason = f"its stored bytes were damaged in {shard}"
    return Reject(utterance.path, utterance.key, utterance.speaker, split, reason)


def _payloads(path: Path, rows: NDArray[Any]) -> Iterator[bytes | None]:
    """The stored bytes of each row, None where the file does not give them."""
    with contextlib.ExitStack() as opened:
        file: io.BufferedReader | None = None
        with contextlib.suppress(OSError):
            file = opened.enter_context(open_regular(path))
        for row in rows:
            payload = None
            # A folder in its place, or a sector that the disk cannot read.
            with contextlib.suppress(OSError):
                if file is not None:
                    file.seek(int(row["offset"]))
                    payload = file.read(int(row["nbytes"]))
            yield payload


def _utterance(row: Any, manifest: Manifest) -> Utterance:
    key, label = row["key"].decode(), int(row["label"])
    speaker = None if label == NO_LABEL else manifest.speakers[label]
    return Utterance(key, f"{key}.pt", speaker, label, int(row["frames"]), 0, 0)


class Supplies:
    """Stored bytes of utterances, made anew from the data set that they came from.

    Args:
        source: The data set.
        manifest: Of the set that is repaired.

    Attributes:
        notes: Of utterances that it could not give, why.
    """

    def __init__(self, source: Location, manifest: Manifest) -> None:
        self.scanned = scan_dataset(source)
        self.notes: list[str] = []
        self._manifest = manifest

    def __call__(self, key: str, frames: int) -> bytes | None:
        """The bytes that a build would store of an utterance, or None."""
        utterance = self.scanned.by_key.get(key)
        path = self.scanned.root / (f"{key}.pt" if utterance is None else utterance.path)
        try:
            if utterance is None:
                raise ValueError("is not in the data set, or faulty")
            return encode_file(
                fetch_file(self.scanned.root, utterance, self._manifest.n_mels),
                n_mels=self._manifest.n_mels,
                frames=frames,
                dtype=self._manifest.dtype,
                codec=self._manifest.codec,
            )
        except ValueError as error:
            self.notes.append(f"{path}: {error}")
            return None
