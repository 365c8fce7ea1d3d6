"""Calibration against sums written out, a grid, and ratios that are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from scored_trials import Scored, scored_trials

from shardprep_trainer.evaluation.calibration import (
    FOLDS,
    calibrate_by_others,
    cllr,
    fit_calibration,
    linked_speakers,
    min_cllr,
)
from shardprep_trainer.evaluation.trials import Trials


def naive_cllr(llrs: list[float], target: list[bool]) -> float:
    same = [math.log2(1 + math.exp(-x)) for x, kind in zip(llrs, target, strict=True) if kind]
    others = [math.log2(1 + math.exp(x)) for x, kind in zip(llrs, target, strict=True) if not kind]
    return (sum(same) / len(same) + sum(others) / len(others)) / 2


@given(scored_trials())
def test_cllr_is_the_sum_written_out(trials: Scored) -> None:
    scores, target = trials
    assert cllr(scores, target) == pytest.approx(naive_cllr(scores.tolist(), target.tolist()))


def test_known_costs() -> None:
    target = np.array([True, False])
    assert cllr(np.zeros(2), target) == 1
    assert cllr(np.array([1e4, -1e4]), target) == 0
    assert cllr(np.array([-1e4, 1e4]), target) == pytest.approx(1e4 / math.log(2))
    with pytest.raises(ValueError, match="both kinds"):
        cllr(np.zeros(2), np.array([True, True]))


def naive_min_cllr(scores: np.ndarray, target: np.ndarray) -> float:
    """The least over all partitions of the distinct scores into neighbours with rising ratios."""
    values = sorted(set(scores.tolist()))
    best = math.inf
    for cuts in range(2 ** (len(values) - 1)):
        groups: list[list[float]] = [[values[0]]]
        for at, value in enumerate(values[1:]):
            if cuts >> at & 1:
                groups.append([value])
            else:
                groups[-1].append(value)
        shares = [
            (np.isin(scores[target], own).mean(), np.isin(scores[~target], own).mean())
            for own in groups
        ]
        ratios = [math.inf if not other else same / other for same, other in shares]
        if ratios != sorted(ratios):
            continue
        cost = sum(
            (same * math.log2(1 + other / same) if same else 0)
            + (other * math.log2(1 + same / other) if other else 0)
            for same, other in shares
        )
        best = min(best, cost / 2)
    return best


@given(scored_trials())
def test_min_cllr_is_the_least_of_every_rising_function(trials: Scored) -> None:
    found = min_cllr(*trials)
    assert found == pytest.approx(naive_min_cllr(*trials), abs=1e-9)
    assert found <= min(1, cllr(*trials)) + 1e-12


def loss_of(scale: float, offset: float, scores: np.ndarray, target: np.ndarray) -> float:
    """What the regression minimises, written out."""
    count = {True: int(target.sum()), False: int((~target).sum())}
    spread = math.sqrt(np.var(scores.tolist())) or 1.0
    total = (scale * spread / 10) ** 2 / min(count.values())
    for score, kind in zip(scores.tolist(), target.tolist(), strict=True):
        odds = scale * score + offset
        against = -odds if kind else odds
        total += (max(against, 0) + math.log1p(math.exp(-abs(odds)))) / count[kind]
    return total


@given(scored_trials())
def test_no_step_away_from_the_fit_is_better(trials: Scored) -> None:
    found = fit_calibration(*trials)
    least = loss_of(found.scale, found.offset, *trials)
    for scale, offset in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, 1e-3)):
        near = loss_of(found.scale + scale, found.offset + offset, *trials)
        assert near >= least - 1e-12


def test_ratios_that_are_known_are_found_on_any_scale() -> None:
    # Normal scores at +2 and -2 with variance 4 are their own log-likelihood ratios.
    rng, target = np.random.default_rng(0), np.arange(40_000) < 10_000
    llrs = rng.normal(np.where(target, 2.0, -2.0), 2.0)
    for scale, offset in ((1.0, 0.0), (1e-3, 0.6), (500.0, -3e4)):
        found = fit_calibration(scale * llrs + offset, target)
        assert found.scale * scale == pytest.approx(1, abs=0.03)
        assert found.scale * offset + found.offset == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0, 1.0], [0.1 + 0.2, 0.3, 0.3, 0.3]])
def test_scores_that_say_nothing_give_ratios_that_say_nothing(scores: list[float]) -> None:
    found = fit_calibration(np.array(scores), np.array([True, False, True, False]))
    assert found.scale * 0.3 + found.offset == pytest.approx(0, abs=1e-9)


def random_scores(count: int, speakers: int) -> tuple[np.ndarray, np.ndarray, tuple]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    sides = rng.integers(0, speakers, (2, count)) * 10
    target = sides[0] == sides[1]
    return rng.normal(np.where(target, 1.0, -1.0), 1.0), target, (sides[0], sides[1])


def test_no_trial_is_calibrated_by_a_trial_of_its_speakers() -> None:
    scores, target, sides = random_scores(400, 12)
    whole = calibrate_by_others(scores, target, sides)
    assert whole is not None
    assert cllr(whole, target) < 0.7
    for speaker in (0, 30, 110):
        own = (sides[0] == speaker) | (sides[1] == speaker)
        changed = scores.copy()
        changed[own] = np.linspace(90, -90, own.sum())
        again = calibrate_by_others(changed, target, sides)
        assert again is not None
        # The function that its own trials have gone through is the one before.
        fold = np.unique(np.concatenate(sides)).tolist().index(speaker) % FOLDS
        part = [np.unique(np.concatenate(sides)).searchsorted(side) % FOLDS for side in sides]
        alone = own & (part[0] == fold) & (part[1] == fold)
        assert alone.any()
        scale, offset = np.polyfit(scores[alone], whole[alone], 1)
        assert np.allclose(again[alone], scale * changed[alone] + offset)


def test_each_part_is_calibrated_by_the_fit_of_the_others() -> None:
    scores, target, sides = random_scores(300, 7)
    found = calibrate_by_others(scores, target, sides)
    assert found is not None
    for index in range(0, 300, 11):
        mine = {int(side[index]) // 10 % FOLDS for side in sides}
        others = [
            k for k in range(300) if not mine & {int(side[k]) // 10 % FOLDS for side in sides}
        ]
        fitted = fit_calibration(scores[others], target[others])
        assert found[index] == pytest.approx(fitted.scale * scores[index] + fitted.offset)


def test_too_few_speakers_calibrate_nothing() -> None:
    assert calibrate_by_others(*random_scores(100, 3)) is None
    assert calibrate_by_others(*random_scores(100, 4)) is not None


def test_target_trials_link_the_utterances_of_a_speaker() -> None:
    enroll = np.array([0, 5, 2, 3, 0, 7])
    test = np.array([5, 2, 9, 4, 3, 8])
    target = np.array([True, True, True, True, False, False])
    one, other = linked_speakers(Trials(enroll, test, target))
    speaker = {}
    for side, utterances in ((one, enroll), (other, test)):
        for number, utterance in zip(side.tolist(), utterances.tolist(), strict=True):
            assert speaker.setdefault(utterance, number) == number
    assert len({speaker[u] for u in (0, 5, 2, 9)}) == 1
    assert speaker[3] == speaker[4]
    assert len({speaker[u] for u in (0, 3, 7, 8)}) == 4
