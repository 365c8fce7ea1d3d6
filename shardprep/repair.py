"""Put a damaged shard set right: from its source to the same bytes, or without what is lost.

A repair works as a build does: what it makes is gathered in the work folder and reaches its place
by rename, when it is whole, so that it can be killed at any moment and run again.
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
from numpy.typing import NDArray

from shardprep.errors import BuildError, CorruptShardError, SourceError
from shardprep.format import (
    MANIFEST_NAME,
    NO_LABEL,
    REJECTS_NAME,
    Manifest,
    ShardInfo,
    decode_manifest,
    encode_manifest,
    load_manifest,
)
from shardprep.limits import MAX_MANIFEST_BYTES, MAX_REJECTS_BYTES
from shardprep.options import BuildOptions
from shardprep.salvage import index_of_tar, rewrite_shard
from shardprep.shard import ShardRecord
from shardprep.sidecars import load_index
from shardprep.source import Reject, scan_dataset
from shardprep.storage import (
    publish,
    publish_bytes,
    read_at_most,
    sha256_of,
    storage_errors,
    sync_folder,
)
from shardprep.unfinished import ShardWriter, hold, install, is_ours
from shardprep.verify import Fault, verify_shards
from shardprep.writer import (
    ProgressListener,
    check_shard,
    index_bytes,
    publish_indexes,
    publish_rejects,
    run_shards,
    shard_tasks,
)


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        path: The shard folder.
        repaired: Files that are as they were built again, to the byte.
        removed: Files of earlier builds that did not belong to the set.
        dropped: Utterances that were left out.
        faults: What is wrong still.
        fingerprint: Of the set as it is now; another one than before if anything was dropped.
        seconds: Time taken.
    """

    path: str
    repaired: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    dropped: list[Reject] = field(default_factory=list)
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
        SourceError: The source is not the one of the set, or is faulty itself.
        BuildError: Somebody else is at work in the folder, a shard built anew is not what it was,
            or nothing would be left.
        StorageError: The disk refused.
    """
    began = time.monotonic()
    folder = Path(path)
    if source is not None and drop:
        raise ValueError("give a source, or let damaged utterances be dropped, not both")
    report = RepairReport(str(folder))
    if not folder.is_dir():
        load_manifest(folder)
    with storage_errors(folder), hold(folder) as work:
        if not _finish_installing(folder, work):
            repair = _Repair(folder, work, report)
            repair.restore_manifest()
            repair.bring_home()
            repair.remove_leftovers()
            repair.rewrite_shards()
            if source is not None:
                repair.rebuild(Path(source), workers, listener or ProgressListener())
            repair.restore_indexes()
            if drop:
                repair.drop()
            shutil.rmtree(work, ignore_errors=True)
            sync_folder(folder)
    report.faults = verify_shards(folder).faults
    report.fingerprint = load_manifest(folder).fingerprint
    report.seconds = time.monotonic() - began
    return report


def _finish_installing(folder: Path, work: Path) -> bool:
    """Go on where a repair was killed as it put a set of fewer utterances in its place."""
    pending = work / MANIFEST_NAME
    if (folder / MANIFEST_NAME).exists() or not pending.exists():
        return False
    data = read_at_most(pending, MAX_MANIFEST_BYTES)
    install(work, decode_manifest(data, pending).files(), data)
    return True


class _Repair:
    """One repair; its steps are called in the order in which they stand here."""

    def __init__(self, folder: Path, work: Path, report: RepairReport) -> None:
        self.folder = folder
        self.work = work
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
        homes = {self.files[name].sha256: name for name in self.damaged}
        found = [
            (path, name)
            for path in self.folder.iterdir()
            if path.is_file() and (path.name in self.damaged or path.name not in self.files)
            if (name := homes.get(sha256_of(path)))
        ]
        # All are copied before the first is replaced: two may have changed places.
        for path, name in found:
            with publish(self.work / name) as file, open(path, "rb") as contents:
                shutil.copyfileobj(contents, file)
        for name in {name for _, name in found}:
            self._put(name)

    def remove_leftovers(self) -> None:
        """Remove files that builds write, but that are not of this set."""
        for path in sorted(self.folder.iterdir()):
            known = path.name in self.files or path.name == MANIFEST_NAME
            if not known and is_ours(path.name) and path.is_file():
                path.unlink()
                self.report.removed.append(path.name)

    def rewrite_shards(self) -> None:
        """Restore the shards whose matrices are all whole, by their index."""
        for name in self.manifest.splits:
            for shard, rows in self._shards_of(name):
                if shard.file in self.damaged and rows is not None:
                    self._rewrite(shard, rows)
                    self._put(shard.file)

    def rebuild(self, source: Path, workers: int, listener: ProgressListener) -> None:
        """Build the damaged shards anew, and the list of rejects.

        Raises:
            SourceError: The source is another one, or faulty.
            BuildError: The shards come out differently.
        """
        if not self.damaged:
            return
        scanned = scan_dataset(source)
        if scanned.fingerprint != self.manifest.source_fingerprint:
            raise SourceError(
                f"is not the data set that {self.folder} was built from: its fingerprint is "
                f"{scanned.fingerprint}, expected {self.manifest.source_fingerprint}",
                file=source,
                remedy="Name the one it was, or repair the set with --drop.",
            )
        tasks = shard_tasks(scanned, _options(self.manifest))
        missing = [task for task in tasks if task.plan.file in self.damaged]
        for record in run_shards(missing, ShardWriter(self.work), workers, listener):
            if not self._put(record.info.file):
                raise BuildError(
                    f"{record.info.file} built anew is not what it was: source files have "
                    "changed, or it was built by another release of zstandard",
                    file=source,
                    remedy="Build the set anew with --overwrite, or repair it with --drop.",
                )
        if REJECTS_NAME in self.damaged:
            # Only reading everything tells what the build left out.
            records = run_shards(tasks, check_shard, workers, listener)
            order = {task.plan.file: number for number, task in enumerate(tasks)}
            records.sort(key=lambda record: order[record.info.file])
            late = (reject for record in records for reject in record.rejects)
            publish_rejects(self.work, [*scanned.rejects, *late])
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
        for name in self.manifest.splits:
            for shard, rows in self._shards_of(name):
                if shard.file not in self.damaged:
                    kept = index_of_tar(self.folder / shard.file, self.manifest)
                    records.append(ShardRecord("", shard, kept, (), 0))
                elif rows is not None:
                    record = self._rewrite(shard, rows)
                    records.append(record)
                    lost.extend(record.rejects)
                else:
                    reason = f"{shard.samples} utterances, lost with the index of their shard"
                    lost.append(Reject(shard.file, "", None, name, reason))
        if not any(record.info.samples for record in records):
            raise BuildError("no utterance of the set is whole", file=self.folder)
        dropped = [self.manifest.source_fingerprint, *(reject.file for reject in lost)]
        manifest = msgspec.structs.replace(
            self.manifest,
            splits=publish_indexes(self.work, records),
            rejects=publish_rejects(self.work, [*self._listed(), *lost]),
            # What it holds is not its source any more, and no build must take it for that.
            source_fingerprint=hashlib.sha256("\n".join(dropped).encode()).hexdigest(),
        )
        data = encode_manifest(manifest)
        # With this a repair that is killed as it moves the files can go on.
        publish_bytes(self.work / MANIFEST_NAME, data)
        install(self.work, manifest.files(), data)
        self.report.dropped.extend(lost)

    def _shards_of(self, name: str) -> Iterator[tuple[ShardInfo, NDArray[Any] | None]]:
        """The shards of a split with their index rows, None where the index is damaged."""
        split = self.manifest.splits[name]
        rows = None
        if split.index.file not in self.damaged:
            rows = load_index(self.folder, split)
            labels, sizes = rows["label"], max((s.bytes for s in split.shards), default=0)
            known = (labels >= NO_LABEL) & (labels < len(self.manifest.speakers))
            if not (known & (rows["nbytes"] <= sizes)).all():
                raise CorruptShardError(
                    "is true to its sha256, but not an index that a build wrote",
                    file=self.folder / split.index.file,
                    remedy="Build the set anew.",
                )
        for number, shard in enumerate(split.shards):
            yield shard, None if rows is None else rows[rows["shard"] == number]

    def _rewrite(self, shard: ShardInfo, rows: NDArray[Any]) -> ShardRecord:
        with publish(self.work / shard.file) as file:
            return rewrite_shard(self.folder / shard.file, shard, rows, self.manifest, file)

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
        info = self.files[path.name]
        try:
            return path.stat().st_size == info.bytes and sha256_of(path) == info.sha256
        except OSError:
            return False

    def _listed(self) -> list[Reject]:
        """What rejects.jsonl lists, as far as it can be read."""
        found: list[Reject] = []
        if self.manifest.rejects is not None:
            with contextlib.suppress(OSError):
                data = read_at_most(self.folder / REJECTS_NAME, MAX_REJECTS_BYTES)
                for line in data.splitlines():
                    with contextlib.suppress(ValueError, RecursionError):
                        found.append(msgspec.json.decode(line, type=Reject))
        return found


def _options(manifest: Manifest) -> BuildOptions:
    """The options of the build that made a set, as far as they decide its bytes."""
    build, codec = manifest.build, manifest.codec
    return BuildOptions(
        dtype=manifest.dtype,
        codec=codec.name,
        level=codec.level,
        samples_per_shard=build.samples_per_shard,
        val_fraction=build.val_fraction,
        seed=build.seed,
        on_error=build.on_error,
    )
