"""Splits are stratified and stable, shards are even, and the order is right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep.build.plan import cut_into_shards, plan_shards, shuffled, split_validation
from shardprep.source.contents import Source, Utterance
from shardprep.source.reader import FileReader


def utterances(counts: list[int]) -> list[Utterance]:
    return [
        Utterance(f"s{label}-{n}", f"s{label}-{n}.pt", f"s{label}", label, 50, 1000, 0)
        for label, count in enumerate(counts)
        for n in range(count)
    ]


def source(counts: list[int], test: int = 0) -> Source:
    tests = tuple(Utterance(f"t{n}", f"t{n}.pt", None, -1, 50, 1000, 0) for n in range(test))
    names = tuple(f"s{n}" for n in range(len(counts)))
    return Source(FileReader(Path("Dataset")), 40, names, tuple(utterances(counts)), tests, ())


def keys(items: list[Utterance]) -> list[str]:
    return [item.key for item in items]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0, 0.99), st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_validation_is_stratified_and_leaves_each_speaker_in_train(
    counts: list[int], fraction: float, seed: int
) -> None:
    every = utterances(counts)
    train, val = split_validation(every, fraction, seed)
    assert sorted(keys(train + val)) == sorted(keys(every))
    in_train, in_val = Counter(u.label for u in train), Counter(u.label for u in val)
    for label, count in enumerate(counts):
        assert in_train[label] >= 1
        assert abs(in_val[label] - count * fraction) <= 0.5 or in_train[label] == 1


@given(st.integers(2, 60), st.integers(0, 50), st.sampled_from([0.1, 0.3]))
@settings(deadline=None, max_examples=100)
def test_added_utterance_moves_at_most_one_other_between_train_and_val(
    count: int, seed: int, fraction: float
) -> None:
    every = utterances([count, 20])
    added = every.pop(count // 2)
    before = set(keys(split_validation(every, fraction, seed)[1]))
    after = set(keys(split_validation([*every, added], fraction, seed)[1])) - {added.key}
    assert len(before ^ after) <= 1
    assert {key for key in before if key.startswith("s1-")} == {
        key for key in after if key.startswith("s1-")
    }


def test_split_and_order_do_not_depend_on_the_order_of_the_metadata() -> None:
    every = utterances([9, 14, 5])
    backwards = every[::-1]
    assert shuffled(every, 3) == shuffled(backwards, 3)
    for one, other in zip(
        split_validation(every, 0.2, 3), split_validation(backwards, 0.2, 3), strict=True
    ):
        assert sorted(keys(one)) == sorted(keys(other))


def test_seed_decides_split_and_order() -> None:
    every = utterances([30, 30])
    assert shuffled(every, 0) == shuffled(every, 0) != shuffled(every, 1)
    assert keys(split_validation(every, 0.3, 0)[1]) != keys(split_validation(every, 0.3, 1)[1])


def test_shuffle_mixes_the_speakers() -> None:
    labels = [u.label for u in shuffled(utterances([50] * 4), 0)]
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    # A fair shuffle changes speaker at 3 of 4 steps: 149 of 199, deviation 6.
    assert 119 < changes < 179


@given(st.integers(1, 500), st.integers(1, 70))
@settings(deadline=None, max_examples=150)
def test_shards_are_few_even_and_in_order(total: int, limit: int) -> None:
    every = utterances([total])
    shards = cut_into_shards("train", every, limit)
    sizes = [len(shard.utterances) for shard in shards]
    assert len(shards) == -(-total // limit)
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert [u for shard in shards for u in shard.utterances] == every
    assert [shard.file for shard in shards] == [f"train-{n:06d}.tar" for n in range(len(shards))]


def test_test_split_keeps_the_order_of_testdata() -> None:
    plans = plan_shards(source([4], test=25), val_fraction=0.5, samples_per_shard=7, seed=0)
    assert [u.key for shard in plans["test"] for u in shard.utterances] == [
        f"t{n}" for n in range(25)
    ]


@pytest.mark.parametrize(
    ("given_source", "fraction", "splits"),
    [
        (source([4, 4], test=2), 0.5, {"train", "val", "test"}),
        (source([4, 4]), 0.0, {"train"}),
        (source([1, 1, 1], test=1), 0.9, {"train", "test"}),
        (source([], test=3), 0.1, {"test"}),
    ],
    ids=["all three", "fraction 0", "one utterance a speaker", "test only"],
)
def test_only_splits_with_utterances_are_planned(
    given_source: Source, fraction: float, splits: set[str]
) -> None:
    plans = plan_shards(given_source, val_fraction=fraction, samples_per_shard=5, seed=0)
    assert set(plans) == splits
