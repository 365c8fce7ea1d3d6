"""From scores of speakers to their probabilities: softmax(scores / temperature).

Pure NumPy. Axis legend: N utterances, S speakers.
"""

from __future__ import annotations

import numpy as np

from shardprep_trainer.evaluation.trials import Ints
from shardprep_trainer.evaluation.verification import Floats

# Of scores in their deviations: inverse temperatures at whose ends nothing more changes.
_LEAST, _MOST = 1e-3, 1e3
_PRIOR_DEVIATION = 10.0
_MOST_STEPS = 100


def cross_entropy(scores: Floats, truth: Ints, temperature: float) -> float:
    """Mean of -log of the probability of the true speaker, in natural logarithms.

    Args:
        scores: (N, S), higher where the speaker is likelier.
        truth: Number of the speaker of each utterance (N,).
        temperature: Of the softmax.
    """
    scaled = np.asarray(scores, np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    own = scaled[np.arange(len(truth)), truth]
    return float((np.log(np.exp(scaled).sum(1)) - own).mean())


def fit_temperature(scores: Floats, truth: Ints) -> float:
    """The temperature of least cross-entropy; see there for the arguments, N at least 1.

    The inverse temperature, of scores in their deviations over the speakers, has a weak prior:
    normal, of deviation 10, which counts as one utterance. So the temperature is not 0 where every
    utterance is recognised, and it follows the unit of the scores.
    """
    scores = np.asarray(scores, np.float64)
    deviation = float(np.sqrt(scores.var(1).mean())) or 1.0
    scaled = (scores - scores.max(1, keepdims=True)) / deviation
    own = float(scaled[np.arange(len(truth)), truth].mean())
    prior = _PRIOR_DEVIATION**-2 / len(truth)
    low, high, inverse = _LEAST, _MOST, 1.0
    # Newton's steps on a convex function, kept between bounds that close in.
    for _ in range(_MOST_STEPS):
        share = np.exp(inverse * scaled)
        share /= share.sum(1, keepdims=True)
        mean = (share * scaled).sum(1)  # (N,)
        variance = (share * scaled**2).sum(1) - mean**2
        slope = float(mean.mean()) - own + prior * inverse
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        following = inverse - slope / (float(variance.mean()) + prior)
        if not low < following < high:
            following = (low + high) / 2
        inverse, before = following, inverse
        if abs(inverse - before) <= 1e-9 * before:
            break
    return deviation / inverse
