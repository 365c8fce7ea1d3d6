"""What a reader accepts of a shard set or a data set, whatever the files claim.

Sizes are checked before memory is taken for them, and against what is stored: a few bytes cannot
ask for gigabytes. FORMAT.md lists the limits, SECURITY.md says what they are for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardprep.format.manifest import FileInfo, Manifest, ShardInfo, SplitInfo

MAX_N_MELS = 4096
# Chunks that are neither so small that seek tables outgrow the mels, nor large to inflate.
MIN_CHUNK_FRAMES = 16
MAX_CHUNK_BYTES = 1 << 20
# A member's size is a uint32 of the index.
MAX_MEMBER_BYTES = 2**32 - 1
# Enough for a hundred thousand shards.
MAX_MANIFEST_BYTES = 16 << 20
MAX_MANIFEST_VALUES = 600_000
MAX_REJECTS_BYTES = 64 << 20
# Of metadata.json and the others of a data set, enough for four hundred thousand utterances; and
# what they may have more for every file that is there.
SMALL_JSON_BYTES, JSON_BYTES_A_FILE = 32 << 20, 512
SMALL_JSON_VALUES, JSON_VALUES_A_FILE = 1_200_000, 4
# A matrix may be so large whatever is stored of it, and otherwise so many times what is stored.
SMALL_MATRIX_BYTES = 64 << 20
MAX_INFLATION = 64

# Far from where sums and products of 64 bits overflow.
_MAX_COUNT = 2**40
_MAX_BYTES = 2**56
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def most_matrix_bytes(stored: int) -> int:
    """The most bytes of a matrix of which `stored` bytes are stored."""
    return max(SMALL_MATRIX_BYTES, MAX_INFLATION * stored)


def most_json_bytes(files: int) -> int:
    """The most bytes of a JSON file of a data set that has so many files."""
    return SMALL_JSON_BYTES + JSON_BYTES_A_FILE * files


def json_fits(data: bytes, files: int) -> bool:
    """Whether the JSON of a data set of so many files is no more than they account for."""
    # Python keeps text that is not ASCII in two bytes a character or four.
    size = len(data) if data.isascii() else 2 * len(data)
    values = SMALL_JSON_VALUES + JSON_VALUES_A_FILE * files
    return size <= most_json_bytes(files) and json_values(data) <= values


def json_values(data: bytes) -> int:
    """At least as many values as a JSON text holds; each takes up to a hundred bytes of memory."""
    return 1 + data.count(b",") + data.count(b"[") + data.count(b"{")


def manifest_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a build would never write into a manifest: the field, and what is wrong with it."""
    if not 1 <= manifest.n_mels <= MAX_N_MELS:
        yield "n_mels", f"is {manifest.n_mels}, expected 1 to {MAX_N_MELS}"
    codec = manifest.codec
    if codec.name == "none" and (codec.level, codec.chunk_frames) != (None, None):
        yield "codec", "has settings, which codec none has not"
    if codec.name == "zstd":
        chunk = codec.chunk_frames or 0
        size = chunk * manifest.n_mels * manifest.numpy_dtype.itemsize
        if not 1 <= (codec.level or 0) <= 22:
            yield "codec.level", f"is {codec.level}, expected 1 to 22"
        if chunk < MIN_CHUNK_FRAMES or size > MAX_CHUNK_BYTES:
            yield (
                "codec.chunk_frames",
                f"is {codec.chunk_frames}, expected {MIN_CHUNK_FRAMES} or more, and chunks of at "
                f"most {MAX_CHUNK_BYTES} bytes",
            )
    for name, split in manifest.splits.items():
        yield from _split_faults(name, split)
    if sum(info.bytes for info in manifest.files().values()) > _MAX_BYTES:
        yield "splits", "claims more bytes than there are disks for"
    if manifest.rejects is not None and (
        manifest.rejects.file != "rejects.jsonl"
        or manifest.rejects.bytes < 0
        or not _SHA256.fullmatch(manifest.rejects.sha256)
    ):
        yield "rejects", "is not an entry of rejects.jsonl"


def _split_faults(name: str, split: SplitInfo) -> Iterator[tuple[str, str]]:
    field = f"splits.{name[:64]!a}"
    if not _SPLIT.fullmatch(name):
        yield field, "is not a name that a split may have"
        return
    if split.index.file != f"{name}.index.npy":
        yield field, f"has an index of the name {split.index.file[:100]!a}"
    shard = re.compile(re.escape(name) + r"-\d{6,12}\.tar")
    if any(not shard.fullmatch(info.file) for info in split.shards):
        yield field, f"has a shard of another name than {name}-NUMBER.tar"
    if len({info.file for info in split.shards}) < len(split.shards):
        yield field, "lists a shard twice"
    entries: tuple[FileInfo | ShardInfo, ...] = (split.index, *split.shards)
    if not all(0 <= e.bytes <= _MAX_BYTES and _SHA256.fullmatch(e.sha256) for e in entries):
        yield field, "has a file of an impossible size or sha256"
    for count in ("samples", "frames"):
        total, parts = getattr(split, count), [getattr(info, count) for info in split.shards]
        if not 0 <= total <= _MAX_COUNT or min(parts, default=0) < 0 or sum(parts) != total:
            yield field, f"has {count} that are not the sum of its shards'"
