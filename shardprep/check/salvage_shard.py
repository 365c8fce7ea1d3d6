"""Write a damaged shard again, from its undamaged utterances and from the data set."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from shardprep.build.shard import ShardRecord, add_utterance, encode_matrix
from shardprep.check.file_faults import payloads
from shardprep.format import codecs
from shardprep.format.index import NO_LABEL, IndexRow, scale_in
from shardprep.format.manifest import Manifest, Reject, ShardInfo
from shardprep.format.quantised import Scale
from shardprep.format.tar import TarWriter
from shardprep.source.contents import Source, Utterance
from shardprep.storage.trouble import BadPlaceError

# By key, frames, crc32 and scale.
FromSource = Callable[[str, int, int, Scale | None], bytes | None]


def rewrite_shard(
    damaged: Path,
    info: ShardInfo,
    rows: NDArray[Any],
    manifest: Manifest,
    file: BinaryIO,
    from_source: FromSource | None = None,
) -> ShardRecord:
    """Write a shard again with those of its utterances whose stored bytes match their crc32.

    Everything between the matrices (headers, labels, JSON members) follows from the index. So a
    shard that is damaged only there gets its original bytes again.

    Args:
        damaged: The damaged shard; it may be missing.
        info: Its entry in the manifest.
        rows: Its rows of the index, which are known to be right.
        manifest: Manifest of the set.
        file: Where to write the new shard.
        from_source: For a damaged utterance, its stored bytes by key, frames, crc32 and scale, or
            None; see `SourcePayloads`.

    Returns:
        The record of the new shard; its rejects are the lost utterances.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    tar = TarWriter(file)
    suffix = codecs.member_suffix(manifest.codec)
    kept: list[IndexRow] = []
    lost: list[Reject] = []
    for row, stored in zip(rows, payloads(damaged, rows), strict=True):
        utterance, payload = _utterance(row, manifest), _if_undamaged(stored, row)
        scale = scale_in(row)
        if payload is None and from_source is not None:
            payload = from_source(utterance.key, utterance.frames, int(row["crc32"]), scale)
        if payload is not None:
            kept.append(add_utterance(tar, utterance, payload, suffix, scale))
        else:
            how = "could not be read" if isinstance(stored, BadPlaceError) else "were damaged"
            lost.append(_lost(utterance, info.file, how))
    tar.close()
    frames = sum(row.frames for row in kept)
    new = ShardInfo(info.file, len(kept), frames, tar.size, tar.sha256.hexdigest())
    return ShardRecord("", new, tuple(kept), tuple(lost), 0)


def _if_undamaged(payload: bytes | BadPlaceError | None, row: Any) -> bytes | None:
    """Stored bytes, if they are those of the index row; else None."""
    return payload if isinstance(payload, bytes) and zlib.crc32(payload) == row["crc32"] else None


def _lost(utterance: Utterance, shard: str, how: str) -> Reject:
    split = "test" if shard.startswith("test-") else "labelled"
    reason = f"its stored bytes {how} in {shard}"
    return Reject(utterance.path, utterance.key, utterance.speaker, split, reason)


def _utterance(row: Any, manifest: Manifest) -> Utterance:
    key, label = row["key"].decode(), int(row["label"])
    speaker = None if label == NO_LABEL else manifest.speakers[label]
    return Utterance(key, f"{key}.pt", speaker, label, int(row["frames"]), 0, 0)


class SourcePayloads:
    """Gives the stored bytes of utterances, encoded again from their files in a data set.

    Args:
        sources: The data sets; an utterance is taken from the first that has its key.
        manifest: Manifest of the set under repair.

    Attributes:
        sources: The data sets.
        notes: The reason for each utterance that it could not give.
    """

    def __init__(self, sources: Sequence[Source], manifest: Manifest) -> None:
        self.sources = sources
        self.notes: list[str] = []
        self._other = "is not the file that the set was built from"
        if manifest.codec.name == "zstd":
            self._other += ", or the set was built by another release of zstandard"
        self._manifest = manifest

    def __call__(self, key: str, frames: int, crc32: int, scale: Scale | None) -> bytes | None:
        """The bytes that a build has stored for an utterance, or None if there are others now."""
        source = next((s for s in self.sources if key in s.by_key), None)
        if source is None:
            places = " nor ".join(str(source.root) for source in self.sources)
            self.notes.append(f"{key}: is not in the data set {places}, or is faulty there")
            return None
        utterance = source.by_key[key]
        try:
            expected = [utterance._replace(frames=frames)]
            ((_, mel),) = source.reader.read(expected, self._manifest.n_mels)
            payload, own = encode_matrix(mel, self._manifest.dtype, self._manifest.codec)
            # Matrices that differ by a constant may have the same bytes of uint8.
            if zlib.crc32(payload) != crc32 or own != scale:
                raise ValueError(self._other)
            return payload
        except ValueError as error:
            self.notes.append(f"{source.root / utterance.path}: {error}")
            return None
