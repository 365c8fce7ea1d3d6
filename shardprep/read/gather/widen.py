"""Bytes of a set of uint8 as the values that they stand for, by all threads of the process.

Axis legend: B segments, T frames, F mel bins.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.format.quantised import dequantise
from shardprep.read.gather.shares import threads, work_on

# Values that are widened at a time: in float32, they stay in the cache of a core.
_PIECE = 1 << 18


def widen(
    levels: NDArray[np.uint8],
    minimum: NDArray[np.float32],
    step: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Fill a buffer with the values of bytes; see `shardprep.format.quantised.dequantise`.

    Args:
        levels: Bytes (B, T, F).
        minimum: What 0 stands for, for each segment (B,).
        step: Distance of two levels, for each segment (B,).
        out: Where the values go (B, T, F).
    """
    lows, steps = minimum[:, None, None], step[:, None, None]

    def fill(begin: int) -> None:
        own = slice(begin, begin + rows)
        dequantise(levels[own], lows[own], steps[own], out=out[own])

    # Not by PyTorch, whose threads wait for each other after every operation: where other programs
    # use the cores, that takes many times as long.
    rows = max(1, _PIECE // max(1, levels[:1].size))
    work_on([partial(fill, begin) for begin in range(0, len(levels), rows)], threads())


def pad(mel: NDArray[Any], valid: NDArray[np.int64], pad_value: float) -> None:
    """Fill the frames of segments (B, T, F) from `valid` (B,) on."""
    for row in np.flatnonzero(valid < mel.shape[1]).tolist():
        mel[row, int(valid[row]) :] = pad_value
