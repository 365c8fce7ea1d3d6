"""Verify the integrity of a shard set, and report every fault: file, key, what is wrong.

Integrity only: speaker verification, the test of speaker models, is in the trainer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shardprep.audio.recipe import known_recipe
from shardprep.build.shard import Advance
from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.check.beside import names_in, notes_on_others, stray_faults, times_fault
from shardprep.check.file_faults import bad_rows, fault_of
from shardprep.check.report import Fault, VerifyReport
from shardprep.check.verify_adopted import adopted_faults
from shardprep.check.verify_against import (
    Against,
    missing_faults,
    originals_of,
    source_faults,
    sources_at,
    unknown_fault,
)
from shardprep.check.verify_tar import tar_faults
from shardprep.errors import CorruptShardError, FormatError, StorageError, VersionError
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    SOURCE_TIMES_NAME,
    FileInfo,
    Manifest,
    ShardInfo,
    encode_manifest,
)
from shardprep.read.files import Files, FolderFiles, Origin, StoreFiles
from shardprep.read.manifest_file import check_fingerprint, load_manifest
from shardprep.read.split import Split
from shardprep.source.contents import Source
from shardprep.storage.local import read_at_most, temporary_place
from shardprep.storage.remote import Location, Remote, locate
from shardprep.storage.trouble import storage_errors


def verify_shards(
    path: str | os.PathLike[str],
    *,
    deep: bool = False,
    against: Against = None,
    follow_links: bool = False,
    advance: Advance = lambda nbytes: None,
) -> VerifyReport:
    """Verify a shard set: sizes and sha256 of all files, and that it has no stray shard or index.

    Args:
        path: The shard folder, or its URL, from which each file is fetched.
        deep: Also walk every tar and read every utterance: crc32, shape, finite values, label.
        against: The data set, or a list of all whose utterances were appended. Compare every
            utterance with it: exactly for float32, otherwise after rounding to the element type.
        follow_links: Whether files of `against` may be links out of it.
        advance: Called with the bytes done since the last call.

    Returns:
        The report; damage is reported, not raised, and so are files of a folder that the machine
        cannot read now.

    Raises:
        SourceError: `against` is no data set.
        VersionError: The set is of a version that this release cannot read.
        CorruptShardError: A build has replaced the set meanwhile.
        StorageError: The machine cannot read the manifest now, or a store does not answer.
    """
    began = time.monotonic()
    place = locate(path)
    report = VerifyReport()
    try:
        manifest = load_manifest(place)
    except VersionError:
        raise
    except FormatError as error:
        sources_at(against, follow_links)
        report.faults.append(Fault(MANIFEST_NAME, "", str(error)))
        return report
    sources = sources_at(against, follow_links, known_recipe(manifest.features))
    report.adopted = manifest.member is not None
    report.files = 1 + len(manifest.files())
    report.bytes = sum(info.bytes for info in manifest.files().values())
    if _written(place / MANIFEST_NAME) != encode_manifest(manifest):
        report.faults.append(
            Fault(MANIFEST_NAME, "", "has the right content, but not the bytes that a build writes")
        )
    with _opened(place) as files:
        check = _Check(files, manifest, report, advance)
        if isinstance(files, FolderFiles):
            check.note(MANIFEST_NAME, check.file_faults(files.place))
        else:
            report.faults.extend(_store_faults(files, manifest, report, advance))
        check.times_fault()
        if deep or sources:
            for name, split in manifest.splits.items():
                report.samples += split.samples
                check.note(split.index.file, check.split_faults(name, deep, sources))
        for source in sources:
            check.note(MANIFEST_NAME, missing_faults(files, manifest, source))
    if report.faults:
        # A build that replaces the set meanwhile takes its files away.
        check_fingerprint(place, manifest.fingerprint)
    report.seconds = time.monotonic() - began
    return report


def _written(path: Location) -> bytes:
    """The bytes of a manifest."""
    if isinstance(path, Remote):
        return path.read()
    with storage_errors(path):
        return read_at_most(path, MAX_MANIFEST_BYTES)


@contextlib.contextmanager
def _opened(place: Location) -> Iterator[FolderFiles | StoreFiles]:
    """The files of a set. Those of a store are fetched again, not taken from the user's cache."""
    if not isinstance(place, Remote):
        yield FolderFiles(place)
        return
    with contextlib.ExitStack() as opened:
        with storage_errors(temporary_place()):
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="shardprep-verify-"))
            room = shutil.disk_usage(folder).free // 2
        yield StoreFiles(place, ShardCache(folder, room))


def _store_faults(
    files: StoreFiles, manifest: Manifest, report: VerifyReport, advance: Advance
) -> Iterator[Fault]:
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
        names = sorted(files.place.listing())
        yield from stray_faults(names, manifest, repairable=False)
        report.notes.extend(notes_on_others(names, manifest))


