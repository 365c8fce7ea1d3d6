"""From scores to log-likelihood ratios, and what these are worth.

A log-likelihood ratio (LLR, natural logarithm) says how much likelier a score is where the speaker
is the same. Calibration is affine: llr = scale * score + offset. Cllr is the cost of LLRs over all
priors (Bruemmer and du Preez 2006, "Application-independent evaluation of speaker detection"):
0 bits for perfect ones, 1 bit for those that say nothing, more for those that mislead. The least
Cllr that a rising function of the scores can have is minCllr; what is above it is lost by
calibration.

Pure NumPy. Axis legend: N utterances, K trials.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardprep_trainer.config.scoring import Calibration
from shardprep_trainer.evaluation.trials import Bools, Ints, Trials
from shardprep_trainer.evaluation.verification import Floats, error_rates

FOLDS = 5
"""Into how many parts the speakers are divided, where there are so many."""

_MOST_STEPS = 100
_PRIOR_DEVIATION = 10.0


def cllr(llrs: Floats, target: Bools) -> float:
    """The cost [bits] of log-likelihood ratios (K,) of trials of which `target` (K,) are targets.

    Raises:
        ValueError: There is no target or no non-target trial.
    """
    if target.all() or not target.any():
        raise ValueError("both kinds of trials are needed")
    cost = np.logaddexp(0, np.where(target, -llrs, llrs)) / np.log(2)
    return float(cost[target].mean() + cost[~target].mean()) / 2


def min_cllr(scores: Floats, target: Bools) -> float:
    """The least Cllr [bits] that a rising function of the scores (K,) can have.

    Args:
        scores: (K,), higher where the speakers seem the same.
        target: Whether they are (K,).

    Raises:
        ValueError: As `error_rates`.
    """
    rates = error_rates(scores, target)
    # Shares of the targets and of the others from each threshold to the next. Where their ratio
    # falls, neighbours are joined (pool adjacent violators).
    pools: list[tuple[float, float]] = []
    steps = (np.diff(rates.miss).tolist(), np.diff(-rates.alarm).tolist())
    for same, other in zip(*steps, strict=True):
        while pools and pools[-1][0] * other >= same * pools[-1][1]:
            before = pools.pop()
            same, other = same + before[0], other + before[1]
        pools.append((same, other))
    same, other = np.array(pools).T
    # A pool's LLR is log(same / other). A share of 0 costs nothing, whatever the ratio.
    bits = same * _log2(1, other, same) + other * _log2(1, same, other)
    return float(bits.sum() / 2)


def _log2(one: float, part: Floats, whole: Floats) -> NDArray[np.float64]:
    """log2(one + part / whole), and 0 where the whole is 0."""
    ratio = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return np.log2(one + ratio)


def fit_calibration(scores: Floats, target: Bools) -> Calibration:
    """Logistic regression of `target` (K,) on scores (K,), with equal weight for both kinds.

    Its log-odds are LLRs, as both kinds count as equally likely. The scale, of scores in their
    deviations, has a weak prior: normal, of deviation 10, which counts as one trial of the rarer
    kind. So the scale is finite where a threshold separates all trials.

    Args:
        scores: Finite numbers (K,), higher where the speakers seem the same.
        target: Whether they are (K,).

    Raises:
        ValueError: There is no target or no non-target trial.
    """
    targets = int(target.sum())
    others = len(target) - targets
    if not targets or not others:
        raise ValueError(f"{targets} target and {others} non-target trials: both kinds are needed")
    scores = np.asarray(scores, np.float64)
    mean, deviation = scores.mean(), scores.std()
    # What differs by rounding alone has no direction.
    if deviation <= 1e-12 * np.abs(scores).max():
        mean, deviation = scores[0], 1.0
    inputs = np.stack(((scores - mean) / deviation, np.ones(len(scores))), axis=1)  # (K, 2)
    weight = np.where(target, 0.5 / targets, 0.5 / others)
    prior = np.array([_PRIOR_DEVIATION**-2 / min(targets, others), 0.0])

    def loss(at: Floats) -> float:
        odds = inputs @ at
        return float(weight @ (np.logaddexp(0, odds) - target * odds) + prior @ at**2 / 2)

    found, least = np.zeros(2), loss(np.zeros(2))
    for _ in range(_MOST_STEPS):
        share = 1 / (1 + np.exp(-np.clip(inputs @ found, -500, 500)))
        gradient = inputs.T @ (weight * (share - target)) + prior * found
        curvature = inputs.T @ (inputs * (weight * share * (1 - share))[:, None]) + np.diag(prior)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        # Newton's step, shortened until it improves.
        while (at := loss(found - step)) > least and np.abs(step).max() > 1e-12:
            step = step / 2
        if at >= least:
            break
        found, least = found - step, at
    scale = found[0] / deviation
    return Calibration(scale=float(scale), offset=float(found[1] - scale * mean))


def calibrate_by_others(
    scores: Floats, target: Bools, sides: tuple[Ints, Ints]
) -> NDArray[np.float64] | None:
    """LLRs of trials, each by a calibration that has seen no trial of either of its speakers.

    The speakers are divided into up to `FOLDS` parts. The trials between two parts, or within one,
    are calibrated by all trials among the speakers of the other parts.

    Args:
        scores: (K,).
        target: Whether the speaker is the same (K,).
        sides: Number of the speaker on each of both sides (K,); see `linked_speakers`.

    Returns:
        (K,), or None where the speakers are too few: other parts lack a kind of trial.
    """
    speakers, places = np.unique(np.concatenate(sides), return_inverse=True)
    part = places.reshape(2, -1) % min(FOLDS, len(speakers))
    low, high = part.min(0), part.max(0)
    llrs = np.empty(len(scores))
    for one, other in sorted(set(zip(low.tolist(), high.tolist(), strict=True))):
        rest = ((part != one) & (part != other)).all(0)
        if target[rest].all() or not target[rest].any():
            return None
        held_out = (low == one) & (high == other)
        fitted = fit_calibration(scores[rest], target[rest])
        llrs[held_out] = fitted.scale * scores[held_out] + fitted.offset
    return llrs


def linked_speakers(trials: Trials) -> tuple[Ints, Ints]:
    """Speakers as far as the trials themselves tell: utterances that target trials link are one's.

    Returns:
        A number of the speaker on each side of every trial (K,).
    """
    utterances = np.concatenate((trials.enroll, trials.test))
    head = np.arange(int(utterances.max(initial=-1)) + 1)

    def first(utterance: int) -> int:
        while head[utterance] != utterance:
            head[utterance] = head[head[utterance]]
            utterance = int(head[utterance])
        return utterance

    kept = trials.target
    for one, other in zip(trials.enroll[kept].tolist(), trials.test[kept].tolist(), strict=True):
        a, b = first(one), first(other)
        head[max(a, b)] = min(a, b)
    # Heads come before those who follow them: one pass is enough.
    speaker = np.array([first(utterance) for utterance in range(len(head))], np.int64)
    return speaker[trials.enroll], speaker[trials.test]
