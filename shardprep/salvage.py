"""Get out of the files of a damaged set what is still whole."""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from shardprep import codecs
from shardprep.errors import CorruptShardError
from shardprep.format import NO_LABEL, Manifest, ShardInfo
from shardprep.shard import IndexRow, ShardRecord, TarWriter, add_sample
from shardprep.source import Reject, Utterance
from shardprep.storage import open_regular, read_bytes
from shardprep.tarwalk import content, walk

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


def _rows(tar: io.FileIO, manifest: Manifest) -> Iterator[IndexRow]:
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
        yield IndexRow(mel.offset, mel.size, frames, label, zlib.crc32(payload), key)


def rewrite_shard(
    damaged: Path, info: ShardInfo, rows: NDArray[Any], manifest: Manifest, file: BinaryIO
) -> ShardRecord:
    """Write a shard anew with those of its utterances whose stored bytes match their crc32.

    What lies between the matrices (headers, labels, the JSON members) follows from the index, so
    that a shard which was damaged there only comes out as it was built.

    Args:
        damaged: The shard as it is found; it may be missing.
        info: Its entry in the manifest.
        rows: Its rows of the index, as they are vouched for by the manifest.
        manifest: Of the set.
        file: Where to.

    Returns:
        The record of the new shard; its rejects are the utterances that are lost.
    """
    tar = TarWriter(file)
    suffix = codecs.member_suffix(manifest.codec)
    kept: list[IndexRow] = []
    lost: list[Reject] = []
    for row, payload in zip(rows, _payloads(damaged, rows), strict=True):
        utterance = _utterance(row, manifest)
        if payload is not None and zlib.crc32(payload) == row["crc32"]:
            kept.append(add_sample(tar, utterance, payload, suffix))
        else:
            lost.append(_lost(utterance, info.file))
    tar.close()
    frames = sum(row.frames for row in kept)
    new = ShardInfo(info.file, len(kept), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord("", new, tuple(kept), tuple(lost), 0)


def _lost(utterance: Utterance, shard: str) -> Reject:
    split = "test" if shard.startswith("test-") else "labelled"
    reason = f"its stored bytes were damaged in {shard}"
    return Reject(utterance.path, utterance.key, utterance.speaker, split, reason)


def _payloads(path: Path, rows: NDArray[Any]) -> Iterator[bytes | None]:
    """The stored bytes of each row, None where the file does not give them."""
    with contextlib.ExitStack() as opened:
        file: io.FileIO | None = None
        with contextlib.suppress(OSError):
            file = opened.enter_context(open_regular(path))
        for row in rows:
            payload = None
            # A folder in its place, or a sector that the disk cannot read.
            with contextlib.suppress(OSError):
                if file is not None:
                    file.seek(int(row["offset"]))
                    payload = read_bytes(file, int(row["nbytes"]))
            yield payload


def _utterance(row: Any, manifest: Manifest) -> Utterance:
    key, label = row["key"].decode(), int(row["label"])
    speaker = None if label == NO_LABEL else manifest.speakers[label]
    return Utterance(key, f"{key}.pt", speaker, label, int(row["frames"]), 0, 0)
