"""Trials of speaker verification: pairs of utterances, and drawing them from a split.

A trial asks whether two utterances have one speaker. Axis legend: N utterances, K trials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Trials:
    """Pairs of utterances, and whether each pair has one speaker."""

    enroll: Ints
    """Positions in the split (K,)."""
    test: Ints
    """Positions in the split (K,)."""
    target: Bools
    """Whether the speaker is the same (K,)."""

    def __len__(self) -> int:
        return len(self.target)


class _Pairs:
    """All unordered pairs of different utterances of labelled speakers, numbered, none stored.

    The utterances are sorted by speaker. The utterance at position b makes target pairs with the
    earlier utterances of its speaker, and non-target pairs with those of all earlier speakers.
    """

    def __init__(self, speakers: Ints) -> None:
        known = np.flatnonzero(speakers >= 0)
        self.row = known[np.argsort(speakers[known], kind="stable")]
        ordered = speakers[self.row]
        first = np.searchsorted(ordered, ordered, side="left")
        place = np.arange(len(ordered))
        # Of each kind: the first partner of every position, and how many pairs end at or before it.
        self._first = {True: first, False: np.zeros_like(first)}
        self._ends = {True: np.cumsum(place - first), False: np.cumsum(first)}

    def count(self, target: bool) -> int:
        ends = self._ends[target]
        return int(ends[-1]) if len(ends) else 0

    def numbered(self, target: bool, numbers: Ints) -> tuple[Ints, Ints]:
        """The pairs of these numbers, each in 0..count-1, the earlier utterance first."""
        ends = self._ends[target]
        later = np.searchsorted(ends, numbers, side="right")
        begin = np.concatenate(([0], ends))[later]
        earlier = self._first[target][later] + numbers - begin
        one, other = self.row[earlier], self.row[later]
        return np.minimum(one, other), np.maximum(one, other)


def possible_trials(speakers: Ints) -> tuple[int, int]:
    """How many target and non-target pairs there are in a split.

    Args:
        speakers: Speaker of each utterance (N,), negative where unknown.
    """
    pairs = _Pairs(speakers)
    return pairs.count(True), pairs.count(False)


def draw_trials(speakers: Ints, targets: int, nontargets: int, seed: int = 0) -> Trials:
    """Draw trials at random, uniformly among all pairs of different utterances, none twice.

    A pair and its mirror image are one. Utterances of unknown speakers take no part.

    Args:
        speakers: Speaker of each utterance (N,), negative where unknown.
        targets: Pairs of one speaker.
        nontargets: Pairs of two speakers.
        seed: Decides which.

    Returns:
        The target trials, then the others, each in the order of the pairs' numbers.

    Raises:
        ValueError: There are not so many; says how many there are.
    """
    if targets < 0 or nontargets < 0:
        raise ValueError(f"{targets} target and {nontargets} non-target trials: none can be < 0")
    pairs, rng = _Pairs(speakers), np.random.default_rng(seed)
    parts = []
    for target, count in ((True, targets), (False, nontargets)):
        total = pairs.count(target)
        if count > total:
            what = "target pairs (one speaker)" if target else "non-target pairs (two speakers)"
            why = "; no speaker has two utterances" if target and not total else ""
            why = "; there is only one speaker" if not target and not total else why
            raise ValueError(
                f"{count:,} {what} asked for, but {len(pairs.row):,} labelled utterances make "
                f"only {total:,}{why}"
            )
        parts.append(pairs.numbered(target, _draw_distinct(rng, total, count)))
    enroll, test = (np.concatenate(side) for side in zip(*parts, strict=True))
    return Trials(enroll, test, np.arange(targets + nontargets) < targets)


def _draw_distinct(rng: np.random.Generator, total: int, count: int) -> Ints:
    """`count` different numbers below `total`, ascending, every such set as likely as another.

    Memory grows with `count` and not with `total`, which is quadratic in the utterances.
    """
    if 2 * count >= total:
        return np.sort(rng.permutation(total)[:count])
    drawn = np.empty(0, np.int64)
    while True:
        drawn = np.concatenate((drawn, rng.integers(0, total, count + 16)))
        # The first `count` different ones in the order they came; a later repeat is left out.
        _, came = np.unique(drawn, return_index=True)
        if len(came) >= count:
            return np.sort(drawn[np.sort(came)[:count]])
