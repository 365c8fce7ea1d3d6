"""Build a shard set: plan, write the shards that are not there yet, then index and manifest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardPlan, plan_shards
from shardprep.build.pool import Advance, run_tasks
from shardprep.build.pool_ray import run_on_ray
from shardprep.build.shard import ShardRecord, ShardTask, write_shard
from shardprep.build.work import Work, publish_indexes, publish_rejects, split_of
from shardprep.build.work_folder import FolderWork, claim
from shardprep.build.work_store import claim_store
from shardprep.errors import BuildError, ShardprepError, SourceError
from shardprep.format.limits import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, json_values
from shardprep.format.manifest import (
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    Manifest,
    Reject,
    encode_manifest,
)
from shardprep.read.files import files_at
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import read_rejects
from shardprep.source.dataset import Source, scan_dataset, source_error
from shardprep.source.metadata import METADATA
from shardprep.storage.local import storage_errors
from shardprep.storage.remote import Location, Remote, locate, modified_ns

_CLOCKS_DIFFER_NS = 60 * 10**9


@dataclass
class SplitReport:
    """Totals of a split: utterances, mel frames, shards, bytes of the shards."""

    samples: int = 0
    frames: int = 0
    shards: int = 0
    bytes: int = 0


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        destination: The shard folder.
        splits: Totals by split.
        speakers: Number of speakers.
        rejects: Utterances left out.
        notes: What a user should know of the result.
        shards_kept: Shards taken over from an unfinished build.
        up_to_date: The set was there already, from the same source and options.
        dry_run: Nothing was written.
        utterances_read: Utterances read in this run.
        source_bytes: Bytes of `.pt` files read in this run.
        seconds: Time taken.
    """

    destination: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    speakers: int = 0
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shards_kept: int = 0
    up_to_date: bool = False
    dry_run: bool = False
    utterances_read: int = 0
    source_bytes: int = 0
    seconds: float = 0.0


class ProgressListener:
    """Told how a build goes; the default ignores it."""

    def start(self, utterances: int, nbytes: int) -> None:
        """The utterances and bytes that are to be read."""

    def advance(self, utterances: int, nbytes: int) -> None:
        """Read since the last call."""

    def close(self) -> None:
        """No more is to come."""


def build_shards(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: BuildOptions | None = None,
    listener: ProgressListener | None = None,
) -> BuildReport:
    """Pack a data set folder into a shard set, or finish a build that was interrupted.

    The same source, options and seed give the same bytes, whatever the number of workers and
    of interruptions (with the same release of zstandard, for that codec).

    Args:
        source: Folder in the homework's layout, or its URL; see `shardprep.source.dataset`.
        destination: Folder for the shards, made if need be, or the URL of one in an object store.
        options: How to build. With more than one worker, a script must call this under
            `if __name__ == "__main__":`, as always where Python starts processes.
        listener: Told of progress.

    Raises:
        SourceError: The data set is not as it should be; what was finished is kept.
        BuildError: The destination holds something else, another build runs there, or a worker
            died.
        StorageError: The disk or the store refused.
    """
    began = time.monotonic()
    options = options or BuildOptions()
    listener = listener or ProgressListener()
    target = locate(destination)
    scanned = scan_dataset(source)
    if scanned.rejects and options.on_error == "fail":
        raise _first_of(scanned)
    tasks = shard_tasks(scanned, options)
    if not tasks:
        raise _nothing_to_pack(scanned)
    report = BuildReport(str(target), speakers=len(scanned.speakers), dry_run=options.dry_run)
    if options.dry_run:
        records = _run(tasks, check_shard, options, listener, report)
        _fill_report(report, scanned, records)
    else:
        with _claim(target, options.overwrite) as work:
            if work is None:
                _report_finished(report, target, scanned, options)
            else:
                records = _write_missing(tasks, work, options, listener, report)
                _fill_report(report, scanned, records)
                _publish_set(work, scanned, options, records, report)
    report.seconds = time.monotonic() - began
    return report


