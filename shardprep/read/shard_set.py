"""Open a shard set, in a folder or behind a URL."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.errors import FormatError
from shardprep.format.entries import Entry, merged_entries
from shardprep.format.manifest import Manifest, Reject
from shardprep.read.files import Files, files_at
from shardprep.read.sidecars import read_rejects
from shardprep.read.split import Split
from shardprep.storage.local import lasting
from shardprep.storage.remote import locate


class ShardSet(Mapping[str, Split]):
    """An open shard set: `shard_set["train"]` is a `Split`.

    Attributes:
        path: Folder or URL.
        manifest: The contents of manifest.json.
    """

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self.path = files.place
        self.manifest = manifest
        self._files = files
        self._open: dict[str, Split] = {}

    @property
    def speakers(self) -> tuple[str, ...]:
        """Speaker names; the position is the label."""
        return self.manifest.speakers

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.manifest.splits)

    @functools.cached_property
    def rejects(self) -> tuple[Reject, ...]:
        """Entries of the data set that have no utterance of their own, and why.

        Those that the build left out, and entries of testdata.json that list a file again.

        Raises:
            CorruptShardError: rejects.jsonl is missing or damaged.
        """
        return read_rejects(self._files, self.manifest)

    @functools.cached_property
    def test_entries(self) -> tuple[Entry, ...]:
        """Every entry of testdata.json in its order, with or without an utterance in the shards.

            for entry in shard_set.test_entries:
                entry.file, entry.index    # a file, and its position in shard_set["test"] or None

        Raises:
            CorruptShardError: The index of the split test or rejects.jsonl is missing or damaged.
        """
        keys = self["test"].keys.tolist() if "test" in self.manifest.splits else []
        return merged_entries(keys, self.rejects)

    def fetch(self, split: str) -> list[Path]:
        """The shard files of a split on this machine, fetched if the set is behind a URL.

        Fetched files stay in the cache as long as this object exists.

        Raises:
            CorruptShardError: The store lacks a shard, or has one with other bytes.
            StorageError: The store cannot be reached, or the cache has no room for all shards.
        """
        shards = self.manifest.splits[split].shards
        self._files.check_room(sum(shard.bytes for shard in shards))
        with ThreadPoolExecutor(DOWNLOADS) as threads:
            return list(threads.map(self._files.local, shards))

    @property
    def network_seconds(self) -> float:
        """Seconds that readers of this process waited for shards to come from a store."""
        return self._files.waited

    def __getitem__(self, name: str) -> Split:
        """Open a split; the next call gives the same object.

        Raises:
            FormatError: The set has no such split.
            CorruptShardError: The split's index is damaged, or a shard is missing or has another
                size than the manifest says.
        """
        if name not in self.manifest.splits:
            raise FormatError(
                f"there is no split {name!r}; the set has {', '.join(self.splits)}", file=self.path
            )
        if name not in self._open:
            split = Split(self._files, name, self.manifest)
            split.check_sizes()
            self._open[name] = split
        return self._open[name]

    def check_unchanged(self) -> None:
        """Make sure that the set that was opened is still there; costs a `stat` or a request.

        Raises:
            CorruptShardError: The place holds another set, or none.
        """
        self._files.check_unchanged(self.manifest)

    def __iter__(self) -> Any:
        return iter(self.manifest.splits)

    def __len__(self) -> int:
        return len(self.manifest.splits)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={split.samples}" for name, split in self.manifest.splits.items())
        return f"ShardSet({str(self.path)!r}, {sizes})"


def open_shards(path: str | os.PathLike[str], cache: ShardCache | None = None) -> ShardSet:
    """Open a shard set.

    Args:
        path: A folder that `shardprep build` made, or the URL of one, such as s3://BUCKET/shards.
        cache: Keeps the files of a set behind a URL; by default a `ShardCache` in the folder that
            SHARDPREP_CACHE names.

    Raises:
        FormatError: There is no complete shard set, or one of another version.
        StorageError: The store behind the URL cannot be reached.
    """
    place = locate(path)
    if isinstance(place, Path):
        place = lasting(place)
    files = files_at(place, cache)
    return ShardSet(files, files.load_manifest())
