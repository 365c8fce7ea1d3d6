"""The files of a shard set: those of a folder of this machine, or those of a store, cached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shardprep.cache.folder import ROOM, Held
from shardprep.cache.shard_cache import ShardCache
from shardprep.errors import REPAIR, StorageError
from shardprep.format.manifest import FileInfo, Manifest, ShardInfo
from shardprep.read.folder_map import FolderMap
from shardprep.read.manifest_file import (
    ManifestWatch,
    check_fingerprint,
    load_manifest,
    manifest_state,
)
from shardprep.read.shard_map import ShardMap
from shardprep.read.store_map import StoreMap
from shardprep.storage.remote import Location, Remote


class Files(Protocol):
    """The files of a set; can be pickled, so that other processes open them too."""

    @property
    def place(self) -> Location:
        """Folder or URL."""

    @property
    def waited(self) -> float:
        """Seconds that readers of this process waited for the network."""

    def load_manifest(self) -> Manifest:
        """Read and check the manifest.

        Raises:
            FormatError: There is no complete shard set, or one of another version.
            StorageError: The store cannot be reached.
        """

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """Path of a file of the set on this machine; the file stays as long as this object.

        Raises:
            CorruptShardError: A store has no such file, or one with other bytes.
            StorageError: The store cannot be reached, or the cache has no room.
        """

    def lend(self, info: FileInfo | ShardInfo) -> contextlib.AbstractContextManager[Path]:
        """The same, for as long as the context lasts."""

    def renew(self, info: FileInfo | ShardInfo) -> bool:
        """Get a damaged file again; False if there is no other copy."""

    def check_room(self, size: int) -> None:
        """Make sure that this machine can keep so many bytes at a time.

        Raises:
            StorageError: It cannot.
        """

    def check_unchanged(self, manifest: Manifest) -> None:
        """Make sure that the place still holds the set that was opened.

        Raises:
            CorruptShardError: The place holds another set, or none.
        """


class FolderFiles:
    """The files of a set in a folder of this machine."""

    waited = 0.0

    def __init__(self, folder: Path) -> None:
        self.place = folder
        self._watch: ManifestWatch | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.place,)

    def load_manifest(self) -> Manifest:
        """See `Files.load_manifest`."""
        # Looked at before it is read: a later change is then never missed.
        seen = manifest_state(self.place)
        manifest = load_manifest(self.place)
        self._watch = ManifestWatch(self.place, manifest.fingerprint, seen)
        return manifest

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """See `Files.local`."""
        return self.place / info.file

    def lend(self, info: FileInfo | ShardInfo) -> contextlib.AbstractContextManager[Path]:
        """See `Files.lend`."""
        return contextlib.nullcontext(self.place / info.file)

    def renew(self, info: FileInfo | ShardInfo) -> bool:
        """The folder has no other copy."""
        return False

    def check_room(self, size: int) -> None:
        """The files are here already."""

    def check_unchanged(self, manifest: Manifest) -> None:
        """See `Files.check_unchanged`; costs a `stat`."""
        self._watch_of(manifest).check()

    def _watch_of(self, manifest: Manifest) -> ManifestWatch:
        if self._watch is None or self._watch.fingerprint != manifest.fingerprint:
            self._watch = ManifestWatch(self.place, manifest.fingerprint)
        return self._watch


class StoreFiles:
    """The files of a set in a store; this machine's cache keeps some of them."""

    def __init__(self, remote: Remote, cache: ShardCache) -> None:
        self.place = remote
        self.cache = cache
        # Small files, which stay in the cache as long as this object lives.
        self._held: dict[str, Held] = {}

    def __reduce__(self) -> Any:
        return type(self), (self.place, self.cache)

    @property
    def waited(self) -> float:
        """Seconds that readers of this process waited for the network."""
        return self.cache.traffic.waited

    def load_manifest(self) -> Manifest:
        """See `Files.load_manifest`."""
        return load_manifest(self.place)

    def local(self, info: FileInfo | ShardInfo) -> Path:
        """See `Files.local`; the path lies in the cache."""
        if info.file not in self._held:
            self._held[info.file] = self.cache.hold(self.place / info.file, info)
        return self._held[info.file].path

    @contextlib.contextmanager
    def lend(self, info: FileInfo | ShardInfo) -> Iterator[Path]:
        """See `Files.lend`; the path lies in the cache."""
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

    def check_unchanged(self, manifest: Manifest) -> None:
        """See `Files.check_unchanged`; a store that gives no answer counts as unchanged."""
        with contextlib.suppress(StorageError):
            check_fingerprint(self.place, manifest.fingerprint)


def files_at(place: Location, cache: ShardCache | None = None) -> Files:
    """The files in a place; those behind a URL come by way of `cache`, by default the user's."""
    if isinstance(place, Remote):
        cache = cache or ShardCache()
        return StoreFiles(Remote(place.url, cache.patience), cache)
    return FolderFiles(place)


class Origin(NamedTuple):
    """A set from which a split comes, alone or with others."""

    files: Files
    manifest: Manifest

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """Its shards of a split, in the order of the index; none if it has no such split."""
        info = self.manifest.splits.get(split)
        return () if info is None else info.shards

    def check_unchanged(self) -> None:
        """See `Files.check_unchanged`."""
        self.files.check_unchanged(self.manifest)


def map_shards(origins: Sequence[Origin], split: str) -> ShardMap:
    """The bytes of the shards of a split, of one set after another.

    Args:
        origins: The sets: all in folders of this machine, or all in stores with one cache.
        split: Name of the split.
    """
    first = origins[0].files
    found = [(origin.files.place, shard) for origin in origins for shard in origin.shards(split)]
    if isinstance(first, StoreFiles):
        stored = [(place, shard) for place, shard in found if isinstance(place, Remote)]
        return StoreMap(stored, first.cache)

    def confirm() -> None:
        for origin in origins:
            origin.check_unchanged()

    remedy = next((o.manifest.remedy for o in origins if o.manifest.member), REPAIR)
    files = [(Path(place / shard.file), shard.bytes) for place, shard in found]
    return FolderMap(files, confirm, remedy)
