"""Shard format, version 1: the names, the manifest and the index row. FORMAT.md is its text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.errors import FormatError
from shardprep.format.limits import (
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    json_values,
    manifest_faults,
)
from shardprep.storage.local import read_at_most
from shardprep.storage.remote import Location, Remote

FORMAT = "shardprep"
VERSION = 1

MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.jsonl"
WORK_FOLDER = ".shardprep-build"
REPAIR_FOLDER = ".shardprep-repair"

NO_LABEL = -1
# A member's name fills at most the 100 bytes of a tar header: the key and ".mel.npy.zst".
MAX_KEY_BYTES = 88
# Mels of hop 160 at 16 kHz; used for hours of speech in reports, never for data.
FRAMES_PER_SECOND = 100

_BUILD_REMEDY = (
    "Run `shardprep build SRC DST` to make one, e.g. `shardprep build Dataset/ shards/`."
)
_UNKNOWN_REMEDY = "Build the shards again, or read them with the release that made them."


class CodecInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a mel matrix is stored: `none`, or `zstd` with its level and mel frames a chunk."""

    name: Literal["none", "zstd"]
    level: int | None = None
    chunk_frames: int | None = None


class FileInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the set: name within the folder, size in bytes, sha256 as hex digits."""

    file: str
    bytes: int
    sha256: str


class ShardInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tar shard: its file and the utterances and mel frames in it."""

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


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The choices of a build that decide its bytes."""

    seed: int
    val_fraction: float
    samples_per_shard: int
    on_error: Literal["fail", "skip"]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json: what the folder holds. Its presence says that the set is complete.

    Attributes:
        format: Always "shardprep".
        version: Version of the format.
        n_mels: Mel bins F of every utterance.
        dtype: Element type of the stored matrices.
        codec: How a matrix is stored.
        speakers: Speaker names; the position is the label.
        splits: Split name to its contents.
        rejects: rejects.jsonl, where the build skipped anything.
        source_fingerprint: SHA-256 over what was packed: keys, speakers, lengths, file sizes.
        build: The choices of the build.
        fingerprint: SHA-256 over all the fields above; it vouches for every file of the set,
            since the sha256 of each is among them.
    """

    format: str
    version: int
    n_mels: int
    dtype: Literal["float16", "float32"]
    codec: CodecInfo
    speakers: tuple[str, ...]
    splits: dict[str, SplitInfo]
    rejects: FileInfo | None
    source_fingerprint: str
    build: BuildRecord
    fingerprint: str = ""

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian dtype of the stored matrices."""
        return np.dtype(self.dtype).newbyteorder("<")

    def files(self) -> dict[str, FileInfo | ShardInfo]:
        """Every file of the set but the manifest, by name."""
        found: dict[str, FileInfo | ShardInfo] = {}
        for split in self.splits.values():
            found[split.index.file] = split.index
            found.update((shard.file, shard) for shard in split.shards)
        if self.rejects is not None:
            found[self.rejects.file] = self.rejects
        return found


def shard_name(split: str, number: int) -> str:
    """Name of a shard file, e.g. train-000012.tar."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """Name of a split's index file, e.g. train.index.npy."""
    return f"{split}.index.npy"


def index_dtype(key_bytes: int) -> np.dtype[Any]:
    """Dtype of an index row; see FORMAT.md for the meaning of its fields."""
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("nbytes", "<u4"),
            ("frames", "<u4"),
            ("label", "<i4"),
            ("crc32", "<u4"),
            ("key", f"S{key_bytes}"),
        ]
    )


def is_index(rows: NDArray[Any]) -> bool:
    """Whether an array is an index: one-dimensional, with the fields of `index_dtype`."""
    names = rows.dtype.names or ()
    return (
        rows.ndim == 1
        and "key" in names
        and rows.dtype["key"].itemsize <= MAX_KEY_BYTES
        and rows.dtype == index_dtype(max(1, rows.dtype["key"].itemsize))
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, with the fingerprint filled in."""
    return _dump(msgspec.structs.replace(manifest, fingerprint=_fingerprint(manifest)))


def load_manifest(folder: Location) -> Manifest:
    """Read and check the manifest of a shard folder, here or behind a URL.

    Raises:
        FormatError: There is none, it is not of this format or version, or it was altered.
        StorageError: The store behind the URL cannot be reached.
    """
    path = folder / MANIFEST_NAME
    if isinstance(path, Remote):
        return _fetched_manifest(path)
    assert isinstance(folder, Path)
    try:
        data = read_at_most(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        if path.exists():
            raise FormatError(
                f"cannot be read: {error.strerror}", file=path, remedy=_UNKNOWN_REMEDY
            ) from None
        what, remedy = "is not a shard folder: no manifest.json", _BUILD_REMEDY
        if (folder / REPAIR_FOLDER / MANIFEST_NAME).exists():
            what, remedy = "holds an unfinished repair", "Run `shardprep repair DST` to finish it."
        elif (folder / WORK_FOLDER).is_dir():
            what = "holds an unfinished build"
            remedy = "Run `shardprep build SRC DST` again to finish it."
        raise FormatError(what, file=folder, remedy=remedy) from error
    return decode_manifest(data, path)


def _fetched_manifest(path: Remote) -> Manifest:
    """The manifest of a store; what comes the same twice is what the store has."""
    data = _fetch(path)
    while True:
        try:
            return decode_manifest(data, path)
        except FormatError:
            before, data = data, _fetch(path)
            if data == before:
                raise


def _fetch(path: Remote) -> bytes:
    try:
        data = path.read(0, MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise FormatError(
            "there is no shard set, or none that is complete: no manifest.json",
            file=path,
            remedy=_BUILD_REMEDY,
        ) from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError("is too large for a manifest", file=path, remedy=_UNKNOWN_REMEDY)
    return data


def decode_manifest(data: bytes, path: Location) -> Manifest:
    """Parse the bytes of a manifest; `path` is named in errors. Raises FormatError."""
    if json_values(data) > MAX_MANIFEST_VALUES:
        raise FormatError("holds too many values", file=path, remedy=_UNKNOWN_REMEDY)
    try:
        head = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(head.get("format", msgspec.Raw(b"null")))
        version = msgspec.json.decode(head.get("version", msgspec.Raw(b"null")))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            f"is not a manifest ({error})", file=path, remedy=_UNKNOWN_REMEDY
        ) from None
    if (name, version) != (FORMAT, VERSION):
        raise FormatError(
            f"found format {name!r:.100} version {version!r:.100}, "
            f"expected {FORMAT!r} version {VERSION}",
            file=path,
            remedy=_UNKNOWN_REMEDY,
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(str(error)[:300], file=path, remedy=_UNKNOWN_REMEDY) from None
    if manifest.fingerprint != _fingerprint(manifest):
        raise FormatError(
            "was altered: its fingerprint does not match its contents",
            file=path,
            remedy="Restore the file, or build the shards again with --overwrite.",
        )
    _check(manifest, path)
    return manifest


def _check(manifest: Manifest, path: Location) -> None:
    for name in (*manifest.files(), *manifest.splits):
        if Path(name).name != name or name.startswith("."):
            raise FormatError("names a file outside the folder", file=path, key=ascii(name)[:100])
    for field, what in manifest_faults(manifest):
        raise FormatError(what, file=path, key=field, remedy=_UNKNOWN_REMEDY)


def _fingerprint(manifest: Manifest) -> str:
    body = msgspec.to_builtins(msgspec.structs.replace(manifest, fingerprint=""))
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _dump(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
