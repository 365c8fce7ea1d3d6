"""Draws without end: own epochs that leave nothing out, and speakers that come equally often."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.load.orders.endless import Balanced, Draws, Shuffled

labelled = st.lists(st.integers(0, 9), min_size=1, max_size=60)


def drawn(draws: Draws, count: int, first: int = 0) -> list[tuple[int, int]]:
    """Draws `first` to `first + count`: what each draws, and how often that came before."""
    indices, epochs = draws(np.arange(first, first + count))
    return list(zip(indices.tolist(), epochs.tolist(), strict=True))


@given(st.integers(1, 70), st.integers(0, 400))
@settings(max_examples=60)
def test_everything_comes_once_in_each_epoch_of_its_own(n: int, count: int) -> None:
    seen: Counter[int] = Counter()
    for number, (index, before) in enumerate(drawn(Shuffled(n, 3), count)):
        assert before == seen[index] == number // n
        seen[index] += 1
    assert set(seen) <= set(range(n))


def test_epochs_seeds_and_sets_have_orders_of_their_own() -> None:
    n = 500
    orders = [
        drawn(Shuffled(n, *key), n, first) for key in ((0, 0), (0, 1), (1, 0)) for first in (0, n)
    ]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert sum(a[0] == b[0] for a, b in zip(one, other, strict=True)) < 12


@given(labelled, st.integers(0, 300))
@settings(max_examples=80)
def test_every_speaker_comes_equally_often_and_each_utterance_as_often_as_it_can(
    labels: list[int], count: int
) -> None:
    speakers = set(labels)
    by_speaker: Counter[int] = Counter(dict.fromkeys(speakers, 0))
    by_utterance: Counter[int] = Counter()
    for index, before in drawn(Balanced(np.array(labels), 0), count):
        assert before == by_utterance[index]
        by_utterance[index] += 1
        by_speaker[labels[index]] += 1
        assert max(by_speaker.values()) - min(by_speaker.values()) <= 1
        # No utterance comes again before the others of its speaker.
        own = [by_utterance[i] for i, label in enumerate(labels) if label == labels[index]]
        assert max(own) - min(own) <= 1


def test_speakers_and_utterances_come_in_another_order_each_time() -> None:
    labels = np.repeat(np.arange(40), 40)
    indices = np.array([index for index, _ in drawn(Balanced(labels, 0), 40 * 80)])
    rounds = indices.reshape(80, 40) // 40
    assert len({tuple(order) for order in rounds.tolist()}) == 80
    own = [indices[labels[indices] == speaker] % 40 for speaker in range(40)]
    epochs = {
        tuple(part) for places in own for part in (places[:40].tolist(), places[40:].tolist())
    }
    assert len(epochs) == 80


def test_each_utterance_of_a_speaker_is_as_likely_at_each_place() -> None:
    labels = np.array([0, 1, 1, 1, 1, 1, 2])
    indices, _ = Balanced(labels, 0)(np.arange(3 * 5 * 1500))
    own = indices[labels[indices] == 1].reshape(1500, 5) - 1
    counts = np.zeros((5, 5))
    np.add.at(counts, (np.tile(np.arange(5), 1500), own.ravel()), 1)
    statistic = ((counts - 300) ** 2 / 300).sum()
    # Rows and columns add up, so the freedom is 4 * 4.
    assert (statistic - 16) / np.sqrt(2 * 16) < 4.5


@given(labelled, st.integers(1, 20), st.integers(0, 10**9), st.randoms())
@settings(max_examples=30)
def test_draws_do_not_depend_on_how_they_are_asked_for(
    labels: list[int], count: int, first: int, random: object
) -> None:
    for draws in (Balanced(np.array(labels), 5), Shuffled(len(labels), 5)):
        whole = drawn(draws, count, first)
        assert [drawn(draws, 1, number)[0] for number in range(first, first + count)] == whole
        numbers = list(range(first, first + count))
        random.shuffle(numbers)  # type: ignore[attr-defined]
        indices, _ = draws(np.array(numbers))
        assert indices.tolist() == [whole[number - first][0] for number in numbers]


@pytest.mark.parametrize("speakers", [1, 3, 5000])
def test_speakers_of_very_different_size_take_no_longer(speakers: int) -> None:
    # One speaker with nearly all utterances: the others' orders must not walk through as many.
    labels = np.concatenate([np.zeros(200_000, np.int32), np.arange(1, speakers)])
    found = drawn(Balanced(labels, 0), 3000, 1000 * speakers)
    by_speaker = Counter(int(labels[index]) for index, _ in found)
    assert max(by_speaker.values()) - (min(by_speaker.values()) if speakers < 3000 else 0) <= 1
