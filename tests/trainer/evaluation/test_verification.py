"""Verification against loops over every threshold, and what scores may be changed by."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scored_trials import Scored, scored_trials

from shardprep_trainer.evaluation.trials import Trials
from shardprep_trainer.evaluation.verification import (
    as_norm,
    cosine_scores,
    equal_error_rate,
    error_rates,
    judge,
    min_dcf,
    normalize,
    speaker_means,
)


def naive_points(scores: np.ndarray, target: np.ndarray) -> list[tuple[Fraction, Fraction]]:
    """The oracle: exact miss and false-alarm rates at every threshold, one after the other."""
    trials = list(zip(scores.tolist(), target.tolist(), strict=True))
    same = [score for score, kind in trials if kind]
    others = [score for score, kind in trials if not kind]
    return [
        (
            Fraction(sum(score < threshold for score in same), len(same)),
            Fraction(sum(score >= threshold for score in others), len(others)),
        )
        for threshold in [*sorted({score for score, _ in trials}), math.inf]
    ]


def naive_eer(scores: np.ndarray, target: np.ndarray) -> Fraction:
    """Where the exact line through the points meets miss = false alarm."""
    points = naive_points(scores, target)
    for (miss, alarm), (next_miss, next_alarm) in zip(points, points[1:], strict=False):
        if next_miss >= next_alarm:
            share = (alarm - miss) / ((alarm - miss) + (next_miss - next_alarm))
            return miss + share * (next_miss - miss)
    raise AssertionError("the last point rejects all")


@given(scored_trials())
def test_rates_are_those_of_every_threshold(trials: Scored) -> None:
    found = error_rates(*trials)
    wanted = naive_points(*trials)
    assert found.miss.tolist() == [float(point[0]) for point in wanted]
    assert found.alarm.tolist() == [float(point[1]) for point in wanted]


@given(scored_trials())
def test_thresholds_have_the_rates_and_the_cost_that_are_told(trials: Scored) -> None:
    scores, target = trials
    found = judge(scores, target)

    def rates(threshold: float) -> tuple[float, float]:
        accepted = scores >= threshold
        return float((~accepted)[target].mean()), float(accepted[~target].mean())

    miss, alarm = rates(found.thresholds.min_dcf)
    assert found.min_dcf == pytest.approx((0.01 * miss + 0.99 * alarm) / 0.01)
    # No other threshold has rates closer to one another along the line that crosses.
    gaps = [abs(m - a) for m, a in (rates(t) for t in [*scores, scores.max() + 1])]
    miss, alarm = rates(found.thresholds.eer)
    assert abs(miss - alarm) == pytest.approx(min(gaps))
    assert min(miss, alarm) - 1e-12 <= found.eer <= max(miss, alarm) + 1e-12
    assert (found.trials, found.target_trials) == (len(scores), target.sum())


@given(scored_trials())
def test_eer_is_that_of_exact_arithmetic(trials: Scored) -> None:
    assert equal_error_rate(*trials) == pytest.approx(float(naive_eer(*trials)), abs=1e-12)


@given(scored_trials(), st.sampled_from([0.01, 0.05, 0.5, 0.9]), st.sampled_from([1.0, 10.0]))
def test_min_dcf_is_the_least_of_every_threshold(
    trials: Scored, p_target: float, c_miss: float
) -> None:
    costs = [
        c_miss * p_target * float(miss) + (1 - p_target) * float(alarm)
        for miss, alarm in naive_points(*trials)
    ]
    wanted = min(costs) / min(c_miss * p_target, 1 - p_target)
    found = min_dcf(*trials, p_target=p_target, c_miss=c_miss)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert 0 <= found <= 1 + 1e-12


def test_known_values() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
    target = np.array([True, True, True, False, False, False])
    # At .7 one of three is missed (.4), at .7 one of three accepted (.7).
    assert equal_error_rate(scores, target) == pytest.approx(1 / 3)
    # Rejecting everything up to .7 misses one of three and accepts none.
    assert min_dcf(scores, target) == pytest.approx(1 / 3)


@given(scored_trials())
def test_only_the_order_of_scores_counts(trials: Scored) -> None:
    scores, target = trials
    for changed in (scores * 3 - 7, np.exp(scores), scores**3):
        assert equal_error_rate(changed, target) == equal_error_rate(scores, target)
        assert min_dcf(changed, target) == min_dcf(scores, target)


@given(scored_trials(), st.randoms(use_true_random=False))
def test_the_order_of_trials_does_not_count(trials: Scored, random: object) -> None:
    scores, target = trials
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert equal_error_rate(scores[order], target[order]) == equal_error_rate(scores, target)
    assert min_dcf(scores[order], target[order]) == min_dcf(scores, target)


@given(scored_trials())
def test_roles_can_be_swapped_with_the_sign(trials: Scored) -> None:
    scores, target = trials
    mirrored = equal_error_rate(-scores, ~target)
    assert mirrored == pytest.approx(equal_error_rate(scores, target), abs=1e-12)
    there = min_dcf(scores, target, p_target=0.2, c_miss=3.0, c_fa=2.0)
    back = min_dcf(-scores, ~target, p_target=0.8, c_miss=2.0, c_fa=3.0)
    assert back == pytest.approx(there, abs=1e-12)


def test_perfect_inverted_and_constant_scores() -> None:
    target = np.arange(10) < 4
    assert equal_error_rate(target.astype(float), target) == 0
    assert min_dcf(target.astype(float), target) == 0
    assert equal_error_rate(-target.astype(float), target) == 1
    assert min_dcf(-target.astype(float), target) == 1
    assert equal_error_rate(np.zeros(10), target) == 0.5
    assert min_dcf(np.zeros(10), target) == 1


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        ([1.0, 2.0], [True, True], "2 target and 0 non-target"),
        ([], [], "0 target and 0 non-target"),
        ([1.0, math.nan], [True, False], "not a finite number"),
        ([1.0], [True, False], "pass"),
    ],
)
def test_what_has_no_rates_is_refused(
    scores: list[float], target: list[bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        equal_error_rate(np.array(scores), np.array(target, bool))


@pytest.mark.parametrize("options", [{"p_target": 0.0}, {"p_target": 1.0}, {"c_miss": 0.0}])
def test_costs_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        min_dcf(np.array([0.0, 1.0]), np.array([False, True]), **options)


def random_trials(count: int, utterances: int, seed: int = 0) -> tuple[np.ndarray, Trials]:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(utterances, 6)).astype(np.float32)
    enroll, test = rng.integers(0, utterances, (2, count))
    return embeddings, Trials(enroll, test, rng.random(count) < 0.5)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(
        math.fsum(x * x for x in a.tolist()) * math.fsum(y * y for y in b.tolist())
    )


def test_scores_are_cosines_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, trials = random_trials(50, 12)
    wanted = [
        cosine(embeddings[a], embeddings[b])
        for a, b in zip(trials.enroll, trials.test, strict=True)
    ]
    for block in (4096, 7, 1):
        monkeypatch.setattr("shardprep_trainer.evaluation.verification._BLOCK", block)
        assert np.allclose(cosine_scores(embeddings, trials), wanted, atol=1e-6)
    mirrored = Trials(trials.test, trials.enroll, trials.target)
    assert np.array_equal(cosine_scores(embeddings, mirrored), cosine_scores(embeddings, trials))


def test_lengths_do_not_matter_unless_they_are_none() -> None:
    rows = np.array([[3.0, 4.0], [3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]], np.float32)
    unit = normalize(rows)
    assert np.allclose(unit[:3], [0.6, 0.8])
    assert unit[3].tolist() == [0, 0]


def test_a_speaker_is_the_mean_of_directions() -> None:
    rng = np.random.default_rng(0)
    embeddings, speakers = rng.normal(size=(9, 4)), np.array([5, 2, -1, 5, 2, 2, 9, -1, 5])
    wanted = []
    for speaker in (2, 5, 9):
        own = [row / np.linalg.norm(row) for row in embeddings[speakers == speaker]]
        wanted.append(sum(own) / len(own))
    assert np.allclose(speaker_means(embeddings, speakers), wanted, atol=1e-6)
    assert speaker_means(embeddings, np.full(9, -1)).shape == (0, 4)


@pytest.mark.parametrize("top", [2, 5, 11, 300])
def test_as_norm_is_that_of_a_loop(top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardprep_trainer.evaluation.verification._BLOCK", 5)
    embeddings, trials = random_trials(40, 12)
    cohort = np.random.default_rng(1).normal(size=(11, 6))
    scores = cosine_scores(embeddings, trials)
    wanted = []
    for score, *sides in zip(scores, trials.enroll, trials.test, strict=True):
        parts = []
        for side in sides:
            near = sorted((cosine(embeddings[side], other) for other in cohort), reverse=True)[:top]
            mean = sum(near) / len(near)
            deviation = math.sqrt(sum((one - mean) ** 2 for one in near) / len(near))
            parts.append((score - mean) / deviation)
        wanted.append(sum(parts) / 2)
    found = as_norm(scores, embeddings, trials, cohort, top)
    assert np.allclose(found, wanted, rtol=1e-3, atol=1e-3)
    mirrored = Trials(trials.test, trials.enroll, trials.target)
    assert np.array_equal(as_norm(scores, embeddings, mirrored, cohort, top), found)


def test_a_cohort_of_twins_gives_finite_scores_and_one_is_refused() -> None:
    embeddings, trials = random_trials(10, 5)
    scores = cosine_scores(embeddings, trials)
    assert np.isfinite(as_norm(scores, embeddings, trials, np.ones((3, 6)))).all()
    for cohort, top in ((np.ones((1, 6)), 300), (np.ones((3, 6)), 1)):
        with pytest.raises(ValueError, match="at least 2"):
            as_norm(scores, embeddings, trials, cohort, top)
