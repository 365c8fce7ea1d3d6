"""Bytes of sets of uint8 as the values that they stand for, where they are used.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardprep.read.gather.shares import threads, work_on
from shardprep.read.split import Split

# Values that are widened at a time on a CPU: in float32, they stay in the cache of a core.
_PIECE = 1 << 18


def dequantise(
    mel: Tensor,
    minimum: Tensor,
    step: Tensor,
    length: Tensor | None = None,
    pad_value: float = -20.0,
) -> Tensor:
    """The values of bytes as `SegmentLoader(dtype=torch.uint8)` delivers them.

    On a CPU, bit by bit what the loader gives by default.

    Args:
        mel: Bytes (B, T, F) uint8.
        minimum: What 0 stands for, for each utterance (B,) float32, on the device of `mel`.
        step: Distance of two levels, for each utterance (B,) float32, likewise.
        length: Frames of each utterance that are not padding (B,), on any device. None for no
            padding, or to leave it at the minimum.
        pad_value: Fills padded frames.

    Returns:
        Values (B, T, F) float32, on the device of `mel`.

    Raises:
        TypeError: `mel` holds no bytes.
    """
    if mel.dtype != torch.uint8:
        raise TypeError(f"mel of {mel.dtype}: dequantise takes torch.uint8, as a set of it stores")
    if torch.compiler.is_compiling() or mel.device.type != "cpu":
        wide = mel.to(torch.float32) * step[:, None, None] + minimum[:, None, None]
        if length is None:
            return wide
        frames = torch.arange(mel.shape[1], device=mel.device)
        padded = frames >= length.to(mel.device, non_blocking=True)[:, None]  # (B, T)
        return wide.masked_fill(padded[:, :, None], pad_value)
    out = torch.empty(mel.shape, dtype=torch.float32)
    widen(mel, minimum, step, out)
    if length is not None:
        pad(out, length.cpu().numpy(), pad_value)
    return out


def widen(mel: Tensor, minimum: Tensor, step: Tensor, out: Tensor) -> None:
    """Fill `out` (B, T, F) float32 with the values of bytes, all on the CPU.

    Args:
        mel: Bytes (B, T, F).
        minimum: For each utterance (B,) float32.
        step: For each utterance (B,) float32.
        out: Where the values go.
    """
    levels, wide = mel.numpy(), out.numpy()
    lows, steps = (scale.numpy()[:, None, None] for scale in (minimum, step))

    def fill(begin: int) -> None:
        own = slice(begin, begin + rows)
        piece = wide[own]
        piece[...] = levels[own]
        # In place, so that a piece is written to memory once.
        piece *= steps[own]
        piece += lows[own]

    # Not by PyTorch, whose threads wait for each other after every operation: where other programs
    # use the cores, that takes many times as long.
    rows = max(1, _PIECE // max(1, mel[:1].numel()))
    work_on([partial(fill, begin) for begin in range(0, len(mel), rows)], threads())


def read_segments(
    split: Split,
    indices: NDArray[np.int64],
    starts: NDArray[np.int64],
    length: int,
    pad_value: float,
) -> Tensor:
    """A batch of segments (B, T, F) of the split's dtype, in new memory; see `Split.segments`."""
    if split.minimum is None or split.step is None:
        return torch.from_numpy(split.segments(indices, starts, length, pad_value))
    places = split.places(indices, starts, length)
    levels = np.empty((len(indices), length, split.n_mels), split.stored_dtype)
    split.gather(places, 0, levels)
    minimum, step = (torch.from_numpy(column[indices]) for column in (split.minimum, split.step))
    mel = torch.empty(levels.shape, dtype=torch.float32)
    widen(torch.from_numpy(levels), minimum, step, mel)
    pad(mel, places.valid, pad_value)
    return mel


def pad(mel: Tensor, length: NDArray[np.int64], pad_value: float) -> None:
    """Fill the frames of (B, T, F) from `length` (B,) on."""
    for row in np.flatnonzero(length < mel.shape[1]).tolist():
        mel[row, int(length[row]) :] = pad_value