@contextlib.contextmanager
def _claim(target: Location, overwrite: bool) -> Iterator[Work | None]:
    if isinstance(target, Remote):
        with claim_store(target, overwrite) as work:
            yield work
    else:
        with claim(target, overwrite) as folder:
            yield None if folder is None else FolderWork(folder)


def _first_of(source: Source) -> ShardprepError:
    error = source_error(source.rejects[0], source.root)
    if len(source.rejects) > 1:
        error.what += f" (and {len(source.rejects) - 1} more utterances are faulty)"
    return error


def _nothing_to_pack(source: Source) -> ShardprepError:
    if source.rejects:
        return _first_of(source)
    return SourceError("lists no utterance", file=source.root / METADATA, key="speakers")


def shard_tasks(source: Source, options: BuildOptions) -> list[ShardTask]:
    """Every shard that a build with these options has to write, in order."""
    plans = plan_shards(
        source,
        val_fraction=options.val_fraction,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
    )

    def task(plan: ShardPlan) -> ShardTask:
        return ShardTask(
            plan,
            source.root,
            source.n_mels,
            options.dtype,
            options.codec_info,
            options.on_error == "skip",
        )

    return [task(plan) for shards in plans.values() for plan in shards]


def _report_finished(
    report: BuildReport, target: Location, source: Source, options: BuildOptions
) -> None:
    """Accept a finished set that is what this build would make; refuse any other."""
    manifest = load_manifest(target)
    wanted = (source.fingerprint, options.record, options.dtype, options.codec_info)
    found = (
        manifest.source_fingerprint,
        manifest.build,
        manifest.dtype,
        manifest.codec,
    )
    if wanted != found:
        raise BuildError(
            "the folder holds a finished set, built from another source or with other options",
            file=target,
            remedy="Name another folder, or give --overwrite to replace the set.",
        )
    present, built_ns = _present(target)
    # Stores have clocks of their own, and count whole seconds.
    between = isinstance(target, Remote) or isinstance(source.root, Remote)
    late_ns = built_ns + (_CLOCKS_DIFFER_NS if between else 0)
    newer = [u for u in (*source.labelled, *source.test) if u.mtime_ns > late_ns]
    if newer:
        raise BuildError(
            f"the set is older than {len(newer)} files of the data set, such as {newer[0].path}",
            file=target,
            remedy="Compare them with `shardprep verify --against`, or build anew by --overwrite.",
        )
    for name, info in manifest.files().items():
        if present.get(name) != info.bytes:
            raise BuildError(
                f"{name} of the finished set is missing or has another size",
                file=target,
                remedy="Give --overwrite to build the set anew.",
            )
    report.up_to_date = True
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        report.splits[name] = SplitReport(split.samples, split.frames, len(split.shards), size)
    report.rejects = list(read_rejects(files_at(target), manifest))


def _present(target: Location) -> tuple[dict[str, int], int]:
    """Sizes of the files in a place, by name, and when its manifest was written [ns]."""
    if isinstance(target, Remote):
        found = target.listing()
        return {name: info["size"] for name, info in found.items()}, modified_ns(
            found[MANIFEST_NAME]
        )
    with storage_errors(target):
        present = {path.name: path.stat().st_size for path in target.iterdir()}
        return present, (target / MANIFEST_NAME).stat().st_mtime_ns


def _write_missing(
    tasks: list[ShardTask],
    work: Work,
    options: BuildOptions,
    listener: ProgressListener,
    report: BuildReport,
) -> list[ShardRecord]:
    """Write every shard that is not there whole; returns the records of all, in order."""
    kept = work.keep_finished(tasks)
    report.shards_kept = len(kept)
    missing = [task for task in tasks if task.plan.file not in kept]
    for record in _run(missing, work, options, listener, report):
        kept[record.info.file] = record
    return [kept[task.plan.file] for task in tasks]


