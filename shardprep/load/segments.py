"""Batches for training and evaluation, from a split's memory maps to PyTorch tensors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardprep.errors import CorruptShardError, ShardprepError, StorageError
from shardprep.load.buffers import BufferPool, ahead
from shardprep.load.damage import OnCorrupt, ReadGuard, Verification
from shardprep.load.on_device import ResidentSplit, fits
from shardprep.load.order import Indices, epoch_order, rank_slice, segment_starts
from shardprep.load.order_windowed import WindowedOrder, check_lanes
from shardprep.read.split import Split

Batch = dict[str, Tensor]
Order = Literal["global", "windowed"]
Placement = Literal["auto", "host", "device"]
# Maps positions of an epoch (B,) to indices (B,).
EpochOrder = Callable[[Indices], Indices]
# Indices, starts, segments (None where they are cut on the device), labels, lengths.
Segments = tuple[Indices, Indices, Tensor | None, Tensor, Tensor]
# The position behind a batch, its segments that stand in for damaged ones, and the batch.
Planned = tuple[int, int, Segments]

# Samples of all ranks whose order and segments are computed at a time.
PLANNED = 16_384


class SegmentLoader:
    """Random segments of fixed length, every utterance once an epoch, over all ranks.

    Global batch k of an epoch holds the same utterances with the same segments at any world size,
    as long as batch_size * world_size is the same; each rank gathers only its own part. One
    iteration yields what is left of the current epoch and then stands at the start of the next;
    an iteration that was broken off is continued by the next one.

    Args:
        split: What to read.
        batch_size: Segments a batch of this rank.
        segment_frames: Frames T a segment; shorter utterances are padded behind.
        seed: Decides order and segments.
        rank: This process's number.
        world_size: Number of processes.
        shuffle: Whether utterances come in random order with random segments; otherwise in the
            split's order with segments from the first frame.
        drop_last: Whether to leave out the last len(split) % (batch_size * world_size)
            utterances of an epoch's order. Otherwise they form a last, smaller batch, shared out
            evenly; every rank still yields as many batches as the others, its last one perhaps
            with no segment at all.
        pad_value: Fills padded frames.
        order: "global" shuffles the whole split, for data that fit into memory, lie on a fast
            disk or on the device. "windowed" reads the shards one after the other and shuffles
            within a window, for data larger than memory; see `shardprep.load.order_windowed`.
        lanes: Sequences of shards that "windowed" reads side by side; a multiple of the world
            size that divides the batch of all ranks.
        window_shards: Shards in the window of each lane.
        device: Where the batches go; None leaves them on the host.
        dtype: What the segments are converted to, on the device; None keeps the stored dtype.
        placement: Where the split lies. "host" reads the mapped shards. "device" loads the split
            into the memory of `device` once, and cuts the same segments there. "auto" does so
            where that takes at most `shardprep.load.on_device.SHARE` of the free memory of a CUDA
            device.
        prefetch: Batches that a thread prepares ahead; 0 prepares them when they are asked for.
        verify_reads: Whether the crc32 of an utterance is checked before its segments are used:
            "never", "once" in this process, or "always". A split that goes to the device is always
            checked as it is loaded.
        on_corrupt: What a damaged utterance leads to: "raise" an error, or "skip" it. The next
            whole utterance of this rank's part of the batch then comes twice, so that batches
            keep their size and ranks stay in step.
        max_corrupt: Damaged utterances of this rank that "skip" bears; one more is an error, and
            so is a batch without a whole one.

    Attributes:
        placement: "host" or "device", as was decided.
        replaced: Segments that were delivered in the place of those of damaged utterances.

    Yields:
        Dicts of tensors: mel (B, T, F), label (B,) int64, both on `device`, and length (B,)
        int64, always on the host: the frames of each segment that are not padding.

    Raises:
        ValueError: An argument is out of range, the split is smaller than one global batch and
            drop_last is on, or damage is to be skipped that nobody looks for.
        StorageError: The split comes from a store, and the cache has no room for as much of it as
            the order needs at a time.
        CorruptShardError: A split that is to lie on the device is damaged. While iterating: a
            shard cannot be read, or an utterance was found to be damaged.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        segment_frames: int = 128,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        pad_value: float = -20.0,
        order: Order = "global",
        lanes: int = 8,
        window_shards: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        placement: Placement = "auto",
        prefetch: int = 2,
        verify_reads: Verification = "never",
        on_corrupt: OnCorrupt = "raise",
        max_corrupt: int = 100,
    ) -> None:
        if batch_size < 1 or segment_frames < 1 or not 0 <= rank < world_size or prefetch < 0:
            raise ValueError(
                f"batch_size {batch_size}, segment_frames {segment_frames}, prefetch {prefetch}, "
                f"rank {rank} of {world_size}: sizes must be positive and the rank below the "
                "world size"
            )
        self._global_batch = batch_size * world_size
        if drop_last and len(split) < self._global_batch:
            raise ValueError(
                f"split {split.name} has {len(split)} utterances, fewer than one batch of "
                f"{batch_size} on each of {world_size} ranks; take a smaller batch_size"
            )
        self._lanes, self._window_shards = lanes, window_shards
        self._stride = PLANNED
        if order == "windowed":
            check_lanes(lanes, window_shards, self._global_batch, world_size)
        if split.room is not None:
            self._stride = plan_for_cache(
                split, order, lanes // world_size, window_shards, split.room
            )
        self.split = split
        self.epoch = 0
        self.replaced = 0
        self._segment_frames = segment_frames
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._shuffle = shuffle
        self._pad_value = pad_value
        self._order: Order = order
        self._device = torch.device("cpu" if device is None else device)
        self._dtype = dtype
        self._prefetch = prefetch
        self._buffers = BufferPool(keep=prefetch + 2)
        self._position = 0
        rest = len(split) % self._global_batch
        self._end = len(split) - rest if drop_last else len(split)
        if placement == "auto":
            placement = "device" if fits(split, self._device) else "host"
        self.placement = placement
        self._guard = ReadGuard(split, verify_reads, on_corrupt, max_corrupt)
        self._resident = None
        if placement == "device":
            self._resident = ResidentSplit(split, self._device, self._guard)
        self._warmed = placement == "device"
        self._wanted = split.wanted_shards()
        self._orders: dict[int, WindowedOrder] = {}

    def __len__(self) -> int:
        """Batches a whole epoch gives each rank."""
        return -(-self._end // self._global_batch)

    @property
    def damaged(self) -> dict[str, CorruptShardError]:
        """Damaged utterances that this rank has met, by key, and what is wrong with each."""
        return {error.key or "": error for error in list(self._guard.damaged.values())}

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on every rank.

        The position counts the samples of all ranks, so that another world size can go on from it.
        """
        state = {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self._seed,
            "split": self.split.name,
            "fingerprint": self.split.fingerprint,
            "order": self._order,
        }
        if self._order == "windowed":
            # These decide which utterances have had their turn.
            state["lanes"], state["window_shards"] = self._lanes, self._window_shards
            state["global_batch"] = self._global_batch
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a loader stood when its `state_dict` was taken.

        Raises:
            ShardprepError: The state belongs to other data, another seed or another order.
        """
        own = self.state_dict()
        for name in own.keys() - {"epoch", "position"}:
            # States of before there was a choice of orders do not name theirs.
            found = state.get(name, "global" if name == "order" else None)
            if found != own[name]:
                raise ShardprepError(
                    f"the saved position has {name} {found!r}, this loader {own[name]!r}",
                    key=name,
                    remedy="Resume with the data set, the seed and the order that the run began "
                    "with.",
                )
        self.epoch, self._position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        self._warm()
        ready = ahead(self._segments(self.epoch, self._position), self._prefetch)
        with contextlib.closing(ready):
            for end, replaced, segments in ready:
                self._position = end
                self.replaced += replaced
                yield self._deliver(segments)
        self.epoch, self._position = self.epoch + 1, 0

    def _segments(self, epoch: int, position: int) -> Iterator[Planned]:
        """Segments of this rank's batches on the host."""
        order = self._epoch_order(epoch)
        step = self._global_batch
        # Order and segments of many batches at once: NumPy's calls cost more than their work.
        stride = max(1, self._stride // step) * step
        for block in range(position, self._end, stride):
            if self._resident is None:
                self._ask_for(order, epoch, block, stride)
            begins = range(block, min(block + stride, self._end), step)
            ends = [min(begin + step, self._end) for begin in begins]
            shares = [
                rank_slice(end - begin, self._rank, self._world_size)
                for begin, end in zip(begins, ends, strict=True)
            ]
            indices, starts = self._plan(order, epoch, begins, shares)
            labels = torch.from_numpy(self.split.labels[indices].astype(np.int64))
            lengths = np.minimum(self.split.frames[indices], self._segment_frames)
            at = 0
            for end, share in zip(ends, shares, strict=True):
                own: Any = np.arange(at, at := at + share.stop - share.start)
                replaced = 0
                if (places := self._guard.stand_ins(indices[own])) is not None:
                    replaced = int((places != np.arange(len(own))).sum())
                    own = own[places]
                mel = self._host_mel(indices[own], starts[own])
                length = torch.from_numpy(lengths[own])
                yield end, replaced, (indices[own], starts[own], mel, labels[own], length)

    def _plan(
        self, order: EpochOrder, epoch: int, begins: range, shares: list[slice]
    ) -> tuple[Indices, Indices]:
        """Indices and segment starts of this rank's part of some batches."""
        positions = np.concatenate(
            [
                np.arange(begin + share.start, begin + share.stop)
                for begin, share in zip(begins, shares, strict=True)
            ]
        )
        if not self._shuffle:
            return positions, np.zeros_like(positions)
        indices, length = order(positions), self._segment_frames
        frames = self.split.frames[indices]
        return indices, segment_starts(indices, frames, length, seed=self._seed, epoch=epoch)

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order == "global":
            return epoch_order(len(self.split), self._seed, epoch)
        return self._windowed_order(epoch)

    def _windowed_order(self, epoch: int) -> WindowedOrder:
        if epoch not in self._orders:
            # The end of an epoch looks at the next one already; no others are needed any more.
            self._orders = {n: order for n, order in self._orders.items() if abs(n - epoch) == 1}
            self._orders[epoch] = WindowedOrder(
                self.split.shard_samples,
                self._seed,
                epoch,
                global_batch=self._global_batch,
                lanes=self._lanes,
                window_shards=self._window_shards,
            )
        return self._orders[epoch]

    def _host_mel(self, indices: Indices, starts: Indices) -> Tensor | None:
        """Segments cut from the mapped shards, in memory that a GPU can fetch them from."""
        if self._resident is not None:
            return None
        split = self.split
        shape = (len(indices), self._segment_frames, split.n_mels)
        if self._device.type == "cuda":
            # PyTorch keeps pinned buffers, and uses one again when its copy has been made.
            stored = torch.from_numpy(np.empty(0, split.dtype)).dtype
            mel = torch.empty(shape, dtype=stored, pin_memory=True)
        else:
            mel = torch.from_numpy(self._buffers.take(shape, split.dtype))
        split.segments(indices, starts, self._segment_frames, self._pad_value, out=mel.numpy())
        return mel

    def _deliver(self, segments: Segments) -> Batch:
        """Bring a batch to the device; the host waits for nothing."""
        indices, starts, mel, label, length = segments
        if mel is None:
            assert self._resident is not None
            mel = self._resident.segments(indices, starts, self._segment_frames, self._pad_value)
        if self._device.type == "cuda":
            label = label.pin_memory()
        # Converted on the device, after the copy: fewer bytes travel.
        mel = mel.to(self._device, non_blocking=True).to(self._dtype or mel.dtype)
        return {"mel": mel, "label": label.to(self._device, non_blocking=True), "length": length}

    def _warm(self) -> None:
        """Have the shards read from end to end, once, where the global order would pick pages."""
        if self._warmed or self._order != "global" or self.split.room is not None:
            return
        self._warmed = True
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.split.nbytes <= memory // 2:
            threading.Thread(target=_read_all, args=(self.split,), daemon=True).start()

    def _ask_for(self, order: EpochOrder, epoch: int, begin: int, stride: int) -> None:
        """Say which shards the batches of the next `stride` positions are cut from."""
        split = self.split
        if not isinstance(order, WindowedOrder):
            if split.room is not None:
                self._wanted.want(range(len(split.shard_samples)))
            return
        share = self._lanes // self._world_size
        lanes = range(self._rank * share, (self._rank + 1) * share)
        due = order.needed(begin, stride // self._lanes, lanes)
        if split.room is None:
            self._wanted.want(due)
            return
        # What two lanes share is read by one at its end and by the other at its beginning: it
        # stays, so as to be fetched but once.
        due += order.shared(lanes)
        reach = int(split.room / split.shard_bytes.sum() * len(split)) // share
        later = order.needed(begin, reach, lanes)
        if begin + stride >= self._end:
            later += self._windowed_order(epoch + 1).needed(0, stride // self._lanes, lanes)
        self._wanted.want(due, later)


def plan_for_cache(split: Split, order: Order, lanes: int, window_shards: int, room: int) -> int:
    """How many samples of all ranks may be planned at a time, if their shards are to be here.

    Args:
        split: What is read.
        order: See `SegmentLoader`.
        lanes: Lanes of this rank.
        window_shards: Shards in the window of each.
        room: Bytes of shards that can be here at a time.

    Raises:
        StorageError: The order needs more shards at a time than there is room for.
    """
    sizes = split.shard_bytes
    if sizes.sum() <= room:
        return PLANNED
    if order == "global":
        needed, advice = int(sizes.sum()), "read by order windowed, or "
    else:
        # Two windows of each lane and a shard at either end, and those that lanes share.
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
    # What is wrong with a shard is said when a segment of it is due.
    with contextlib.suppress(ShardprepError):
        for shard in range(len(split.shard_samples)):
            split.read_ahead(shard)
