"""Mixtures: several sets drawn from side by side, each as often as its share asks for.

After any number of draws, every set has come as often as its share asks for, to within one draw.
The draws follow a pattern that repeats: with shares 3 and 1, of every four draws three are from the
first set. What they draw is each set's own affair; see `shardprep.load.orders.endless`.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.load.orders.endless import Balanced, Draws, Shuffled
from shardprep.load.orders.epoch import Indices

LONGEST_PATTERN = 100_000
"""Most draws of a pattern: what the shares may add up to, in lowest terms."""

_LARGEST_DENOMINATOR = 1000


class Mixed:
    """Draws from several sets that stand one after another.

    Args:
        draws: What is drawn from each set.
        begins: Where each set begins (sets,).
        shares: How often each set comes, see `whole_shares`.
    """

    def __init__(
        self, draws: Sequence[Draws], begins: Sequence[int], shares: tuple[int, ...]
    ) -> None:
        self._draws = draws
        self._begins = begins
        self._shares = np.array(shares, np.int64)
        self._pattern, self._before = pattern(shares)

    def __call__(self, numbers: Indices) -> tuple[Indices, Indices]:
        """See `Draws`."""
        repeats, places = np.divmod(numbers, len(self._pattern))
        sets = self._pattern[places]
        own_numbers = repeats * self._shares[sets] + self._before[places]
        indices, epochs = np.empty_like(numbers), np.empty_like(numbers)
        for number, (draws, begin) in enumerate(zip(self._draws, self._begins, strict=True)):
            own = np.flatnonzero(sets == number)
            found, epochs[own] = draws(own_numbers[own])
            indices[own] = found + begin
        return indices, epochs


def endless_draws(
    sizes: Sequence[int],
    shares: Sequence[float | Rational] | None,
    labels: NDArray[Any] | None,
    seed: int,
) -> Draws:
    """Draws without end from the utterances of one or several sets.

    Args:
        sizes: Utterances of each set, positive.
        shares: How often each set comes, see `whole_shares`; None draws from all as from one set.
        labels: Speaker of each utterance (N,), of whom all are drawn equally often; of the
            speakers within each set, if there are shares. None shuffles the utterances.
        seed: Seed of the run.
    """

    def draws(number: int, begin: int, size: int) -> Draws:
        if labels is None:
            return Shuffled(size, seed, number)
        return Balanced(labels[begin : begin + size], seed, number)

    if shares is None:
        return draws(0, 0, sum(sizes))
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    each = [draws(number, *place) for number, place in enumerate(zip(begins, sizes, strict=True))]
    return Mixed(each, begins, whole_shares(shares))


@functools.lru_cache(8)
def pattern(shares: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which set each draw is from, until that repeats.

    The j-th draw from a set with share s, of W in all, comes in time if it is among the first
    ceil(j * W / s) draws, and not early if it is after the first floor((j - 1) * W / s). The draw
    that must come first is always taken. This keeps all times, as the shares of the draws add up to
    one draw at a time (Baruah et al. 1996, "Proportionate progress").

    Args:
        shares: Share of each set, positive.

    Returns:
        The set of each draw (W,); and how many draws before it are from the same set (W,).
    """
    total = sum(shares)
    sets, before = np.empty(total, np.int64), np.empty(total, np.int64)
    drawn = [0] * len(shares)
    # The next draw of each set: those that would be early, and those that may come, by when.
    early: list[tuple[int, int]] = [(0, number) for number in range(len(shares))]
    ready: list[tuple[int, int]] = []
    for at in range(total):
        while early and early[0][0] <= at:
            number = heapq.heappop(early)[1]
            due = -(-(drawn[number] + 1) * total // shares[number])
            heapq.heappush(ready, (due, number))
        number = heapq.heappop(ready)[1]
        sets[at], before[at] = number, drawn[number]
        drawn[number] += 1
        heapq.heappush(early, (drawn[number] * total // shares[number], number))
    sets.flags.writeable = before.flags.writeable = False
    return sets, before


def whole_shares(shares: Sequence[float | Rational]) -> tuple[int, ...]:
    """Shares as whole numbers in lowest terms.

    Args:
        shares: Whole numbers and fractions, taken exactly; or floats, each taken as the nearest
            fraction with a denominator of at most 1,000.

    Raises:
        ValueError: There is none, one is not a positive number, or their sum is larger than
            LONGEST_PATTERN.
    """
    refused = f"shares {shares!r}: must be positive numbers, at least .001, one for each set"
    if isinstance(shares, str):
        raise ValueError(refused)
    exact = [_fraction(share) for share in shares]
    if not exact or min(exact) <= 0:
        raise ValueError(refused)
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    divisor = math.gcd(*whole)
    found = tuple(share // divisor for share in whole)
    if sum(found) > LONGEST_PATTERN:
        raise ValueError(
            f"shares {list(shares)}: in whole numbers {list(found)}, which add up to more than "
            f"{LONGEST_PATTERN:,}; take rounder ones"
        )
    return found


def _fraction(share: float | Rational) -> Fraction:
    if isinstance(share, Rational):
        return Fraction(share)
    number = float(share)
    return (
        Fraction(number).limit_denominator(_LARGEST_DENOMINATOR)
        if math.isfinite(number)
        else Fraction(0)
    )
