"""A set that a program makes anew: a spool first, then shards as a build writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardprep.build.options import BuildOptions
from shardprep.build.plan import shard_tasks
from shardprep.build.pools.local import LocalPool
from shardprep.build.pools.pool import ProgressListener
from shardprep.build.program.arguments import SPLITS
from shardprep.build.report import BuildReport, fill_report
from shardprep.build.work_folder import FolderWork
from shardprep.build.writer import publish_set, write_missing
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import Features
from shardprep.source.contents import Source
from shardprep.source.spool import Spool, Spooled, SpoolReader, version_of


class Place(Protocol):
    """What a writer does with what is added: in a new set, or beside a finished one."""

    closed: bool

    def take(
        self, key: str, stored: NDArray[np.floating], speaker: str | None, split: str | None
    ) -> Spooled:
        """Take an utterance."""

    def keep(self, key: str) -> Spooled | None:
        """What an earlier run has of an utterance."""

    def source(self, added: Mapping[str, Spooled], features: Features | None) -> Source:
        """What was added, as a source."""

    def finish(self, source: Source, added: list[Spooled]) -> BuildReport:
        """Publish the set, or make sure that it is there."""

    def close(self) -> None:
        """Close the files."""


class NewSet:
    """A new set: what is added goes to the spool, and is packed at the end."""

    def __init__(self, work: FolderWork, n_mels: int, options: BuildOptions) -> None:
        self.closed = False
        self._work, self._options = work, options
        self._spool = Spool(work.folder, n_mels, options.dtype)

    def take(
        self, key: str, stored: NDArray[np.floating], speaker: str | None, split: str | None
    ) -> Spooled:
        """See `Place`: what an earlier run has spooled is not spooled again."""
        found = self._spool.found.get(key)
        if found is not None:
            same = (found.speaker, found.split, found.frames) == (speaker, split, len(stored))
            if same and found.version == version_of(stored) and self._spool.is_intact(found):
                return found
        return self._spool.append(key, stored, speaker, split)

    def keep(self, key: str) -> Spooled | None:
        """See `Place`."""
        found = self._spool.found.get(key)
        return found if found is not None and self._spool.is_intact(found) else None

    def source(self, added: Mapping[str, Spooled], features: Features | None) -> Source:
        """See `Place`."""
        return source_of(added, self._spool.reader, features)

    def finish(self, source: Source, added: list[Spooled]) -> BuildReport:
        """See `Place`."""
        report = BuildReport(str(self._work.target), speakers=len(source.speakers))
        tasks = shard_tasks(source, self._options)
        pool = LocalPool(self._options.workers)
        records = write_missing(tasks, self._work, pool, ProgressListener(), report)
        fill_report(report, source, records)
        publish_set(self._work, source, self._options, records, report, of_files=False)
        return report

    def close(self) -> None:
        """See `Place`."""
        self.closed = True
        self._spool.close()


def source_of(
    added: Mapping[str, Spooled], reader: SpoolReader, features: Features | None
) -> Source:
    """What was added, as a source: speakers in sorted order, the test split as it was added."""
    names = {record.speaker for record in added.values() if record.speaker is not None}
    speakers = tuple(sorted(names))
    labels: dict[str | None, int] = {name: label for label, name in enumerate(speakers)}
    parts: dict[str | None, list[Any]] = {None: [], **{name: [] for name in SPLITS}}
    for record in added.values():
        own = parts[record.split]
        entry = len(own) if record.split == "test" else None
        own.append(reader.utterance(record, labels.get(record.speaker, NO_LABEL), entry))
    return Source(
        reader,
        reader.n_mels,
        speakers,
        tuple(parts[None]),
        tuple(parts["test"]),
        (),
        features=features,
        fixed={name: tuple(parts[name]) for name in ("train", "val") if parts[name]},
    )
