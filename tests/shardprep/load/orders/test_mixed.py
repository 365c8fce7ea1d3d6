"""Mixtures: after any number of draws, each set has come as often as its share asks for."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.load.orders.mixed import LONGEST_PATTERN, endless_draws, pattern, whole_shares

some_shares = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@given(some_shares)
@settings(max_examples=200)
def test_no_set_is_ever_a_whole_draw_early_or_late(shares: list[int]) -> None:
    counts = [0] * len(shares)
    sets, before = pattern(tuple(shares))
    assert len(sets) == sum(shares)
    for done, (number, earlier) in enumerate(zip(sets.tolist(), before.tolist(), strict=True), 1):
        assert earlier == counts[number]
        counts[number] += 1
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - Fraction(done * share, sum(shares))) < 1
    assert counts == shares


@given(some_shares, st.data())
@settings(max_examples=60)
def test_each_set_comes_as_asked_and_in_epochs_of_its_own(
    shares: list[int], data: st.DataObject
) -> None:
    sizes = [data.draw(st.integers(1, 30)) for _ in shares]
    begins = [sum(sizes[:number]) for number in range(len(sizes))]
    draws = endless_draws(sizes, shares, None, seed=1)
    first = data.draw(st.sampled_from([0, 0, 1, 777]))
    indices, epochs = draws(np.arange(first + 300))
    by_set, by_utterance = Counter[int](), Counter[int]()
    for done, (index, before) in enumerate(zip(indices.tolist(), epochs.tolist(), strict=True), 1):
        number = max(n for n, begin in enumerate(begins) if begin <= index)
        assert before == by_utterance[index] == by_set[number] // sizes[number]
        by_utterance[index] += 1
        by_set[number] += 1
        for each, share in enumerate(shares):
            assert abs(by_set[each] - Fraction(done * share, sum(shares))) < 1
    again, _ = draws(np.arange(first, first + 300))
    np.testing.assert_array_equal(again, indices[first:])


def test_speakers_are_balanced_within_each_set() -> None:
    rng = np.random.default_rng(0)
    sizes, shares = [50, 30], [2, 3]
    labels = np.concatenate([rng.integers(0, 4, 50), rng.integers(2, 9, 30)])
    indices, _ = endless_draws(sizes, shares, labels, seed=0)(np.arange(500))
    for first, size, count in ((0, 50, 200), (50, 30, 300)):
        own = indices[(indices >= first) & (indices < first + size)]
        assert len(own) == count
        for done in range(1, count):
            seen = np.bincount(labels[own[:done]], minlength=9)[
                np.unique(labels[first : first + size])
            ]
            assert seen.max() - seen.min() <= 1


@pytest.mark.parametrize(
    ("shares", "whole"),
    [
        ([3, 1], (3, 1)),
        ([6, 2], (3, 1)),
        ([0.7, 0.3], (7, 3)),
        ([0.25, 1], (1, 4)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([Fraction(1, 3001), 1], (1, 3001)),
        ([np.int64(4), np.float32(0.5)], (8, 1)),
        ([5], (1,)),
        ([LONGEST_PATTERN - 1, 1], (LONGEST_PATTERN - 1, 1)),
    ],
)
def test_shares_become_whole_numbers(shares: list[float], whole: tuple[int, ...]) -> None:
    found = whole_shares(shares)
    assert found == whole
    assert all(type(share) is int for share in found)


@pytest.mark.parametrize(
    "shares", [[], [0, 1], [-1, 1], [float("nan"), 1], [float("inf"), 1], [1e-9, 1], "3:1", "31"]
)
def test_shares_that_are_not_positive_are_refused(shares: Any) -> None:
    with pytest.raises(ValueError, match="positive"):
        whole_shares(shares)


def test_shares_whose_pattern_is_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add up to more than 100,000; take rounder"):
        whole_shares([LONGEST_PATTERN, 1])
