"""Batches of whole utterances, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from shardprep.guard import OnCorrupt, ReadGuard
from shardprep.loader import Batch
from shardprep.prefetch import ahead
from shardprep.reader import Split
from shardprep.sampling import length_batches


class UtteranceLoader:
    """Whole utterances, their crc32 checked, batched by length, every one once over all ranks.

    Ranks may yield different numbers of batches: do not synchronise them batch by batch.

    Args:
        split: What to read.
        max_frames: Most frames of a batch, padding counted; a longer utterance travels alone.
        rank: This process's number.
        world_size: Number of processes.
        pad_value: Fills padded frames.
        prefetch: Batches that a thread prepares ahead; 0 prepares them when they are asked for.
        on_corrupt: What a damaged utterance leads to: "raise" an error, or "skip", which leaves it
            out.
        max_corrupt: Damaged utterances of this rank that "skip" bears; one more is an error.

    Yields:
        Dicts of CPU tensors: mel (B, T, F) in the stored dtype, label (B,), length (B,) and
        index (B,), the positions in the split, all int64.

    Raises:
        ValueError: An argument is out of range.
        CorruptShardError: While iterating: an utterance is damaged, or a shard cannot be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        max_frames: int = 32_768,
        rank: int = 0,
        world_size: int = 1,
        pad_value: float = -20.0,
        prefetch: int = 1,
        on_corrupt: OnCorrupt = "raise",
        max_corrupt: int = 100,
    ) -> None:
        if max_frames < 1 or not 0 <= rank < world_size or prefetch < 0:
            raise ValueError(
                f"max_frames {max_frames}, rank {rank} of {world_size}, prefetch {prefetch}"
            )
        self._prefetch = prefetch
        self.split = split
        self._pad_value = pad_value
        self._guard = ReadGuard(split, "always", on_corrupt, max_corrupt)
        self._batches = length_batches(split.frames, max_frames)[rank::world_size]

    def __len__(self) -> int:
        """Batches that this rank yields, where nothing is left out."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return ahead(self._read(), self._prefetch)

    def _read(self) -> Iterator[Batch]:
        for batch in self._batches:
            indices = self._guard.keep(batch)
            if len(indices):
                yield self._batch(indices)

    def _batch(self, indices: NDArray[np.int64]) -> Batch:
        split, frames = self.split, self.split.frames[indices]
        starts = np.zeros_like(indices)
        return {
            "mel": torch.from_numpy(
                split.crops(indices, starts, int(frames.max()), self._pad_value)
            ),
            "label": torch.from_numpy(split.labels[indices].astype(np.int64)),
            "length": torch.from_numpy(frames),
            "index": torch.from_numpy(indices),
        }
