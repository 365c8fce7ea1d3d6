"""The windowed order: each utterance once, from few shards at a time, at any world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.load.orders.windowed import WindowedOrder


def order(shards: list[int], seed: int = 0, epoch: int = 0, **options: int) -> WindowedOrder:
    settings = {"global_batch": 8, "lanes": 4, "window_shards": 2, **options}
    return WindowedOrder(shards, seed, epoch, **settings)


def owners(shards: list[int], indices: np.ndarray) -> np.ndarray:
    """The shard of each index."""
    return np.repeat(np.arange(len(shards)), shards)[indices]


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4, 6]),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_every_index_comes_once_in_slices_of_any_size(
    shards: list[int], lanes: int, each: int, window: int, epoch: int
) -> None:
    n = sum(shards)
    own = order(shards, epoch=epoch, global_batch=lanes * each, lanes=lanes, window_shards=window)
    images = own(np.arange(n))
    np.testing.assert_array_equal(np.sort(images), np.arange(n))
    cut = n // 3
    parts = [own(np.arange(cut)), own(np.arange(cut, n))]
    np.testing.assert_array_equal(np.concatenate(parts), images)


def test_positions_draw_from_the_needed_shards_only() -> None:
    shards = [50] * 60
    own = order(shards, window_shards=3, global_batch=16, lanes=4)
    images = own(np.arange(3000))
    lane = np.arange(3000) % 16 // 4
    for position in range(0, 2900, 320):
        for rank in range(2):
            lanes = range(2 * rank, 2 * rank + 2)
            ask = own.needed(position, 80, lanes)
            assert len(ask) == len(set(ask)) <= 2 * 9
            span = np.arange(position, min(position + 320, 2976))
            used = owners(shards, images[span][np.isin(lane[span], lanes)])
            assert set(used.tolist()) <= set(ask)


def test_a_batch_takes_equally_many_from_each_lane_and_lanes_share_no_shard_but_the_borders() -> (
    None
):
    shards = [40] * 32
    own = order(shards, global_batch=16, lanes=4)
    images = own(np.arange(32 * 40)).reshape(-1, 4, 4)
    seen = [set(owners(shards, images[:, lane].ravel()).tolist()) for lane in range(4)]
    assert all(len(one) <= 9 for one in seen)
    assert sum(map(len, seen)) <= 32 + 3


def test_within_the_shuffle_window_the_order_is_random_and_epochs_differ() -> None:
    shards = [100] * 40
    n = 4000
    first, second = (
        order(shards, epoch=epoch, lanes=1, global_batch=10, window_shards=10)(np.arange(n))
        for epoch in (0, 1)
    )
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.25
    # Neighbours come from different shards about as often as with a random order of ten shards.
    same = (np.diff(owners(shards, first)) == 0).mean()
    assert 0.04 < same < 0.2
    # No border stops all utterances: some cross the middle of each block.
    places = np.argsort(order(shards, lanes=1, global_batch=10, window_shards=10).shards)
    moved = places[owners(shards, first)] - np.arange(n) // 100
    assert moved.min() < -5
    assert moved.max() > 5


@pytest.mark.slow
def test_every_utterance_of_a_shuffle_window_is_equally_likely_at_each_of_its_positions() -> None:
    # One shard that is one block: over epochs, position against index is uniform.
    n, epochs = 12, 3000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), order([n], epoch=epoch, global_batch=1, lanes=1)(np.arange(n))] += 1
    freedom = (n - 1) ** 2
    statistic = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert (statistic - freedom) / np.sqrt(2 * freedom) < 4.5


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_shards_come_in_another_order_with_another_seed_or_epoch(other: dict[str, int]) -> None:
    shards = [3] * 50
    one, two = order(shards), order(shards, **other)
    assert sorted(one.shards) == sorted(two.shards) == list(range(50))
    assert (one.shards == two.shards).mean() < 0.2
