"""Batches for training and evaluation, from a split's memory maps to PyTorch tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardprep.errors import ShardprepError
from shardprep.reader import Split
from shardprep.sampling import crop_starts, epoch_order, length_batches, rank_slice

Batch = dict[str, Tensor]


class SegmentLoader:
    """Random segments of fixed length, every utterance once an epoch, over all ranks.

    Global batch k of an epoch holds the same utterances with the same crops at any world size,
    as long as batch_size * world_size is the same; each rank gathers only its own part. One
    iteration yields what is left of the current epoch and then stands at the start of the next;
    an iteration that was broken off is continued by the next one.

    Args:
        split: What to read.
        batch_size: Segments a batch of this rank.
        segment_frames: Frames T a segment; shorter utterances are padded behind.
        seed: Decides order and crops.
        rank: This process's number.
        world_size: Number of processes.
        shuffle: Whether utterances come in random order with random crops; otherwise in the
            split's order with crops from the first frame.
        drop_last: Whether to leave out the last len(split) % (batch_size * world_size)
            utterances of an epoch's order. Otherwise they form a last, smaller batch, shared out
            evenly; every rank still yields as many batches as the others, its last one perhaps
            with no segment at all.
        pad_value: Fills padded frames.

    Yields:
        Dicts of CPU tensors: mel (B, T, F) in the stored dtype, label (B,) int64, length (B,)
        int64, the frames of each segment that are not padding.

    Raises:
        ValueError: An argument is out of range, or the split is smaller than one global batch
            and drop_last is on.
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
    ) -> None:
        if batch_size < 1 or segment_frames < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, segment_frames {segment_frames}, rank {rank} of "
                f"{world_size}: sizes must be positive and the rank below the world size"
            )
        self._global_batch = batch_size * world_size
        if drop_last and len(split) < self._global_batch:
            raise ValueError(
                f"split {split.name} has {len(split)} utterances, fewer than one batch of "
                f"{batch_size} on each of {world_size} ranks; take a smaller batch_size"
            )
        self.split = split
        self.epoch = 0
        self._segment_frames = segment_frames
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._shuffle = shuffle
        self._pad_value = pad_value
        self._position = 0
        rest = len(split) % self._global_batch
        self._end = len(split) - rest if drop_last else len(split)

    def __len__(self) -> int:
        """Batches a whole epoch gives each rank."""
        return -(-self._end // self._global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens if it is the current one."""
        if epoch != self.epoch:
            self.epoch, self._position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, the same on every rank.

        The position counts the samples of all ranks, so that another world size can go on from it.
        """
        return {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self._seed,
            "split": self.split.name,
            "fingerprint": self.split.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a loader stood when its `state_dict` was taken.

        Raises:
            ShardprepError: The state belongs to other data or another seed.
        """
        own = self.state_dict()
        for name in ("split", "fingerprint", "seed"):
            if state.get(name) != own[name]:
                raise ShardprepError(
                    f"the saved position has {name} {state.get(name)!r}, this loader {own[name]!r}",
                    key=name,
                    remedy="Resume with the data set and the seed that the run began with.",
                )
        self.epoch, self._position = int(state["epoch"]), int(state["position"])

    def __iter__(self) -> Iterator[Batch]:
        while self._position < self._end:
            begin = self._position
            self._position = min(begin + self._global_batch, self._end)
            yield self._batch(begin, self._position)
        self.epoch, self._position = self.epoch + 1, 0

    def _batch(self, begin: int, end: int) -> Batch:
        share = rank_slice(end - begin, self._rank, self._world_size)
        indices = np.arange(begin + share.start, begin + share.stop, dtype=np.int64)
        starts = np.zeros_like(indices)
        if self._shuffle:
            indices = epoch_order(len(self.split), self._seed, self.epoch)(indices)
            starts = crop_starts(
                indices,
                self.split.frames[indices],
                self._segment_frames,
                seed=self._seed,
                epoch=self.epoch,
            )
        return _crop_batch(self.split, indices, starts, self._segment_frames, self._pad_value)


class UtteranceLoader:
    """Whole utterances, batched by length, every one once over all ranks.

    Ranks may yield different numbers of batches: do not synchronise them batch by batch.

    Args:
        split: What to read.
        max_frames: Most frames of a batch, padding counted; a longer utterance travels alone.
        rank: This process's number.
        world_size: Number of processes.
        pad_value: Fills padded frames.

    Yields:
        Dicts of CPU tensors: mel (B, T, F) in the stored dtype, label (B,), length (B,) and
        index (B,), the positions in the split, all int64.
    """

    def __init__(
        self,
        split: Split,
        *,
        max_frames: int = 32_768,
        rank: int = 0,
        world_size: int = 1,
        pad_value: float = -20.0,
    ) -> None:
        if max_frames < 1 or not 0 <= rank < world_size:
            raise ValueError(f"max_frames {max_frames}, rank {rank} of {world_size}")
        self.split = split
        self._pad_value = pad_value
        self._batches = length_batches(split.frames, max_frames)[rank::world_size]

    def __len__(self) -> int:
        """Batches that this rank yields."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._batches:
            longest = int(self.split.frames[indices].max())
            starts = np.zeros_like(indices)
            batch = _crop_batch(self.split, indices, starts, longest, self._pad_value)
            yield {**batch, "index": torch.from_numpy(indices)}


def _crop_batch(
    split: Split,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    starts: np.ndarray[Any, np.dtype[np.int64]],
    length: int,
    pad_value: float,
) -> Batch:
    return {
        "mel": torch.from_numpy(split.crops(indices, starts, length, pad_value)),
        "label": torch.from_numpy(split.labels[indices].astype(np.int64)),
        "length": torch.from_numpy(np.minimum(split.frames[indices], length)),
    }
