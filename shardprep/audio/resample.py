"""Brings samples to another rate, as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import needs

Samples = NDArray[np.float32]

# Samples that are resampled at a time: how the stream is cut is part of the result.
_BLOCK = 1 << 17


def resample(blocks: Iterable[Samples], rate: int, to: int) -> Iterator[Samples]:
    """The samples of a channel at another rate, by soxr in its quality HQ.

    Args:
        blocks: Samples (N,) of any lengths; how they are cut makes no difference.
        rate: Their rate [Hz].
        to: The rate that is wanted [Hz].
    """
    if rate == to:
        yield from blocks
        return
    with needs("audio"):
        import soxr
    stream = soxr.ResampleStream(rate, to, 1, dtype="float32", quality="HQ")
    for block in _even(blocks):
        if len(found := stream.resample_chunk(block)):
            yield found
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _even(blocks: Iterable[Samples]) -> Iterator[Samples]:
    """The same samples in blocks of one length, and the rest."""
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate((rest, block)) if len(rest) else block
        whole = len(rest) // _BLOCK * _BLOCK
        for at in range(0, whole, _BLOCK):
            yield rest[at : at + _BLOCK]
        rest = rest[whole:]
    if len(rest):
        yield rest
