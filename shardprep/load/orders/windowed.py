"""An order for data larger than memory: random within a shuffle window that slides over shards.

The shards of an epoch come in a random order. Their utterances, one shard after another, are
divided into equal lanes. Each lane is read from its beginning to its end and shuffled within a
shuffle window, and each batch takes equally many utterances from every lane. A rank reads whole
lanes, so the batches are the same at every world size that divides the number of lanes.

The shuffle of a lane is two bijections, one after the other, each within blocks of half a shuffle
window. The blocks of the second lie across the borders of the first, so an utterance can cross
borders. Any position can be computed alone, and one block of positions draws from two blocks of
utterances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardprep.load.orders.epoch import Indices, Permutation, derive_key, mix64

# Streams of random numbers; 1 and 2 are those of `shardprep.load.orders.epoch`.
_SHARDS, _WITHIN, _ACROSS = 3, 4, 5


class WindowedOrder:
    """The order of an epoch: maps position to index, both in range(n).

    Args:
        shard_samples: Utterances of each shard, in the order of the index.
        seed: Seed of the run.
        epoch: Number of the epoch.
        global_batch: Utterances a batch of all ranks, a multiple of `lanes`.
        lanes: Number of lanes.
        window_shards: Size of a lane's shuffle window, in shards of average size.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        seed: int,
        epoch: int,
        *,
        global_batch: int,
        lanes: int,
        window_shards: int,
    ) -> None:
        assert global_batch % lanes == 0
        self.lanes = lanes
        samples = np.asarray(shard_samples, np.int64)
        count, n = len(samples), int(samples.sum())
        key = derive_key(_SHARDS, seed, epoch)
        #: Shards in the order of this epoch.
        self.shards: Indices = Permutation(count, key)(np.arange(count))
        # Where each of them begins in the split, and in the order.
        self._home = (np.cumsum(samples) - samples)[self.shards]
        self._at = np.cumsum(samples[self.shards]) - samples[self.shards]
        self._lane_begin: Indices = np.arange(lanes + 1) * n // lanes
        self._each = global_batch // lanes
        self._full = n // lanes // self._each * self._each
        self._rest = np.cumsum([0, *(np.diff(self._lane_begin) - self._full)])
        self.block = max(1, -(-window_shards * n // (2 * count)))
        sizes = np.diff(self._lane_begin)
        self._largest = int((-(-sizes // np.maximum(1, sizes // self.block))).max()) + 1
        self._keys = [derive_key(stage, seed, epoch) for stage in (_WITHIN, _ACROSS)]

    def __call__(self, positions: Indices) -> Indices:
        """Indices of `positions` (B,) in the epoch."""
        lane, place = self._lane_place(positions)
        size = np.diff(self._lane_begin)[lane]
        place = self._shuffle(lane, place, size, across=True)
        place = self._shuffle(lane, place, size, across=False)
        at = self._lane_begin[lane] + place
        shard = np.searchsorted(self._at, at, side="right") - 1
        indices: Indices = self._home[shard] + at - self._at[shard]
        return indices

    def needed(self, position: int, ahead: int, lanes: range) -> list[int]:
        """Shards that some lanes draw from, for the next utterances after a position.

        Args:
            position: Position in the epoch.
            ahead: How many utterances of each lane.
            lanes: Which lanes.

        Returns:
            Shard numbers, in the order of their use.
        """
        place = min(position // (self._each * self.lanes) * self._each, self._full)
        found: dict[int, float] = {}
        for lane in lanes:
            begin, end = self._lane_begin[lane], self._lane_begin[lane + 1]
            # A position draws from up to a block and a half around it.
            first = max(begin, begin + place - 2 * self.block)
            last = min(end, begin + place + ahead + 2 * self.block)
            slots = range(
                int(np.searchsorted(self._at, first, side="right")) - 1,
                int(np.searchsorted(self._at, last, side="left")),
            )
            for slot in slots:
                shard, due = int(self.shards[slot]), float(self._at[slot] - begin)
                found[shard] = min(due, found.get(shard, due))
        return sorted(found, key=lambda shard: found[shard])

    def shared(self, lanes: range) -> list[int]:
        """Shards that some of these lanes share with the lane before or after."""
        borders = self._lane_begin[lanes.start : lanes.stop + 1]
        inner = borders[(borders > 0) & (borders < self._lane_begin[-1])]
        slots = np.searchsorted(self._at, inner, side="right") - 1
        found: list[int] = self.shards[slots[self._at[slots] < inner]].tolist()
        return found

    def _lane_place(self, positions: Indices) -> tuple[Indices, Indices]:
        """Lane, and place in it; after the full batches follow the remainders of the lanes."""
        batch, within = np.divmod(positions, self._each * self.lanes)
        lane, place = within // self._each, batch * self._each + within % self._each
        rest = positions - self._full * self.lanes
        after = np.flatnonzero(rest >= 0)
        lane[after] = np.searchsorted(self._rest, rest[after], side="right") - 1
        place[after] = self._full + rest[after] - self._rest[lane[after]]
        return lane, place

    def _shuffle(self, lane: Indices, place: Indices, size: Indices, *, across: bool) -> Indices:
        """Permute places within their blocks; with `across`, borders move by half a block."""
        blocks = np.maximum(1, size // self.block)
        shift = int(across)

        def border(number: Indices) -> Indices:
            inner: Indices = (2 * number - shift) * size // (2 * blocks)
            return np.clip(inner, 0, size)

        number = (2 * blocks * place // size + shift) // 2
        # Rounding may be off by one block.
        number += (place >= border(number + 1)).astype(np.int64)
        number -= (place < border(number)).astype(np.int64)
        begin = border(number)
        # A key for every block of every lane.
        block: NDArray[np.uint64] = (lane << 40 | number).astype(np.uint64)
        keys = mix64(block + np.uint64(self._keys[across]))
        blocks_of_each = Permutation(border(number + 1) - begin, keys, self._largest)
        return begin + blocks_of_each(place - begin)


def check_lanes(lanes: int, window_shards: int, global_batch: int, world_size: int) -> None:
    """Make sure that lanes can be divided evenly among batches and ranks.

    Raises:
        ValueError: They cannot.
    """
    if lanes < 1 or window_shards < 1:
        raise ValueError(f"lanes {lanes}, window_shards {window_shards}: both must be positive")
    if lanes % world_size or global_batch % lanes:
        raise ValueError(
            f"lanes {lanes}: must be a multiple of the {world_size} processes, and divide the "
            f"{global_batch} segments of a batch of all of them"
        )