class _Check:
    """The check of a set, which goes on with the next file where the machine cannot read one.

    Args:
        files: The files of the set.
        manifest: Its manifest.
        report: Gets the faults, and the files that cannot be read.
        advance: Called with the bytes done since the last call.
    """

    def __init__(
        self, files: Files, manifest: Manifest, report: VerifyReport, advance: Advance
    ) -> None:
        self._files = files
        self._manifest = manifest
        self._report = report
        self._advance = advance
        # Files that the disk cannot read somewhere: a process that maps them may be killed.
        self._bad: set[str] = set()

    def note(self, file: str, faults: Iterator[Fault]) -> None:
        """Put faults into the report, and the file if the machine cannot read it."""
        with self._noting_unread(file):
            for fault in faults:
                # An index is read twice, and a fault of it is one fault.
                if fault.key or fault not in self._report.faults:
                    self._report.faults.append(fault)

    @contextlib.contextmanager
    def _noting_unread(self, file: str) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            name = file if error.file is None else os.path.basename(error.file)
            self._report.unread.append(Fault(name, "", f"{error.what}. {error.remedy}"))

    def file_faults(self, folder: Path) -> Iterator[Fault]:
        """Files of another size or sha256, and files that should not be there."""
        infos = self._manifest.files()
        for name, info in infos.items():
            with self._noting_unread(name):
                finding = fault_of(folder / name, info)
                if finding is not None and finding.has_bad_places:
                    self._bad.add(name)
                    found = list(self._bad_utterances(folder, name))
                    yield from found or [Fault(name, "", finding.what)]
                elif finding is not None:
                    yield Fault(name, "", finding.what)
            self._advance(info.bytes)
        names = names_in(folder)
        yield from stray_faults(names, self._manifest, repairable=True)
        self._report.notes.extend(notes_on_others(names, self._manifest))

    def times_fault(self) -> None:
        """Put damage of source-times.npy into the report."""
        with self._noting_unread(SOURCE_TIMES_NAME):
            if (fault := times_fault(self._files.place, self._manifest)) is not None:
                self._report.faults.append(fault)

    def _bad_utterances(self, folder: Path, file: str) -> Iterator[Fault]:
        """The utterances of a shard that the disk cannot read; none if the index is damaged."""
        for name, split in self._manifest.splits.items():
            for number, shard in enumerate(split.shards):
                if shard.file == file:
                    try:
                        rows = Split(name, [Origin(self._files, self._manifest)]).locations
                    except CorruptShardError:
                        return
                    rows = rows[rows["shard"] == number]
                    for row, what in bad_rows(folder / file, rows):
                        yield Fault(file, rows[row]["key"].decode(), what)

    def split_faults(self, name: str, deep: bool, sources: Sequence[Source]) -> Iterator[Fault]:
        """Faults of a split that only reading every utterance finds."""
        info = self._manifest.splits[name]
        closed = self._bad | {fault.file for fault in self._report.unread}
        if info.index.file in closed:
            return
        try:
            split = Split(name, [Origin(self._files, self._manifest)])
        except CorruptShardError as error:
            yield Fault(info.index.file, "", error.what)
            return
        shards = split.locations["shard"]
        for number, shard in enumerate(info.shards):
            if shard.file not in closed:
                indices = np.flatnonzero(shards == number)
                with self._noting_unread(shard.file):
                    if deep:
                        of_tar = tar_faults if self._manifest.member is None else adopted_faults
                        yield from of_tar(self._files, shard, split, indices, self._manifest)
                    yield from _utterance_faults(
                        shard, split, indices, self._manifest.speakers, sources
                    )
            self._advance(shard.bytes)


def _utterance_faults(
    info: ShardInfo,
    split: Split,
    indices: np.ndarray,
    speakers: Sequence[str],
    sources: Sequence[Source],
) -> Iterator[Fault]:
    """Faults of the utterances of a shard, read one by one."""
    unknown = []
    originals = originals_of(sources, split, indices)
    for index, original in zip(map(int, indices), originals, strict=True):
        try:
            mel = split.read(index)
        except CorruptShardError as error:
            if error.key is None:
                # The file is missing or has another size. This fault is reported already.
                return
            yield Fault(info.file, error.key, error.what)
            continue
        key = str(split.keys[index])
        if not np.isfinite(mel).all():
            yield Fault(info.file, key, "has values that are not finite")
        if original is not None:
            yield from source_faults(info.file, split, index, mel, speakers, original)
        elif sources:
            unknown.append(key)
    yield from unknown_fault(info.file, unknown, sources)
