"""Trials: every pair can be drawn and none twice; a bad line refuses the list by its number."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep_trainer.evaluation.trials import Trials, draw_trials, possible_trials


def all_pairs(speakers: list[int]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """The oracle: target and non-target pairs of the labelled, one by one."""
    known = [index for index, speaker in enumerate(speakers) if speaker >= 0]
    pairs = list(combinations(known, 2))
    same = {(a, b) for a, b in pairs if speakers[a] == speakers[b]}
    return same, set(pairs) - same


def drawn(trials: Trials) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    pairs = list(zip(trials.enroll.tolist(), trials.test.tolist(), strict=True))
    kinds = trials.target.tolist()
    return (
        [pair for pair, same in zip(pairs, kinds, strict=True) if same],
        [pair for pair, same in zip(pairs, kinds, strict=True) if not same],
    )


@given(st.lists(st.integers(-1, 4), max_size=14), st.data())
def test_draws_are_different_pairs_of_the_right_kind(
    speakers: list[int], data: st.DataObject
) -> None:
    same, different = all_pairs(speakers)
    labels = np.array(speakers, np.int64)
    assert possible_trials(labels) == (len(same), len(different))
    targets = data.draw(st.integers(0, len(same)))
    others = data.draw(st.integers(0, len(different)))
    found, found_others = drawn(draw_trials(labels, targets, others, seed=3))
    assert (len(found), len(found_others)) == (targets, others)
    assert len(set(found)) == targets
    assert len(set(found_others)) == others
    assert set(found) <= same
    assert set(found_others) <= different
    everything = drawn(draw_trials(labels, len(same), len(different)))
    assert [set(part) for part in everything] == [same, different]


def test_the_seed_decides() -> None:
    speakers = np.repeat(np.arange(20), 10)
    first, again, other = (draw_trials(speakers, 50, 70, seed) for seed in (1, 1, 2))
    assert drawn(first) == drawn(again)
    assert drawn(first) != drawn(other)


def test_all_pairs_are_equally_likely() -> None:
    # 10 target pairs of which 3 are drawn by rejection, 4,000 times: 1,200 each, deviation 29.
    speakers = np.array([7, 7, 1, 7, 7, 7])
    counts = dict.fromkeys(all_pairs(speakers.tolist())[0], 0)
    for seed in range(4000):
        for pair in drawn(draw_trials(speakers, 3, 0, seed))[0]:
            counts[pair] += 1
    assert len(counts) == 10
    assert all(1050 < count < 1350 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("speakers", "targets", "others", "message"),
    [
        ([0, 1, 2], 1, 0, "1 target pairs .* 3 labelled .* only 0; no speaker has two utterances"),
        ([0, 0, -1], 0, 1, "1 non-target pairs .* 2 labelled .* only 0; there is only one speaker"),
        ([0, 0, 1], 2, 0, "2 target pairs .* only 1$"),
        ([], 1, 0, "0 labelled"),
        ([0, 0, 1], -1, 0, "none can be < 0"),
    ],
)
def test_too_many_are_refused(speakers: list[int], targets: int, others: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_trials(np.array(speakers, np.int64), targets, others)
