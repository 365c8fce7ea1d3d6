"""From planned segments to batches: gathered on the host, and delivered to the device.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardprep.load.buffers import BufferPool
from shardprep.load.course.position import Stretch
from shardprep.load.damage import ReadGuard
from shardprep.load.on_device import ResidentSplit
from shardprep.load.orders.epoch import Indices
from shardprep.load.plan import BatchPlan
from shardprep.read.split import Split

Batch = dict[str, Tensor]
# Indices, starts, segments (None where the split lies on the device), labels, lengths.
Segments = tuple[Indices, Indices, Tensor | None, Tensor, Tensor]
# Where the batch after this one begins, how many segments replace damaged ones, and the batch.
Planned = tuple[int, int, Segments]


class BatchMaker:
    """Makes the batches of a loader; it does not know where the loader stands.

    Args:
        split: What is read.
        guard: Finds and replaces damaged utterances.
        segment_frames: Frames T a segment.
        pad_value: Fills padded frames.
        device: Where the batches go.
        dtype: What the segments are converted to; None keeps that of the split.
        keep: Most buffers that are kept for later batches.

    Attributes:
        resident: The split on the device, if it lies there.
    """

    def __init__(
        self,
        split: Split,
        guard: ReadGuard,
        *,
        segment_frames: int,
        pad_value: float,
        device: torch.device,
        dtype: torch.dtype | None,
        keep: int,
    ) -> None:
        self._split = split
        self._guard = guard
        self._frames = segment_frames
        self._pad_value = pad_value
        self._device = device
        self._dtype = dtype
        self._buffers = BufferPool(keep)
        self.resident: ResidentSplit | None = None

    def load_resident(self) -> None:
        """Load the split onto the device, unless that is done."""
        if self.resident is None:
            self.resident = ResidentSplit(self._split, self._device, self._guard)

    def __getstate__(self) -> dict[str, Any]:
        # A split on the device belongs to this process.
        return {**self.__dict__, "resident": None}

    def prepare(self, plan: BatchPlan, stretch: Stretch) -> Iterator[Planned]:
        """Batches on the host, one after another."""
        split = self._split
        say_ahead = self.resident is None
        for block in plan.blocks(stretch.start, stretch.every, say_ahead=say_ahead):
            indices, starts = block.indices, block.starts
            labels = torch.from_numpy(split.labels[indices].astype(np.int64))
            lengths = np.minimum(split.frames[indices], self._frames)
            at = 0
            for following, size in zip(block.nexts, block.sizes, strict=True):
                own: Any = np.arange(at, at := at + size)
                replaced = 0
                if (places := self._guard.replacements(indices[own])) is not None:
                    replaced = int((places != np.arange(len(own))).sum())
                    own = own[places]
                mel = self._host_mel(indices[own], starts[own])
                valid = torch.from_numpy(lengths[own])
                yield following, replaced, (indices[own], starts[own], mel, labels[own], valid)

    def _host_mel(self, indices: Indices, starts: Indices) -> Tensor | None:
        """Segments (B, T, F) from the mapped shards, in memory that a GPU can copy from.

        None if the split lies on the device.
        """
        if self.resident is not None:
            return None
        split = self._split
        shape = (len(indices), self._frames, split.n_mels)
        if self._device.type == "cuda":
            # PyTorch keeps pinned buffers, and uses a buffer again when its copy is done.
            stored = torch.from_numpy(np.empty(0, split.dtype)).dtype
            mel = torch.empty(shape, dtype=stored, pin_memory=True)
        else:
            mel = torch.from_numpy(self._buffers.take(shape, split.dtype))
        split.segments(indices, starts, self._frames, self._pad_value, out=mel.numpy())
        return mel

    def deliver(self, segments: Segments) -> Batch:
        """Copy a batch to the device; the host does not wait."""
        indices, starts, mel, label, length = segments
        if mel is None:
            assert self.resident is not None
            mel = self.resident.segments(indices, starts, self._frames, self._pad_value)
        if self._device.type == "cuda":
            label = label.pin_memory()
        # Converted on the device, after the copy: fewer bytes are copied.
        mel = mel.to(self._device, non_blocking=True).to(self._dtype or mel.dtype)
        return {"mel": mel, "label": label.to(self._device, non_blocking=True), "length": length}
