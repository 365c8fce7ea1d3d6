"""The backend, against covariance and cosines written out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep_trainer.evaluation.verification import normalize
from shardprep_trainer.evaluation.wccn import Wccn


def voices(
    random: np.random.Generator, speakers: int, each: int, width: int, situations: float
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) of speakers who differ in half of the dimensions, and their numbers.

    In the other half utterances differ, and the more by the share `situations`.
    """
    half = width // 2
    own = np.repeat(random.normal(size=(speakers, half)), each, axis=0)
    other = situations * random.normal(size=(speakers * each, width - half))
    small = 0.1 * random.normal(size=(speakers * each, half))
    return np.hstack((own + small, other)).astype(np.float32), np.arange(speakers).repeat(each)


def by_hand(embeddings: np.ndarray, labels: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """Cosines (N, S) in the normalised space, from the paper, with loops and float64."""
    unit = [row / np.linalg.norm(row) for row in embeddings.astype(np.float64)]
    covariance = np.zeros((len(unit[0]), len(unit[0])))
    for row, label in zip(unit, labels, strict=True):
        own = [other for other, name in zip(unit, labels, strict=True) if name == label]
        apart = row - np.mean(own, axis=0)
        covariance += np.outer(apart, apart) / len(unit)
    covariance += 0.3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    inverse = np.linalg.inv(covariance)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ inverse @ b / np.sqrt((a @ inverse @ a) * (b @ inverse @ b)))

    means = []
    for name in np.unique(labels):
        own = [row for row, label in zip(unit, labels, strict=True) if label == name]
        means.append(np.mean([row / np.sqrt(row @ inverse @ row) for row in own], axis=0))
    return np.array([[cosine(test, mean) for mean in means] for test in tests.astype(np.float64)])


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 4), st.integers(2, 9))
def test_scores_are_those_of_the_paper(seed: int, speakers: int, each: int, width: int) -> None:
    random = np.random.default_rng(seed)
    embeddings, labels = voices(random, speakers, each, width, situations=1.0)
    tests = random.normal(size=(3, width)).astype(np.float32)
    scores = Wccn(embeddings, labels).scores(tests)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, by_hand(embeddings, labels, tests), atol=1e-4)


def test_what_varies_within_speakers_counts_for_less() -> None:
    random = np.random.default_rng(0)
    embeddings, labels = voices(random, 40, 8, 32, situations=1.5)
    train = np.arange(len(labels)) % 8 < 6
    tests, truth = embeddings[~train], labels[~train]
    unit = normalize(embeddings[train])
    means = np.array([unit[labels[train] == name].mean(0) for name in range(40)])
    plain = (normalize(tests) @ normalize(means).T).argmax(1) == truth
    found = Wccn(embeddings[train], labels[train]).scores(tests).argmax(1) == truth
    assert plain.mean() < 0.9
    assert found.mean() > 0.98


def test_one_utterance_of_each_speaker_gives_plain_cosines() -> None:
    embeddings = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    scores = Wccn(embeddings, np.arange(5)).scores(embeddings)
    np.testing.assert_allclose(scores, normalize(embeddings) @ normalize(embeddings).T, atol=1e-6)


def test_unknown_speakers_take_no_part_and_numbers_may_have_gaps() -> None:
    random = np.random.default_rng(0)
    embeddings, labels = voices(random, 3, 3, 6, situations=1.0)
    labels = np.array([2, 7, 4])[labels]
    mixed = np.concatenate((100 * random.normal(size=(4, 6)).astype(np.float32), embeddings))
    backend = Wccn(mixed, np.concatenate(([-1] * 4, labels)))
    assert backend.speakers.tolist() == [2, 4, 7]
    order = np.argsort(labels, kind="stable")
    alone = Wccn(embeddings[order], labels[order])
    np.testing.assert_allclose(backend.scores(embeddings), alone.scores(embeddings), atol=1e-6)
    assert (backend.speakers[backend.scores(embeddings).argmax(1)] == labels).all()


@pytest.mark.parametrize("count", [1, 3])
def test_silence_and_a_single_speaker_give_finite_scores(count: int) -> None:
    embeddings = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    embeddings[0] = 0
    scores = Wccn(embeddings, np.zeros(count, np.int64)).scores(np.zeros((2, 8), np.float32))
    np.testing.assert_array_equal(scores, np.zeros((2, 1)))


def test_no_speaker_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no utterance has a speaker"):
        Wccn(np.ones((2, 3), np.float32), np.full(2, -1))
