"""Where segments lie in the mapped shards.

Axis legend: B segments.
"""

from __future__ import annotations

from typing import NamedTuple

from shardprep.read.gather.contract import Indices


class Places(NamedTuple):
    """Where segments lie; each field is for B segments."""

    utterance: Indices
    """Position of the utterance in the split."""
    shard: Indices
    begin: Indices
    """Where the payload of the utterance begins in the map, in bytes."""
    end: Indices
    """Where it ends."""
    frames: Indices
    """Length of the utterance."""
    start: Indices
    """First frame of the segment, within its utterance."""
    valid: Indices
    """Frames of the segment that are not padding."""

    def of(self, rows: slice | Indices) -> Places:
        """The places of some of the segments."""
        utterance, shard, begin, end, frames, start, valid = self
        return Places(
            utterance[rows],
            shard[rows],
            begin[rows],
            end[rows],
            frames[rows],
            start[rows],
            valid[rows],
        )
