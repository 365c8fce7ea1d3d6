"""Says ahead of time which shards the next batches need, and how many batches may be planned."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from shardprep.errors import ShardprepError, StorageError
from shardprep.load.orders.epoch import EpochOrder
from shardprep.load.orders.windowed import WindowedOrder
from shardprep.read.split import Split

PLANNED = 16_384
"""Utterances of all ranks whose order and segments are computed at a time."""


class ReadAhead:
    """Tells a split which shards the batches of one rank need next.

    Args:
        split: What is read.
        order_of: The order of an epoch.
        end: Positions of an epoch that are read.
        lanes: Lanes of this rank, of the windowed order.
        all_lanes: Lanes of all ranks.
    """

    def __init__(
        self,
        split: Split,
        order_of: Callable[[int], EpochOrder],
        end: int,
        lanes: range,
        all_lanes: int,
    ) -> None:
        self._split = split
        self._order_of = order_of
        self._end = end
        self._lanes = lanes
        self._all_lanes = all_lanes
        self._wanted = split.wanted_shards()
        self._warmed = False

    def want(self, epoch: int, begin: int, count: int) -> None:
        """Say which shards the batches of `count` positions from `begin` on need.

        Raises:
            CorruptShardError: A shard of a folder is missing, or has another size than expected.
        """
        split, order = self._split, self._order_of(epoch)
        if not isinstance(order, WindowedOrder):
            if split.room is not None:
                self._wanted.want(range(len(split.shard_samples)))
            return
        each = count // self._all_lanes
        due = order.needed(begin, each, self._lanes)
        if split.room is None:
            self._wanted.want(due)
            return
        # One lane reads the end of a shared shard, and another lane its beginning. The shard stays
        # in between, so that it is fetched only once.
        due += order.shared(self._lanes)
        reach = int(split.room / split.shard_bytes.sum() * len(split)) // len(self._lanes)
        later = order.needed(begin, reach, self._lanes)
        if begin + count >= self._end:
            following = self._order_of(epoch + 1)
            assert isinstance(following, WindowedOrder)
            later += following.needed(0, each, self._lanes)
        self._wanted.want(due, later)

    def warm(self) -> None:
        """Have all shards of a folder read from end to end, once, if they fit into memory.

        For the global order, which would read pages here and there.
        """
        if self._warmed or self._split.room is not None:
            return
        self._warmed = True
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self._split.nbytes <= memory // 2:
            threading.Thread(target=_read_all, args=(self._split,), daemon=True).start()


def plan_for_cache(split: Split, order: str, lanes: int, window_shards: int, room: int) -> int:
    """How many utterances of all ranks may be planned at a time, so that their shards have room.

    Args:
        split: What is read.
        order: "global" or "windowed", see `SegmentLoader`.
        lanes: Lanes of this rank.
        window_shards: Shards in the shuffle window of each lane.
        room: Bytes of shards that this process may keep at a time.

    Raises:
        StorageError: The order needs more shards at a time than there is room for.
    """
    sizes = split.shard_bytes
    if sizes.sum() <= room:
        return PLANNED
    if order == "global":
        needed, advice = int(sizes.sum()), "read by order windowed, or "
    else:
        # Two shuffle windows of each lane, a shard at either end, and those that lanes share.
        shards = min(lanes * (2 * window_shards + 3) + 1, len(sizes))
        needed, advice = int(shards * sizes.max()), "take fewer lanes or window_shards, or "
    if needed > room:
        raise StorageError(
            f"order {order} needs {needed / 1e9:.3g} GB of split {split.name} at a time, and this "
            f"process's part of the cache has room for {room / 1e9:.3g} GB",
            file=split.place,
            remedy=f"Either {advice}give the cache more room (SHARDPREP_CACHE_GB, or data.cache_gb "
            "of the trainer).",
        )
    spare = (room - needed) / 2 * len(split) / sizes.sum()
    return int(min(PLANNED, max(spare, 1)))


def _read_all(split: Split) -> None:
    # A fault of a shard is raised when a segment of it is read.
    with contextlib.suppress(ShardprepError):
        for shard in range(len(split.shard_samples)):
            split.read_ahead(shard)