def check_shard(task: ShardTask, advance: Advance) -> ShardRecord:
    """The record of a shard, without writing it."""
    with open(os.devnull, "wb") as nowhere:
        return write_shard(task, nowhere, advance)


def _run(
    tasks: list[ShardTask],
    work: Callable[[ShardTask, Advance], ShardRecord],
    options: BuildOptions,
    listener: ProgressListener,
    report: BuildReport,
) -> list[ShardRecord]:
    utterances = [utterance for task in tasks for utterance in task.plan.utterances]
    report.utterances_read = len(utterances)
    report.source_bytes = sum(utterance.nbytes for utterance in utterances)
    return run_shards(
        tasks, work, options.workers, listener, engine=options.engine, address=options.address
    )


def run_shards(
    tasks: list[ShardTask],
    work: Callable[[ShardTask, Advance], ShardRecord],
    workers: int,
    listener: ProgressListener,
    *,
    engine: str = "local",
    address: str | None = None,
) -> list[ShardRecord]:
    """Carry out shard tasks, on `workers` processes or on Ray; records as they came.

    Args:
        tasks: What to do.
        work: How to do one.
        workers: Processes, 0 for the cores; with Ray, tasks at a time, 0 for its CPUs.
        listener: Told of progress.
        engine: "local" or "ray".
        address: Of a Ray cluster; None to start Ray on this machine.
    """
    utterances = [utterance for task in tasks for utterance in task.plan.utterances]
    listener.start(len(utterances), sum(utterance.nbytes for utterance in utterances))
    if engine == "ray":
        folder = work.work if isinstance(work, FolderWork) else None
        places = (tasks[0].root if tasks else None, folder)
        results = run_on_ray(work, tasks, workers, listener.advance, address, places)
    else:
        results = run_tasks(work, tasks, workers or len(os.sched_getaffinity(0)), listener.advance)
    try:
        return list(results)
    finally:
        results.close()
        listener.close()


def _fill_report(report: BuildReport, source: Source, records: list[ShardRecord]) -> None:
    labels: dict[str, set[int]] = {"train": set(), "val": set()}
    for record in records:
        # A shard all of whose utterances were rejected is left out, and so is such a split.
        if record.info.samples:
            split = report.splits.setdefault(split_of(record), SplitReport())
            split.samples += record.info.samples
            split.frames += record.info.frames
            split.shards += 1
            split.bytes += record.info.bytes
            labels.setdefault(split_of(record), set()).update(row.label for row in record.rows)
    report.rejects = [*source.rejects, *(r for record in records for r in record.rejects)]
    if "val" not in report.splits:
        report.notes.append("there is no val split: no speaker can spare an utterance for it")
    if unheard := sorted(source.speakers[label] for label in labels["val"] - labels["train"]):
        report.notes.append(f"in val, but not in train, are the speakers {', '.join(unheard)}")


def _publish_set(
    work: Work,
    source: Source,
    options: BuildOptions,
    records: list[ShardRecord],
    report: BuildReport,
) -> None:
    """Write the index files and rejects.jsonl, and move the complete set to its place."""
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        n_mels=source.n_mels,
        dtype=options.dtype,
        codec=options.codec_info,
        speakers=source.speakers,
        splits=publish_indexes(work, records),
        rejects=publish_rejects(work, report.rejects),
        source_fingerprint=source.fingerprint,
        build=options.record,
    )
    data = encode_manifest(manifest)
    if len(data) > MAX_MANIFEST_BYTES or json_values(data) > MAX_MANIFEST_VALUES:
        raise BuildError(
            f"the manifest of so many shards and speakers has {len(data)} bytes, more than "
            "readers take",
            file=work.target,
            remedy="Give a larger --samples-per-shard, or split the data set.",
        )
    work.install(manifest.files(), data)
