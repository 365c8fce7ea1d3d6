"""Append a data set to a finished set: its new utterances become new shards.

No shard of the set is touched. Index files, rejects.jsonl and the manifest are written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from shardprep.audio.recipe import known_recipe
from shardprep.build.existing.additions import (
    Held,
    additions,
    append_tasks,
    conflicts,
    own_options,
)
from shardprep.build.existing.finished import (
    changed_files,
    check_sizes,
    differing,
    read_again,
    remember,
    remembered,
    times_of,
)
from shardprep.build.options import BuildOptions
from shardprep.build.plan import shard_tasks, utterances_of
from shardprep.build.pools.pool import Pool, ProgressListener, run_shards
from shardprep.build.report import (
    BuildReport,
    SplitReport,
    count_read,
    note_repeats,
    note_untrained,
    totals,
)
from shardprep.build.shard import ShardRecord, check_shard
from shardprep.build.work import Work, publish_file, publish_rejects, split_of
from shardprep.build.work_folder import has_pending
from shardprep.build.writer import (
    check_manifest_size,
    claim,
    nothing_to_pack,
    pool_of,
    write_missing,
)
from shardprep.errors import BuildError
from shardprep.format.index import encode_index, index_rows
from shardprep.format.limits import MAX_REJECTS_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    SOURCE_TIMES_NAME,
    FileInfo,
    Manifest,
    Reject,
    SplitInfo,
    encode_manifest,
    index_name,
    other_features,
)
from shardprep.read.joined import joined_rows
from shardprep.read.manifest_file import load_manifest
from shardprep.source.contents import Source
from shardprep.source.dataset import rejects_error
from shardprep.source.scan import scan_source
from shardprep.storage.remote import Location, locate
from shardprep.storage.trouble import storage_errors

_ORDER = ("train", "val", "test")


def append_shards(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: BuildOptions | None = None,
    listener: ProgressListener | None = None,
    *,
    given: Collection[str] = (),
) -> BuildReport:
    """Add the new utterances of a data set to a finished set, as new shards.

    The shards of the set stay as they are. Utterances that the set has already, by their keys, are
    compared with it and left out; so the data set may be the old one, extended. The result holds
    what `open_shards([destination, B])` gives, where B is a set of the new utterances alone.

    Args:
        source: The data set, as for `build_shards`.
        destination: The finished set: a folder, or a URL in an object store.
        options: How to build. Options that decide the bytes are those of the set; others than
            these are refused. `on_error` is that of the set too, unless it is "skip" here.
        listener: Receives the progress.
        given: Names of options that count as asked for even if they have their default.

    Returns:
        The report; `added` is what is new.

    Raises:
        SourceError: The data set is faulty.
        FormatError: There is no complete set.
        BuildError: The set was not made by a build, or with other options; it has other utterances
            of the same keys; or another build is running there.
        CorruptShardError: An index or rejects.jsonl of the set is damaged.
        StorageError: The disk or a store failed.
    """
    began = time.monotonic()
    options = options or BuildOptions()
    if options.overwrite:
        raise BuildError("goes with a build, not with an append", key="overwrite")
    target = locate(destination)
    if isinstance(target, Path):
        with storage_errors(target):
            pending = has_pending(target)
        if not pending:
            # Raises before anything is written in a folder that holds no set.
            load_manifest(target)
    report = BuildReport(str(target), dry_run=options.dry_run)
    with contextlib.ExitStack() as held:
        # This completes an append that was interrupted while it put its files into place.
        work = None if options.dry_run else held.enter_context(claim(target, overwrite=True))
        recipe = options.recipe or known_recipe(load_manifest(target).features)
        if recipe is not None and options.recipe is None and options.n_mels is not None:
            recipe = replace(recipe, n_mels=options.n_mels)
        scanned = scan_source(
            source, follow_links=options.follow_links, n_mels=options.n_mels, recipe=recipe
        )
        if not scanned.utterances:
            raise nothing_to_pack(scanned)
        append = _Append(
            target, scanned, options, frozenset(given), work, listener or ProgressListener(), report
        )
        append.run()
    report.seconds = time.monotonic() - began
    return report


def appended_fingerprint(former: str, added: str) -> str:
    """The source fingerprint of a set with source fingerprint `former` after appending `added`."""
    return hashlib.sha256(f"{former}\n{added}".encode()).hexdigest()


class _Append:
    """One append; `work` is None for a dry run."""

    def __init__(
        self,
        target: Location,
        source: Source,
        options: BuildOptions,
        given: frozenset[str],
        work: Work | None,
        listener: ProgressListener,
        report: BuildReport,
    ) -> None:
        self.target, self.source, self.work = target, source, work
        self.listener, self.report = listener, report
        self.held = Held.at(target)
        self.manifest = self.held.manifest
        self.options = own_options(self.manifest, target, options, given)
        # To overwrite the set would leave only what is new.
        check_sizes(self.manifest, target, "First restore it with `shardprep repair`.")
        _check_alike(self.manifest, target, source)
        self.pool: Pool = pool_of(self.options, source.root, None if work is None else work.folder)
        report.stops = self.options.on_error == "fail"
        if source.rejects and report.stops and work is not None:
            raise rejects_error(source.rejects, source.root)
        self.versions = {u.key: u.version for u in source.utterances}
        self.before = remembered(target, self.manifest.source_fingerprint, self.held.keys)

    def run(self) -> None:
        """Compare what the set has, pack what it has not, and publish it."""
        compared = self._compare()
        new = additions(self.held, self.source, self._whole())
        options = replace(self.options, on_error="skip") if self.work is None else self.options
        tasks = append_tasks(self.held, new, options)
        if self.work is None:
            count_read(self.report, utterances_of(tasks))
            records = run_shards(tasks, check_shard, self.pool, self.listener)
        else:
            records = write_missing(tasks, self.work, self.pool, self.listener, self.report)
        self._fill_report(new, records)
        lines = [*self.report.rejects, *self.report.repeats]
        self.report.up_to_date = not (
            self.report.added or lines or new.speakers != self.manifest.speakers
        )
        if self.work is None:
            return
        if not self.report.up_to_date:
            self._publish(self.work, new.speakers, records, lines)
            return
        self.work.remove()
        if compared and (fingerprint := self.manifest.source_fingerprint) is not None:
            times = times_of(fingerprint, self._versions(self.held.keys))
            if (note := remember(self.target, times)) is not None:
                self.report.notes.append(note)

    def _compare(self) -> bool:
        """Make sure that the source has what the set has of it; whether files were read for this.

        Raises:
            BuildError: It has other utterances of the same keys.
        """
        known = [u for u in self.source.utterances if u.key in self.held.packed]
        self.report.present = len(known)
        other = [(u, f", which {what}") for u, what in conflicts(self.held, self.source)]
        changed = changed_files(known, self.before)
        if changed and not other:
            self.listener.note(
                f"{len(changed)} of {len(known)} files that the set has already may have changed, "
                "by their times; comparing their contents"
            )
            tasks = shard_tasks(self.source, self.options)
            count_read(self.report, changed)
            differ = differing(
                self.manifest, self.target, self.source, tasks, changed, self.pool, self.listener
            )
            other = [(u, "") for u in differ]
        if other:
            utterance, what = other[0]
            raise BuildError(
                f"{len(other)} of {len(known)} utterances of {self.source.root} whose keys the set "
                f"has are not those of the set, such as {utterance.path}{what}",
                file=self.target,
                remedy="Rename the files if they are new utterances. To replace those of the set, "
                "build a new one.",
            )
        return bool(changed)

    def _whole(self) -> set[str]:
        """Keys that the set has left out, and whose files are undamaged now."""
        keys = {u.key for u in self.source.utterances} & self.held.left_out.keys()
        if not keys:
            return set()
        tasks = shard_tasks(self.source, self.options)
        found = read_again(tasks, keys, self.pool, self.listener)
        whole = {key for key, row in found.items() if not isinstance(row, str)}
        late = sorted(key for key in whole if self.held.left_out[key].split == "test")
        if late:
            self.report.notes.append(
                f"{len(late)} test entries that the set has left out are undamaged now, such as "
                f"{late[0]}; only a new build can put them in their places"
            )
        return whole

    def _fill_report(self, new: Source, records: Sequence[ShardRecord]) -> None:
        report = self.report
        report.added = totals(records)
        report.speakers = len(new.speakers)
        report.features = new.features
        report.new_speakers = len(new.speakers) - len(self.manifest.speakers)
        report.rejects = [*new.rejects, *(r for record in records for r in record.rejects)]
        report.repeats = list(new.repeats)
        note_repeats(report, new)
        train = self.held.indexes.get("train")
        trained = set() if train is None else set(np.unique(train["label"]).tolist())
        note_untrained(report, new.speakers, records, trained)
        for name in _in_order({*self.manifest.splits, *report.added}):
            total = report.splits[name] = SplitReport()
            if (split := self.manifest.splits.get(name)) is not None:
                size = sum(shard.bytes for shard in split.shards)
                total.add(SplitReport(split.samples, split.frames, len(split.shards), size))
            total.add(report.added.get(name, SplitReport()))

    def _publish(
        self,
        work: Work,
        speakers: tuple[str, ...],
        records: Sequence[ShardRecord],
        lines: Sequence[Reject],
    ) -> None:
        """Write indexes, rejects.jsonl and manifest, and move them and the new shards."""
        packed = {row.key for record in records for row in record.rows}
        kept = [x for x in self.held.lines if x.key not in packed or x.repeats is not None]
        former, build = self.manifest.source_fingerprint, self.manifest.build
        assert build is not None
        skips = "skip" if "skip" in (build.on_error, self.options.on_error) else "fail"
        manifest = msgspec.structs.replace(
            self.manifest,
            speakers=speakers,
            splits=self._splits(work, records, len(speakers)),
            rejects=_checked(publish_rejects(work, [*kept, *lines]), self.target),
            source_fingerprint=former and appended_fingerprint(former, self.source.fingerprint),
            build=msgspec.structs.replace(build, on_error=skips),
        )
        data = encode_manifest(manifest)
        check_manifest_size(data, self.target)
        files = manifest.files()
        if (fingerprint := manifest.source_fingerprint) is not None:
            keys = {*self.held.packed, *packed, *(x.key for x in (*kept, *lines) if x.key)}
            times = times_of(fingerprint, self._versions(keys))
            files[SOURCE_TIMES_NAME] = publish_file(work, SOURCE_TIMES_NAME, times)
        # With this file, any later build or repair finishes what is killed while files move.
        work.publish(MANIFEST_NAME, data)
        self.report.notes.extend(work.install(files, data))

    def _splits(
        self, work: Work, records: Sequence[ShardRecord], speakers: int
    ) -> dict[str, SplitInfo]:
        """The splits with their new shards; writes the indexes that change."""
        by_split: dict[str, list[ShardRecord]] = {}
        for record in records:
            if record.info.samples:
                by_split.setdefault(split_of(record), []).append(record)
        found = {}
        for name in _in_order({*self.manifest.splits, *by_split}):
            old, new = self.manifest.splits.get(name), by_split.get(name)
            if new is None:
                found[name] = self.manifest.splits[name]
                continue
            rows = index_rows(record.rows for record in new)
            shards = () if old is None else old.shards
            if old is not None:
                labels = np.arange(speakers, dtype=np.int32)
                before = (self.held.indexes[name], rows)
                rows = joined_rows(before, [len(old.shards), len(new)], [labels, labels])
            shards = (*shards, *(record.info for record in new))
            found[name] = SplitInfo(
                samples=sum(shard.samples for shard in shards),
                frames=sum(shard.frames for shard in shards),
                index=publish_file(work, index_name(name), encode_index(rows)),
                shards=shards,
            )
        return found

    def _versions(self, keys: Collection[str]) -> dict[str, int]:
        """What the files of these keys looked like last; 0 where unknown."""
        return {key: self.versions.get(key, self.before.get(key, 0)) for key in keys}


def _check_alike(manifest: Manifest, target: Location, source: Source) -> None:
    """BuildError if a set and a source differ in what all utterances of a set have in common."""
    if source.n_mels != manifest.n_mels:
        key = "n_mels"
        what = f"the set has n_mels {manifest.n_mels}, and {source.root} has {source.n_mels}"
    elif source.features != manifest.features:
        key = "features"
        other = other_features(manifest.features, source.features)
        what = f"the set has features that {source.root} has not ({other})"
    else:
        return
    remedy = "Build the data set into a folder of its own."
    raise BuildError(what, file=target, key=key, remedy=remedy)


def _checked(rejects: FileInfo | None, target: Location) -> FileInfo | None:
    if rejects is not None and rejects.bytes > MAX_REJECTS_BYTES:
        raise BuildError(
            f"rejects.jsonl would have more than the {MAX_REJECTS_BYTES} bytes that readers accept",
            file=target,
            remedy="Correct the data set.",
        )
    return rejects


def _in_order(names: Collection[str]) -> list[str]:
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else 3, name))
