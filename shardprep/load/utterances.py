"""Batches of whole utterances, for evaluation and prediction.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from shardprep.load.background import ahead
from shardprep.load.batch_maker import Batch
from shardprep.load.course.world import Part, refuse_second_division, this_worker
from shardprep.load.damage import OnCorrupt, ReadGuard
from shardprep.load.orders.epoch import length_batches
from shardprep.read.split import Split

# Part of the room for wanted shards that is read at a time; the next part comes meanwhile.
_AT_A_TIME = 0.45


class UtteranceLoader(IterableDataset[Batch]):
    """Whole utterances, batched by length; over all ranks, each once. Their crc32 is checked.

    Ranks may yield different numbers of batches: do not synchronise ranks batch by batch.

    Args:
        split: What to read.
        max_frames: Most frames of a batch, padding included; a longer utterance is a batch of
            its own.
        rank: This process's number; by default found when an iteration begins, as `SegmentLoader`
            does.
        world_size: Number of processes; by default found likewise.
        pad_value: Fills padded frames.
        prefetch: Batches that a thread prepares ahead; with 0, each is prepared when it is due.
        on_corrupt: What happens at a damaged utterance: "raise" an error, or "skip" it.
        max_corrupt: Most damaged utterances that "skip" skips on this rank; one more is an error.

    Yields:
        Dicts of CPU tensors: mel (B, T, F) in the stored dtype, float32 of a set of uint8; label
        (B,), length (B,) and index (B,), the position in the split, all three int64.

    Raises:
        ValueError: An argument is out of range.
        CorruptShardError: While iterating: an utterance is damaged, or a shard cannot be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        max_frames: int = 32_768,
        rank: int | None = None,
        world_size: int | None = None,
        pad_value: float = -20.0,
        prefetch: int = 1,
        on_corrupt: OnCorrupt = "raise",
        max_corrupt: int = 100,
    ) -> None:
        if max_frames < 1 or prefetch < 0:
            raise ValueError(
                f"max_frames {max_frames}, prefetch {prefetch}: frames must be positive, and "
                "batches not negative"
            )
        self._part = Part(rank, world_size)
        self._prefetch = prefetch
        self.split = split
        self._pad_value = pad_value
        self._guard = ReadGuard(split, "always", on_corrupt, max_corrupt)
        # Groups of shards, each with as many shards as there is room for at a time, and the batches
        # of all ranks from each.
        self._groups = [
            (shards, [indices[own] for own in length_batches(split.frames[indices], max_frames)])
            for shards, indices in _groups(split)
        ]

    def __len__(self) -> int:
        """Batches that this rank yields if no utterance is skipped."""
        return sum(len(batches) for batches in self._own_batches())

    def __iter__(self) -> Iterator[Batch]:
        refuse_second_division(self, self._part)
        batches = self._own_batches()
        if (worker := this_worker()) is not None:
            # Workers take turns, from the first batch of the rank to its last.
            before = np.cumsum([0, *map(len, batches)])
            firsts = (worker.number - before) % worker.count
            batches = [
                own[first :: worker.count]
                for own, first in zip(batches, firsts[:-1].tolist(), strict=True)
            ]
        return ahead(self._read(batches), self._prefetch)

    def _own_batches(self) -> list[list[NDArray[np.int64]]]:
        """The batches of this rank, from each group of shards."""
        rank, size = self._part.world()
        return [batches[rank::size] for _, batches in self._groups]

    def _read(self, own: list[list[NDArray[np.int64]]]) -> Iterator[Batch]:
        with contextlib.closing(self.split.wanted_shards()) as wanted:
            for number, ((shards, _), batches) in enumerate(zip(self._groups, own, strict=True)):
                if not batches:
                    continue
                wanted.want(shards, self._groups[(number + 1) % len(self._groups)][0])
                for batch in batches:
                    indices = self._guard.undamaged(batch)
                    if len(indices):
                        yield self._batch(indices)

    def _batch(self, indices: NDArray[np.int64]) -> Batch:
        split, frames = self.split, self.split.frames[indices]
        starts = np.zeros_like(indices)
        return {
            "mel": torch.from_numpy(
                split.segments(indices, starts, int(frames.max()), self._pad_value)
            ),
            "label": torch.from_numpy(split.labels[indices].astype(np.int64)),
            "length": torch.from_numpy(frames),
            "index": torch.from_numpy(indices),
        }


def _groups(split: Split) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Shards that there is room for at a time, and the positions (N,) of their utterances."""
    begins = np.cumsum([0, *split.shard_samples])
    room = None if split.room is None else _AT_A_TIME * split.room
    ends = np.cumsum(split.shard_bytes)
    first = 0
    while first < len(ends):
        stop = len(ends)
        if room is not None:
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + room, side="right")))
        # Of a folder, one group: it is read by length, so reading ahead by shards gains nothing.
        shards = [] if room is None else list(range(first, stop))
        yield shards, np.arange(begins[first], begins[stop])
        first = stop
