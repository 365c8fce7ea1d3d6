"""Batches of random segments, from a split's memory maps to PyTorch tensors.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardprep.errors import CorruptShardError, ShardprepError
from shardprep.load.buffers import BufferPool, ahead
from shardprep.load.damage import OnCorrupt, ReadGuard, VerifyReads
from shardprep.load.on_device import ResidentSplit, fits
from shardprep.load.order import EpochOrder, Indices, epoch_order, rank_slice, segment_starts
from shardprep.load.order_windowed import WindowedOrder, check_lanes
from shardprep.load.read_ahead import PLANNED, ReadAhead, plan_for_cache
from shardprep.read.split import Split

Batch = dict[str, Tensor]
Order = Literal["global", "windowed"]
Placement = Literal["auto", "host", "device"]
# Indices, starts, segments (None where the split lies on the device), labels, lengths.
Segments = tuple[Indices, Indices, Tensor | None, Tensor, Tensor]
# The position behind a batch, how many of its segments replace damaged ones, and the batch.
Planned = tuple[int, int, Segments]


class SegmentLoader:
    """Random segments of fixed length; over all ranks, every utterance once an epoch.

    Global batch k of an epoch holds the same utterances with the same segments at any world size,
    as long as batch_size * world_size is the same; each rank gathers only its own part. One
    iteration yields the rest of the current epoch, and then stands at the start of the next epoch.
    If an iteration is broken off, the next one continues it.

    Args:
        split: What to read.
        batch_size: Segments a batch of this rank.
        segment_frames: Frames T a segment; shorter utterances are padded at their end.
        seed: Decides order and segments.
        rank: This process's number.
        world_size: Number of processes.
        shuffle: Whether utterances come in random order with random segments. Otherwise they come
            in the split's order, and each segment begins at the first frame.
        drop_last: Whether to leave out the last len(split) % (batch_size * world_size)
            utterances of an epoch's order. Otherwise they form a last, smaller batch, divided
            evenly among the ranks. Every rank yields equally many batches; the last batch of a
            rank may be empty.
        pad_value: Fills padded frames.
        order: "global" shuffles the whole split: for data that fit into memory, or lie on a fast
            disk or on the device. "windowed" reads the shards one after another and shuffles
            within a shuffle window: for data larger than memory; see
            `shardprep.load.order_windowed`.
        lanes: Sequences of shards that "windowed" reads side by side; a multiple of the world
            size that divides the batch of all ranks.
        window_shards: Shards in the shuffle window of each lane.
        device: Where the batches go; None leaves them on the host.
        dtype: What the segments are converted to, on the device; None keeps the stored dtype.
        placement: Where the split lies. "host" reads the mapped shards. "device" loads the split
            into the memory of `device` once, and takes the same segments from there. "auto" means
            "device" if the split takes at most `shardprep.load.on_device.SHARE` of the free memory
            of a CUDA device, otherwise "host".
        prefetch: Batches that a thread prepares ahead; with 0, each is prepared when it is due.
        verify_reads: Whether the crc32 of an utterance is checked before its segments are used:
            "never", "once" in this process, or "always". A split that goes to the device is always
            checked while it is loaded.
        on_corrupt: What happens at a damaged utterance: "raise" an error, or "skip" it. With
            "skip", the next undamaged utterance of this rank's part of the batch comes twice, so
            that batches keep their size and ranks stay in step.
        max_corrupt: Most damaged utterances that "skip" skips on this rank. One more is an error,
            and so is a batch in which every utterance is damaged.

    Attributes:
        placement: "host" or "device"; what "auto" chose.
        replaced: Segments delivered so far in place of those of damaged utterances.

    Yields:
        Dicts of tensors: mel (B, T, F) and label (B,) int64, both on `device`, and length (B,)
        int64, always on the host: how many frames of each segment are not padding.

    Raises:
        ValueError: An argument is out of range; or the split is smaller than one global batch and
            drop_last is on; or on_corrupt is "skip" and verify_reads "never".
        StorageError: The split comes from a store, and the cache has less room than the order
            needs at a time.
        CorruptShardError: A split that goes to the device is damaged. While iterating: a shard
            cannot be read, or an utterance is damaged.
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
        verify_reads: VerifyReads = "never",
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
        self._orders = _Orders(
            split,
            order,
            seed,
            global_batch=self._global_batch,
            lanes=lanes,
            window_shards=window_shards,
        )
        own = lanes // world_size
        own_lanes = range(rank * own, (rank + 1) * own)
        self._read_ahead = ReadAhead(split, self._orders, self._end, own_lanes, lanes)

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return -(-self._end // self._global_batch)

    @property
    def damaged(self) -> dict[str, CorruptShardError]:
        """Damaged utterances that this rank found so far: key to what is wrong."""
        return {error.key or "": error for error in list(self._guard.damaged.values())}

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; do nothing if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on every rank.

        The position counts the utterances of all ranks, so that a run can continue at another
        world size.
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
            # These decide which utterances came already.
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
            # Older states, from when there was one order, do not name the order.
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
        if self._order == "global" and self._resident is None:
            self._read_ahead.warm()
        ready = ahead(self._segments(self.epoch, self._position), self._prefetch)
        with contextlib.closing(ready):
            for end, replaced, segments in ready:
                self._position = end
                self.replaced += replaced
                yield self._deliver(segments)
        self.epoch, self._position = self.epoch + 1, 0

    def _segments(self, epoch: int, position: int) -> Iterator[Planned]:
        """Segments of this rank's batches on the host."""
        order = self._orders(epoch)
        step = self._global_batch
        # Order and segments of many batches at once: NumPy's calls cost more than their work.
        stride = max(1, self._stride // step) * step
        for block in range(position, self._end, stride):
            if self._resident is None:
                self._read_ahead.want(epoch, block, stride)
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
                if (places := self._guard.replacements(indices[own])) is not None:
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

    def _host_mel(self, indices: Indices, starts: Indices) -> Tensor | None:
        """Segments (B, T, F) from the mapped shards, in memory that a GPU can copy from.

        None if the split lies on the device.
        """
        if self._resident is not None:
            return None
        split = self.split
        shape = (len(indices), self._segment_frames, split.n_mels)
        if self._device.type == "cuda":
            # PyTorch keeps pinned buffers, and uses a buffer again when its copy is done.
            stored = torch.from_numpy(np.empty(0, split.dtype)).dtype
            mel = torch.empty(shape, dtype=stored, pin_memory=True)
        else:
            mel = torch.from_numpy(self._buffers.take(shape, split.dtype))
        split.segments(indices, starts, self._segment_frames, self._pad_value, out=mel.numpy())
        return mel

    def _deliver(self, segments: Segments) -> Batch:
        """Copy a batch to the device; the host does not wait."""
        indices, starts, mel, label, length = segments
        if mel is None:
            assert self._resident is not None
            mel = self._resident.segments(indices, starts, self._segment_frames, self._pad_value)
        if self._device.type == "cuda":
            label = label.pin_memory()
        # Converted on the device, after the copy: fewer bytes are copied.
        mel = mel.to(self._device, non_blocking=True).to(self._dtype or mel.dtype)
        return {"mel": mel, "label": label.to(self._device, non_blocking=True), "length": length}


class _Orders:
    """The order of each epoch; remembers those of the windowed order while they are needed."""

    def __init__(
        self,
        split: Split,
        order: Order,
        seed: int,
        *,
        global_batch: int,
        lanes: int,
        window_shards: int,
    ) -> None:
        self._split = split
        self._order = order
        self._seed = seed
        self._options = {
            "global_batch": global_batch,
            "lanes": lanes,
            "window_shards": window_shards,
        }
        self._windowed: dict[int, WindowedOrder] = {}

    def __call__(self, epoch: int) -> EpochOrder:
        if self._order == "global":
            return epoch_order(len(self._split), self._seed, epoch)
        if epoch not in self._windowed:
            # The end of an epoch looks at the next one already. Other epochs are needed no longer.
            kept = {n: order for n, order in self._windowed.items() if abs(n - epoch) == 1}
            shards = self._split.shard_samples
            kept[epoch] = WindowedOrder(shards, self._seed, epoch, **self._options)
            self._windowed = kept
        return self._windowed[epoch]
