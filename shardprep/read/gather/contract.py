"""What fills a batch of segments from a `ShardMap`, whatever the codec.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Gather(Protocol):
    """Copies segments out of a map, for codec "none" or "zstd"."""

    def __call__(
        self,
        begin: Indices,
        end: Indices,
        frames: Indices,
        start: Indices,
        valid: Indices,
        pad_value: float,
        out: NDArray[Any],
    ) -> None:
        """Fill `out` with a segment of each utterance.

        Args:
            begin: Where the payload of each utterance begins in the map (B,), in bytes.
            end: Where it ends (B,), in bytes.
            frames: Length of each utterance (B,), in frames.
            start: First frame of each segment (B,).
            valid: Frames of each segment that are not padding (B,).
            pad_value: Fills the padding.
            out: Segments (B, T, F) of the stored dtype.

        Raises:
            DamagedChunk: A segment cannot be decoded.
        """


class DamagedChunk(ValueError):
    """A segment cannot be decoded.

    Attributes:
        row: Which segment of the batch, from 0.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row
