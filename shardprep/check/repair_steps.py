"""The steps of a repair, each of which restores what it can from what the set still has."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.build.options import options_of
from shardprep.build.plan import shard_tasks
from shardprep.build.pools.pool import Pool, ProgressListener, run_shards
from shardprep.build.shard import ShardRecord, check_shard
from shardprep.build.work import is_ours, publish_indexes, publish_rejects
from shardprep.build.work_folder import FolderWork, refuse_folders
from shardprep.check.beside import times_fault
from shardprep.check.file_faults import fault_of, read_legible
from shardprep.check.report import RepairReport
from shardprep.check.salvage_index import confirmed_rows, index_of_tar
from shardprep.check.salvage_shard import SourcePayloads, rewrite_shard
from shardprep.errors import BuildError, SourceError, StorageError
from shardprep.format.entries import row_positions
from shardprep.format.index import index_bytes
from shardprep.format.limits import MAX_REJECTS_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    REPAIR_FOLDER,
    SET_ASIDE_FOLDER,
    SOURCE_TIMES_NAME,
    Reject,
    ShardInfo,
    encode_manifest,
)
from shardprep.read.files import FolderFiles, Origin
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import legible_rejects
from shardprep.read.split import Split
from shardprep.source.contents import Source
from shardprep.storage.local import (
    exists,
    move,
    publish,
    publish_bytes,
    sha256_of,
    sync_folder,
)
from shardprep.storage.trouble import BadPlaceError


class Repair:
    """One repair; its steps are called in the order in which they are defined.

    Args:
        folder: The shard folder; the caller holds its lock.
        report: Records what the repair does.
        before_drop: Called with the utterances that `drop` leaves out, before anything is changed.

    Raises:
        BuildError: A folder is in the place of a file of the set. Nothing was changed.
        StorageError: The machine cannot read a file of the set now. Nothing was changed.
    """

    def __init__(
        self, folder: Path, report: RepairReport, before_drop: Callable[[list[Reject]], None]
    ) -> None:
        self.before_drop = before_drop
        self.folder = folder
        self.work = FolderWork(folder / REPAIR_FOLDER)
        self.report = report
        self.manifest = load_manifest(folder)
        self.files = self.manifest.files()
        self._put_back()
        # Everything is read before anything is changed.
        findings = {name: fault_of(folder / name, info) for name, info in self.files.items()}
        # No part of the set: trouble with this file must not keep a repair from its work.
        self._intact_times = [SOURCE_TIMES_NAME]
        with contextlib.suppress(StorageError):
            if times_fault(folder, self.manifest) is not None:
                self._intact_times = []
        self.damaged = {name for name, finding in findings.items() if finding is not None}
        refuse_folders(self.folder / name for name in sorted(self.damaged))
        self._bad = {name for name, found in findings.items() if found and found.has_bad_places}
        self.work.folder.mkdir(exist_ok=True)

    def restore_manifest(self) -> None:
        """Write the manifest as a build does, if its content is right but its bytes are not."""
        data = encode_manifest(self.manifest)
        if (self.folder / MANIFEST_NAME).read_bytes() != data:
            publish_bytes(self.folder / MANIFEST_NAME, data, scratch=self.work.folder)
            self.report.repaired.append(MANIFEST_NAME)

    def restore_names(self) -> None:
        """Restore files that have got the name of another file."""
        sizes = {self.files[name].bytes for name in self.damaged}
        names_by_hash = {self.files[name].sha256: name for name in self.damaged}
        found = []
        for path in sorted(self.folder.iterdir()) if names_by_hash else ():
            misnamed = path.name in self.damaged or path.name not in self.files
            # A file in which the disk cannot read some places has another sha256.
            with contextlib.suppress(BadPlaceError):
                if misnamed and path.is_file() and path.stat().st_size in sizes:
                    found.append((path, names_by_hash.get(sha256_of(path))))
        # Copy all files before the first is replaced: two may have swapped names.
        paths = {name: path for path, name in found if name is not None}
        for name, path in paths.items():
            with publish(self.work.folder / name) as file, open(path, "rb") as contents:
                shutil.copyfileobj(contents, file)
        for name in paths:
            self._put(name)

    def remove_leftovers(self) -> None:
        """Remove files that builds write but that do not belong to this set, or are damaged."""
        for path in sorted(self.folder.iterdir()):
            known = path.name in (*self.files, MANIFEST_NAME, *self._intact_times)
            if not known and is_ours(path.name) and path.is_file():
                path.unlink()
                self.report.removed.append(path.name)

    def rewrite_shards(
        self, from_source: SourcePayloads | None, listener: ProgressListener
    ) -> None:
        """Restore shards by their index, with matrices from the source where theirs are damaged."""
        damaged = [
            (shard, rows)
            for name in self.manifest.splits
            for shard, rows in self._shards_of(name)
            if shard.file in self.damaged and rows is not None
        ]
        listener.start(sum(shard.samples for shard, _ in damaged), sum(s.bytes for s, _ in damaged))
        for shard, rows in damaged:
            self._rewrite(shard, rows, from_source)
            self._put(shard.file)
            listener.advance(shard.samples, shard.bytes)
        listener.close()

    def rebuild(self, sources: Sequence[Source], pool: Pool, listener: ProgressListener) -> None:
        """Build the shards whose index is damaged too, and the list of rejects, again.

        Raises:
            SourceError: The set was not built from one of these data sets alone.
        """
        without_index = {
            shard.file
            for split in self.manifest.splits.values()
            for shard in split.shards
            if {shard.file, split.index.file} <= self.damaged
        }
        if not without_index and REJECTS_NAME not in self.damaged:
            return
        expected = self.manifest.source_fingerprint
        scanned = next((s for s in sources if s.fingerprint == expected), None)
        if scanned is None:
            raise SourceError(
                f"is not as it was when {self.folder} was built, or the set was repaired with "
                f"--drop since, or appended to: its fingerprint is {sources[0].fingerprint}, "
                f"expected {expected}",
                file=sources[0].root,
                remedy="Name the source that it was built from. Where a shard of a set that was "
                "appended to is damaged together with the index, --drop keeps the rest.",
            )
        tasks = shard_tasks(scanned, options_of(self.manifest))
        missing = [task for task in tasks if task.plan.file in without_index]
        for record in run_shards(missing, self.work, pool, listener):
            if not self._put(record.info.file):
                self.report.notes.append(
                    f"{record.info.file}, built again, has other bytes than before: source files "
                    "have changed, or it was built by another release of zstandard"
                )
        if REJECTS_NAME in self.damaged:
            # Only reading every file shows what the build has left out.
            records = run_shards(tasks, check_shard, pool, listener)
            order = {task.plan.file: number for number, task in enumerate(tasks)}
            records.sort(key=lambda record: order[record.info.file])
            found = (reject for record in records for reject in record.rejects)
            publish_rejects(self.work, [*scanned.rejects, *found, *scanned.repeats])
            self._put(REJECTS_NAME)

    def restore_indexes(self) -> None:
        """Make damaged indexes again, where the shards of the split are undamaged."""
        for split in self.manifest.splits.values():
            if split.index.file in self.damaged and not self.damaged & {
                shard.file for shard in split.shards
            }:
                rows = [index_of_tar(self.folder / s.file, self.manifest) for s in split.shards]
                publish_bytes(self.work.folder / split.index.file, index_bytes(rows))
                self._put(split.index.file)

    def drop(self) -> None:
        """Make the set again without what is damaged.

        Raises:
            BuildError: Nothing would be left.
        """
        if not self.damaged:
            return
        records, lost = self._without_damage()
        if not any(record.info.samples for record in records):
            raise BuildError("no utterance of the set is undamaged", file=self.folder)
        rejects = []
        if self.manifest.rejects is not None:
            rejects = legible_rejects(read_legible(self.folder / REJECTS_NAME, MAX_REJECTS_BYTES))
        if REJECTS_NAME in self.damaged:
            self.report.notes.append(f"{REJECTS_NAME} was damaged: its readable lines are kept")
        lost = self._with_positions(lost, rejects)
        self.before_drop(lost)
        self.report.lost += len(lost)
        self.report.dropped.extend(lost)
        if any(line.split == "test" and line.entry is None for line in lost):
            self.report.notes.append(
                "the positions of lost test utterances in testdata.json are not known; their rows "
                "of a submission come last"
            )
        origin = self.manifest.source_fingerprint
        if lost and origin is not None:
            # The set no longer has all of its source, and a build must not accept it as complete.
            listed = [origin, *(reject.file for reject in lost)]
            origin = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        manifest = msgspec.structs.replace(
            self.manifest,
            splits=publish_indexes(self.work, records),
            rejects=publish_rejects(self.work, [*rejects, *lost]),
            source_fingerprint=origin,
        )
        data = encode_manifest(manifest)
        # With this file, `finish_install` can finish a repair that is killed while it moves files.
        publish_bytes(self.work.folder / MANIFEST_NAME, data)
        for name in sorted(self._bad):
            self._set_aside(name)
        self.report.notes.extend(self.work.install(manifest.files(), data))

    def _without_damage(self) -> tuple[list[ShardRecord], list[Reject]]:
        """Write every damaged shard without its damaged utterances.

        Returns:
            The records of all shards, and the utterances that are lost.
        """
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
                    rows = confirmed_rows(index, split.index.bytes, number, path, self.manifest)
                if rows is not None:
                    record = self._rewrite(shard, rows, None)
                    records.append(record)
                    lost.extend(record.rejects)
                if unnamed := shard.samples - (0 if rows is None else len(rows)):
                    reason = f"lost with their rows of the index: {unnamed} of its utterances"
                    lost.append(Reject(shard.file, "", None, name, reason))
                    self.report.lost += unnamed - 1
        return records, lost

    def _with_positions(self, lost: list[Reject], rejects: list[Reject]) -> list[Reject]:
        """The lost utterances with their positions in testdata.json, where these are known."""
        test = self.manifest.splits.get("test")
        if test is None or {test.index.file, REJECTS_NAME} & self.damaged:
            return lost
        keys = Split("test", [Origin(FolderFiles(self.folder), self.manifest)]).keys
        position = dict(zip(map(str, keys), row_positions(len(keys), rejects), strict=True))
        return [
            msgspec.structs.replace(line, entry=position.get(line.key))
            if line.split == "test"
            else line
            for line in lost
        ]

    def _shards_of(self, name: str) -> Iterator[tuple[ShardInfo, NDArray[Any] | None]]:
        """The shards of a split with their index rows, None where the index is damaged."""
        split = self.manifest.splits[name]
        if split.index.file in self.damaged:
            yield from ((shard, None) for shard in split.shards)
            return
        # Checked as for reading: no row points outside its shard.
        rows = Split(name, [Origin(FolderFiles(self.folder), self.manifest)]).locations
        ends = np.searchsorted(rows["shard"], np.arange(len(split.shards)), side="right")
        for number, shard in enumerate(split.shards):
            own = rows[ends[number - 1] if number else 0 : ends[number]]
            yield shard, own[own["shard"] == number]

    def _rewrite(
        self, shard: ShardInfo, rows: NDArray[Any], from_source: SourcePayloads | None
    ) -> ShardRecord:
        damaged = self.folder / shard.file
        with publish(self.work.folder / shard.file) as file:
            return rewrite_shard(damaged, shard, rows, self.manifest, file, from_source)

    def _put(self, name: str) -> bool:
        """Move a file from the work folder to its place, if it has the sha256 of the manifest."""
        if fault_of(self.work.folder / name, self.files[name]) is not None:
            return False
        if name in self._bad:
            self._set_aside(name)
        move(self.work.folder / name, self.folder / name)
        sync_folder(self.folder)
        self.damaged.remove(name)
        self.report.repaired.append(name)
        return True

    def _set_aside(self, name: str) -> None:
        """Keep a file that the disk cannot read everywhere: other means may read more of it."""
        aside = self.folder / SET_ASIDE_FOLDER
        aside.mkdir(exist_ok=True)
        number = next(n for n in itertools.count() if not os.path.lexists(aside / f"{name}.{n}"))
        os.rename(self.folder / name, aside / f"{name}.{number}")
        sync_folder(aside)
        self._bad.discard(name)
        self.report.notes.append(
            f"the disk cannot read all of the old {name}; it is kept as "
            f"{SET_ASIDE_FOLDER}/{name}.{number}"
        )

    def _put_back(self) -> None:
        """Put back files that a repair set aside before it was killed."""
        aside = self.folder / SET_ASIDE_FOLDER
        kept = os.listdir(aside) if exists(aside) else []
        newest = {name.rpartition(".")[0]: name for name in sorted(kept, key=lambda n: (len(n), n))}
        for name in newest.keys() & self.files.keys():
            if not os.path.lexists(self.folder / name):
                os.rename(aside / newest[name], self.folder / name)
