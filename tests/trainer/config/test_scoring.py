"""Thresholds and calibrations: what they make of a score, and what they may be."""

from __future__ import annotations

import math
from fractions import Fraction

import msgspec
import pytest

from shardprep_trainer.config.scoring import Calibration, Thresholds


@pytest.mark.parametrize("prior", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("score", [-0.3, 0.2, 0.9])
def test_a_probability_is_that_of_bayes_rule(score: float, prior: float) -> None:
    calibration = Calibration(scale=12.0, offset=-4.0)
    ratio = Fraction(math.exp(12 * score - 4))
    share = Fraction(prior)
    wanted = share * ratio / (share * ratio + 1 - share)
    assert calibration.llr(score) == pytest.approx(math.log(float(ratio)))
    assert calibration.probability(score, prior) == pytest.approx(float(wanted), rel=1e-12)


def test_large_ratios_overflow_nowhere() -> None:
    calibration = Calibration(scale=1e6, offset=0.0)
    assert calibration.probability(1.0, 0.5) == 1
    assert calibration.probability(-1.0, 0.5) == 0


@pytest.mark.parametrize("kind", [Thresholds, Calibration])
def test_numbers_that_decide_nothing_are_refused(kind: type[msgspec.Struct]) -> None:
    names = kind.__struct_fields__
    msgspec.convert(dict.fromkeys(names, 0.5), kind)
    for name in names:
        with pytest.raises(msgspec.ValidationError, match=f"{name} nan is not a finite number"):
            msgspec.convert({**dict.fromkeys(names, 0.5), name: math.nan}, kind)
