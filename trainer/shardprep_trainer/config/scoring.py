"""What makes a decision of the cosine of two embeddings: thresholds, and a calibration."""

from __future__ import annotations

import math

import msgspec


class Thresholds(msgspec.Struct, frozen=True):
    """Cosines at or above which two utterances count as of one speaker."""

    eer: float
    """Where misses and false alarms were equally frequent."""
    min_dcf: float
    """Where the detection cost was least."""

    def __post_init__(self) -> None:
        """Make sure that both decide something."""
        _check_finite(self)


class Calibration(msgspec.Struct, frozen=True):
    """A score as a log-likelihood ratio: scale * score + offset, in natural logarithms."""

    scale: float
    offset: float

    def __post_init__(self) -> None:
        """Make sure that a finite score has a finite ratio."""
        _check_finite(self)

    def llr(self, score: float) -> float:
        """How much likelier the score is where the speaker is the same, as a logarithm."""
        return self.scale * score + self.offset

    def probability(self, score: float, prior: float) -> float:
        """The probability that the speaker is the same.

        Args:
            score: Cosine of two embeddings.
            prior: Probability that the speaker is the same before anything is compared, between 0
                and 1.
        """
        log_odds = self.llr(score) + math.log(prior) - math.log1p(-prior)
        # Either form alone overflows at one of the ends.
        if log_odds < 0:
            return math.exp(log_odds) / (1 + math.exp(log_odds))
        return 1 / (1 + math.exp(-log_odds))


def _check_finite(numbers: msgspec.Struct) -> None:
    for name, value in msgspec.structs.asdict(numbers).items():
        if not math.isfinite(value):
            raise ValueError(f"{name} {value} is not a finite number")
