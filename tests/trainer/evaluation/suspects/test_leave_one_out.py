"""Suspects, against a naive leave-one-out in float64 and against labels that were swapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardprep_trainer.evaluation.suspects.leave_one_out import Judged, judge_labels

Found = dict[int, tuple[float, dict[int, float]]]


def groups_of(labels: np.ndarray, left_out: set[int]) -> dict[int, list[int]]:
    known = [at for at in range(len(labels)) if labels[at] >= 0 and at not in left_out]
    return {int(name): [at for at in known if labels[at] == name] for name in {*labels[known]}}


def compared(unit: np.ndarray, labels: np.ndarray, inverse: np.ndarray) -> Found:
    """For each utterance that can be judged: own cosine, and that with each other speaker.

    Every mean is made anew from the utterances, one by one; cosines by the inverse covariance.
    """
    scaled = [row / np.sqrt(row @ inverse @ row) for row in unit]

    def cosine(at: int, others: list[int]) -> float:
        mean = np.mean([scaled[other] for other in others], axis=0)
        return float(scaled[at] @ inverse @ mean / np.sqrt(mean @ inverse @ mean))

    found, groups = {}, groups_of(labels, set())
    for at in np.flatnonzero(labels >= 0):
        mine = [other for other in groups[labels[at]] if other != at]
        if mine:
            others = {name: cosine(at, g) for name, g in groups.items() if name != labels[at]}
            found[int(at)] = (cosine(at, mine), others)
    return found


def by_hand(embeddings: np.ndarray, labels: np.ndarray) -> tuple[Found, Found]:
    """`compared` by plain cosines, and by the covariance of what these do not doubt; in float64."""
    unit = np.array([row.astype(float) / np.linalg.norm(row) for row in embeddings])
    width = unit.shape[1]
    plain = compared(unit, labels, np.eye(width))
    doubted = {at for at, (own, others) in plain.items() if own < max(others.values())}
    groups = list(groups_of(labels, doubted).values()) or list(groups_of(labels, set()).values())
    covariance = np.zeros((width, width))
    for group in groups:
        for at in group:
            apart = unit[at] - np.mean(unit[group], axis=0)
            covariance += np.outer(apart, apart) / sum(map(len, groups))
    if np.trace(covariance) / width < 1e-12:
        return plain, plain
    covariance += 0.3 * np.trace(covariance) / width * np.eye(width)
    return plain, compared(unit, labels, np.linalg.inv(covariance))


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
    plain, expected = by_hand(embeddings, labels)
    assume(expected)
    # What float32 cannot decide has no place here.
    assume(all(abs(own - max(others.values())) > 1e-5 for own, others in plain.values()))
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


def test_many_wrong_labels_of_few_speakers_do_not_hide_one_another() -> None:
    # Their differences are most of the covariance within labels, and all between speakers.
    random = np.random.default_rng(0)
    embeddings, truth = voices(random, 3, 8, 32, spread=0.5)
    labels = np.where(np.arange(24) % 7 == 0, (truth + 1) % 3, truth)
    found = judge_labels(embeddings, labels)
    assert sorted(found.position[found.suspects]) == [0, 7, 14, 21]


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
