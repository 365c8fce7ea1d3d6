"""A split in the memory of the device that trains on it.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardprep.errors import CorruptShardError
from shardprep.load.damage import ReadGuard
from shardprep.read.split import Split

SHARE = 0.4
"""Part of a device's free memory that a split may take at most."""

_PIECE_BYTES = 64 << 20


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split may lie on a device: it takes at most SHARE of the free memory there.

    Never on a CPU, where the mapped shards are in memory already.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.nbytes <= SHARE * free


class ResidentSplit:
    """All matrices of a split, one after another, on a device; those of uint8 as bytes.

    Args:
        split: What to load; the crc32 of each utterance is checked.
        device: Where the matrices go.
        guard: Raises or skips damaged utterances.

    Attributes:
        mel: All frames (frames, F), of the stored dtype.
        scales: Of a set of uint8, what 0 stands for in each utterance and the distance of its
            levels, (N,) float32 each; otherwise nothing.

    Raises:
        CorruptShardError: An utterance is damaged, and must not be skipped.
    """

    def __init__(self, split: Split, device: torch.device, guard: ReadGuard) -> None:
        self._device = device
        self._frames = split.frames
        self._first: NDArray[np.int64] = np.cumsum(split.frames) - split.frames
        total = int(split.frames.sum())
        sample = torch.from_numpy(np.empty(0, split.stored_dtype))
        self.mel = torch.empty((total, split.n_mels), dtype=sample.dtype, device=device)
        piece_frames = max(1, _PIECE_BYTES // (split.n_mels * split.stored_dtype.itemsize))
        index, shards = 0, split.locations["shard"]
        wanted = split.wanted_shards()
        while index < len(split):
            first = int(shards[index])
            wanted.want([first], range(first + 1, len(split.shard_samples)))
            at = int(self._first[index])
            stop = max(index + 1, int(np.searchsorted(self._first, at + piece_frames)))
            piece = np.concatenate([_read(split, i, guard) for i in range(index, stop)])
            self.mel[at : at + len(piece)].copy_(torch.from_numpy(piece))
            index = stop
        wanted.close()
        guard.stop_checking()
        columns = (split.minimum, split.step)
        self.scales = [torch.from_numpy(x).to(device) for x in columns if x is not None]

    def segments(
        self, indices: NDArray[np.int64], starts: NDArray[np.int64], length: int, pad_value: float
    ) -> tuple[Tensor, ...]:
        """A batch of segments (B, T, F) on the device, as `Split.stored_segments` gives them.

        Args:
            indices: Positions in the split (B,).
            starts: First frame of each segment (B,), within its utterance.
            length: Frames T a segment.
            pad_value: Fills the frames of a segment after the end of its utterance.

        Returns:
            The segments; of a set of uint8 also the scales of their utterances, (B,) each.
        """
        begin = self._first[indices] + starts
        valid = np.minimum(self._frames[indices] - starts, length)
        places = torch.from_numpy(np.stack([begin, valid, indices]))
        if self._device.type == "cuda":
            places = places.pin_memory()
        places = places.to(self._device, non_blocking=True)
        first, count, _ = places.unsqueeze(2)  # each (B, 1)
        steps = torch.arange(length, device=self._device)  # (T,)
        rows = (first + steps).clamp_(max=len(self.mel) - 1)  # (B, T)
        mel = self.mel[rows]  # (B, T, F)
        if (valid < length).any():
            mel.masked_fill_((steps >= count).unsqueeze(2), 0 if self.scales else pad_value)
        return (mel, *(scale[places[2]] for scale in self.scales))


def _read(split: Split, index: int, guard: ReadGuard) -> NDArray[Any]:
    """An utterance (T, F); zeros if it is damaged and skipped, which nobody will read."""
    try:
        return split.read_stored(index)
    except CorruptShardError as error:
        if error.key is None:
            raise
        guard.report(index, error)
        return np.zeros((int(split.frames[index]), split.n_mels), split.stored_dtype)
