"""Bytes of sets of uint8 as the values that they stand for, where they are used.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardprep.read.gather.widen import pad, widen


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
    widen(mel.numpy(), minimum.numpy(), step.numpy(), out.numpy())
    if length is not None:
        pad(out.numpy(), length.cpu().numpy(), pad_value)
    return out
