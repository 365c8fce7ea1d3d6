"""Which utterances of val choose the way of combining: few, spread evenly, always the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.evaluation.trials import Ints

SHARE = 0.04
"""Most frames of the sample, relative to those that are embedded anyway."""

# With fewer nothing is chosen; more than the other bound changes little, and takes memory.
_FEWEST, _MOST = 5, 1000


def sample(frames: Ints, usable: Ints, budget: float) -> NDArray[np.int64]:
    """Positions of the utterances, ascending, equidistant among those that are usable.

    Args:
        frames: Lengths of the utterances of the split (N,).
        usable: Positions of the utterances whose speakers all models know, ascending.
        budget: Most frames in all; five utterances are taken also where they have more.

    Returns:
        Nothing where fewer than five utterances are usable.
    """
    if len(usable) < _FEWEST:
        return np.empty(0, np.int64)
    count = int(min(len(usable), _MOST, max(_FEWEST, budget / frames[usable].mean())))
    while True:
        # The middles of `count` equal parts.
        chosen = usable[(np.arange(count) * 2 + 1) * len(usable) // (2 * count)]
        if count == _FEWEST or frames[chosen].sum() <= budget:
            return chosen.astype(np.int64)
        count -= 1
