"""Repair a damaged shard set: restore the same bytes from its source, or leave out what is lost.

A repair works like a build. It collects complete files in a folder, `.shardprep-repair`, and moves
them to their places by rename. So it can be killed at any time and run again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shardprep.audio.recipe import known_recipe
from shardprep.build.lock import locked, remove_if_unused
from shardprep.build.pools.local import LocalPool
from shardprep.build.pools.pool import Pool, ProgressListener
from shardprep.build.work_folder import finish_install, has_pending
from shardprep.check.repair_steps import Repair
from shardprep.check.report import Fault, RepairReport
from shardprep.check.salvage_shard import SourcePayloads
from shardprep.check.verify import verify_shards
from shardprep.check.verify_against import Against, sources_at
from shardprep.errors import RESTORE, BuildError, CorruptShardError, StorageError
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    REPAIR_FOLDER,
    WORK_FOLDER,
    Manifest,
    Reject,
)
from shardprep.read.files import FolderFiles, Origin
from shardprep.read.manifest_file import load_manifest
from shardprep.read.split import Split
from shardprep.storage.local import exists, sync_folder
from shardprep.storage.trouble import storage_errors
from shardprep.system import check_supported

# By the work folder of what was interrupted.
_FINISHED = {
    REPAIR_FOLDER: f"an interrupted repair is finished now; {REJECTS_NAME} lists what it dropped",
    WORK_FOLDER: "an interrupted `build --append` is finished now",
}


def repair_shards(
    path: str | os.PathLike[str],
    *,
    source: Against = None,
    drop: bool = False,
    follow_links: bool = False,
    workers: int = 0,
    listener: ProgressListener | None = None,
    before_drop: Callable[[list[Reject]], None] = lambda lost: None,
) -> RepairReport:
    """Repair a shard set.

    What the set itself can give is restored from it: headers, labels and padding of a shard from
    the index, an index from its shards. Utterances whose stored bytes are damaged are restored
    from the source; or the set is made again without them, and rejects.jsonl lists them.

    Args:
        path: The shard folder.
        source: The data set that it was built from, or a list of all that it was made of.
        drop: Whether to leave out what is damaged; not together with a source.
        follow_links: Whether files of the data set may be links out of it.
        workers: Processes that build shards; 0 for the number of cores.
        listener: Receives the progress.
        before_drop: Called with the utterances that will be left out, before the set is changed;
            an error that it raises stops the repair.

    Returns:
        What was done, and the faults that `verify_shards` finds now.

    Raises:
        FormatError: The folder has no readable manifest; only a new build can help.
        SourceError: The source is no data set. Or the set was not built from it, and the original
            plan is needed: for a shard whose index is damaged too, and for rejects.jsonl.
        BuildError: Another build or repair is running in the folder, a folder is in the place of a
            file, or nothing would be left; or the set is one of adopted tars.
        CorruptShardError: A file has the right sha256, but is not what a build writes.
        StorageError: The machine could not read or write a file. If a file of the set could not be
            read, nothing was changed.
    """
    began = time.monotonic()
    check_supported()
    folder = Path(path)
    if source is not None and drop:
        raise ValueError("give a source or drop, not both")
    report = RepairReport(str(folder))
    with storage_errors(folder):
        pending = has_pending(folder)
    if not pending:
        # Raises before anything is written in a folder that holds no set.
        _refuse_adopted(load_manifest(folder), folder)
    with storage_errors(folder), locked(folder) as build_folder:
        try:
            if (finished := finish_install(folder)) is not None:
                report.notes.append(_FINISHED[finished])
            _run_steps(
                Repair(folder, report, before_drop),
                source,
                drop,
                follow_links,
                LocalPool(workers),
                listener or ProgressListener(),
            )
        finally:
            with contextlib.suppress(OSError):
                if exists(folder / MANIFEST_NAME):
                    shutil.rmtree(folder / REPAIR_FOLDER, ignore_errors=True)
                remove_if_unused(build_folder)
        sync_folder(folder)
    checked = verify_shards(folder)
    if checked.unread:
        raise StorageError(checked.unread[0].what, file=folder / checked.unread[0].file)
    report.faults = checked.faults
    manifest = load_manifest(folder)
    if report.intact:
        report.faults.extend(_index_faults(folder, manifest))
    report.fingerprint = manifest.fingerprint
    report.seconds = time.monotonic() - began
    return report


def _refuse_adopted(manifest: Manifest, folder: Path) -> None:
    """BuildError if the tars of a set belong to another program."""
    if manifest.member is not None:
        raise BuildError("is a set of adopted tars", file=folder, remedy=RESTORE)


def _run_steps(
    repair: Repair,
    source: Against,
    drop: bool,
    follow_links: bool,
    pool: Pool,
    listener: ProgressListener,
) -> None:
    """The steps in order: each leaves less to do for those after it."""
    repair.restore_manifest()
    repair.restore_names()
    repair.remove_leftovers()
    from_source = None
    if source is not None:
        recipe = known_recipe(repair.manifest.features)
        from_source = SourcePayloads(sources_at(source, follow_links, recipe), repair.manifest)
    repair.rewrite_shards(from_source, listener)
    if from_source is not None:
        repair.rebuild(from_source.sources, pool, listener)
    repair.restore_indexes()
    if drop:
        repair.drop()
    if from_source is not None:
        repair.report.notes.extend(from_source.notes)


def _index_faults(folder: Path, manifest: Manifest) -> Iterator[Fault]:
    """Indexes that have the right sha256, but that no reader accepts."""
    for name, info in manifest.splits.items():
        try:
            Split(name, [Origin(FolderFiles(folder), manifest)])
        except CorruptShardError as error:
            yield Fault(info.index.file, "", error.what)
