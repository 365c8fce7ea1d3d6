"""Draws without end from some utterances: pure functions of (key, number of the draw).

Each draw has a number, from 0 on, and can be computed alone. What is drawn from comes in epochs of
its own: everything once, in a random order, and then again in another order.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardprep.load.orders.epoch import Indices, Permutations, derive_key, derive_keys

# Streams of random numbers; `shardprep.load.orders.epoch` lists those of other modules.
_SHUFFLED, _ROUND, _SPEAKER = 6, 7, 8


class Draws(Protocol):
    """Draws without end from range(n)."""

    def __call__(self, numbers: Indices) -> tuple[Indices, Indices]:
        """Some of the draws.

        Args:
            numbers: Which draws (B,), in any order.

        Returns:
            What they draw (B,); and how often each of these was drawn before (B,).
        """


class Shuffled:
    """Draws range(n) in a random order, then again in another one, and so on.

    Args:
        n: Size of the range.
        key: Integers that decide the orders, such as (seed, number of the set).
    """

    def __init__(self, n: int, *key: int) -> None:
        self._n = n
        self._key = derive_key(_SHUFFLED, *key)

    def __call__(self, numbers: Indices) -> tuple[Indices, Indices]:
        """See `Draws`."""
        epochs, places = np.divmod(numbers, self._n)
        first, last = _span(epochs)
        orders = Permutations(self._n, derive_keys(self._key, np.arange(first, last + 1)))
        return orders(epochs - first, places), epochs


class Balanced:
    """Draws from every speaker equally often.

    Draws come in rounds. Each round visits every speaker once, in an order of its own. A speaker's
    utterances come in epochs of the speaker's own: shorter ones where there are fewer utterances.

    Args:
        labels: Speaker of each utterance (n,).
        key: Integers that decide the orders, as of `Shuffled`.
    """

    def __init__(self, labels: NDArray[Any], *key: int) -> None:
        #: The utterances of the first speaker, then those of the second, ...
        self._utterances: Indices = np.argsort(labels, kind="stable")
        speakers, counts = np.unique(labels, return_counts=True)
        self._counts: Indices = counts.astype(np.int64)
        self._begins: Indices = np.cumsum(self._counts) - self._counts
        self._round_key = derive_key(_ROUND, *key)
        self._speaker_keys = derive_keys(derive_key(_SPEAKER, *key), speakers.astype(np.int64))

    def __call__(self, numbers: Indices) -> tuple[Indices, Indices]:
        """See `Draws`."""
        rounds, slots = np.divmod(numbers, len(self._counts))
        first, last = _span(rounds)
        visits = Permutations(
            len(self._counts), derive_keys(self._round_key, np.arange(first, last + 1))
        )
        speakers = visits(rounds - first, slots)
        # A round draws once from every speaker.
        epochs, places = np.divmod(rounds, self._counts[speakers])
        places = self._orders(speakers, epochs, places, first, last)
        return self._utterances[self._begins[speakers] + places], epochs

    def _orders(
        self, speakers: Indices, epochs: Indices, places: Indices, first: int, last: int
    ) -> Indices:
        """Where among a speaker's utterances each of B draws leads, in rounds `first` to `last`."""
        # Keys cost more than anything else here. So each is computed once for all draws of a
        # speaker in an epoch of the speaker's own, unless there are more speakers than draws.
        before = first // self._counts
        spans = last // self._counts - before + 1
        if int(spans.sum()) > len(places):
            keys = derive_keys(self._speaker_keys[speakers], epochs)
            return Permutations(self._counts[speakers], keys)(np.arange(len(places)), places)
        at = np.cumsum(spans) - spans
        owner = np.repeat(np.arange(len(spans)), spans)
        own_epochs = np.arange(len(owner)) - at[owner] + before[owner]
        keys = derive_keys(self._speaker_keys[owner], own_epochs)
        return Permutations(self._counts[owner], keys)((at - before)[speakers] + epochs, places)


def _span(numbers: Indices) -> tuple[int, int]:
    """The smallest and the largest of some numbers; 0 where there are none."""
    return (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
