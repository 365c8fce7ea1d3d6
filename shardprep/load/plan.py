"""Which segments the batches of one rank hold: the order of an epoch, divided among the ranks.

Axis legend: B batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Rational
from typing import Any, Literal

import numpy as np

from shardprep.load.course.epochs import Place
from shardprep.load.course.world import World
from shardprep.load.orders.epoch import EpochOrder, Indices, epoch_order, rank_slice, segment_starts
from shardprep.load.orders.mixed import endless_draws, whole_shares
from shardprep.load.orders.windowed import WindowedOrder, check_lanes
from shardprep.load.read_ahead import PLANNED, ReadAhead, plan_for_cache
from shardprep.read.split import Split

Order = Literal["global", "windowed"]
Balance = Literal["speaker"]


@dataclass(frozen=True)
class Sampling:
    """How the utterances of a split become batches; the arguments of `SegmentLoader`."""

    batch_size: int
    segment_frames: int
    seed: int
    shuffle: bool
    drop_last: bool
    order: Order
    lanes: int
    window_shards: int
    shares: Sequence[float | Rational] | None = None
    balance: Balance | None = None

    def __post_init__(self) -> None:
        # NumPy's integers overflow in the arithmetic of the order, and are no JSON in a state.
        for name in ("batch_size", "segment_frames", "seed", "lanes", "window_shards"):
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if self.batch_size < 1 or self.segment_frames < 1:
            raise ValueError(
                f"batch_size {self.batch_size}, segment_frames {self.segment_frames}: both must be "
                "positive"
            )
        if self.order not in ("global", "windowed"):
            raise ValueError(f"order {self.order!r}: must be 'global' or 'windowed'")
        if self.order == "windowed" and (self.lanes < 1 or self.window_shards < 1):
            raise ValueError(
                f"lanes {self.lanes}, window_shards {self.window_shards}: both must be positive"
            )
        if self.shares is not None:
            object.__setattr__(self, "shares", whole_shares(self.shares))
        if self.balance not in (None, "speaker"):
            raise ValueError(f"balance {self.balance!r}: must be 'speaker' or None")
        if self.is_endless and (self.order == "windowed" or not self.shuffle):
            raise ValueError(
                "shares and balance go with order 'global' and shuffle=True only: they draw from "
                "everywhere at any time"
            )

    @property
    def is_endless(self) -> bool:
        """Whether utterances are drawn without end, and an epoch is only a number of draws."""
        return self.shares is not None or self.balance is not None

    def identity(self) -> dict[str, Any]:
        """What must be the same for a position to mean the same utterances, as JSON values."""
        found: dict[str, Any] = {"seed": self.seed, "order": self.order}
        if self.order == "windowed":
            found |= {"lanes": self.lanes, "window_shards": self.window_shards}
        if self.is_endless:
            # The length of an epoch, by which draws are counted.
            found["drop_last"] = self.drop_last
        if self.shares is not None:
            found["shares"] = list(self.shares)
        if self.balance is not None:
            found["balance"] = self.balance
        return found

    @property
    def counts_batches(self) -> bool:
        """Whether a position means other utterances with another batch of all ranks."""
        return self.order == "windowed" or self.is_endless


@dataclass(frozen=True)
class Block:
    """The plan of a few batches of one rank, one after another.

    Attributes:
        nexts: Where in the epoch the batch after each begins.
        sizes: Segments of each batch.
        indices: Position in the split of each segment, of all these batches (B,).
        starts: First frame of each segment (B,).
    """

    nexts: list[int]
    sizes: list[int]
    indices: Indices
    starts: Indices


class BatchPlan:
    """The batches of one rank, of any epoch.

    Args:
        split: What is read.
        sampling: How it becomes batches.
        world: The rank, and how many there are.

    Attributes:
        world: As given.
        global_batch: Utterances of a batch of all ranks.
        end: Utterances of an epoch, of all ranks.
        read_ahead: Which shards come next.

    Raises:
        ValueError: The split is smaller than a batch of all ranks, and the last smaller batch is
            left out; or the ranks cannot share the lanes.
        StorageError: The cache has less room than the order needs at a time.
    """

    def __init__(self, split: Split, sampling: Sampling, world: World) -> None:
        self._split = split
        self._sampling = sampling
        self.world = world
        self.global_batch = sampling.batch_size * world.size
        check_split(split, sampling, world.size)
        if sampling.order == "windowed":
            check_lanes(sampling.lanes, sampling.window_shards, self.global_batch, world.size)
        rest = len(split) % self.global_batch
        self.end = len(split) - rest if sampling.drop_last else len(split)
        own = sampling.lanes // world.size
        planned = PLANNED
        if split.room is not None:
            planned = plan_for_cache(split, sampling.order, own, sampling.window_shards, split.room)
        # Order and segments of many batches at once: NumPy's calls cost more than their work.
        self._batches_planned = max(1, planned // self.global_batch)
        self._draws = None
        if sampling.is_endless:
            labels = None if sampling.balance is None else split.labels
            self._draws = endless_draws(split.set_sizes, sampling.shares, labels, sampling.seed)
        orders = _Orders(split, sampling, self.global_batch)
        self._order_of = orders
        lanes = range(world.rank * own, (world.rank + 1) * own)
        self.read_ahead = ReadAhead(split, orders, self.end, lanes, sampling.lanes)

    def __len__(self) -> int:
        return -(-self.end // self.global_batch)

    def count(self, start: Place, every: int = 1) -> int:
        """Batches in the rest of an epoch; see `blocks`."""
        return len(range(start.position, self.end, every * self.global_batch))

    def blocks(self, start: Place, every: int = 1, *, say_ahead: bool) -> Iterator[Block]:
        """The rest of an epoch, planned a few batches at a time.

        Args:
            start: Where it begins.
            every: Plan only the first of so many batches, and so on.
            say_ahead: Whether to say which shards the batches of a block need, before it comes.
        """
        step = self.global_batch
        all_begins = range(start.position, self.end, every * step)
        count = max(1, self._batches_planned // every)
        for first in range(0, len(all_begins), count):
            begins = all_begins[first : first + count]
            if say_ahead:
                self.read_ahead.want(start.epoch, begins[0], count * every * step)
            shares = [rank_slice(min(step, self.end - begin), *self.world) for begin in begins]
            positions = np.concatenate(
                [
                    np.arange(begin + share.start, begin + share.stop)
                    for begin, share in zip(begins, shares, strict=True)
                ]
            )
            sizes = [share.stop - share.start for share in shares]
            nexts = [begin + every * step for begin in begins]
            yield Block(nexts, sizes, *self._segments(start.epoch, positions))

    def _segments(self, epoch: int, positions: Indices) -> tuple[Indices, Indices]:
        """Indices and segment starts at some positions (B,) of an epoch."""
        sampling = self._sampling
        if not sampling.shuffle:
            return positions, np.zeros_like(positions)
        own_epoch: int | Indices = epoch
        if self._draws is None:
            indices = self._order_of(epoch)(positions)
        else:
            indices, own_epoch = self._draws(epoch * self.end + positions)
        frames = self._split.frames[indices]
        starts = segment_starts(
            indices, frames, sampling.segment_frames, seed=sampling.seed, epoch=own_epoch
        )
        return indices, starts


def check_split(split: Split, sampling: Sampling, world_size: int) -> None:
    """Refuse what cannot work, neither at this world size nor at a larger one.

    Raises:
        ValueError: The split has fewer utterances than a batch of all ranks, and the last smaller
            batch is left out; or it does not go with the shares or the balance.
        StorageError: The cache has less room than the global order needs.
    """
    _check_draws(split, sampling)
    if sampling.drop_last and len(split) < sampling.batch_size * world_size:
        raise ValueError(
            f"split {split.name} has {len(split)} utterances, fewer than one batch of "
            f"{sampling.batch_size} on each of {world_size} ranks; take a smaller batch_size"
        )
    if sampling.order == "global" and split.room is not None:
        plan_for_cache(split, sampling.order, sampling.lanes, sampling.window_shards, split.room)


def _check_draws(split: Split, sampling: Sampling) -> None:
    """ValueError if a split cannot be drawn from with the shares or the balance."""
    sizes, shares = split.set_sizes, sampling.shares
    if shares is not None and len(shares) != len(sizes):
        raise ValueError(
            f"shares {list(shares)}: split {split.name} comes from {len(sizes)} set(s), and each "
            "needs a share; open several sets as one by open_shards([A, B])"
        )
    if shares is not None and 0 in sizes:
        raise ValueError(
            f"shares {list(shares)}: set {sizes.index(0) + 1} of {len(sizes)} has no utterances in "
            f"split {split.name}"
        )
    if sampling.balance is not None and (unknown := int((split.labels < 0).sum())):
        raise ValueError(
            f"balance {sampling.balance!r}: {unknown} of the {len(split)} utterances of split "
            f"{split.name} have no speaker"
        )


class _Orders:
    """The order of each epoch; remembers those of the windowed order while they are needed."""

    def __init__(self, split: Split, sampling: Sampling, global_batch: int) -> None:
        self._split = split
        self._sampling = sampling
        self._global_batch = global_batch
        self._windowed: dict[int, WindowedOrder] = {}

    def __call__(self, epoch: int) -> EpochOrder:
        sampling = self._sampling
        if sampling.order == "global":
            return epoch_order(len(self._split), sampling.seed, epoch)
        if epoch not in self._windowed:
            # The end of an epoch looks at the next one already. Other epochs are needed no longer.
            kept = {n: order for n, order in self._windowed.items() if abs(n - epoch) == 1}
            kept[epoch] = WindowedOrder(
                self._split.shard_samples,
                sampling.seed,
                epoch,
                global_batch=self._global_batch,
                lanes=sampling.lanes,
                window_shards=sampling.window_shards,
            )
            self._windowed = kept
        return self._windowed[epoch]
