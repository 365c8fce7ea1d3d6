"""Mels batched by length. Axis legend: B batch, T frames, F mel bins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mel = NDArray[np.floating[Any]]


def batches(
    mels: Sequence[Mel], max_frames: int, pad_value: float
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of mels of similar length, the longest first.

    Args:
        mels: (T, F) each.
        max_frames: Largest padded area of a batch [frames]; a longer mel is a batch of its own.
        pad_value: Fills padded frames [log-mel].

    Yields:
        Positions of the mels of a batch, mel (B, T, F) float32, and lengths (B,) int64.
    """
    order = sorted(range(len(mels)), key=lambda number: -len(mels[number]))
    at = 0
    while at < len(order):
        longest = len(mels[order[at]])
        own = order[at : at + max(1, max_frames // longest)]
        at += len(own)
        mel = torch.full((len(own), longest, mels[own[0]].shape[1]), pad_value)
        for row, number in zip(mel, own, strict=True):
            row[: len(mels[number])] = torch.from_numpy(np.asarray(mels[number], np.float32))
        yield own, mel, torch.tensor([len(mels[number]) for number in own])
