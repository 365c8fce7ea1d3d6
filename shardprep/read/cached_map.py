"""The shards of a split that lies in a store: each is mapped from the cache while it is wanted."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from shardprep.cache.folder import ROOM, NoRoomError
from shardprep.cache.shard_cache import ShardCache
from shardprep.errors import StorageError
from shardprep.format.manifest import ShardInfo
from shardprep.read.shard_map import ShardMap, Window
from shardprep.storage.remote import Remote

# Of a process's share of the cache: what its windows may want, and what may stay mapped without.
_WINDOWS, _LOOSE = 0.75, 0.2


class CachedMap(ShardMap):
    """A `ShardMap` whose files come from a store when they are needed, and leave it again.

    What no `Window` wants stays mapped too, up to a part of the cache's budget, until the cache
    is short of room.

    Args:
        folder: Where the files come from.
        shards: Their names, sizes and sha256.
        cache: Where they are kept.
    """

    def __init__(self, folder: Remote, shards: Sequence[ShardInfo], cache: ShardCache) -> None:
        super().__init__([(folder / shard.file, shard.bytes) for shard in shards])
        self._folder = folder
        self._infos = shards
        self._cache = cache
        self.room = int(_WINDOWS * cache.share)
        # Those that are mapped, the longest first; a dict for its order.
        self._held: dict[int, None] = {}
        #: Bytes of these.
        self.in_use = 0
        # How many windows want each.
        self._wanted: Counter[int] = Counter()
        self._begin()
        cache.lends(self)

    def _begin(self) -> None:
        # A window that nobody holds any more may end anywhere, also in here.
        self._lock = threading.RLock()
        # Those that are on their way.
        self._coming: dict[int, Future[None]] = {}
        # Reads going on of each, until whose end what is to leave stays mapped.
        self._reads: Counter[int] = Counter()
        self._leaving: set[int] = set()

    def begin_anew(self) -> None:
        """Have nothing mapped or on its way, in a process that was forked from that which had.

        Its threads stayed there, and what is mapped here too could not leave the cache.
        """
        self._begin()
        self._unmap(set(self._held))

    def need(self, shards: NDArray[np.int64]) -> None:
        """Make sure that these files (B,) are mapped; waits for those that are not here.

        Raises:
            CorruptShardError: A file is missing in the store, or has other bytes than expected.
            StorageError: The store gave no answer, there is no room in the cache, or the system
                maps no more files.
        """
        missing = np.unique(shards[~self._mapped[shards]]).tolist()
        if not missing:
            return
        size = sum(self._infos[shard].bytes for shard in np.unique(shards).tolist())
        if size > self._cache.folder.budget:
            raise StorageError(
                f"{size} bytes of shards are read from at once, and the cache keeps at most "
                f"{self._cache.folder.budget}",
                file=self._folder,
                remedy=ROOM,
            )
        began = time.perf_counter()
        for shard in missing[1:]:
            self._send_for(shard, wanted=False)
        for shard in missing:
            self._bring(shard)
        self._cache.count_wait(time.perf_counter() - began)
        self._trim(int(_LOOSE * self._cache.share), set(missing))

    def map_all(self) -> None:
        """Nothing: the files of a set are known by their sha256, and need not be held for it."""

    def renew(self, shard: int) -> bool:
        """Fetch a file anew that was damaged in the cache; False if the store has it so."""
        info = self._infos[shard]
        if not self._cache.renew(self._folder / info.file, info):
            return False
        with self._lock:
            # What is mapped is the damaged one; whoever reads it just now will find that as well.
            self._leave([shard] if shard in self._held else [])
        return True

    def check_sizes(self) -> None:
        """Nothing: the size of a file is checked as it comes."""

    @contextlib.contextmanager
    def reading(self, shards: NDArray[np.int64]) -> Iterator[None]:
        """Keep these files (B,) mapped while something is read from them; raises as `need` does."""
        own = np.unique(shards).tolist()
        with self._lock:
            self._reads.update(own)
        try:
            self.need(shards)
            yield
        finally:
            with self._lock:
                self._reads.subtract(own)
                self._unmap({shard for shard in own if not self._reads[shard]} & self._leaving)

    def window(self) -> Window:
        """What one reader says of the files that it will read next."""
        return CachedWindow(self)

    def read_ahead(self, shard: int) -> None:
        """Have a file brought in the background."""
        self._send_for(shard, wanted=False)

    def change(self, before: Sequence[int], now: Sequence[int]) -> None:
        """Have a window want other files than before, in this order."""
        with self._lock:
            self._wanted.update(now)
            self._wanted.subtract(before)
            self._leaving -= set(now)
            self._leave(shard for shard in before if self._wanted[shard] <= 0)
        for shard in now:
            self._send_for(shard, wanted=True)

    def fitting(self, due: Sequence[int], later: Sequence[int]) -> list[int]:
        """As many of these files, each once, as one window may want; of those due, all."""
        chosen = dict.fromkeys(due)
        assert self.room is not None
        room = self.room - sum(self._infos[shard].bytes for shard in chosen)
        for shard in later:
            if shard not in chosen:
                room -= self._infos[shard].bytes
                if room < 0:
                    break
                chosen[shard] = None
        return list(chosen)

    def give_back(self, *, urgent: bool) -> None:
        """Let go of what no window wants; if urgent, of the last to come of what one does."""
        self._trim(0, set())
        if urgent:
            with self._lock:
                idle = [shard for shard in list(self._held) if not self._reads[shard]]
                self._unmap(set(idle[-1:]))

    def _send_for(self, shard: int, *, wanted: bool) -> None:
        with self._lock:
            if self._mapped[shard] or shard in self._coming:
                return
            self._coming[shard] = self._cache.threads.submit(self._arrive, shard, wanted)

    def _arrive(self, shard: int, wanted: bool) -> None:
        # An order is struck off in the same moment as its file is mapped or given up: a window
        # that comes to want a file which is gone again must not take it to be on its way.
        with self._lock:
            if wanted and self._wanted[shard] <= 0:
                self._coming.pop(shard, None)
                return
        # What finds no room now is brought when it is needed.
        with contextlib.suppress(NoRoomError):
            try:
                self._fetch(shard, wait=False)
            except BaseException:
                self._strike_off(shard)
                raise
            # Perhaps no window wants it by now.
            self._trim(int(_LOOSE * self._cache.share), {shard})

    def _strike_off(self, shard: int) -> None:
        with self._lock:
            self._coming.pop(shard, None)

    def _bring(self, shard: int) -> None:
        """Wait until a file is mapped, at the latest by this thread itself."""
        coming = self._coming.get(shard)
        if coming is not None:
            if coming.cancel():
                self._strike_off(shard)
            else:
                coming.result()
        if not self._mapped[shard]:
            self._fetch(shard, wait=True)

    def _fetch(self, shard: int, *, wait: bool) -> None:
        info = self._infos[shard]
        held = self._cache.hold(self._folder / info.file, info, wait=wait)
        with self._lock:
            self._coming.pop(shard, None)
            if self._mapped[shard]:
                held.close()
                return
            self._region.put(int(self.begins[shard]), info.bytes, held.handle)
            # The lock is that of the open file, which the mapping keeps; the number is spared.
            held.close()
            self._held[shard] = None
            self._mapped[shard] = True
            self.in_use += info.bytes

    def _trim(self, most: int, keep: set[int]) -> None:
        """Let the files go that no window wants, the longest mapped first, until few are left."""
        with self._lock:
            loose = [
                shard
                for shard in list(self._held)
                if self._wanted[shard] <= 0 and not self._reads[shard]
            ]
            excess = sum(self._infos[shard].bytes for shard in loose) - most
            for shard in loose:
                if excess > 0 and shard not in keep:
                    excess -= self._infos[shard].bytes
                    self._leave([shard])

    def _leave(self, shards: Sequence[int] | Iterator[int]) -> None:
        """Unmap files, each as soon as nobody reads it; for who holds the lock."""
        going = {shard for shard in shards if shard in self._held}
        busy = {shard for shard in going if self._reads[shard]}
        self._leaving |= busy
        self._unmap(going - busy)

    def _unmap(self, shards: set[int]) -> None:
        for shard in shards:
            self._mapped[shard] = False
            self._region.clear(int(self.begins[shard]), int(self._pages[shard]))
            if shard in self._held:
                del self._held[shard]
                self.in_use -= self._infos[shard].bytes
        self._leaving -= shards


class CachedWindow(Window):
    """Keeps the files mapped that a reader wants, and has those brought that are not here."""

    def __init__(self, shards: CachedMap) -> None:
        self._cached = shards
        self._chosen: list[int] = []
        # A reader that is broken off and forgotten wants nothing any more either.
        weakref.finalize(self, _release, shards, self._chosen).atexit = False

    def want(self, due: Sequence[int], later: Sequence[int] = ()) -> None:
        """See `Window.want`; of `later`, as much as the cache's budget allows."""
        chosen = self._cached.fitting(due, later)
        self._cached.change(self._chosen, chosen)
        self._chosen[:] = chosen

    def close(self) -> None:
        """Want nothing any more."""
        _release(self._cached, self._chosen)


def _release(shards: CachedMap, chosen: list[int]) -> None:
    shards.change(chosen, [])
    chosen.clear()
