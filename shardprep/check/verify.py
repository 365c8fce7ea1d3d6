"""Find out whether a shard set is whole, and name every fault: file, key, what."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shardprep.build.shard import SourceFile, files_ahead
from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.errors import CorruptShardError, FormatError
from shardprep.format import codecs
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REPAIR_FOLDER,
    WORK_FOLDER,
    FileInfo,
    Manifest,
    ShardInfo,
    encode_manifest,
)
from shardprep.format.tar import Member, content, walk
from shardprep.read.files import Files, FolderFiles, StoreFiles
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import read_rejects
from shardprep.read.split import Split
from shardprep.source.dataset import Source, Utterance, scan_dataset
from shardprep.source.features import load_features
from shardprep.storage.local import open_regular, sha256_of
from shardprep.storage.remote import Location, Remote, locate

Advance = Callable[[int], None]

# The manifest vouches for the others; folders of work are gone when it is done.
_NOT_OF_THE_SET = (MANIFEST_NAME, WORK_FOLDER, REPAIR_FOLDER)

# More than a label, or what is said of an utterance, takes.
_MOST_TEXT = 1 << 16


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the file, the utterance's key ("" for a whole file), and what."""

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.what) if part)


@dataclass
class VerifyReport:
    """What a verification looked at and what it found.

    Attributes:
        faults: Everything that is wrong; empty for a set that is whole.
        files: Files checked.
        bytes: Their size by the manifest.
        samples: Utterances read one by one (deep, against), else 0.
        seconds: Time taken.
    """

    faults: list[Fault] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    samples: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify_shards(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    against: str | os.PathLike[str] | None = None,
    advance: Advance = lambda nbytes: None,
) -> VerifyReport:
    """Check a shard set.

    Args:
        path: The shard folder, or its URL; from there each file is fetched.
        deep: Also walk every tar and read every sample: crc32, shape, finiteness, label.
        against: Data set folder to compare every sample with: exactly for float32, after
            rounding to float16 for float16.
        advance: Called with the bytes done since the last call.

    Returns:
        What was found; damage is reported, not raised.

    Raises:
        SourceError: `against` is no data set.
        StorageError: A store gives no answer.
    """
    began = time.monotonic()
    place = locate(path)
    report = VerifyReport()
    source = scan_dataset(against) if against is not None else None
    try:
        manifest = load_manifest(place)
    except FormatError as error:
        report.faults.append(Fault(MANIFEST_NAME, "", str(error)))
        return report
    report.files = 1 + len(manifest.files())
    report.bytes = sum(info.bytes for info in manifest.files().values())
    written = place / MANIFEST_NAME
    data = written.read() if isinstance(written, Remote) else written.read_bytes()
    if data != encode_manifest(manifest):
        report.faults.append(Fault(MANIFEST_NAME, "", "says the same, in bytes no build wrote"))
    with _opened(place) as files:
        if isinstance(files, FolderFiles):
            report.faults.extend(_file_faults(files.place, manifest, advance))
        else:
            report.faults.extend(_store_faults(files, manifest, advance))
        if deep or source is not None:
            for name in manifest.splits:
                report.samples += manifest.splits[name].samples
                report.faults.extend(_split_faults(files, name, manifest, deep, source, advance))
        if source is not None:
            report.faults.extend(_absent(files, manifest, source))
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def _opened(place: Location) -> Iterator[FolderFiles | StoreFiles]:
    """The files of a set; those of a store anew, whatever the user's cache has of them."""
    if not isinstance(place, Remote):
        yield FolderFiles(place)
        return
    with tempfile.TemporaryDirectory(prefix="shardprep-verify-") as folder:
        yield StoreFiles(place, ShardCache(folder, shutil.disk_usage(folder).free // 2))


def _store_faults(files: StoreFiles, manifest: Manifest, advance: Advance) -> Iterator[Fault]:
    """Contents of all files of a store, and files that should not be there."""
    infos = manifest.files()

    def fault(info: FileInfo | ShardInfo) -> str | None:
        try:
            with files.lend(info):
                return None
        except CorruptShardError as error:
            return error.what

    with ThreadPoolExecutor(DOWNLOADS) as threads:
        for info, what in zip(infos.values(), threads.map(fault, infos.values()), strict=True):
            if what is not None:
                yield Fault(info.file, "", what)
            advance(info.bytes)
    if not files.place.is_http:
        for name in sorted(files.place.listing()):
            if name not in infos and name.split("/")[0] not in _NOT_OF_THE_SET:
                yield Fault(name, "", "does not belong to the set")


def _file_faults(folder: Path, manifest: Manifest, advance: Advance) -> Iterator[Fault]:
    """Sizes and sha256 of all files, and files that should not be there."""
    files = manifest.files()
    for name, info in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != info.bytes:
                yield Fault(name, "", f"has {size} bytes, expected {info.bytes}")
            elif sha256_of(path) != info.sha256:
                yield Fault(name, "", "its sha256 is not the one in the manifest")
        except FileNotFoundError:
            yield Fault(name, "", "is missing")
        except OSError as error:
            yield Fault(name, "", f"cannot be read: {error.strerror}")
        advance(info.bytes)
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name not in _NOT_OF_THE_SET:
            yield Fault(path.name, "", "does not belong to the set")


def _split_faults(
    files: Files,
    name: str,
    manifest: Manifest,
    deep: bool,
    source: Source | None,
    advance: Advance,
) -> Iterator[Fault]:
    try:
        split = Split(files, name, manifest)
    except CorruptShardError as error:
        yield Fault(manifest.splits[name].index.file, "", error.what)
        return
    shards = split.locations["shard"]
    for number, info in enumerate(manifest.splits[name].shards):
        indices = np.flatnonzero(shards == number)
        if deep:
            yield from _tar_faults(files, info, split, indices, manifest)
        originals = _originals(source, split, indices)
        for index, original in zip(map(int, indices), originals, strict=False):
            try:
                mel = split.read(index)
            except CorruptShardError as error:
                if error.key is None:
                    # The file is missing or of another size: named already, for all its samples.
                    break
                yield Fault(info.file, error.key, error.what)
                continue
            if not np.isfinite(mel).all():
                yield Fault(info.file, str(split.keys[index]), "has values that are not finite")
            if source is not None:
                yield from _source_faults(info.file, split, index, mel, source, original)
        advance(info.bytes)


def _tar_faults(
    files: Files, info: ShardInfo, split: Split, indices: np.ndarray, manifest: Manifest
) -> Iterator[Fault]:
    """Walk a tar by its own headers and compare what is met with the index."""
    suffix = codecs.member_suffix(manifest.codec)
    try:
        with files.lend(info) as path, open_regular(path) as tar:
            members = walk(tar)
            for index in map(int, indices):
                for fault in _sample_faults(tar, members, split, index, suffix, manifest):
                    yield Fault(info.file, str(split.keys[index]), fault)
            if (extra := next(members, None)) is not None:
                name = extra.name if extra.name.isprintable() else ascii(extra.name)
                yield Fault(info.file, name, "is a member that the index does not know")
    except (tarfile.TarError, OSError) as error:
        yield Fault(info.file, "", f"is not a whole tar: {error}")
    except CorruptShardError:
        # The store does not have the file as it should be: named already.
        return


def _sample_faults(
    tar: io.BufferedReader,
    members: Iterator[Member],
    split: Split,
    index: int,
    suffix: str,
    manifest: Manifest,
) -> list[str]:
    """What is wrong with the members of one sample; ReadError if the tar ends before."""
    faults = []
    key, row, label = str(split.keys[index]), split.locations[index], int(split.labels[index])
    mel = _next(members)
    if mel.name != key + suffix:
        faults.append(f"the tar has {mel.name!a} where the index has {key + suffix}")
    if (mel.offset, mel.size) != (int(row["offset"]), int(row["nbytes"])):
        faults.append("lies elsewhere in the tar than the index says")
    elif zlib.crc32(content(tar, mel, mel.size)) != int(row["crc32"]):
        faults.append("the member's bytes do not match the crc32 in the index")
    if label != NO_LABEL:
        cls = _next(members)
        if cls.name != f"{key}.cls" or content(tar, cls, _MOST_TEXT) != str(label).encode():
            faults.append(f"{cls.name!a} is not the label {label}")
    about = _next(members)
    speaker = None if label == NO_LABEL else manifest.speakers[label]
    try:
        said = json.loads(content(tar, about, _MOST_TEXT))
        expected = {"frames": int(split.frames[index]), "speaker": speaker}
        agrees = all(said[name] == value for name, value in expected.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        agrees = False
    if about.name != f"{key}.json" or not agrees:
        faults.append(f"{about.name!a} does not agree with the index")
    return faults


def _next(members: Iterator[Member]) -> Member:
    member = next(members, None)
    if member is None:
        raise tarfile.ReadError("it ends before the last sample of the index")
    return member


def _originals(
    source: Source | None, split: Split, indices: np.ndarray
) -> Iterator[tuple[Utterance, SourceFile] | None]:
    """What the source has of each utterance, None where it has nothing."""
    if source is None:
        yield from itertools.repeat(None)
        return
    known = [source.by_key.get(str(split.keys[index])) for index in indices]
    there = [utterance for utterance in known if utterance is not None]
    files = files_ahead(source.root, there, source.n_mels)
    for utterance in known:
        yield None if utterance is None else next(files)


def _source_faults(
    file: str,
    split: Split,
    index: int,
    mel: np.ndarray,
    source: Source,
    original: tuple[Utterance, SourceFile] | None,
) -> Iterator[Fault]:
    key = str(split.keys[index])
    if original is None:
        yield Fault(file, key, f"is not an utterance of {source.root}")
        return
    utterance, stored = original
    if utterance.label != int(split.labels[index]):
        yield Fault(
            file, key, f"its label is {split.labels[index]}, the source's {utterance.label}"
        )
    try:
        if isinstance(stored, ValueError):
            raise stored
        numbers = load_features(stored, n_mels=source.n_mels, frames=utterance.frames)
    except ValueError as error:
        yield Fault(file, key, f"the source file {utterance.path} {error}")
        return
    with np.errstate(over="ignore"):
        expected = numbers.astype(split.dtype)
    if not np.array_equal(expected, mel):
        yield Fault(file, key, f"differs from the source file {utterance.path}")


def _absent(files: Files, manifest: Manifest, source: Source) -> Iterator[Fault]:
    """Utterances of the source that are neither packed nor listed among the rejects."""
    packed: set[str] = set()
    for name in manifest.splits:
        try:
            packed.update(map(str, Split(files, name, manifest).keys))
        except CorruptShardError:
            return
    try:
        packed.update(reject.key for reject in read_rejects(files, manifest))
    except CorruptShardError:
        # Named among the faults of the files; what it listed is unknown.
        return
    for key, utterance in source.by_key.items():
        if key not in packed:
            yield Fault(str(source.root / utterance.path), key, "is not in the set")
