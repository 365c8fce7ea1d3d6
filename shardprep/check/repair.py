"""Put a damaged shard set right: from its source to the same bytes, or without what is lost.

A repair works as a build does: what it makes is gathered in a folder, `.shardprep-repair`, and
reaches its place by rename, when it is whole, so that it can be killed at any moment and run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.build.options import options_of
from shardprep.build.shard import ShardRecord
from shardprep.build.work import is_ours, publish_indexes, publish_rejects
from shardprep.build.work_folder import FolderWork, finish_repair, hold, install, let_go
from shardprep.build.writer import (
    ProgressListener,
    check_shard,
    run_shards,
    shard_tasks,
)
from shardprep.check.salvage import Supplies, index_of_tar, rewrite_shard, vouched_rows
from shardprep.check.verify import Fault, verify_shards
from shardprep.errors import BuildError, CorruptShardError, SourceError
from shardprep.format.index import index_bytes
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    REPAIR_FOLDER,
    Manifest,
    Reject,
    ShardInfo,
    encode_manifest,
)
from shardprep.read.files import FolderFiles
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import check_file, legible_rejects
from shardprep.read.split import Split
from shardprep.source.dataset import Source
from shardprep.storage.local import (
    publish,
    publish_bytes,
    sha256_of,
    storage_errors,
    sync_folder,
)
from shardprep.storage.remote import locate


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        path: The shard folder.
        repaired: Files that are as they were built again, to the byte.
        removed: Files of earlier builds that did not belong to the set.
        dropped: Utterances that were left out; an entry without a key stands for several.
        lost: Number of utterances that were left out.
        notes: What a user should know of the way that it went.
        faults: What is wrong still.
        fingerprint: Of the set as it is now; another one than before if anything was dropped.
        seconds: Time taken.
    """

    path: str
    repaired: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    dropped: list[Reject] = field(default_factory=list)
    lost: int = 0
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    fingerprint: str = ""
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.faults


def repair_shards(
    path: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    drop: bool = False,
    workers: int = 0,
    listener: ProgressListener | None = None,
) -> RepairReport:
    """Put a shard set right.

    Whatever can be had from the set itself is: headers, labels and padding of a shard from the
    index, an index from its shards. Utterances whose stored bytes are damaged come from the
    source; or the set is made anew without them, and rejects.jsonl lists them.

    Args:
        path: The shard folder.
        source: The data set that it was built from.
        drop: Whether to leave out what is damaged; not with a source.
        workers: Processes that build shards; 0 stands for the number of cores.
        listener: Told of progress.

    Returns:
        What was done, and what `verify_shards` finds now.

    Raises:
        FormatError: The folder has no manifest that can be read; only a build can help.
        SourceError: The source is no data set, or another one where the plan of its build is
            needed: for a shard whose index is damaged too, and for rejects.jsonl.
        BuildError: Somebody else is at work in the folder, or nothing would be left.
        CorruptShardError: A file is true to its sha256 and yet not what a build writes.
        StorageError: The disk refused.
    """
    began = time.monotonic()
    folder = Path(path)
    if source is not None and drop:
        raise ValueError("give a source, or let damaged utterances be dropped, not both")
    report = RepairReport(str(folder))
    pending = folder / REPAIR_FOLDER / MANIFEST_NAME
    if (folder / MANIFEST_NAME).exists() or not pending.exists():
        # Nothing is made in a folder that holds no set.
        load_manifest(folder)
    with storage_errors(folder), hold(folder) as building:
        try:
            if finish_repair(folder):
                report.notes.append(
                    f"a repair that was interrupted is finished; {REJECTS_NAME} has what it dropped"
                )
            _run(_Repair(folder, report), source, drop, workers, listener or ProgressListener())
        finally:
            with contextlib.suppress(OSError):
                if (folder / MANIFEST_NAME).exists():
                    shutil.rmtree(folder / REPAIR_FOLDER, ignore_errors=True)
                let_go(building)
        sync_folder(folder)
    report.faults = verify_shards(folder).faults
    manifest = load_manifest(folder)
    if report.whole:
        report.faults.extend(_unopened(folder, manifest))
    report.fingerprint = manifest.fingerprint
    report.seconds = time.monotonic() - began
    return report


