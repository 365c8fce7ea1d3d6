"""Open shard sets, in folders or behind URLs: one, or several that are read as one."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

from shardprep.cache.shard_cache import DOWNLOADS, ShardCache
from shardprep.errors import FormatError
from shardprep.format.entries import Entry, later_reject, merged_entries
from shardprep.format.manifest import Reject
from shardprep.read.files import Origin, files_at
from shardprep.read.joined import check_alike, joined_fingerprint, joined_speakers
from shardprep.read.sidecars import read_rejects
from shardprep.read.split import Split
from shardprep.storage.local import lasting
from shardprep.storage.remote import Location, Remote, locate


class OpenShards(Mapping[str, Split]):
    """One or several open shard sets, read as one: `shards["train"]` is a `Split`.

    Sets stand one after another: so do the utterances of each split, and the speakers. Speakers are
    united by name. The first set's keep their labels; those that a later set adds follow in its
    order.

    Attributes:
        places: Folder or URL of each set.
        speakers: Speaker names; the position is the label.
        samples: Utterances of each split, by its name.
        n_mels: Mel bins F of every utterance.
        dtype: Element type that is stored: "float16", "float32" or "uint8".
        features: How the features were made; None where a set does not say, or where sets differ.
        fingerprint: Fingerprint of the set; of several, one that stands for them in this order.
    """

    def __init__(self, origins: Sequence[Origin]) -> None:
        manifests = [origin.manifest for origin in origins]
        self.places = tuple(origin.files.place for origin in origins)
        check_alike(self.places, manifests)
        self.speakers, _ = joined_speakers([manifest.speakers for manifest in manifests])
        self.samples: dict[str, int] = {}
        for manifest in manifests:
            for name, split in manifest.splits.items():
                self.samples[name] = self.samples.get(name, 0) + split.samples
        self.n_mels = manifests[0].n_mels
        self.dtype = manifests[0].dtype
        features = manifests[0].features
        alike = all(manifest.features == features for manifest in manifests)
        self.features = features if alike else None
        self.fingerprint = joined_fingerprint([manifest.fingerprint for manifest in manifests])
        self._origins = tuple(origins)
        self._open: dict[str, Split] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.samples)

    @property
    def where(self) -> str:
        """The places of the sets, as a text."""
        return " and ".join(map(str, self.places))

    @functools.cached_property
    def rejects(self) -> tuple[Reject, ...]:
        """Entries of the data sets that have no utterance of their own, and why.

        Those that the build left out, and entries of testdata.json that list a file again. Of
        several sets, the entries of each testdata.json follow those of the one before.

        Raises:
            CorruptShardError: A rejects.jsonl is missing or damaged.
        """
        found: list[Reject] = []
        before = 0
        for origin, entries in zip(self._origins, self._entries, strict=True):
            found += [later_reject(reject, before) for reject in self._rejects_of(origin)]
            before += len(entries)
        return tuple(found)

    @functools.cached_property
    def test_entries(self) -> tuple[Entry, ...]:
        """Every entry of testdata.json in its order, with or without an utterance in the shards.

            for entry in shard_set.test_entries:
                entry.file, entry.index    # a file, and its position in shard_set["test"] or None

        Of several sets, the entries of one after those of another.

        Raises:
            CorruptShardError: The index of the split test or rejects.jsonl is missing or damaged.
        """
        return tuple(itertools.chain.from_iterable(self._entries))

    @functools.cached_property
    def _entries(self) -> list[tuple[Entry, ...]]:
        """The entries of each set."""
        keys = self["test"].keys.tolist() if "test" in self.samples else []
        found, at = [], 0
        for origin in self._origins:
            split = origin.manifest.splits.get("test")
            own = keys[at : at + split.samples] if split else []
            ending = origin.manifest.member or "pt"
            found.append(merged_entries(own, self._rejects_of(origin), at, ending))
            at += len(own)
        return found

    def _rejects_of(self, origin: Origin) -> tuple[Reject, ...]:
        return read_rejects(origin.files, origin.manifest)

    @property
    def reject_lists(self) -> tuple[Location, ...]:
        """The files that list the rejects, of the sets that have any."""
        lists = [(origin.files.place, origin.manifest.rejects) for origin in self._origins]
        return tuple(place / info.file for place, info in lists if info is not None)

    def fetch(self, split: str) -> list[Path]:
        """The shard files of a split on this machine, fetched if the set is behind a URL.

        Fetched files stay in the cache as long as this object exists.

        Raises:
            FormatError: There is no such split.
            CorruptShardError: The store lacks a shard, or has one with other bytes.
            StorageError: The store cannot be reached, or the cache has no room for all shards.
        """
        self._check_split(split)
        shards = [(origin.files, info) for origin in self._origins for info in origin.shards(split)]
        self._origins[0].files.check_room(sum(info.bytes for _, info in shards))
        with ThreadPoolExecutor(DOWNLOADS) as threads:
            return list(threads.map(lambda shard: shard[0].local(shard[1]), shards))

    @property
    def network_seconds(self) -> float:
        """Seconds that readers of this process waited for shards to come from a store."""
        # Sets that are read as one have one cache, and it counts.
        return self._origins[0].files.waited

    def __getitem__(self, name: str) -> Split:
        """Open a split; the next call gives the same object.

        Raises:
            FormatError: There is no such split.
            CorruptShardError: The split's index is damaged, or a shard is missing or has another
                size than the manifest says.
        """
        self._check_split(name)
        if name not in self._open:
            split = Split(name, self._origins)
            split.check_sizes()
            self._open[name] = split
        return self._open[name]

    def _check_split(self, name: str) -> None:
        if name not in self.samples:
            raise FormatError(
                f"there is no split {name!r}; the set has {', '.join(self.splits)}", file=self.where
            )

    def check_unchanged(self) -> None:
        """Make sure that what was opened is still there; costs a `stat` or a request a set.

        Raises:
            CorruptShardError: A place holds another set, or none.
        """
        for origin in self._origins:
            origin.check_unchanged()

    def __contains__(self, name: object) -> bool:
        # Mapping's own would open the split, and expects a KeyError.
        return name in self.samples

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={count}" for name, count in self.samples.items())
        return f"{type(self).__name__}({self.where!r}, {sizes})"


class ShardSet(OpenShards):
    """An open shard set.

    Attributes:
        path: Folder or URL.
        manifest: The contents of manifest.json.
    """

    def __init__(self, origin: Origin) -> None:
        super().__init__([origin])
        self.path = origin.files.place
        self.manifest = origin.manifest


@overload
def open_shards(path: str | os.PathLike[str], cache: ShardCache | None = None) -> ShardSet: ...


@overload
def open_shards(
    path: Sequence[str | os.PathLike[str]], cache: ShardCache | None = None
) -> OpenShards: ...


def open_shards(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    cache: ShardCache | None = None,
) -> OpenShards:
    """Open a shard set, or several sets to be read as one.

        both = open_shards(["a/", "b/"])
        both["train"]    # the utterances of a, then those of b

    Args:
        path: A folder that `shardprep build` made, or the URL of one, such as s3://BUCKET/shards;
            or a list of folders, or of URLs.
        cache: Keeps the files of sets behind URLs; by default a `ShardCache` in the folder that
            SHARDPREP_CACHE names.

    Raises:
        FormatError: There is no complete shard set, or one of another version. Of several: two are
            the same, or differ in mel bins, element type or codec, or in being in a folder or
            behind a URL.
        StorageError: The store behind a URL cannot be reached.
    """
    if isinstance(path, (str, os.PathLike)):
        return ShardSet(_open(locate(path), cache))
    places = [locate(one) for one in path]
    if cache is None and any(isinstance(place, Remote) for place in places):
        cache = ShardCache()
    return OpenShards([_open(place, cache) for place in places])


def _open(place: Location, cache: ShardCache | None) -> Origin:
    files = files_at(lasting(place) if isinstance(place, Path) else place, cache)
    return Origin(files, files.load_manifest())
