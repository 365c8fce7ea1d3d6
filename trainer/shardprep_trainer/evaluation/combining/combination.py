"""The scores of several models as one score for each speaker.

The mean of log-probabilities is the mean of scores that are divided by temperatures, but for a term
that all speakers of an utterance share. So both ways of combining are means of scores with weights;
utterances that no model was trained on choose the way.

Axis legend: B batch, N utterances, M models, S speakers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardprep_trainer.evaluation.combining.temperature import cross_entropy, fit_temperature
from shardprep_trainer.evaluation.trials import Ints
from shardprep_trainer.evaluation.verification import Floats

Scores = TypeVar("Scores", Tensor, NDArray[np.float32])

LOG_PROBABILITIES = "log-probabilities"


@dataclass(frozen=True)
class Way:
    """What a mean is taken of, and how well it names the speakers of the held-out utterances."""

    mean_of: str
    """cosines, logits or log-probabilities."""
    temperatures: tuple[float, ...]
    """Of each model (M,), or one that all share."""
    cross_entropy: float
    """In natural logarithms, the scale of the mean fitted, too."""

    def __str__(self) -> str:
        shown = " and ".join(f"{temperature:.3g}" for temperature in self.temperatures)
        return f"{self.cross_entropy:.4f} by {self.mean_of} (temperature {shown})"


@dataclass(frozen=True)
class Combination:
    """How the scores of M models become one score for each speaker."""

    mean_of: str
    """cosines, logits or log-probabilities."""
    weights: tuple[float, ...]
    """What the scores of each model are multiplied by (M,); their sum is 1."""
    utterances: int = 0
    """Held-out utterances that chose this; 0 where there were none."""
    ways: tuple[Way, ...] = field(default=())
    """What was compared, the best first."""

    def __call__(self, scores: Sequence[Scores]) -> Scores:
        """Combine scores (B, S) of each model, which number the speakers alike."""
        first, *others = (own * weight for own, weight in zip(scores, self.weights, strict=True))
        for each in others:
            first = first + each
        return first

    def line(self, held_out: str) -> str:
        """The same for people; `held_out` names the split of the held-out utterances."""
        return (
            f"combined by the mean of {self.mean_of}; cross-entropy on {self.utterances:,} "
            f"utterances of {held_out}: {', '.join(map(str, self.ways))}"
        )


def plain_mean(kinds: Sequence[str]) -> Combination:
    """The mean of the scores as they are.

    Args:
        kinds: What the scores of each model are (M,), all alike.
    """
    return Combination(kinds[0], (1 / len(kinds),) * len(kinds))


def choose(scores: Sequence[Floats], truth: Ints, kinds: Sequence[str]) -> Combination:
    """The way of combining that has the lowest cross-entropy on held-out utterances.

    The ways are the mean of log-probabilities, at a temperature of each model that has the lowest
    cross-entropy for it alone; and the mean of scores, where they are of one kind. The scale of
    both means is fitted likewise, so that the ways differ by the weights of the models alone.

    Args:
        scores: Of each model (N, S).
        truth: Number of the speaker of each utterance (N,).
        kinds: What the scores of each model are (M,): "cosines" or "logits".
    """
    own = tuple(fit_temperature(each, truth) for each in scores)
    inverse = np.array([1 / temperature for temperature in own])
    alike = np.full(len(scores), 1 / len(scores))
    tried = [(LOG_PROBABILITIES, inverse / inverse.sum())]
    if len(set(kinds)) == 1:
        # First: of two that are equally good, the simpler counts.
        tried.insert(0, (kinds[0], alike))
    found = []
    for mean_of, weights in tried:
        mean = np.tensordot(weights, np.asarray(scores, np.float64), 1)  # (M, N, S) -> (N, S)
        common = fit_temperature(mean, truth)
        temperatures = own if mean_of == LOG_PROBABILITIES else (common,)
        way = Way(mean_of, temperatures, cross_entropy(mean, truth, common))
        found.append((way, weights))
    found.sort(key=lambda each: each[0].cross_entropy)
    (best, weights), ways = found[0], tuple(way for way, _ in found)
    return Combination(best.mean_of, tuple(weights.tolist()), len(truth), ways)
