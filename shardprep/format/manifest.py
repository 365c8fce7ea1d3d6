"""Shard format, version 2: the names of its files, and the manifest. FORMAT.md describes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from shardprep.errors import REPAIR, RESTORE, FormatError, VersionError
from shardprep.format.limits import (
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_VALUES,
    MAX_N_MELS,
    MIN_CHUNK_FRAMES,
    json_values,
)

FORMAT = "shardprep"
VERSION = 2

MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.jsonl"
SOURCE_TIMES_NAME = "source-times.npy"
WORK_FOLDER = ".shardprep-build"
REPAIR_FOLDER = ".shardprep-repair"
SET_ASIDE_FOLDER = ".shardprep-set-aside"

# Of mels with hop 160 at 16 kHz, where nothing is known of the features.
_FRAMES_PER_SECOND = 100.0

# Numbers beyond these are refused: far below where sums and products of 64 bits overflow.
_MAX_COUNT = 2**40
_MAX_BYTES = 2**56
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMBER = re.compile(r"(?:[^/\x00-\x20\x7fA-Z]{1,60}\.)?npy")

# In testdata.json.
Position = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]

Features: TypeAlias = dict[str, str | int | float | bool | None]
"""The recipe from audio to mel."""

DType: TypeAlias = Literal["float16", "float32", "uint8"]
"""Element type of the stored matrices; of uint8, `shardprep.format.quantised` has the meaning."""

OTHER_RELEASE = "Build the shards again, or read them with the release that made them."


def frames_per_second(features: Features | None) -> float:
    """Mel frames of a second of speech; for hours in reports, never for data."""
    known = features or {}
    rate, hop = known.get("sample_rate"), known.get("hop_length")
    if not (isinstance(rate, int) and isinstance(hop, int)) or min(rate, hop) < 1:
        return _FRAMES_PER_SECOND
    return rate / hop


def other_features(features: Features | None, asked: Features | None) -> str:
    """In what the features of a set are others than those that are asked for."""
    found, wanted = features or {}, asked or {}
    return "; ".join(
        f"{name} {found.get(name)}, not {wanted.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    )


class CodecInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a mel matrix is stored.

    Attributes:
        name: "none", or "zstd".
        level: Compression level of zstd.
        chunk_frames: Mel frames of a chunk, of zstd.
    """

    name: Literal["none", "zstd"]
    level: int | None = None
    chunk_frames: int | None = None


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the set: name within the folder, size in bytes, sha256 as hex digits."""

    file: str
    bytes: int
    sha256: str


class ShardInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tar shard: its file, and how many utterances and mel frames are in it."""

    file: str
    samples: int
    frames: int
    bytes: int
    sha256: str


class SplitInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A split: its totals, its index file, and its shards in the order of the index."""

    samples: int
    frames: int
    index: FileInfo
    shards: tuple[ShardInfo, ...]


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The options of a build that decide its bytes; `val_speakers` is None for 0."""

    seed: int
    val_fraction: float
    samples_per_shard: int
    on_error: Literal["fail", "skip"]
    val_speakers: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json: what the folder holds. If it is there, the set is complete.

    Attributes:
        format: Always "shardprep".
        version: Version of the format.
        n_mels: Mel bins F of every utterance.
        dtype: Element type of the stored matrices.
        codec: How a matrix is stored.
        speakers: Speaker names; the position is the label.
        splits: Split name to its contents.
        rejects: rejects.jsonl, where the build skipped anything.
        features: The recipe from audio to mel, where it is known.
        source_fingerprint: SHA-256 over what was packed: keys, speakers, lengths, file sizes; None
            where no build of a data set made the set.
        build: The options of the build; None likewise.
        member: Of adopted tars, the extension of the member that has the matrix, in lower case:
            what follows the key and a dot. None for tars that have the members of the format.
        fingerprint: SHA-256 over all fields above. They have the sha256 of every file of the
            set, so it stands for the contents of all files.
    """

    format: str
    version: int
    n_mels: int
    dtype: DType
    codec: CodecInfo
    features: Features | None
    speakers: tuple[str, ...]
    splits: dict[str, SplitInfo]
    rejects: FileInfo | None
    source_fingerprint: str | None
    build: BuildRecord | None
    member: str | None = None
    fingerprint: str = ""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian dtype of the stored matrices."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def is_quantised(self) -> bool:
        """Whether the matrices are whole numbers of one byte, each with a scale of its own."""
        return self.dtype == "uint8"

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """Dtype of what readers give: float32 for quantised matrices, otherwise the stored one."""
        return np.dtype("<f4") if self.is_quantised else self.numpy_dtype

    @property
    def remedy(self) -> str:
        """What helps where files of the set, in a folder, are damaged."""
        return REPAIR if self.member is None else RESTORE

    def files(self) -> dict[str, FileInfo | ShardInfo]:
        """Every file of the set but the manifest, by name."""
        found: dict[str, FileInfo | ShardInfo] = {}
        for split in self.splits.values():
            found[split.index.file] = split.index
            found.update((shard.file, shard) for shard in split.shards)
        if self.rejects is not None:
            found[self.rejects.file] = self.rejects
        return found


class Reject(msgspec.Struct, frozen=True):
    """An entry of the data set that has no utterance of its own, and why; a line of rejects.jsonl.

    Attributes:
        file: The path as the metadata give it.
        key: Its key, empty where the path gives none.
        speaker: Speaker name, or None.
        split: "labelled" or "test".
        reason: What is wrong with it.
        entry: Position in testdata.json; None for other splits, and where a repair has lost it.
        repeats: Position of the earlier entry that lists the same file; None if there is none.
    """

    file: str
    key: str
    speaker: str | None
    split: str
    reason: str
    entry: Position | None = None
    repeats: Position | None = None


def shard_name(split: str, number: int) -> str:
    """Name of a shard file, e.g. train-000012.tar."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """Name of a split's index file, e.g. split=train.index.npy."""
    # Not train.index.npy: what looks for files of a split by its name would take it for data, as
    # Hugging Face `datasets` does with train.*, *-train-* and others.
    return f"split={split}.index.npy"


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with the fingerprint filled in."""
    return _dump(msgspec.structs.replace(manifest, fingerprint=_fingerprint(manifest)))


def decode_manifest(data: bytes, path: str | os.PathLike[str]) -> Manifest:
    """Parse and check the bytes of a manifest.

    Args:
        data: The bytes.
        path: Named in errors.

    Raises:
        FormatError: They are not a manifest of this version, or it was altered.
    """
    if json_values(data) > MAX_MANIFEST_VALUES:
        raise FormatError("holds too many values", file=path, remedy=OTHER_RELEASE)
    try:
        head = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(head.get("format", msgspec.Raw(b"null")))
        version = msgspec.json.decode(head.get("version", msgspec.Raw(b"null")))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"is not a manifest ({error})", file=path, remedy=OTHER_RELEASE) from None
    if (name, version) != (FORMAT, VERSION):
        folder = os.path.dirname(path) or "DST"
        raise VersionError(
            f"found format {name!r:.100} version {version!r:.100}, "
            f"expected {FORMAT!r} version {VERSION}",
            file=path,
            remedy=f"Build the shards again: `shardprep build SRC {folder} --overwrite`."
            if version == 1
            else OTHER_RELEASE,
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(str(error)[:300], file=path, remedy=OTHER_RELEASE) from None
    if manifest.fingerprint != _fingerprint(manifest):
        raise FormatError(
            "was altered: its fingerprint does not match its contents",
            file=path,
            remedy="Restore the file, or build the shards again with --overwrite.",
        )
    _check(manifest, path)
    return manifest


def _check(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    for name in (*manifest.files(), *manifest.splits):
        if Path(name).name != name or name.startswith("."):
            raise FormatError("names a file outside the folder", file=path, key=ascii(name)[:100])
    for field, what in manifest_faults(manifest):
        raise FormatError(what, file=path, key=field, remedy=OTHER_RELEASE)


def _fingerprint(manifest: Manifest) -> str:
    body = msgspec.to_builtins(msgspec.structs.replace(manifest, fingerprint=""))
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _dump(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def manifest_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Faults that no build writes into a manifest: a field, and what is wrong with it."""
    if not 1 <= manifest.n_mels <= MAX_N_MELS:
        yield "n_mels", f"is {manifest.n_mels}, expected 1 to {MAX_N_MELS}"
    codec = manifest.codec
    if codec.name == "none" and (codec.level, codec.chunk_frames) != (None, None):
        yield "codec", "has settings, but codec none takes none"
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
    if manifest.member is not None and not _MEMBER.fullmatch(manifest.member):
        yield "member", "is not an extension that ends in npy, in lower case"
    elif manifest.member is not None and (codec.name != "none" or manifest.is_quantised):
        yield "member", "is for codec none and floating point only"
    for name, split in manifest.splits.items():
        yield from _split_faults(name, split)
    if sum(info.bytes for info in manifest.files().values()) > _MAX_BYTES:
        yield "splits", "claims more bytes than any disk has"
    if manifest.rejects is not None and (
        manifest.rejects.file != "rejects.jsonl"
        or manifest.rejects.bytes < 0
        or not _SHA256.fullmatch(manifest.rejects.sha256)
    ):
        yield "rejects", "is not an entry of rejects.jsonl"


def _split_faults(name: str, split: SplitInfo) -> Iterator[tuple[str, str]]:
    field = f"splits.{name[:64]!a}"
    if not _SPLIT.fullmatch(name):
        yield field, "is not a valid name of a split"
        return
    if split.index.file != index_name(name):
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
