"""Trials of speaker verification: pairs of utterances, drawn from a split or read from a list.

A trial asks whether two utterances have one speaker. Axis legend: N utterances, K trials.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import LeftOut, read_text

Ints = NDArray[np.signedinteger[Any]]
Bools = NDArray[np.bool_]

SEVERAL = -1
"""Position of a key that several utterances have."""

_AUDIO = (".wav", ".flac", ".m4a")
_ANSWERS = {"1": True, "0": False}


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


def positions_of(keys: Iterable[str]) -> dict[str, int]:
    """Positions of utterances in a split, by both names that lists give them: KEY and KEY.pt.

    SEVERAL stands for a key that several utterances have; see `check_single`.
    """
    found: dict[str, int] = {}
    for position, key in enumerate(keys):
        found[str(key)] = found[f"{key}.pt"] = SEVERAL if key in found else position
    return found


def check_single(positions: Mapping[str, int], key: str, where: str) -> None:
    """Refuse a key that several utterances have: a list does not say which one it means.

    Raises:
        PredictionError: The key is such a one; `where` says who asked for it.
    """
    if positions[key] == SEVERAL:
        raise PredictionError(
            f"{where}: {key} stands for several utterances, as sets that are read as one have it "
            "in common; name one of the sets with --shards"
        )


def read_trials(path: Path, keys: Iterable[str], left_out: LeftOut | None = None) -> Trials:
    """Read a list of trials as VoxCeleb has them: `1 ENROLL TEST` or `0 ENROLL TEST` a line.

    Args:
        path: The list. 1 says that the speaker is the same; blank lines are ignored.
        keys: Keys of the split's utterances, in its order; a list may append `.pt` to them, or
            the suffix of the audio.
        left_out: What the build of the shards left out.

    Raises:
        PredictionError: The file cannot be read, a line is not a trial of this split, or there
            is no target or no non-target trial.
    """
    positions = positions_of(keys)
    target, enroll, test = [], [], []
    lines = read_text(path, "a list of trials").split("\n")
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0] not in _ANSWERS:
            raise PredictionError(
                f"{path}, line {number}: found {line.strip()[:80]!r}; write `1 ENROLL TEST` for "
                "a pair of one speaker and `0 ENROLL TEST` for one of two"
            )
        pair = [_without_audio(key) for key in fields[1:]]
        for key, name in zip(pair, fields[1:], strict=True):
            if key not in positions:
                raise PredictionError(_stranger(path, number, name, left_out))
            check_single(positions, key, f"{path}, line {number}")
        target.append(_ANSWERS[fields[0]])
        enroll.append(positions[pair[0]])
        test.append(positions[pair[1]])
    if all(target) or not any(target):
        raise PredictionError(
            f"{path}: {sum(target):,} target and {len(target) - sum(target):,} non-target trials; "
            "both kinds are needed"
        )
    return Trials(np.array(enroll, np.int64), np.array(test, np.int64), np.array(target))


def _without_audio(name: str) -> str:
    """The key of an utterance that a list names by its audio, as VoxCeleb's lists do."""
    return next((name.removesuffix(end) for end in _AUDIO if name.endswith(end)), name)


def _stranger(path: Path, number: int, key: str, left_out: LeftOut | None) -> str:
    remedy = "choose the --split that the list was made for"
    if left_out is not None and left_out.ids & {key, f"{key}.pt"}:
        remedy = f"the build left it out, as {left_out.listing} says: take the line out"
    return f"{path}, line {number}: the split has no utterance {key}; {remedy}"
