"""Build a shard set: plan it, write the shards that are missing, then indexes and manifest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace

from shardprep.build.existing.finished import (
    changed_since,
    check_same_build,
    differing,
    remember,
    times_of,
    versions_of,
)
from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask, shard_tasks, utterances_of
from shardprep.build.pools.local import LocalPool
from shardprep.build.pools.pool import Pool, ProgressListener, run_shards
from shardprep.build.pools.ray import RayPool
from shardprep.build.report import BuildReport, SplitReport, count_read, fill_report, note_repeats
from shardprep.build.shard import ShardRecord, check_shard
from shardprep.build.work import Work, publish_file, publish_indexes, publish_rejects
from shardprep.build.work_folder import FolderWork
from shardprep.build.work_store import StoreWork
from shardprep.errors import BuildError, ShardprepError, SourceError
from shardprep.format.limits import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, json_values
from shardprep.format.manifest import (
    FORMAT,
    SOURCE_TIMES_NAME,
    VERSION,
    Manifest,
    encode_manifest,
)
from shardprep.read.files import files_at
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import read_rejects
from shardprep.source.contents import Source
from shardprep.source.dataset import rejects_error
from shardprep.source.scan import scan_source
from shardprep.source.spool import spools
from shardprep.storage.remote import Location, Remote, locate


def build_shards(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: BuildOptions | None = None,
    listener: ProgressListener | None = None,
) -> BuildReport:
    """Pack a data set into a shard set, or finish a build that was interrupted.

    The same source, options and seed give the same bytes, for any number of workers and of
    interruptions (codec zstd: with the same release of zstandard).

    Args:
        source: Folder in the homework's layout or of recordings, a list of files, or Kaldi's data;
            or the URL of one (not Kaldi's). See `shardprep.source.scan`.
        destination: Folder for the shards, made if necessary, or a URL in an object store.
        options: How to build.
        listener: Receives the progress.

    Raises:
        SourceError: The data set is faulty. Finished shards are kept.
        BuildError: The destination holds something else, another build is running there, or a
            worker died.
        StorageError: The disk or the store failed.
    """
    began = time.monotonic()
    options = options or BuildOptions()
    listener = listener or ProgressListener()
    target = locate(destination)
    scanned = scan_source(
        source, follow_links=options.follow_links, n_mels=options.n_mels, recipe=options.recipe
    )
    if options.recipe is not None and scanned.features != options.recipe.to_features():
        raise SourceError(
            "says that its features were made by another recipe",
            file=scanned.root / scanned.listing,
            key="features",
            remedy="Leave the options of the recipe out, or pack the recordings.",
        )
    if scanned.rejects and options.on_error == "fail" and not options.dry_run:
        raise rejects_error(scanned.rejects, scanned.root)
    # A dry run finds all faults, also where the first one would stop a build.
    policy = "skip" if options.dry_run else options.on_error
    tasks = shard_tasks(scanned, replace(options, on_error=policy))
    if not tasks:
        raise nothing_to_pack(scanned)
    report = BuildReport(str(target), speakers=len(scanned.speakers), dry_run=options.dry_run)
    report.repeats = list(scanned.repeats)
    report.stops = options.on_error == "fail"
    note_repeats(report, scanned)
    if options.dry_run:
        count_read(report, utterances_of(tasks))
        pool = pool_of(options, scanned.root, None)
        fill_report(report, scanned, run_shards(tasks, check_shard, pool, listener))
    else:
        with claim(target, options.overwrite) as work:
            if work is None:
                _report_finished(report, target, scanned, options, tasks, listener)
            else:
                pool = pool_of(options, scanned.root, work.folder)
                records = write_missing(tasks, work, pool, listener, report)
                fill_report(report, scanned, records)
                if not report.splits:
                    raise rejects_error(report.rejects, scanned.root)
                publish_set(work, scanned, options, records, report)
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def claim(target: Location, overwrite: bool) -> Iterator[Work | None]:
    """See `Work.claim`.

    Raises:
        BuildError: Also where a ShardWriter has left a spool, which a build would remove.
    """
    if isinstance(target, Remote):
        with StoreWork.claim(target, overwrite) as stored:
            yield stored
        return
    with FolderWork.claim(target, overwrite) as work:
        if work is not None and not overwrite and (left := spools(work.folder)):
            raise BuildError(
                "holds what an interrupted program has added by ShardWriter",
                file=left[0],
                remedy="Run the program again, or name another folder, or remove this file.",
            )
        yield work


def pool_of(options: BuildOptions, source: Location, destination: Location | None) -> Pool:
    """Who carries out the tasks of a build."""
    if options.engine == "ray":
        return RayPool(options.workers, options.address, source, destination)
    return LocalPool(options.workers)


def nothing_to_pack(source: Source) -> ShardprepError:
    """The error for a source without an utterance that can be packed."""
    if source.rejects:
        return rejects_error(source.rejects, source.root)
    return SourceError("lists no utterance", file=source.root / source.listing)


def _report_finished(
    report: BuildReport,
    target: Location,
    source: Source,
    options: BuildOptions,
    tasks: list[ShardTask],
    listener: ProgressListener,
) -> None:
    """Accept a finished set if this build would make the same one; refuse any other."""
    manifest = load_manifest(target)
    check_same_build(manifest, target, source, options)
    if changed := changed_since(target, source):
        listener.note(
            f"{len(changed)} of {len(source.utterances)} files of the data set may have changed "
            "since the set was built, by their times; comparing their contents"
        )
        count_read(report, changed)
        pool = pool_of(options, source.root, None)
        other = differing(manifest, target, source, tasks, changed, pool, listener)
        if other:
            raise BuildError(
                f"{len(other)} of {len(source.utterances)} files of the data set are not those "
                f"that the set was built from, such as {other[0].path}",
                file=target,
                remedy="Compare them with `shardprep verify --against`, or build the set again "
                "with --overwrite.",
            )
        times = times_of(source.fingerprint, versions_of(source))
        if (note := remember(target, times)) is not None:
            report.notes.append(note)
    elif isinstance(source.root, Remote):
        # Web servers give times that a copy can keep, and tags made of them.
        report.notes.append(
            "the store's times and tags say that no file has changed; `shardprep verify DST "
            "--against SRC` compares the contents"
        )
    report.up_to_date = True
    report.features = manifest.features
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        report.splits[name] = SplitReport(split.samples, split.frames, len(split.shards), size)
    lines = read_rejects(files_at(target), manifest)
    report.rejects = [line for line in lines if line.repeats is None]


def write_missing(
    tasks: list[ShardTask],
    work: Work,
    pool: Pool,
    listener: ProgressListener,
    report: BuildReport,
) -> list[ShardRecord]:
    """Write every shard that an earlier run has not finished; the records of all, in order."""
    # Where a place does not say whether a file has changed, a shard of an earlier run may hold
    # another file than there is now.
    records = work.keep_finished(
        [task for task in tasks if all(utterance.version for utterance in task.plan.utterances)]
    )
    report.shards_kept = len(records)
    missing = [task for task in tasks if task.plan.file not in records]
    count_read(report, utterances_of(missing))
    for record in run_shards(missing, work, pool, listener):
        records[record.info.file] = record
    return [records[task.plan.file] for task in tasks]


def publish_set(
    work: Work,
    source: Source,
    options: BuildOptions,
    records: list[ShardRecord],
    report: BuildReport,
    *,
    of_files: bool = True,
) -> None:
    """Write indexes, rejects.jsonl and manifest, and move the complete set to its place.

    Args:
        work: The unfinished build.
        source: What was packed.
        options: The options of the build.
        records: The records of all shards, in order.
        report: The report, with rejects and repeats.
        of_files: Whether a later build can compare the set with the files of its source.
    """
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        n_mels=source.n_mels,
        dtype=options.dtype,
        codec=options.codec_info,
        features=source.features,
        speakers=source.speakers,
        splits=publish_indexes(work, records),
        rejects=publish_rejects(work, [*report.rejects, *report.repeats]),
        source_fingerprint=source.fingerprint if of_files else None,
        build=options.record,
    )
    data = encode_manifest(manifest)
    check_manifest_size(data, work.target)
    files = manifest.files()
    if of_files:
        times = times_of(source.fingerprint, versions_of(source))
        files[SOURCE_TIMES_NAME] = publish_file(work, SOURCE_TIMES_NAME, times)
    report.notes.extend(work.install(files, data))


def check_manifest_size(data: bytes, target: Location) -> None:
    """BuildError if readers would refuse a manifest for its size."""
    if len(data) > MAX_MANIFEST_BYTES or json_values(data) > MAX_MANIFEST_VALUES:
        raise BuildError(
            f"the manifest of so many shards and speakers has {len(data)} bytes, more than "
            "readers accept",
            file=target,
            remedy="Give a larger --samples-per-shard, or split the data set.",
        )
