"""Removes silence, as a stream: the result does not depend on how the samples were cut."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


class SilenceRemover:
    """Removes long stretches of quiet samples, at the ends and in the middle.

    A sample is quiet if its magnitude is below `level`. A stretch is consecutive quiet samples; one
    of more than `longest` samples is removed whole, a shorter one stays.

    Args:
        level: Magnitude, full scale is 1.
        longest: Samples of the longest stretch that stays.
    """

    def __init__(self, level: float, longest: int) -> None:
        # The smallest value of float32 that is not below: comparing is then exact.
        self._level = np.float32(level)
        if float(self._level) < level:
            self._level = np.nextafter(self._level, np.float32(np.inf))
        self._longest = longest
        # The quiet samples at the end so far, up to one more than may stay.
        self._quiet: Samples = np.zeros(0, np.float32)

    def push(self, samples: Samples) -> Samples:
        """What is known to stay of the samples so far (N,), and has not been given before."""
        loud = np.flatnonzero(np.abs(samples) >= self._level)
        if not len(loud):
            self._wait(np.concatenate((self._quiet, samples)))
            return samples[:0]
        before = len(self._quiet)
        joined = np.concatenate((self._quiet, samples)) if before else samples
        # Where each stretch begins and ends: after a loud sample, before the next.
        edges = np.concatenate(([-1], loud + before))
        long = np.flatnonzero(np.diff(edges) - 1 > self._longest)
        begins = np.concatenate(([0], edges[long + 1]))
        ends = np.concatenate((edges[long] + 1, edges[-1:] + 1))
        self._wait(joined[edges[-1] + 1 :])
        if not len(long):
            return joined[: ends[0]]
        return np.concatenate([joined[b:e] for b, e in zip(begins, ends, strict=True)])

    def end(self) -> Samples:
        """The quiet samples at the end, if they stay."""
        kept = self._quiet if len(self._quiet) <= self._longest else self._quiet[:0]
        self._quiet = self._quiet[:0]
        return kept

    def _wait(self, quiet: Samples) -> None:
        self._quiet = quiet[: self._longest + 1].copy()
