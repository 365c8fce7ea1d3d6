"""A finished set that a program finds: is it what the program would make?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep.build.options import BuildOptions
from shardprep.build.plan import ShardTask, shard_tasks
from shardprep.build.program.new_set import source_of
from shardprep.build.report import BuildReport, SplitReport
from shardprep.build.shard import encode_matrix
from shardprep.errors import BuildError
from shardprep.format.index import NO_LABEL, scale_in
from shardprep.format.manifest import Features
from shardprep.format.quantised import is_rounded
from shardprep.read.shard_set import ShardSet, open_shards
from shardprep.read.split import Split
from shardprep.source.contents import Source
from shardprep.source.spool import Spooled, SpoolReader, version_of

_OTHER_SET = "Name another folder, or give overwrite=True to replace the set."


class FinishedSet:
    """A finished set: what is added must be what it holds."""

    def __init__(
        self, target: Path, n_mels: int, options: BuildOptions, features: Features | None
    ) -> None:
        self.closed = False
        self._target, self._options = target, options
        self._set: ShardSet = open_shards(target)
        self._splits: dict[str, Split] = {name: self._set[name] for name in self._set}
        self._places = {
            str(key): (split, index)
            for split in self._splits.values()
            for index, key in enumerate(split.keys)
        }
        self._kept = False
        manifest = self._set.manifest
        wanted = (n_mels, options.dtype, options.codec_info, options.record, features, None)
        found = (
            manifest.n_mels,
            manifest.dtype,
            manifest.codec,
            manifest.build,
            manifest.features,
            manifest.source_fingerprint,
        )
        names = ("n_mels", "dtype", "codec", "build", "features", "source_fingerprint")
        other = [n for n, a, b in zip(names, wanted, found, strict=True) if a != b]
        if other:
            raise self._other(f"the folder holds a finished set with other {', '.join(other)}")

    def take(
        self, key: str, stored: NDArray[np.floating], speaker: str | None, split: str | None
    ) -> Spooled:
        """See `Place`.

        Raises:
            BuildError: The finished set has another utterance of this key, or none.
            CorruptShardError: What it has is damaged.
        """
        if key not in self._places:
            raise self._other("the folder holds a finished set without this utterance", key)
        part, index = self._places[key]
        label = int(part.labels[index])
        found = None if label == NO_LABEL else self._set.speakers[label]
        if found != speaker:
            raise self._other(f"is of speaker {found} in the finished set, not {speaker}", key)
        if part.name not in ((split,) if split else ("train", "val")):
            raise self._other(f"is in {part.name} of the finished set", key)
        if not self._is_same(part, index, stored):
            raise self._other("the finished set has another matrix of this utterance", key)
        return Spooled(key, speaker, split, len(stored), version_of(stored))

    def keep(self, key: str) -> Spooled | None:
        """See `Place`."""
        if key not in self._places:
            return None
        self._kept = True
        part, index = self._places[key]
        label = int(part.labels[index])
        speaker = None if label == NO_LABEL else self._set.speakers[label]
        return Spooled(key, speaker, part.name, int(part.frames[index]), 1)

    def source(self, added: Mapping[str, Spooled], features: Features | None) -> Source:
        """See `Place`."""
        n_mels = self._set.manifest.n_mels
        reader = SpoolReader(self._target, "", n_mels, self._options.dtype)
        return source_of(added, reader, features)

    def finish(self, source: Source, added: list[Spooled]) -> BuildReport:
        """See `Place`.

        Raises:
            BuildError: The finished set has other utterances, or has them in another order.
        """
        if missing := self._places.keys() - {record.key for record in added}:
            raise self._other(
                f"the folder holds a finished set with {len(missing)} utterances more, such as "
                f"{min(missing)}"
            )
        # Nobody knows in which splits the program has put what it has not added again.
        tasks = [] if self._kept else shard_tasks(source, self._options)
        test = [u.key for u in source.test]
        has_test = list(self._splits["test"].keys) if "test" in self._splits else []
        if test != has_test or (tasks and _layout(tasks) != self._layout()):
            raise self._other("the folder holds a finished set in another order or other splits")
        report = BuildReport(str(self._target), speakers=len(source.speakers), up_to_date=True)
        for name, split in self._set.manifest.splits.items():
            size = sum(shard.bytes for shard in split.shards)
            report.splits[name] = SplitReport(split.samples, split.frames, len(split.shards), size)
        return report

    def close(self) -> None:
        """See `Place`."""
        self.closed = True

    def _layout(self) -> dict[str, list[str]]:
        """The keys of each shard, by its name."""
        found = {}
        for name, info in self._set.manifest.splits.items():
            keys, at = self._splits[name].keys.tolist(), 0
            for shard in info.shards:
                found[shard.file] = keys[at : at + shard.samples]
                at += shard.samples
        return found

    def _is_same(self, part: Split, index: int, stored: NDArray[np.floating]) -> bool:
        if self._options.codec == "none":
            row = part.locations[index]
            payload, scale = encode_matrix(stored, self._options.dtype, self._options.codec_info)
            same = len(stored) == int(row["frames"]) and zlib.crc32(payload) == int(row["crc32"])
            return same and scale == scale_in(row)
        # Another release of zstandard may have other bytes for the same matrix.
        return is_rounded(part.read(index), stored, self._options.dtype)

    def _other(self, what: str, key: str | None = None) -> BuildError:
        return BuildError(what, file=self._target, key=key, remedy=_OTHER_SET)


def _layout(tasks: list[ShardTask]) -> dict[str, list[str]]:
    return {task.plan.file: [u.key for u in task.plan.utterances] for task in tasks}
