"""Verify the integrity of a shard set, and report every fault: file, key, what is wrong.

Integrity only: speaker verification, the test of speaker models, is in the trainer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shardprep.build.shard import Advance
from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.check.report import Fault, VerifyReport
from shardprep.check.verify_against import missing_faults, original_files, source_faults
from shardprep.check.verify_tar import tar_faults
from shardprep.errors import CorruptShardError, FormatError
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REPAIR_FOLDER,
    WORK_FOLDER,
    FileInfo,
    Manifest,
    ShardInfo,
    encode_manifest,
)
from shardprep.read.files import Files, FolderFiles, StoreFiles
from shardprep.read.manifest_file import load_manifest
from shardprep.read.split import Split
from shardprep.source.dataset import Source, scan_dataset
from shardprep.storage.local import sha256_of
from shardprep.storage.remote import Location, Remote, locate

# What may be there besides the files that the manifest lists.
_ALLOWED = (MANIFEST_NAME, WORK_FOLDER, REPAIR_FOLDER)


def verify_shards(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    against: str | os.PathLike[str] | None = None,
    advance: Advance = lambda nbytes: None,
) -> VerifyReport:
    """Verify a shard set: sizes and sha256 of all files, and that no file is there besides them.

    Args:
        path: The shard folder, or its URL, from which each file is fetched.
        deep: Also walk every tar and read every utterance: crc32, shape, finite values, label.
        against: Data set folder. Compare every utterance with it: exactly for float32, after
            rounding to float16 for float16.
        advance: Called with the bytes done since the last call.

    Returns:
        The report; damage is reported, not raised.

    Raises:
        SourceError: `against` is no data set.
        StorageError: A store does not answer.
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
        report.faults.append(
            Fault(MANIFEST_NAME, "", "has the right content, but not the bytes that a build writes")
        )
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
            report.faults.extend(missing_faults(files, manifest, source))
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def _opened(place: Location) -> Iterator[FolderFiles | StoreFiles]:
    """The files of a set. Those of a store are fetched again, not taken from the user's cache."""
    if not isinstance(place, Remote):
        yield FolderFiles(place)
        return
    with tempfile.TemporaryDirectory(prefix="shardprep-verify-") as folder:
        yield StoreFiles(place, ShardCache(folder, shutil.disk_usage(folder).free // 2))


def _store_faults(files: StoreFiles, manifest: Manifest, advance: Advance) -> Iterator[Fault]:
    """Damaged files of a store, and files that should not be there."""
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
            if name not in infos and name.split("/")[0] not in _ALLOWED:
                yield Fault(name, "", "does not belong to the set")


def _file_faults(folder: Path, manifest: Manifest, advance: Advance) -> Iterator[Fault]:
    """Files of another size or sha256, and files that should not be there."""
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
        if path.name not in files and path.name not in _ALLOWED:
            yield Fault(path.name, "", "does not belong to the set")


def _split_faults(
    files: Files,
    name: str,
    manifest: Manifest,
    deep: bool,
    source: Source | None,
    advance: Advance,
) -> Iterator[Fault]:
    """Faults of a split that only reading every utterance finds."""
    try:
        split = Split(files, name, manifest)
    except CorruptShardError as error:
        yield Fault(manifest.splits[name].index.file, "", error.what)
        return
    shards = split.locations["shard"]
    for number, info in enumerate(manifest.splits[name].shards):
        indices = np.flatnonzero(shards == number)
        if deep:
            yield from tar_faults(files, info, split, indices, manifest)
        originals = original_files(source, split, indices)
        for index, original in zip(map(int, indices), originals, strict=False):
            try:
                mel = split.read(index)
            except CorruptShardError as error:
                if error.key is None:
                    # The file is missing or has another size. This fault is reported already.
                    break
                yield Fault(info.file, error.key, error.what)
                continue
            if not np.isfinite(mel).all():
                yield Fault(info.file, str(split.keys[index]), "has values that are not finite")
            if source is not None:
                yield from source_faults(info.file, split, index, mel, source, original)
        advance(info.bytes)
