"""The order is a uniform bijection that no slicing changes, and the segments are uniform too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardprep.load.orders.epoch import (
    Permutation,
    Permutations,
    derive_key,
    derive_keys,
    epoch_order,
    length_batches,
    mix64,
    rank_slice,
    segment_starts,
)

Indices = NDArray[np.int64]
MASK = (1 << 64) - 1


def chi_square(counts: NDArray[np.int64], expected: float) -> float:
    """Standardised chi-square: about normal with mean 0 and deviation 1 under uniformity."""
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("word", [0, 1, 2**63, MASK, 0x0123456789ABCDEF])
def test_mix64_is_the_finaliser_of_splitmix64(word: int) -> None:
    x = word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    assert int(mix64(np.array([word], np.uint64))[0]) == x ^ (x >> 31)


def test_keys_of_different_parts_differ() -> None:
    parts = [*itertools.product(range(-3, 12), repeat=2), *itertools.product(range(6), repeat=3)]
    assert len({derive_key(*part) for part in parts}) == len(parts)
    assert derive_key(5) == derive_key(5 + (1 << 64))


@pytest.mark.parametrize(
    "sizes", [range(1, 301), (4096, 4097, 65_535, 65_537, 250_001)], ids=["small", "large"]
)
def test_permutation_is_a_bijection(sizes: Iterable[int]) -> None:
    for n in sizes:
        images = Permutation(n, derive_key(n))(np.arange(n))
        assert images.dtype == np.int64
        np.testing.assert_array_equal(np.sort(images), np.arange(n))


def test_keys_of_many_parts_are_those_of_each_part() -> None:
    parts = [0, 1, 7, 2**40]
    for keys in (derive_key(3, 4), np.array([derive_key(n) for n in range(4)], np.uint64)):
        own = [derive_key(3, 4, part) for part in parts]
        if not isinstance(keys, int):
            own = [derive_key(n, part) for n, part in enumerate(parts)]
        assert derive_keys(keys, np.array(parts)).tolist() == own


def test_each_of_many_permutations_is_a_bijection_of_its_own() -> None:
    sizes = np.array([*range(1, 70), 1000, 2**20 + 1])
    orders = Permutations(sizes, derive_keys(0, np.arange(len(sizes))))
    for number, n in enumerate(np.minimum(sizes, 3000).tolist()):
        images = orders(np.full(n, number), np.arange(n))
        assert len(set(images.tolist())) == n
        assert images.max() < sizes[number]
    both = np.array([10, 50] * 9)
    mixed = orders(both, np.repeat(np.arange(9), 2))
    for number in (10, 50):
        alone = orders(np.full(9, number), np.arange(9))
        np.testing.assert_array_equal(mixed[both == number], alone)
    alike = Permutations(600, derive_keys(5, np.arange(3)))
    assert sorted(alike(np.full(600, 2), np.arange(600)).tolist()) == list(range(600))


def test_any_position_of_a_huge_range_is_computed_at_once() -> None:
    positions = np.array([0, 1, 2**39, 10**12 - 1])
    images = Permutation(10**12, 7)(positions)
    assert len(set(images)) == 4
    assert images.min() >= 0
    assert images.max() < 10**12


@given(st.integers(1, 5000), st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=50)
def test_order_does_not_depend_on_how_it_is_sliced(n: int, epoch: int, data: st.DataObject) -> None:
    order = epoch_order(n, 3, epoch)
    cut = data.draw(st.integers(0, n))
    positions = np.arange(n)
    parts = np.concatenate([order(positions[:cut]), order(positions[cut:])])
    np.testing.assert_array_equal(parts, order(positions))
    picked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    np.testing.assert_array_equal(order(picked), parts[picked])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 16, 17, 50])
def test_every_index_is_as_likely_at_every_position(n: int) -> None:
    epochs = 1500
    counts = np.zeros((n, n), np.int64)
    for epoch in range(epochs):
        counts[np.arange(n), epoch_order(n, 11, epoch)(np.arange(n))] += 1
    # Rows and columns add up to `epochs`, so the freedom is (n - 1)^2 and not n^2 - 1.
    freedom = (n - 1) ** 2
    statistic = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert (statistic - freedom) / np.sqrt(2 * freedom) < 4.5


@pytest.mark.parametrize("n", [1000, 20_000])
def test_position_says_nothing_about_the_index(n: int) -> None:
    cells = np.zeros((20, 20), np.int64)
    for epoch in range(10):
        images = epoch_order(n, 5, epoch)(np.arange(n))
        np.add.at(cells, (np.arange(n) * 20 // n, images * 20 // n), 1)
    assert abs(chi_square(cells.ravel(), 10 * n / 400)) < 4.5


@pytest.mark.parametrize("one", [(0, 0), (0, 1), (1, 0)])
def test_epochs_and_seeds_are_independent(one: tuple[int, int]) -> None:
    n = 20_000
    first = epoch_order(n, *one)(np.arange(n)).astype(float)
    for other in [(0, 2), (2, 0), (0, 1000), (7, 7)]:
        second = epoch_order(n, *other)(np.arange(n)).astype(float)
        # The correlation of independent orders has a deviation of 1 / sqrt(n) = 0.007.
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
        assert (first == second).mean() < 0.001


def test_neighbours_are_separated() -> None:
    n = 20_000
    images = epoch_order(n, 0, 0)(np.arange(n))
    steps = np.abs(np.diff(images))
    # Two random indices lie n / 3 apart on average, deviation of the mean 0.17 % of n.
    assert abs(steps.mean() / n - 1 / 3) < 0.01
    assert (steps == 1).sum() < 12


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(1, 300), st.integers(0, 5)
)
@settings(deadline=None, max_examples=80)
def test_segments_lie_within_their_utterances(frames: list[int], length: int, epoch: int) -> None:
    lengths = np.array(frames)
    starts = segment_starts(np.arange(len(frames)), lengths, length, seed=1, epoch=epoch)
    assert starts.dtype == np.int64
    assert (starts >= 0).all()
    assert (starts[lengths >= length] <= (lengths - length)[lengths >= length]).all()
    assert (starts[lengths <= length] == 0).all()


@pytest.mark.parametrize("choices", [2, 7, 100, 413])
def test_segment_starts_are_uniform_over_utterances_and_over_epochs(choices: int) -> None:
    n = 20_000
    frames = np.full(n, 128 + choices - 1)
    over_utterances = segment_starts(np.arange(n), frames, 128, seed=0, epoch=3)
    over_epochs = [
        segment_starts(np.array([17]), frames[:1], 128, seed=0, epoch=epoch)[0]
        for epoch in range(4000)
    ]
    for starts in (over_utterances, np.array(over_epochs)):
        counts = np.bincount(starts, minlength=choices)
        assert len(counts) == choices
        assert abs(chi_square(counts, len(starts) / choices)) < 4.5


def test_segments_depend_on_seed_epoch_and_utterance_but_not_on_the_batch() -> None:
    frames = np.full(1000, 10_000)
    indices = np.arange(1000)
    starts = segment_starts(indices, frames, 128, seed=0, epoch=0)
    np.testing.assert_array_equal(
        segment_starts(indices[5:9], frames[5:9], 128, seed=0, epoch=0), starts[5:9]
    )
    for seed, epoch in [(0, 1), (1, 0)]:
        other = segment_starts(indices, frames, 128, seed=seed, epoch=epoch)
        assert abs(np.corrcoef(starts, other)[0, 1]) < 0.15
    position = epoch_order(1000, 0, 0)(indices)
    assert abs(np.corrcoef(starts, position)[0, 1]) < 0.15


@given(st.integers(0, 500), st.integers(1, 17))
@settings(deadline=None)
def test_ranks_share_a_batch_evenly_and_completely(count: int, world_size: int) -> None:
    parts = [range(count)[rank_slice(count, rank, world_size)] for rank in range(world_size)]
    assert [index for part in parts for index in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(1, 400), max_size=80), st.integers(1, 1500))
@settings(deadline=None)
def test_length_batches_partition_the_split_within_the_budget(
    frames: list[int], budget: int
) -> None:
    batches = length_batches(np.array(frames, np.int64), budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(frames)))
    longest = [max(frames[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, length in zip(batches, longest, strict=True):
        assert len(batch) * length <= budget or len(batch) == 1
    for batch, following in zip(batches, longest[1:], strict=False):
        assert min(frames[i] for i in batch) >= following
