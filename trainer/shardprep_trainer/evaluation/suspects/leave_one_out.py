"""Compare each utterance with its own speaker, leaving the utterance itself out, and with others.

Pure NumPy. Axis legend: N utterances, K judged utterances, S speakers, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.evaluation.trials import Bools, Ints
from shardprep_trainer.evaluation.verification import (
    Floats,
    error_rates,
    normalize,
    speaker_means,
)
from shardprep_trainer.evaluation.wccn import Wccn

# Utterances that are compared at a time: with 6,000 speakers that is 100 MB of cosines.
_BLOCK = 4096


@dataclass(frozen=True)
class Judged:
    """The utterances of a split beside their speakers; cosines as `Wccn.scores` gives them."""

    position: Ints
    """Positions (K,) of the judged utterances in the split, ascending."""
    own: Floats
    """Cosine (K,) with the mean of the other utterances of the same label."""
    other: Floats
    """Cosine (K,) with the nearest mean of another speaker."""
    nearest: Ints
    """Number (K,) of that speaker."""
    alone: int
    """Labelled utterances that are not judged: their speaker has no other."""
    threshold: float
    """Cosine that separates `own` from `other` with equally many errors on both sides."""

    @cached_property
    def margin(self) -> Floats:
        """How much nearer the own speaker is (K,); negative where another one is nearer."""
        return self.own - self.other

    @cached_property
    def suspects(self) -> Ints:
        """Rows 0..K-1 of the utterances that are nearer to another speaker, worst margin first."""
        rows = np.flatnonzero(self.margin < 0)
        return rows[np.argsort(self.margin[rows], kind="stable")]

    @cached_property
    def is_like_other(self) -> Bools:
        """Whether the other speaker (K,) is as near as own speakers usually are."""
        return self.other >= self.threshold


def judge_labels(embeddings: Floats, speakers: Ints) -> Judged:
    """Compare every labelled utterance with its own and with all other speakers.

    A speaker is the mean of the utterances of that label after within-class covariance
    normalisation, as the backend wccn has it; `own` is exactly what this mean gives without the
    utterance. The covariance is estimated once, without the utterances that plain cosines find
    nearer to another speaker: wrong labels would make differences between speakers look like those
    within a speaker. That it holds the utterance itself, one of N, changes little.

    Args:
        embeddings: (N, D), of any length.
        speakers: Speaker of each (N,), negative where unknown; those take no part.

    Raises:
        ValueError: There are fewer than two speakers, or none of them has two utterances.
    """
    known = np.flatnonzero(speakers >= 0)
    numbers, rows, counts = np.unique(speakers[known], return_inverse=True, return_counts=True)
    if len(numbers) < 2 or counts.max() < 2:
        most = int(counts.max()) if len(counts) else 0
        raise ValueError(
            f"{len(numbers)} speakers, of whom none has more than {most} utterances: it takes two "
            "speakers, and one with two utterances"
        )
    judged = np.flatnonzero(counts[rows] > 1)
    own, other, _ = _compare(normalize(embeddings[known]), rows, judged)
    trusted = rows.copy()
    trusted[judged[own < other]] = -1
    # If all are doubted, none is worth more than another.
    wccn = Wccn(embeddings[known], trusted if (trusted >= 0).any() else rows)
    own, other, nearest = _compare(wccn.project(embeddings[known]), rows, judged)
    target = np.repeat([True, False], len(judged))
    return Judged(
        position=known[judged],
        own=own,
        other=other,
        nearest=numbers[nearest],
        alone=len(known) - len(judged),
        threshold=error_rates(np.concatenate((own, other)), target).equal()[1],
    )


def _compare(unit: NDArray[np.float32], rows: Ints, judged: Ints) -> tuple[Floats, Floats, Ints]:
    """Compare utterances with their own speaker, without themselves, and with the others.

    Args:
        unit: Embeddings (N, D) of length 1.
        rows: Speaker 0..S-1 of each (N,).
        judged: Which are compared (K,); their speakers have others.

    Returns:
        `own`, `other` and `nearest` (K,), as in `Judged`; `nearest` in 0..S-1.
    """
    sums = speaker_means(unit, rows) * np.bincount(rows)[:, None]
    means = normalize(sums)
    own, other = np.empty(len(judged)), np.empty(len(judged))
    nearest = np.empty(len(judged), np.int64)
    for at in range(0, len(judged), _BLOCK):
        block = slice(at, at + _BLOCK)
        these, labels = unit[judged[block]], rows[judged[block]]
        own[block] = _cosines(these, sums[labels] - these)
        scores = these @ means.T  # (block, S)
        scores[np.arange(len(these)), labels] = -np.inf
        nearest[block] = scores.argmax(1)
        other[block] = scores.max(1)
    return own, other, nearest


def _cosines(unit: NDArray[np.float32], sums: Floats) -> Floats:
    """Cosines (K,) of rows of length 1 with sums (K, D), 0 where a sum is 0."""
    lengths = np.linalg.norm(sums, axis=1)
    products = np.einsum("kd,kd->k", unit, sums)
    return np.asarray(products / np.where(lengths == 0, 1, lengths))
