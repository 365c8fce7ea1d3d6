"""Speaker verification: cosine scores of trials, their normalisation, and what they are worth.

Pure NumPy. A trial (see `trials` beside this module) asks whether two utterances have one speaker.
It is accepted where its score is at or above a threshold; trials of equal score are accepted or
rejected together, so nothing here depends on the order of the trials.

Axis legend: N utterances, K trials, C cohort, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.config.scoring import Thresholds
from shardprep_trainer.evaluation.trials import Bools, Ints, Trials

Floats = NDArray[np.floating[Any]]

P_TARGET = 0.01
"""Prior probability of a target trial, for minDCF."""

# Rows that are multiplied at a time: 4096 of width 512 are 8 MiB in float32, which a cache holds.
_BLOCK = 4096
# Cosines of float32 embeddings mean nothing below this; nor does a deviation of theirs.
_LEAST_DEVIATION = 1e-6


def normalize(embeddings: Floats) -> NDArray[np.float32]:
    """Bring embeddings (N, D) to length 1; one of length 0 stays as it is."""
    # In float64, so that squares neither overflow nor vanish.
    lengths = np.sqrt(np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64))
    scaled = embeddings / np.where(lengths == 0, 1, lengths)[:, None]
    return scaled.astype(np.float32)


def join(embeddings: Sequence[Floats]) -> NDArray[np.float32]:
    """Join the embeddings (N, D) of several models, so that a cosine is the mean of their cosines.

    Returns:
        Of one model, its embeddings as they are; else (N, sum of D), of length 1.
    """
    if len(embeddings) == 1:
        return np.asarray(embeddings[0], np.float32)
    return normalize(np.concatenate([normalize(own) for own in embeddings], axis=1))


def cosine_scores(embeddings: Floats, trials: Trials) -> NDArray[np.float64]:
    """Cosine of the two embeddings of each trial.

    Args:
        embeddings: (N, D), of any length.
        trials: K trials of positions in 0..N-1.

    Returns:
        Scores (K,), -1 to 1 but for rounding; 0 where an embedding has length 0.
    """
    unit = normalize(embeddings)
    scores = np.empty(len(trials))
    for at in range(0, len(trials), _BLOCK):
        block = slice(at, at + _BLOCK)
        pair = unit[trials.enroll[block]], unit[trials.test[block]]
        scores[block] = np.einsum("kd,kd->k", *pair)
    return scores


@dataclass(frozen=True)
class ErrorRates:
    """What each threshold that makes a difference leads to."""

    threshold: Floats
    """The distinct scores, rising, and one just above all of them."""
    miss: Floats
    """Share of the target trials that are rejected, rising from 0 to 1."""
    alarm: Floats
    """Share of the other trials that are accepted, falling from 1 to 0."""

    def equal(self) -> tuple[float, float]:
        """The equal error rate, see `equal_error_rate`, and the threshold next to it."""
        # Every point has a trial more or less of some kind, so the gap grows strictly from -1 to 1.
        gap = self.miss - self.alarm
        after = int(np.searchsorted(gap, 0.0))
        before = after - 1
        share = -gap[before] / (gap[after] - gap[before])
        rate = self.miss[before] + share * (self.miss[after] - self.miss[before])
        nearest = before if share < 0.5 else after
        return float(rate), float(self.threshold[nearest])

    def least_cost(self, p_target: float, c_miss: float, c_fa: float) -> tuple[float, float]:
        """The least normalised cost, see `min_dcf`, and the lowest threshold that has it."""
        at_miss, at_alarm = c_miss * p_target, c_fa * (1 - p_target)
        costs = at_miss * self.miss + at_alarm * self.alarm
        best = int(costs.argmin())
        return float(costs[best] / min(at_miss, at_alarm)), float(self.threshold[best])


def error_rates(scores: Floats, target: Bools) -> ErrorRates:
    """Miss and false-alarm rate at every threshold that makes a difference.

    Args:
        scores: (K,), higher where the speakers seem the same.
        target: Whether they are (K,).

    Raises:
        ValueError: A score is not finite, or there is no target or no non-target trial.
    """
    if scores.ndim != 1 or scores.shape != target.shape:
        raise ValueError(f"scores {scores.shape} and targets {target.shape}: pass (K,) and (K,)")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not a finite number")
    targets = int(target.sum())
    others = len(target) - targets
    if not targets or not others:
        raise ValueError(f"{targets} target and {others} non-target trials: both kinds are needed")
    order = np.argsort(scores)
    ranked = scores[order]
    # Where a run of equal scores begins; a threshold at that score rejects all before it.
    below = np.concatenate(([0], np.flatnonzero(np.diff(ranked)) + 1, [len(ranked)]))
    missed = np.concatenate(([0], np.cumsum(target[order])))[below]
    return ErrorRates(
        threshold=np.append(ranked[below[:-1]], np.nextafter(ranked[-1], np.inf)),
        miss=missed / targets,
        alarm=(others - (below - missed)) / others,
    )


def equal_error_rate(scores: Floats, target: Bools) -> float:
    """The rate at which misses and false alarms are equally frequent.

    The points of `error_rates` are joined by straight lines, and the rate is where these cross
    miss = false alarm. This is what the field's usual tools compute for VoxCeleb (the root of
    1 - fpr - tpr along a linearly interpolated ROC), but exactly and with no solver. A straight
    line between two points is what drawing lots between their thresholds achieves. The convex
    hull of the points (ROCCH-EER; Bruemmer and de Villiers 2013, arXiv 1304.2865) gives the same
    or a little less.

    Args:
        scores: (K,), higher where the speakers seem the same.
        target: Whether they are (K,).

    Returns:
        0 to 1; .5 where all scores are equal.

    Raises:
        ValueError: As `error_rates`.
    """
    return error_rates(scores, target).equal()[0]


def min_dcf(
    scores: Floats,
    target: Bools,
    *,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> float:
    """The normalised detection cost at the best of all thresholds.

    The cost of a threshold is c_miss * p_target * miss + c_fa * (1 - p_target) * false alarm,
    divided by that of the better of accepting all and rejecting all (NIST SRE 2016 evaluation
    plan, section 3; VoxSRC uses it with the defaults here but for p_target = .05).

    Args:
        scores: (K,), higher where the speakers seem the same.
        target: Whether they are (K,).
        p_target: Prior probability of a target, between 0 and 1.
        c_miss: Cost of a miss, above 0.
        c_fa: Cost of a false alarm, above 0.

    Returns:
        0 to 1.

    Raises:
        ValueError: As `error_rates`, or an argument out of its range.
    """
    if not 0 < p_target < 1 or c_miss <= 0 or c_fa <= 0:
        raise ValueError(f"p_target {p_target}, c_miss {c_miss}, c_fa {c_fa}: out of range")
    return error_rates(scores, target).least_cost(p_target, c_miss, c_fa)[0]


def speaker_means(embeddings: Floats, speakers: Ints) -> NDArray[np.float64]:
    """The cohort: each speaker's mean embedding, after each is brought to length 1.

    Args:
        embeddings: (N, D).
        speakers: Speaker of each (N,), negative where unknown; those take no part.

    Returns:
        (C, D), one row for each speaker that occurs, in the order of their numbers.
    """
    known = speakers >= 0
    if not known.any():
        return np.zeros((0, embeddings.shape[1]))
    rows = np.flatnonzero(known)
    rows = rows[np.argsort(speakers[rows], kind="stable")]
    _, begins, counts = np.unique(speakers[rows], return_index=True, return_counts=True)
    unit = normalize(embeddings[rows])
    sums = np.add.reduceat(unit, begins, axis=0, dtype=np.float64)
    return np.asarray(sums / counts[:, None])


def as_norm(
    scores: Floats, embeddings: Floats, trials: Trials, cohort: Floats, top: int = 300
) -> NDArray[np.float64]:
    """Adaptive symmetric normalisation of cosine scores.

    AS-norm1 of Matejka et al. 2017 ("Analysis of score normalization in multilingual speaker
    recognition", Interspeech, equation 4): a score s becomes the mean of (s - mean) / deviation
    over the two sides, where mean and deviation (of the population) are those of the side's own
    `top` highest cosines with the cohort.

    Args:
        scores: (K,), of `cosine_scores`.
        embeddings: (N, D).
        trials: The K trials.
        cohort: (C, D) embeddings of other speakers, at least two.
        top: How many of the cohort count for each side, at least 2; all where there are fewer.

    Returns:
        Scores (K,), in deviations.

    Raises:
        ValueError: Fewer than two of the cohort would count.
    """
    if min(top, len(cohort)) < 2:
        raise ValueError(f"top {top} of a cohort of {len(cohort)}: a deviation needs at least 2")
    used, places = np.unique(np.concatenate((trials.enroll, trials.test)), return_inverse=True)
    unit, others = normalize(embeddings[used]), normalize(cohort)
    mean, deviation = np.empty(len(used)), np.empty(len(used))
    cut = max(0, len(cohort) - top)
    for at in range(0, len(used), _BLOCK):
        block = slice(at, at + _BLOCK)
        nearest = np.partition(unit[block] @ others.T, cut, axis=1)[:, cut:]  # (block, top)
        mean[block] = nearest.mean(1, dtype=np.float64)
        deviation[block] = nearest.std(1, dtype=np.float64)
    deviation = np.maximum(deviation, _LEAST_DEVIATION)
    enroll, test = places.reshape(2, -1)
    sides = [(scores - mean[side]) / deviation[side] for side in (enroll, test)]
    return np.asarray((sides[0] + sides[1]) / 2)


@dataclass(frozen=True)
class Verified:
    """What the scores of trials tell of a model."""

    trials: int
    target_trials: int
    eer: float
    """Equal error rate, 0 to 1."""
    min_dcf: float
    """At a prior of P_TARGET, normalised."""
    thresholds: Thresholds
    """Of the scores, at both."""


def judge(scores: Floats, target: Bools) -> Verified:
    """Say how well scores (K,) tell target trials (K,) from the others.

    Raises:
        ValueError: As `error_rates`.
    """
    rates = error_rates(scores, target)
    eer, at_eer = rates.equal()
    cost, at_cost = rates.least_cost(P_TARGET, 1.0, 1.0)
    return Verified(
        trials=len(target),
        target_trials=int(target.sum()),
        eer=eer,
        min_dcf=cost,
        thresholds=Thresholds(eer=at_eer, min_dcf=at_cost),
    )
