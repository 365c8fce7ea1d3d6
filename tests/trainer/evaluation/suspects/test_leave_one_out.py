"""Suspects, against a naive leave-one-out in float64 and against labels that were swapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardprep_trainer.evaluation.suspects.leave_one_out import Judged, judge_labels


def by_hand(
    embeddings: np.ndarray, labels: np.ndarray
) -> dict[int, tuple[float, dict[int, float]]]:
    """For each utterance that can be judged: own cosine, and that with each other speaker.

    Every mean is made anew from the utterances, one by one; float64, no Cholesky factor.
    """
    rows = [at for at in range(len(labels)) if labels[at] >= 0]
    unit = {at: embeddings[at].astype(float) / np.linalg.norm(embeddings[at]) for at in rows}
    groups = {name: [at for at in rows if labels[at] == name] for name in {*labels[rows]}}
    width = embeddings.shape[1]
    covariance = np.zeros((width, width))
    for group in groups.values():
        for at in group:
            apart = unit[at] - sum(unit[other] for other in group) / len(group)
            covariance += np.outer(apart, apart) / len(rows)
    inverse = np.linalg.inv(covariance + 0.3 * np.trace(covariance) / width * np.eye(width))
    scaled = {at: row / np.sqrt(row @ inverse @ row) for at, row in unit.items()}

    def cosine(at: int, others: list[int]) -> float:
        mean = sum(scaled[other] for other in others) / len(others)
        return float(scaled[at] @ inverse @ mean / np.sqrt(mean @ inverse @ mean))

    found = {}
    for at in rows:
        mine = [other for other in groups[labels[at]] if other != at]
        if mine:
            others = {name: cosine(at, g) for name, g in groups.items() if name != labels[at]}
            found[at] = (cosine(at, mine), others)
    return found


def voices(
    random: np.random.Generator, speakers: int, each: int, width: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) of speakers about directions of their own, and their numbers (N,)."""
    labels = np.repeat(np.arange(speakers), each)
    centres = random.normal(size=(speakers, width))
    noise = spread * random.normal(size=(len(labels), width))
    return (centres[labels] + noise).astype(np.float32), labels


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 6), st.integers(2, 8))
def test_cosines_are_those_of_means_made_anew_without_the_utterance(
    seed: int, speakers: int, each: int, width: int
) -> None:
    random = np.random.default_rng(seed)
    embeddings, labels = voices(random, speakers, each, width, spread=1.0)
    # Speakers of unequal size, some of one utterance, numbers with gaps, some unknown.
    labels = 3 * np.where(random.random(len(labels)) < 0.4, 0, labels) + 1
    labels[random.random(len(labels)) < 0.1] = -1
    assume(len({*labels} - {-1}) > 1)
    expected = by_hand(embeddings, labels)
    assume(expected)
    found = judge_labels(embeddings, labels)
    assert found.position.tolist() == list(expected)
    assert found.alone == (labels >= 0).sum() - len(expected)
    for row, (own, others) in enumerate(expected.values()):
        assert found.own[row] == pytest.approx(own, abs=2e-5)
        # Of two others that are equally near either may be named.
        named = others[int(found.nearest[row])]
        assert found.other[row] == pytest.approx(max(others.values()), abs=2e-5)
        assert found.other[row] == pytest.approx(named, abs=2e-5)


def test_swapped_labels_are_found_with_the_speaker_that_they_are_from() -> None:
    random = np.random.default_rng(0)
    embeddings, truth = voices(random, 60, 20, 128, spread=1.5)
    labels, swapped = truth.copy(), np.sort(random.permutation(len(truth))[:36])
    labels[swapped] = (truth[swapped] + random.integers(1, 60, len(swapped))) % 60
    found = judge_labels(embeddings, labels)
    listed = found.position[found.suspects]
    hits = np.isin(listed, swapped)
    assert hits.sum() / len(swapped) > 0.95  # recall
    assert hits.mean() > 0.9  # precision
    assert hits[:36].mean() > 0.97
    assert (found.nearest[found.suspects][hits] == truth[listed[hits]]).mean() > 0.97
    assert found.is_like_other[found.suspects][hits].mean() > 0.9


def test_strangers_sound_like_nobody_and_right_labels_are_not_listed() -> None:
    random = np.random.default_rng(1)
    embeddings, labels = voices(random, 30, 20, 64, spread=0.7)
    strangers = np.arange(5, 600, 60)
    embeddings[strangers] = random.normal(size=(len(strangers), 64)).astype(np.float32)
    found = judge_labels(embeddings, labels)
    listed = found.position[found.suspects]
    assert np.isin(strangers, listed).mean() >= 0.8
    assert np.isin(listed, strangers).all()
    assert not found.is_like_other[found.suspects].any()


def test_without_leaving_out_a_pair_with_one_wrong_label_would_hide_it() -> None:
    # Of two utterances of a label one is another speaker's: each is half of the mean of both.
    embeddings = np.array([[1, 0.1, 0], [0, 0.1, 1], [0, 0, 1], [0, 0.2, 1]], np.float32)
    found = judge_labels(embeddings, np.array([0, 0, 1, 1]))
    assert 1 in found.position[found.suspects]
    assert found.nearest[1] == 1


def test_the_most_suspicious_utterance_comes_first() -> None:
    found = Judged(
        position=np.array([3, 5, 8, 9]),
        own=np.array([0.5, 0.2, 0.9, 0.4]),
        other=np.array([0.6, 0.7, 0.1, 0.4]),
        nearest=np.array([1, 2, 1, 2]),
        alone=0,
        threshold=0.65,
    )
    # Equally near is not nearer.
    assert found.position[found.suspects].tolist() == [5, 3]
    assert found.is_like_other.tolist() == [False, True, False, False]


def test_an_embedding_of_length_0_is_near_nobody() -> None:
    embeddings = np.array([[0, 0], [1, 0.1], [1, 0], [0, 1], [0.1, 1]], np.float32)
    found = judge_labels(embeddings, np.array([0, 0, 0, 1, 1]))
    assert (found.own[0], found.other[0]) == (0, 0)
    assert 0 not in found.position[found.suspects]


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [-1, -1, 0]])
def test_too_few_speakers_or_utterances_are_an_error(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"takes two speakers, and one with two utterances"):
        judge_labels(np.eye(3, dtype=np.float32), np.array(labels))
