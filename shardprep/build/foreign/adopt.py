"""Make a set of tars that another program wrote: an index, a manifest, and links to the tars.

The tars are read once, and never opened for writing. What reading a tar has found is kept in the
work folder, so that an adoption that was killed goes on. Links, index and manifest move to their
places as in a build.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from shardprep.build.foreign.choose import choose_member
from shardprep.build.foreign.join import Joined, join
from shardprep.build.foreign.scan import TarRecord, TarTask, file_state, scan_tar
from shardprep.build.foreign.tars import SPLITS, ForeignTar, find_tars
from shardprep.build.pools.local import LocalPool
from shardprep.build.pools.pool import ProgressListener
from shardprep.build.report import SplitReport, totals
from shardprep.build.shard import Advance
from shardprep.build.work import Publisher, publish_indexes, publish_rejects
from shardprep.build.work_folder import FolderWork
from shardprep.errors import BuildError, CorruptShardError, SourceError, StorageError
from shardprep.format.limits import MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, json_values
from shardprep.format.manifest import (
    FORMAT,
    VERSION,
    CodecInfo,
    Manifest,
    Reject,
    encode_manifest,
)
from shardprep.read.manifest_file import load_manifest
from shardprep.read.sidecars import check_file
from shardprep.source.dataset import rejects_error
from shardprep.storage.courtesies import NOT_HERE
from shardprep.storage.local import publish_bytes, read_at_most
from shardprep.storage.remote import Remote, locate
from shardprep.storage.trouble import machine_errors, storage_errors

SPEAKER_FIELD = "speaker"
# A record has at most as many bytes more than its tar.
_MOST_RECORD = 1 << 20
_REMEDY = "Correct the tars, or leave such utterances out with --on-error skip."


@dataclass
class AdoptReport:
    """What an adoption did.

    Attributes:
        destination: The shard folder.
        member: Extension of the members that have the matrices.
        dtype: Element type of the matrices.
        n_mels: Their columns.
        splits: Totals by split.
        speakers: Number of speakers.
        rejects: What was left out.
        notes: What a user should know about the result.
        tars_kept: Number of tars that an interrupted adoption had read.
        up_to_date: Whether the set was there already.
        bytes_read: Bytes of the tars read in this run.
        seconds: Time taken.
    """

    destination: str
    member: str
    dtype: str = ""
    n_mels: int = 0
    splits: dict[str, SplitReport] = field(default_factory=dict)
    speakers: int = 0
    rejects: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tars_kept: int = 0
    up_to_date: bool = False
    bytes_read: int = 0
    seconds: float = 0.0


def adopt_shards(
    tars: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    member: str | None = None,
    speaker: str | None = None,
    split: str | None = None,
    val: Sequence[str | os.PathLike[str]] = (),
    test: Sequence[str | os.PathLike[str]] = (),
    on_error: Literal["fail", "skip"] = "fail",
    overwrite: bool = False,
    workers: int = 0,
    listener: ProgressListener | None = None,
) -> AdoptReport:
    """Make a set of WebDataset tars of `.npy` matrices, without a copy of them.

    The set is a folder of links to the tars, with an index and a manifest. It is read as every
    other set, as long as the tars stay where they are.

    Args:
        tars: Files, folders, brace patterns or globs.
        destination: Folder for the set, made if necessary.
        member: Extension of the members that have the matrices, such as "mel.npy"; None for the
            only one that ends in npy.
        speaker: Field of the `.json` members that names the speaker. None for "speaker", or else
            what the `.cls` members say.
        split: Split of all `tars`; None to go by the names of the files and folders.
        val: Tars of the split val, named as `tars`.
        test: Tars of the split test, named as `tars`.
        on_error: "fail": an utterance that cannot be mapped stops the adoption; "skip": it is left
            out and listed.
        overwrite: Whether to replace a finished set of other contents.
        workers: Number of processes; 0 for the number of cores.
        listener: Receives the progress.

    Raises:
        SourceError: A tar is missing or none, or has what cannot be mapped.
        BuildError: The destination holds something else, or another build is running there; or an
            argument is wrong.
        StorageError: The disk failed, or has no symbolic links.
    """
    began = time.monotonic()
    listener = listener or ProgressListener()
    place = locate(destination)
    if isinstance(place, Remote):
        raise BuildError(
            "is a URL, and links to the tars need a folder of this machine",
            file=place,
            remedy="Name a folder.",
        )
    if split not in (None, *SPLITS):
        raise BuildError(f"is {split!r}, expected one of {', '.join(SPLITS)}", key="split")
    if on_error not in ("fail", "skip"):
        raise BuildError(f"is {on_error!r}, expected fail or skip", key="on_error")
    named = [tars] if isinstance(tars, str | os.PathLike) else list(tars)
    found = find_tars(named, place, split=split, val=val, test=test)
    chosen = choose_member(found, member)
    report = AdoptReport(str(place), chosen)
    tasks = [_task(tar, chosen, speaker or SPEAKER_FIELD) for tar in found]
    with FolderWork.claim(place, overwrite) as work:
        if work is None:
            listener.note("the folder holds a finished set: reading the tars, to compare")
        records = _read_tars(tasks, work, LocalPool(workers), listener, report)
        joined = join(list(zip(found, records, strict=True)), speaker)
        _fill_report(report, joined)
        if report.rejects and (on_error == "fail" or not joined.records):
            raise _rejects_error(report.rejects)
        if not joined.records:
            raise SourceError("has no utterance", file=found[0].shown)
        data, manifest = _manifest_of(work or _Nowhere(), joined, chosen)
        if work is None:
            _check_same(place, joined, data)
            report.up_to_date = True
        else:
            _make_links(work, joined)
            report.notes.extend(work.install(manifest.files(), data))
    report.seconds = time.monotonic() - began
    return report


def _task(tar: ForeignTar, member: str, speaker: str) -> TarTask:
    try:
        with machine_errors(tar.shown):
            state = file_state(os.stat(tar.path))
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=tar.shown) from None
    return TarTask(tar.path, tar.shown, member, speaker, state)


@dataclass(frozen=True)
class _Reading:
    """What a worker does with a tar: it reads it, and keeps the record in the work folder."""

    folder: Path | None

    def __call__(self, task: TarTask, advance: Advance) -> TarRecord:
        record = scan_tar(task, advance)
        if self.folder is not None:
            publish_bytes(_record_path(self.folder, task), msgspec.json.encode(record))
        return record


def _record_path(folder: Path, task: TarTask) -> Path:
    return folder / f"adopted-{hashlib.sha256(task.path.encode()).hexdigest()[:32]}.json"


def _read_tars(
    tasks: Sequence[TarTask],
    work: FolderWork | None,
    pool: LocalPool,
    listener: ProgressListener,
    report: AdoptReport,
) -> list[TarRecord]:
    """The record of every tar, in order: those that an earlier run has kept, and the others."""
    records: dict[str, TarRecord] = {}
    for task in tasks if work is not None else ():
        assert work is not None
        if (kept := _kept(work.folder, task)) is not None:
            records[kept.inputs] = kept
    report.tars_kept = len(records)
    missing = [task for task in tasks if task.inputs not in records]
    report.bytes_read = sum(task.size for task in missing)
    listener.start(len(missing), report.bytes_read)
    results = pool.run(_Reading(work.folder if work else None), missing, listener.advance)
    try:
        records.update((record.inputs, record) for record in results)
    finally:
        results.close()
        listener.close()
    return [records[task.inputs] for task in tasks]


def _kept(folder: Path, task: TarTask) -> TarRecord | None:
    """What an earlier run has found in a tar, if that is certain."""
    try:
        with machine_errors(folder):
            data = read_at_most(_record_path(folder, task), _MOST_RECORD + task.size)
        record = msgspec.json.decode(data, type=TarRecord)
    except (OSError, ValueError, RecursionError):
        return None
    return record if record.inputs == task.inputs else None


def _fill_report(report: AdoptReport, joined: Joined) -> None:
    report.dtype, report.n_mels = joined.dtype, joined.n_mels
    report.speakers, report.rejects = len(joined.speakers), joined.rejects
    report.notes.extend(joined.notes)
    report.splits = totals(joined.records)


def _rejects_error(rejects: Sequence[Reject]) -> SourceError:
    """The error for what cannot be mapped: the first, and how many there are of each kind."""
    error = rejects_error(rejects, Path())
    error.key, error.remedy = rejects[0].key or None, _REMEDY
    return error


class _Nowhere:
    """Publishes nothing: for comparing a set that is there."""

    def publish(self, name: str, data: bytes) -> None:
        """See `Work.publish`."""


def _manifest_of(work: Publisher, joined: Joined, member: str) -> tuple[bytes, Manifest]:
    """Write index and rejects; the manifest of the set, and its bytes."""
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        n_mels=joined.n_mels,
        dtype=joined.dtype,
        codec=CodecInfo("none"),
        features=None,
        speakers=joined.speakers,
        splits=publish_indexes(work, joined.records),
        rejects=publish_rejects(work, joined.rejects),
        source_fingerprint=None,
        build=None,
        member=member,
    )
    data = encode_manifest(manifest)
    if len(data) > MAX_MANIFEST_BYTES or json_values(data) > MAX_MANIFEST_VALUES:
        raise BuildError(
            f"the manifest of so many tars has {len(data)} bytes, more than readers accept",
            remedy="Adopt the tars as several sets.",
        )
    return data, manifest


def _make_links(work: FolderWork, joined: Joined) -> None:
    """Put the links to the tars into the work folder, in place of those of an earlier run."""
    for name, target in joined.targets.items():
        link = work.folder / name
        with storage_errors(link):
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(target)
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
                raise StorageError(
                    f"its file system makes no symbolic links ({error.strerror})",
                    file=work.target,
                    remedy="Name a folder on another file system; the tars may stay where they "
                    "are.",
                ) from error


def _check_same(place: Path, joined: Joined, data: bytes) -> None:
    """Make sure that a finished set is the one that would be made now.

    Raises:
        BuildError: It is not.
    """
    manifest = load_manifest(place)
    same = encode_manifest(manifest) == data
    for name, target in joined.targets.items() if same else ():
        same = same and os.path.realpath(place / name) == target
    with contextlib.suppress(CorruptShardError, OSError), storage_errors(place):
        for name, info in manifest.files().items():
            if same and name not in joined.targets:
                check_file(place / name, info)
        if same:
            return
    made = "adopted from other tars" if manifest.member else "built by `shardprep build`"
    raise BuildError(
        f"the folder holds a finished set that is damaged, or was {made} or with other options",
        file=place,
        remedy="Name another folder, or give --overwrite to replace the set.",
    )
