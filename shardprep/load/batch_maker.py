"""From planned segments to batches: gathered on the host, and delivered to the device.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardprep.load.buffers import BufferPool
from shardprep.load.course.position import Stretch
from shardprep.load.damage import ReadGuard
from shardprep.load.on_device import ResidentSplit
from shardprep.load.plan import BatchPlan
from shardprep.load.widen import dequantise
from shardprep.read.gather.places import Places
from shardprep.read.gather.widen import pad, widen
from shardprep.read.split import Split

Batch = dict[str, Tensor]


class Made(NamedTuple):
    """A batch on the host."""

    following: int
    """Where in the epoch the batch after it begins."""
    replaced: int
    """How many segments stand for those of damaged utterances."""
    places: Places
    """Where its segments lie (B,)."""
    label: Tensor
    length: Tensor
    """Frames that are not padding (B,)."""
    mel: Tensor | None
    """Segments (B, T, F), as stored or widened; None where the split lies on the device."""
    scales: tuple[Tensor, ...]
    """Of bytes: what 0 stands for, and the distance of two levels (B,)."""


class BatchMaker:
    """Makes the batches of a loader; it does not know where the loader stands.

    Args:
        split: What is read.
        guard: Finds and replaces damaged utterances.
        segment_frames: Frames T a segment.
        pad_value: Fills padded frames.
        device: Where the batches go.
        dtype: What the segments are converted to; None keeps that of the split. torch.uint8
            delivers bytes as they are stored.
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
        # Where bytes lie until they are widened.
        self._bytes = BufferPool(1)
        self.resident: ResidentSplit | None = None

    def load_resident(self) -> None:
        """Load the split onto the device, unless that is done."""
        if self.resident is None:
            self.resident = ResidentSplit(self._split, self._device, self._guard)

    def __getstate__(self) -> dict[str, Any]:
        # A split on the device belongs to this process.
        return {**self.__dict__, "resident": None}

    def prepare(self, plan: BatchPlan, stretch: Stretch) -> Iterator[Made]:
        """Batches on the host, one after another."""
        split = self._split
        say_ahead = self.resident is None
        # What lies on the device has its scales there.
        found = (split.minimum, split.step)
        columns = [column for column in found if column is not None and say_ahead]
        for block in plan.blocks(stretch.start, stretch.every, say_ahead=say_ahead):
            # Of many batches at once: NumPy's calls cost more than their work.
            planned = split.places(block.indices, block.starts, self._frames)
            labels = split.labels[block.indices].astype(np.int64)
            at = 0
            for following, size in zip(block.nexts, block.sizes, strict=True):
                own: Any = slice(at, at := at + size)
                replaced = 0
                if (chosen := self._guard.replacements(planned.utterance[own])) is not None:
                    replaced = int((chosen != np.arange(size)).sum())
                    own = own.start + chosen
                places = planned.of(own)
                # Copies: a view of the whole block would be sent as a whole to another process.
                label = torch.from_numpy(labels[own].copy())
                length = torch.from_numpy(places.valid.copy())
                scales = tuple(torch.from_numpy(column[places.utterance]) for column in columns)
                mel = None if self.resident is not None else self._host_mel(places, scales)
                yield Made(following, replaced, places, label, length, mel, scales)

    def _host_mel(self, places: Places, scales: tuple[Tensor, ...]) -> Tensor:
        """Segments (B, T, F) from the mapped shards, in memory that a GPU can copy from."""
        split = self._split
        shape = (len(places.utterance), self._frames, split.n_mels)
        if self._device.type == "cuda":
            # PyTorch keeps pinned buffers, and uses a buffer again when its copy is done.
            stored = torch.from_numpy(np.empty(0, split.stored_dtype)).dtype
            mel = torch.empty(shape, dtype=stored, pin_memory=True)
            split.gather(places, self._pad_value, mel.numpy())
            return mel
        widens = split.is_quantised and self._dtype != torch.uint8
        pool = self._bytes if widens else self._buffers
        found = pool.take(shape, split.stored_dtype)
        split.gather(places, self._pad_value, found)
        if not widens:
            return torch.from_numpy(found)
        wide = self._buffers.take(shape, split.dtype)
        widen(found, scales[0].numpy(), scales[1].numpy(), wide)
        if int(places.valid.min(initial=self._frames)) < self._frames:
            pad(wide, places.valid, self._pad_value)
        return torch.from_numpy(wide)

    def deliver(self, made: Made) -> Batch:
        """Copy a batch to the device; the host does not wait."""
        mel, places, scales = made.mel, made.places, made.scales
        if mel is None:
            assert self.resident is not None
            mel, *there = self.resident.segments(
                places.utterance, places.start, self._frames, self._pad_value
            )
            scales = tuple(there)
        # Widened and converted on the device, after the copy: fewer bytes are copied.
        batch = {"mel": self._send(mel), "label": self._send(made.label), "length": made.length}
        if mel.dtype == torch.uint8:
            minimum, step = map(self._send, scales)
            if self._dtype == torch.uint8:
                return {**batch, "minimum": minimum, "step": step}
            short = int(places.valid.min(initial=self._frames)) < self._frames
            length = made.length if short else None
            batch["mel"] = dequantise(batch["mel"], minimum, step, length, self._pad_value)
        if self._dtype is not None:
            batch["mel"] = batch["mel"].to(self._dtype)
        return batch

    def _send(self, values: Tensor) -> Tensor:
        """A tensor on the device; segments on the host are pinned already."""
        if self._device.type == "cpu" or values.device.type != "cpu":
            return values
        if self._device.type == "cuda" and not values.is_pinned():
            values = values.pin_memory()
        return values.to(self._device, non_blocking=True)
