"""The temperature of least cross-entropy, against a grid; the way of combining, against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.combining.combination import (
    LOG_PROBABILITIES,
    Combination,
    choose,
    plain_mean,
)
from shardprep_trainer.evaluation.combining.held_out import sample
from shardprep_trainer.evaluation.combining.namer import common_speakers, numbers_of
from shardprep_trainer.evaluation.combining.temperature import cross_entropy, fit_temperature


def made_scores(
    clarity: float, unit: float, seed: int, count: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, 12) of a model that is right as often as it is clear, and the true speakers."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(0).integers(0, 12, count)
    scores = rng.normal(size=(count, 12))
    scores[np.arange(count), truth] += clarity
    return (unit * scores).astype(np.float32), truth


def naive_cross_entropy(scores: np.ndarray, truth: np.ndarray, temperature: float) -> float:
    total = 0.0
    for row, speaker in zip(scores.astype(np.float64), truth, strict=True):
        shares = np.exp(row / temperature)
        total -= np.log(shares[speaker] / shares.sum())
    return total / len(truth)


@pytest.mark.parametrize("unit", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("clarity", [0.5, 2.0, 3.0])
def test_the_temperature_has_the_least_cross_entropy_on_a_grid(clarity: float, unit: float) -> None:
    scores, truth = made_scores(clarity, unit, 1)
    found = fit_temperature(scores, truth)
    assert cross_entropy(scores, truth, found) == pytest.approx(
        naive_cross_entropy(scores, truth, found), rel=1e-6
    )
    grid = unit * np.geomspace(0.02, 50, 2000)
    costs = [naive_cross_entropy(scores, truth, temperature) for temperature in grid]
    # The prior moves it a little.
    assert found == pytest.approx(grid[int(np.argmin(costs))], rel=0.02)
    assert cross_entropy(scores, truth, found) == pytest.approx(min(costs), abs=1e-4)


@pytest.mark.parametrize("factor", [1e-4, 3.0, 1e5])
def test_the_temperature_follows_the_unit_of_the_scores(factor: float) -> None:
    scores, truth = made_scores(2.0, 1.0, 1)
    scaled = fit_temperature(factor * scores.astype(np.float64), truth)
    assert scaled == pytest.approx(factor * fit_temperature(scores, truth), rel=1e-4)


def test_temperatures_are_finite_and_positive_whatever_the_scores_are() -> None:
    right, truth = made_scores(100.0, 1.0, 1)
    wrong, alike = -right, np.zeros_like(right)
    for scores in (right, wrong, alike, right[:1]):
        found = fit_temperature(scores, truth[: len(scores)])
        assert 0 < found < np.inf
        assert np.isfinite(cross_entropy(scores, truth[: len(scores)], found))


def test_a_clearer_model_counts_for_more_where_that_helps() -> None:
    clear, truth = made_scores(3.0, 0.1, 1)
    vague, _ = made_scores(0.3, 0.1, 2)
    found = choose([clear, vague], truth, ["cosines", "cosines"])
    assert found.mean_of == LOG_PROBABILITIES
    assert found.weights[0] > 3 * found.weights[1]
    own = [fit_temperature(each, truth) for each in (clear, vague)]
    best, other = found.ways
    assert best.temperatures == pytest.approx(own)
    # The oracle: the sum of log-probabilities, at the best of many scales.
    logs = sum(
        np.log(np.exp(each.astype(np.float64) / t) / np.exp(each / t).sum(1, keepdims=True))
        for each, t in zip((clear, vague), own, strict=True)
    )
    plain = clear.astype(np.float64) + vague
    for way, scores in ((best, logs), (other, plain)):
        grid = scores.std() * np.geomspace(0.02, 50, 2000)
        cost = min(naive_cross_entropy(scores, truth, temperature) for temperature in grid)
        assert way.cross_entropy == pytest.approx(cost, abs=1e-4)
    assert best.cross_entropy < other.cross_entropy
    combined = found([clear, vague])
    assert combined.argmax(1).tolist() == logs.argmax(1).tolist()


def test_of_two_ways_that_are_equally_good_the_plain_mean_is_taken() -> None:
    scores, truth = made_scores(1.5, 1.0, 1)
    found = choose([scores, scores], truth, ["cosines", "cosines"])
    assert found.weights == pytest.approx((0.5, 0.5))
    one, other = (way.cross_entropy for way in found.ways)
    assert one == pytest.approx(other)


def test_cosines_and_logits_have_no_plain_mean() -> None:
    clear, truth = made_scores(3.0, 0.1, 1)
    logits, _ = made_scores(2.0, 5.0, 2)
    found = choose([clear, logits], truth, ["cosines", "logits"])
    assert [way.mean_of for way in found.ways] == [LOG_PROBABILITIES]
    # Weights undo the units: 0.1 against 5.
    assert 10 < found.weights[0] / found.weights[1] < 200


@pytest.mark.parametrize("models", [2, 3])
def test_a_combination_is_a_weighted_mean_of_arrays_and_of_tensors(models: int) -> None:
    scores = [made_scores(1.0, 1.0, seed)[0] for seed in range(models)]
    weights = tuple(float(n + 1) for n in range(models))
    expected = sum(weight * own for weight, own in zip(weights, scores, strict=True))
    combination = Combination("logits", weights)
    assert np.allclose(combination(scores), expected)
    found = combination([torch.from_numpy(own) for own in scores])
    assert torch.allclose(found, torch.from_numpy(np.asarray(expected)))
    assert sum(plain_mean(["cosines"] * models).weights) == pytest.approx(1)


def test_a_sample_is_spread_evenly_within_its_budget() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(100, 900, 1000)
    usable = np.flatnonzero(rng.random(1000) < 0.7)
    for budget in (5_000, 40_000, 200_000):
        found = sample(frames, usable, budget)
        assert found.tolist() == sample(frames, usable, budget).tolist()
        assert set(found) <= set(usable)
        assert 0.8 * budget < frames[found].sum() <= budget
        # Equal gaps, but for one.
        gaps = np.diff(np.searchsorted(usable, found))
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("usable", "budget", "count"),
    [(4, 1e9, 0), (5, 0, 5), (40, 0, 5), (40, 1e9, 40), (1500, 1e9, 1000)],
)
def test_a_sample_has_five_utterances_or_none_and_at_most_a_thousand(
    usable: int, budget: float, count: int
) -> None:
    frames = np.full(2000, 100)
    assert len(set(sample(frames, np.arange(usable), budget))) == count


def test_common_speakers_are_sorted_by_name_but_those_of_one_model_left_as_they_are() -> None:
    assert common_speakers({"x": ("c", "a", "b")}) == ("c", "a", "b")
    assert common_speakers({"x": ("c", "a", "b"), "y": ("b", "c", "a")}) == ("a", "b", "c")
    assert numbers_of(["b", None, "z"], ("c", "a", "b")).tolist() == [2, -1, -1]


@pytest.mark.parametrize("order", [1, -1])
def test_models_that_know_different_speakers_are_named(order: int) -> None:
    known = dict([("x", ("a", "b", "d", "e")), ("y", ("a", "b", "c", "d", "e"))][::order])
    with pytest.raises(PredictionError, match="x does not know 1 of the speakers whom y knows"):
        common_speakers(known)