def _run(
    repair: _Repair,
    source: str | os.PathLike[str] | None,
    drop: bool,
    workers: int,
    listener: ProgressListener,
) -> None:
    """What comes first makes less to do for what comes later."""
    repair.restore_manifest()
    repair.bring_home()
    repair.remove_leftovers()
    found = Supplies(locate(source), repair.manifest) if source is not None else None
    repair.rewrite_shards(found, listener)
    if found is not None:
        repair.rebuild(found.scanned, workers, listener)
    repair.restore_indexes()
    if drop:
        repair.drop()
    if found is not None:
        repair.report.notes.extend(found.notes)


def _unopened(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Indexes that are true to their sha256, but that no reader takes."""
    for name, info in manifest.splits.items():
        try:
            Split(FolderFiles(folder), name, manifest)
        except CorruptShardError as error:
            yield Fault(info.index.file, "", error.what)


class _Repair:
    """One repair; its steps are called in the order in which they stand here."""

    def __init__(self, folder: Path, report: RepairReport) -> None:
        self.folder = folder
        self.work = folder / REPAIR_FOLDER
        self.work.mkdir(exist_ok=True)
        self.report = report
        self.manifest = load_manifest(folder)
        self.files = self.manifest.files()
        self.damaged = {name for name in self.files if not self._is_whole(folder / name)}

    def restore_manifest(self) -> None:
        """Write the manifest as a build does, if its content is right but its bytes are not."""
        data = encode_manifest(self.manifest)
        if (self.folder / MANIFEST_NAME).read_bytes() != data:
            publish_bytes(self.folder / MANIFEST_NAME, data, scratch=self.work)
            self.report.repaired.append(MANIFEST_NAME)

    def bring_home(self) -> None:
        """Restore files whose contents are there under the name of another."""
        sizes = {self.files[name].bytes for name in self.damaged}
        homes = {self.files[name].sha256: name for name in self.damaged}
        found = []
        for path in sorted(self.folder.iterdir()) if homes else ():
            # One that cannot be read is none of them.
            with contextlib.suppress(OSError):
                spare = path.name in self.damaged or path.name not in self.files
                if spare and path.is_file() and path.stat().st_size in sizes:
                    found.append((path, homes.get(sha256_of(path))))
        # All are copied before the first is replaced: two may have changed places.
        names = {name: path for path, name in found if name is not None}
        for name, path in names.items():
            with publish(self.work / name) as file, open(path, "rb") as contents:
                shutil.copyfileobj(contents, file)
        for name in names:
            self._put(name)

    def remove_leftovers(self) -> None:
        """Remove files that builds write, but that are not of this set."""
        for path in sorted(self.folder.iterdir()):
            known = path.name in self.files or path.name == MANIFEST_NAME
            if not known and is_ours(path.name) and path.is_file():
                path.unlink()
                self.report.removed.append(path.name)

    def rewrite_shards(self, supplies: Supplies | None, listener: ProgressListener) -> None:
        """Restore shards by their index, with matrices of the source where theirs are damaged."""
        due = [
            (shard, rows)
            for name in self.manifest.splits
            for shard, rows in self._shards_of(name)
            if shard.file in self.damaged and rows is not None
        ]
        listener.start(sum(shard.samples for shard, _ in due), sum(s.bytes for s, _ in due))
        for shard, rows in due:
            self._rewrite(shard, rows, supplies)
            self._put(shard.file)
            listener.advance(shard.samples, shard.bytes)
        listener.close()

    def rebuild(self, scanned: Source, workers: int, listener: ProgressListener) -> None:
        """Build anew the shards whose index is damaged too, and the list of rejects.

        Raises:
            SourceError: The source is not the one of the set.
        """
        planless = {
            shard.file
            for split in self.manifest.splits.values()
            for shard in split.shards
            if {shard.file, split.index.file} <= self.damaged
        }
        if not planless and REJECTS_NAME not in self.damaged:
            return
        if scanned.fingerprint != self.manifest.source_fingerprint:
            raise SourceError(
                f"is not as it was when {self.folder} was built, or that was repaired with --drop "
                f"since: its fingerprint is {scanned.fingerprint}, expected "
                f"{self.manifest.source_fingerprint}",
                file=scanned.root,
                remedy="Name the one that it was built from, or repair the set with --drop.",
            )
        tasks = shard_tasks(scanned, options_of(self.manifest))
        missing = [task for task in tasks if task.plan.file in planless]
        for record in run_shards(missing, FolderWork(self.work), workers, listener):
            if not self._put(record.info.file):
                self.report.notes.append(
                    f"{record.info.file} built anew is not what it was: source files have changed, "
                    "or it was built by another release of zstandard"
                )
        if REJECTS_NAME in self.damaged:
            # Only reading everything tells what the build left out.
            records = run_shards(tasks, check_shard, workers, listener)
            order = {task.plan.file: number for number, task in enumerate(tasks)}
            records.sort(key=lambda record: order[record.info.file])
            late = (reject for record in records for reject in record.rejects)
            publish_rejects(FolderWork(self.work), [*scanned.rejects, *late])
            self._put(REJECTS_NAME)

    def restore_indexes(self) -> None:
        """Make damaged indexes anew, where the shards of the split are whole."""
        for split in self.manifest.splits.values():
            if split.index.file in self.damaged and not self.damaged & {
                shard.file for shard in split.shards
            }:
                rows = [index_of_tar(self.folder / s.file, self.manifest) for s in split.shards]
                publish_bytes(self.work / split.index.file, index_bytes(rows))
                self._put(split.index.file)

    def drop(self) -> None:
        """Make the set anew without what is damaged.

        Raises:
            BuildError: Nothing would be left.
        """
        if not self.damaged:
            return
        records: list[ShardRecord] = []
        lost: list[Reject] = []
        for name, split in self.manifest.splits.items():
            for number, (shard, rows) in enumerate(self._shards_of(name)):
                if shard.file not in self.damaged:
                    kept = index_of_tar(self.folder / shard.file, self.manifest)
                    records.append(ShardRecord("", shard, kept, (), 0))
                    continue
                if rows is None:
                    index, path = self.folder / split.index.file, self.folder / shard.file
                    rows = vouched_rows(index, split.index.bytes, number, path, self.manifest)
                if rows is not None:
                    record = self._rewrite(shard, rows, None)
                    records.append(record)
                    lost.extend(record.rejects)
                if nameless := shard.samples - (0 if rows is None else len(rows)):
                    reason = f"lost with their rows of the index: {nameless} of its utterances"
                    lost.append(Reject(shard.file, "", None, name, reason))
                    self.report.lost += nameless - 1
        if not any(record.info.samples for record in records):
            raise BuildError("no utterance of the set is whole", file=self.folder)
        self.report.lost += len(lost)
        self.report.dropped.extend(lost)
        rejects = legible_rejects(self.folder, self.manifest)
        if REJECTS_NAME in self.damaged:
            self.report.notes.append(f"{REJECTS_NAME} was damaged: its legible lines are kept")
        origin = self.manifest.source_fingerprint
        if lost:
            # What the set holds is not its source any more, and no build must take it for that.
            listed = [origin, *(reject.file for reject in lost)]
            origin = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        manifest = msgspec.structs.replace(
            self.manifest,
            splits=publish_indexes(FolderWork(self.work), records),
            rejects=publish_rejects(FolderWork(self.work), [*rejects, *lost]),
            source_fingerprint=origin,
        )
        data = encode_manifest(manifest)
        # With this a repair that is killed as it moves the files can go on.
        publish_bytes(self.work / MANIFEST_NAME, data)
        install(self.work, manifest.files(), data)

    def _shards_of(self, name: str) -> Iterator[tuple[ShardInfo, NDArray[Any] | None]]:
        """The shards of a split with their index rows, None where the index is damaged."""
        split = self.manifest.splits[name]
        if split.index.file in self.damaged:
            yield from ((shard, None) for shard in split.shards)
            return
        # Looked at as for reading: no row leads outside.
        rows = Split(FolderFiles(self.folder), name, self.manifest).locations
        ends = np.searchsorted(rows["shard"], np.arange(len(split.shards)), side="right")
        for number, shard in enumerate(split.shards):
            own = rows[ends[number - 1] if number else 0 : ends[number]]
            yield shard, own[own["shard"] == number]

    def _rewrite(
        self, shard: ShardInfo, rows: NDArray[Any], supplies: Supplies | None
    ) -> ShardRecord:
        damaged = self.folder / shard.file
        with publish(self.work / shard.file) as file:
            return rewrite_shard(damaged, shard, rows, self.manifest, file, supplies)

    def _put(self, name: str) -> bool:
        """Move a file from the work folder to its place, if it is what the manifest says."""
        if not self._is_whole(self.work / name):
            return False
        os.replace(self.work / name, self.folder / name)
        sync_folder(self.folder)
        self.damaged.remove(name)
        self.report.repaired.append(name)
        return True

    def _is_whole(self, path: Path) -> bool:
        try:
            check_file(path, self.files[path.name])
        except (OSError, CorruptShardError):
            return False
        return True
