"""Where the files of a shard set lie: in a folder of this machine, or in a store behind a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from shardprep.cache.folder import ROOM, Held
from shardprep.cache.shard_cache import ShardCache
from shardprep.errors import StorageError
from shardprep.format.manifest import FileInfo, Manifest, ShardInfo
from shardprep.read.cached_map import CachedMap
from shardprep.read.manifest_file import ManifestWatch, check_fingerprint
from shardprep.read.shard_map import ShardMap
from shardprep.storage.remote import Location, Remote


class Files(Protocol):
    """The files of a set; pickles, for other processes to open them too.

    Attributes:
        place: Folder or URL.
        waited: Seconds for which readers of this process stood still for the network.
    """

    @property
    def place(self) -> Location:
        """Folder or URL."""

    @property
    def waited(self) -> float:
        """Seconds for which readers of this process stood still for the network."""

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """A file of the set, on this machine.

        Raises:
            CorruptShardError: It comes from a store, which does not have it as it should be.
            StorageError: It comes from a store, which cannot be reached.
        """

    def lend(self, info: FileInfo | ShardInfo) -> contextlib.AbstractContextManager[Path]:
        """The same, for as long as the context lasts."""

    def renew(self, info: FileInfo | ShardInfo) -> bool:
        """Get a file anew that is not as it should be; False if it is what the place has."""

    def check_room(self, size: int) -> None:
        """Make sure that so many bytes can be on this machine at a time.

        Raises:
            StorageError: They cannot.
        """

    def map_shards(self, shards: Sequence[ShardInfo], manifest: Manifest) -> ShardMap:
        """The bytes of some shards."""

    def check_unchanged(self, manifest: Manifest) -> None:
        """Make sure that the place still holds the set that was opened.

        Raises:
            CorruptShardError: It holds another set, or none.
        """


class LocalFiles:
    """Files in a folder of this machine."""

    waited = 0.0

    def __init__(self, folder: Path) -> None:
        self.place = folder
        self._watch: ManifestWatch | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.place,)

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """Where a file of the set lies."""
        return self.place / info.file

    def lend(self, info: FileInfo | ShardInfo) -> contextlib.AbstractContextManager[Path]:
        """Where a file of the set lies."""
        return contextlib.nullcontext(self.place / info.file)

    def renew(self, info: FileInfo | ShardInfo) -> bool:
        """There is only this one."""
        return False

    def check_room(self, size: int) -> None:
        """They are here."""

    def map_shards(self, shards: Sequence[ShardInfo], manifest: Manifest) -> ShardMap:
        """See `Files.map_shards`."""
        watch = self._watch_of(manifest)
        return ShardMap([(self.place / shard.file, shard.bytes) for shard in shards], watch.check)

    def check_unchanged(self, manifest: Manifest) -> None:
        """See `Files.check_unchanged`; costs a `stat`."""
        self._watch_of(manifest).check()

    def _watch_of(self, manifest: Manifest) -> ManifestWatch:
        if self._watch is None or self._watch.fingerprint != manifest.fingerprint:
            self._watch = ManifestWatch(self.place, manifest.fingerprint)
        return self._watch


class CachedFiles:
    """Files of a store, of which this machine's cache keeps some."""

    def __init__(self, remote: Remote, cache: ShardCache) -> None:
        self.place = remote
        self.cache = cache
        # Small files, which stay in the cache as long as this object lives.
        self._held: dict[str, Held] = {}

    def __reduce__(self) -> Any:
        return type(self), (self.place, self.cache)

    @property
    def waited(self) -> float:
        """Seconds for which readers of this process stood still for the network."""
        return self.cache.traffic.waited

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """Where a file of the set lies in the cache."""
        if info.file not in self._held:
            self._held[info.file] = self.cache.hold(self.place / info.file, info)
        return self._held[info.file].path

    @contextlib.contextmanager
    def lend(self, info: FileInfo | ShardInfo) -> Iterator[Path]:
        """Where a file of the set lies in the cache, for as long as the context lasts."""
        with contextlib.closing(self.cache.hold(self.place / info.file, info)) as held:
            yield held.path

    def renew(self, info: FileInfo | ShardInfo) -> bool:
        """See `Files.renew`: a file of the cache may have been damaged since it came."""
        if (held := self._held.pop(info.file, None)) is not None:
            held.close()
        return self.cache.renew(self.place / info.file, info)

    def check_room(self, size: int) -> None:
        """See `Files.check_room`."""
        if size > self.cache.folder.budget:
            raise StorageError(
                f"takes {size} bytes, and the cache keeps at most {self.cache.folder.budget}",
                file=self.place,
                remedy=ROOM,
            )

    def map_shards(self, shards: Sequence[ShardInfo], manifest: Manifest) -> ShardMap:
        """See `Files.map_shards`."""
        return CachedMap(self.place, shards, self.cache)

    def check_unchanged(self, manifest: Manifest) -> None:
        """See `Files.check_unchanged`; a store that gives no answer counts as unchanged."""
        with contextlib.suppress(StorageError):
            check_fingerprint(self.place, manifest.fingerprint)


def files_at(place: Location, cache: ShardCache | None = None) -> Files:
    """The files in a place; `cache` is for those behind a URL, by default the user's."""
    if isinstance(place, Remote):
        cache = cache or ShardCache()
        return CachedFiles(Remote(place.url, cache.patience), cache)
    return LocalFiles(place)
