"""The shards of a store: each is mapped from this machine's cache while a reader wants it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from shardprep.cache.folder import ROOM, NoRoomError
from shardprep.cache.shard_cache import ShardCache
from shardprep.errors import StorageError
from shardprep.format.manifest import ShardInfo
from shardprep.read.address_space import AddressSpace
from shardprep.storage.remote import Remote

# Parts of a process's share of the cache: what one reader may want, and what may stay mapped
# although no reader wants it.
_WANTED, _UNWANTED = 0.75, 0.2


class StoreMap:
    """A `ShardMap` of files that come from a store when they are needed, and leave again.

    A shard that no reader wants stays mapped too, up to a part of the cache's budget, until the
    cache is short of room.

    Args:
        shards: Each file: where it comes from, and its name, size and sha256.
        cache: Where they are kept.

    Attributes:
        begins: See `ShardMap`.
        bytes: See `ShardMap`.
        room: See `ShardMap`.
        in_use: Bytes of the shards that are mapped.
    """

    def __init__(self, shards: Sequence[tuple[Remote, ShardInfo]], cache: ShardCache) -> None:
        self._infos = [info for _, info in shards]
        self._places = [folder / info.file for folder, info in shards]
        self._space = AddressSpace(np.array([info.bytes for info in self._infos], np.int64))
        self.begins, self.bytes = self._space.begins, self._space.bytes
        self._cache = cache
        # The mapped shards, the longest mapped first; a dict for its order.
        self._held: dict[int, None] = {}
        self.in_use = 0
        # How many readers want each shard.
        self._wanted: Counter[int] = Counter()
        self._begin()
        cache.add_borrower(self)

    @property
    def room(self) -> int:
        """See `ShardMap.room`; less in a worker of a DataLoader than in its parent."""
        return int(_WANTED * self._cache.share)

    def _begin(self) -> None:
        # RLock: the finalizer of a `WantedShards` may run while this thread holds the lock.
        self._lock = threading.RLock()
        # Shards that are being fetched.
        self._coming: dict[int, Future[None]] = {}
        # Reads of each shard that are going on. A shard that is to leave stays mapped until then.
        self._reads: Counter[int] = Counter()
        self._leaving: set[int] = set()

    def reset_after_fork(self) -> None:
        """Have nothing mapped and nothing on its way; for a process that was just forked.

        The threads stayed with the parent. A shard that is mapped here too could not leave the
        cache when the parent gives it back.
        """
        self._begin()
        self._unmap(set(self._held))

    @contextlib.contextmanager
    def reading(self, shards: NDArray[np.int64]) -> Iterator[None]:
        """See `ShardMap.reading`; waits for shards that are not here."""
        own = np.unique(shards).tolist()
        with self._lock:
            self._reads.update(own)
        try:
            self._need(shards)
            yield
        finally:
            with self._lock:
                self._reads.subtract(own)
                self._unmap({shard for shard in own if not self._reads[shard]} & self._leaving)

    def map_all(self) -> None:
        """Nothing: the shards are known by their sha256, whatever the store has later."""

    def renew(self, shard: int) -> bool:
        """Fetch again a shard that was damaged in the cache; False if the store has the same."""
        if not self._cache.renew(self._places[shard], self._infos[shard]):
            return False
        with self._lock:
            # The damaged file is mapped. Whoever reads it now will find the damage too.
            self._leave([shard] if shard in self._held else [])
        return True

    def check_sizes(self) -> None:
        """Nothing: the size of a shard is checked when it comes."""

    def read_ahead(self, shard: int) -> None:
        """See `ShardMap.read_ahead`."""
        self._send_for(shard, wanted=False)

    def want(
        self, before: Sequence[int], due: Sequence[int], later: Sequence[int] = ()
    ) -> list[int]:
        """See `ShardMap.want`: what is wanted is fetched in this order, and stays mapped."""
        now = self._fitting(due, later)
        with self._lock:
            self._wanted.update(now)
            self._wanted.subtract(before)
            self._leaving -= set(now)
            self._leave(shard for shard in before if self._wanted[shard] <= 0)
        for shard in now:
            self._send_for(shard, wanted=True)
        return now

    def give_back(self, *, urgent: bool) -> None:
        """Unmap what no reader wants; if urgent, also the last that came of what is wanted."""
        self._trim(0, set())
        if urgent:
            with self._lock:
                idle = [shard for shard in list(self._held) if not self._reads[shard]]
                self._unmap(set(idle[-1:]))

    def _fitting(self, due: Sequence[int], later: Sequence[int]) -> list[int]:
        """All shards that are due, and as many of the later ones as there is room for."""
        chosen = dict.fromkeys(due)
        room = self.room - sum(self._infos[shard].bytes for shard in chosen)
        for shard in later:
            if shard not in chosen:
                room -= self._infos[shard].bytes
                if room < 0:
                    break
                chosen[shard] = None
        return list(chosen)

    def _need(self, shards: NDArray[np.int64]) -> None:
        """Make sure that these shards (B,) are mapped; raises as `reading` does."""
        missing = self._space.missing(shards)
        if not missing:
            return
        size = sum(self._infos[shard].bytes for shard in np.unique(shards).tolist())
        if size > self._cache.folder.budget:
            raise StorageError(
                f"{size} bytes of shards are read from at once, and the cache keeps at most "
                f"{self._cache.folder.budget}",
                file=self._places[missing[0]],
                remedy=ROOM,
            )
        began = time.perf_counter()
        for shard in missing[1:]:
            self._send_for(shard, wanted=False)
        for shard in missing:
            self._wait_for(shard)
        self._cache.count_wait(time.perf_counter() - began)
        self._trim(int(_UNWANTED * self._cache.share), set(missing))

    def _send_for(self, shard: int, *, wanted: bool) -> None:
        """Have a shard fetched in the background, unless it is here or on its way."""
        with self._lock:
            if self._space.mapped[shard] or shard in self._coming:
                return
            self._coming[shard] = self._cache.threads.submit(self._fetch_ahead, shard, wanted)

    def _fetch_ahead(self, shard: int, wanted: bool) -> None:
        # An order is removed under the same lock that maps its shard or gives it up. Otherwise a
        # reader could want a shard that has just left, and believe that it is on its way.
        with self._lock:
            if wanted and self._wanted[shard] <= 0:
                self._coming.pop(shard, None)
                return
        # A shard that finds no room now is fetched when it is needed.
        with contextlib.suppress(NoRoomError):
            try:
                self._fetch(shard, wait=False)
            except BaseException:
                self._remove_order(shard)
                raise
            # Perhaps no reader wants it any longer.
            self._trim(int(_UNWANTED * self._cache.share), {shard})

    def _remove_order(self, shard: int) -> None:
        with self._lock:
            self._coming.pop(shard, None)

    def _wait_for(self, shard: int) -> None:
        """Wait until a shard is mapped; this thread fetches it if no other has begun."""
        coming = self._coming.get(shard)
        if coming is not None:
            if coming.cancel():
                self._remove_order(shard)
            else:
                coming.result()
        if not self._space.mapped[shard]:
            self._fetch(shard, wait=True)

    def _fetch(self, shard: int, *, wait: bool) -> None:
        info = self._infos[shard]
        held = self._cache.hold(self._places[shard], info, wait=wait)
        with self._lock:
            self._coming.pop(shard, None)
            if self._space.mapped[shard]:
                held.close()
                return
            self._space.map(shard, held.handle, held.path)
            # The lock belongs to the open file, which the mapping keeps. The descriptor is free.
            held.close()
            self._held[shard] = None
            self.in_use += info.bytes

    def _trim(self, most: int, keep: set[int]) -> None:
        """Unmap shards that no reader wants, the longest mapped first, down to `most` bytes."""
        with self._lock:
            unwanted = [
                shard
                for shard in list(self._held)
                if self._wanted[shard] <= 0 and not self._reads[shard]
            ]
            excess = sum(self._infos[shard].bytes for shard in unwanted) - most
            for shard in unwanted:
                if excess > 0 and shard not in keep:
                    excess -= self._infos[shard].bytes
                    self._leave([shard])

    def _leave(self, shards: Iterable[int]) -> None:
        """Unmap shards, each as soon as nobody reads it; the caller holds the lock."""
        going = {shard for shard in shards if shard in self._held}
        busy = {shard for shard in going if self._reads[shard]}
        self._leaving |= busy
        self._unmap(going - busy)

    def _unmap(self, shards: set[int]) -> None:
        for shard in shards:
            self._space.unmap(shard)
            if shard in self._held:
                del self._held[shard]
                self.in_use -= self._infos[shard].bytes
        self._leaving -= shards
