"""Loaders with shares and balance: the counts that were asked for, at any world size, resumable."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shardprep import SegmentLoader, ShardprepError, Split, UtteranceLoader, open_shards

Batch = dict[str, torch.Tensor]
T = 24
WAYS: dict[str, dict[str, Any]] = {
    "shares": {"shares": [3, 2]},
    "balance": {"balance": "speaker"},
    "both": {"shares": [0.5, 0.25], "balance": "speaker"},
}

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="session")
def places(edge_set: Path, second_sets: dict[str, Path]) -> list[Path]:
    return [edge_set, second_sets["none"]]


@pytest.fixture
def split(places: list[Path]) -> Split:
    """28 utterances of one set and 9 of another, of 6 speakers, one of whom is in both."""
    return open_shards(places)["train"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def loader(split: Split, **options: Any) -> SegmentLoader:
    return SegmentLoader(split, **{"batch_size": 4, "segment_frames": T, **options})


def bits(batches: Any) -> list[bytes]:
    return [b["mel"].numpy().tobytes() + b["label"].numpy().tobytes() for b in batches]


def ranks(split: Split, size: int, **options: Any) -> list[SegmentLoader]:
    """Loaders of all ranks, whose batches together have 24 segments."""
    options = {"batch_size": 24 // size, **options}
    return [loader(split, rank=rank, world_size=size, **options) for rank in range(size)]


def forever(loaders: list[SegmentLoader]) -> Any:
    """Global batches of one epoch after another: mel and label, as bytes."""
    streams = [itertools.chain.from_iterable(itertools.repeat(one)) for one in loaders]
    for parts in zip(*streams, strict=True):
        yield (
            b"".join(p["mel"].numpy().tobytes() for p in parts),
            b"".join(p["label"].numpy().tobytes() for p in parts),
        )


def utterances(split: Split, batches: list[Batch]) -> list[int]:
    """Which utterance each segment is from, by a search in all of them."""
    whole = [split.read(index).tobytes() for index in range(len(split))]
    found = []
    for batch in batches:
        for mel, length in zip(batch["mel"], batch["length"].tolist(), strict=True):
            part = mel[:length].numpy().tobytes()
            (index,) = [index for index, data in enumerate(whole) if part in data]
            found.append(index)
    return found


@pytest.mark.parametrize("drop_last", [True, False])
def test_counts_are_as_asked_at_any_time_over_the_ends_of_epochs(
    split: Split, way: dict[str, Any], drop_last: bool
) -> None:
    own = loader(split, **way, batch_size=5, drop_last=drop_last)
    epochs = [list(own) for _ in range(4)]
    expected = len(split) // 5 * 5 if drop_last else len(split)
    assert [sum(len(batch["label"]) for batch in epoch) for epoch in epochs] == [expected] * 4
    seen = utterances(split, list(itertools.chain.from_iterable(epochs)))
    from_first = np.cumsum([index < split.set_sizes[0] for index in seen])
    first = split.set_sizes[0]
    ranges = [range(first), range(first, len(split))] if "shares" in way else [range(len(split))]
    if "shares" in way:
        share = way["shares"][0] / sum(way["shares"])
        assert (np.abs(from_first - share * np.arange(1, len(seen) + 1)) < 1).all()
    if "balance" not in way:
        for own_range in ranges:
            part, size = [index for index in seen if index in own_range], len(own_range)
            for at in range(0, len(part) - size, size):
                assert len(set(part[at : at + size])) == size
    for own_range in ranges if "balance" in way else ():
        counts = Counter(dict.fromkeys(split.labels[list(own_range)].tolist(), 0))
        for index in seen:
            if index in own_range:
                counts[int(split.labels[index])] += 1
                assert max(counts.values()) - min(counts.values()) <= 1


def test_an_utterance_that_comes_again_has_another_segment(
    places: list[Path], way: dict[str, Any]
) -> None:
    split = open_shards(places)["train"]
    own = loader(split, **way, segment_frames=8)
    batches = list(itertools.chain.from_iterable(list(own) for _ in range(6)))
    segments: dict[int, list[bytes]] = {}
    mels = torch.cat([batch["mel"] for batch in batches])
    for index, mel in zip(utterances(split, batches), mels, strict=True):
        segments.setdefault(index, []).append(mel.numpy().tobytes())
    long = {index: own for index, own in segments.items() if split.frames[index] > 100}
    assert max(map(len, long.values())) >= 5
    repeats = sum(len(own) - len(set(own)) for own in long.values())
    assert repeats < 0.15 * sum(map(len, long.values()))


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_batches_are_the_same_at_any_world_size(
    split: Split, way: dict[str, Any], size: int
) -> None:
    many, one = forever(ranks(split, size, **way)), forever(ranks(split, 1, **way))
    for _ in range(5):
        assert next(many) == next(one)


@pytest.mark.parametrize("size", [5, 7])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_that_share_unevenly_draw_each_place_once(
    split: Split, way: dict[str, Any], size: int, drop_last: bool
) -> None:
    options = {**way, "batch_size": 3, "drop_last": drop_last}
    many = forever(ranks(split, size, **options))
    one = forever([loader(split, **{**options, "batch_size": 3 * size})])
    for _ in range(6):
        assert next(many) == next(one)


@given(
    st.integers(0, 14),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.sampled_from(list(WAYS)),
)
@settings(max_examples=25)
def test_resume_is_exact_anywhere_and_at_another_world_size(
    places: list[Path], taken: int, before: int, after: int, drop_last: bool, name: str
) -> None:
    split = open_shards(places)["train"]
    options = {**WAYS[name], "drop_last": drop_last, "batch_size": 8}
    whole = list(itertools.islice(forever(ranks(split, 1, **options)), taken + 6))
    first = ranks(split, before, **{**options, "batch_size": 8 // before})
    assert list(itertools.islice(forever(first), taken)) == whole[:taken]
    states = [json.dumps(one.state_dict()) for one in first]
    assert len(set(states)) == 1
    second = ranks(split, after, **{**options, "batch_size": 8 // after})
    for one in second:
        one.load_state_dict(json.loads(states[0]))
    assert list(itertools.islice(forever(second), 6)) == whole[taken:]


@pytest.mark.parametrize(
    "other",
    [
        {"shares": [1, 1]},
        {},
        {"balance": "speaker"},
        {"shares": [3, 2], "balance": "speaker"},
        {"shares": [3, 2], "drop_last": False},
        {"shares": [3, 2], "batch_size": 3},
    ],
)
def test_a_position_among_other_draws_is_refused(split: Split, other: dict[str, Any]) -> None:
    one, two = loader(split, shares=[3, 2]), loader(split, **other)
    # The error names what the user gave: an argument, or batch_size in the remedy.
    named = {"batch_size": "global_batch"}
    expected = {named.get(name, name) for name in ("shares", *other)}
    for state, taker in ((one.state_dict(), two), (two.state_dict(), one)):
        with pytest.raises(ShardprepError) as caught:
            taker.load_state_dict(state)
        assert caught.value.key in expected
        assert ("batch_size" in str(caught.value)) == (caught.value.key == "global_batch")
    loader(split, shares=[6, 4]).load_state_dict(one.state_dict())


@pytest.mark.parametrize("count", [1, 3])
def test_workers_of_a_dataloader_give_the_loaders_own_batches(
    split: Split, way: dict[str, Any], count: int
) -> None:
    own, alone = loader(split, **way), loader(split, **way)
    batches = DataLoader(own, batch_size=None, num_workers=count, multiprocessing_context="fork")
    for _ in range(2):
        assert bits(batches) == bits(alone)
    own.set_epoch(5)
    alone.set_epoch(5)
    assert bits(batches) == bits(alone)


def test_every_placement_gives_the_same_bits(split: Split, way: dict[str, Any]) -> None:
    host = loader(split, **way, placement="host")
    device = loader(split, **way, placement="device", device="cpu")
    assert bits(host) == bits(device)


def test_damaged_utterances_are_skipped(
    damaged_split: Callable[..., tuple[Split, list[int]]],
    split: Split,
    second_sets: dict[str, Path],
) -> None:
    alone, bad = damaged_split([3, 4])
    both = open_shards([Path(alone.place), second_sets["none"]])["train"]
    own = loader(both, shares=[1, 1], verify_reads="once", on_corrupt="skip")
    batches = list(itertools.chain.from_iterable(list(own) for _ in range(2)))
    assert all(len(batch["label"]) == 4 for batch in batches)
    assert set(own.damaged) == {str(both.keys[index]) for index in bad}
    assert own.replaced > 0
    assert not set(utterances(split, batches)) & set(bad)


def test_without_shares_the_sets_are_read_as_one(split: Split) -> None:
    own = loader(split, drop_last=False)
    assert sorted(utterances(split, list(own))) == list(range(len(split)))
    windowed = loader(split, drop_last=False, order="windowed", lanes=2, window_shards=1)
    assert sorted(utterances(split, list(windowed))) == list(range(len(split)))
    seen = [index for batch in UtteranceLoader(split) for index in batch["index"].tolist()]
    assert sorted(seen) == list(range(len(split)))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"shares": [1]}, "comes from 2 set.*needs a share; open several sets"),
        ({"shares": [1, 2, 3]}, "comes from 2 set"),
        ({"shares": [1, 0]}, "positive"),
        ({"shares": [1, 1], "shuffle": False}, "shuffle=True only"),
        ({"shares": [1, 1], "order": "windowed"}, "order 'global'"),
        ({"balance": "speaker", "order": "windowed"}, "order 'global'"),
        ({"balance": "Speaker"}, "must be 'speaker' or None"),
    ],
)
def test_what_cannot_be_drawn_is_refused(split: Split, options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        loader(split, **options)


def test_a_split_that_cannot_be_drawn_from_is_refused(
    places: list[Path], source_of: Callable[..., Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="10 of the 10 utterances of split test have no speaker"):
        loader(open_shards(places)["test"], balance="speaker")
    build(source_of({"eva": [50, 60]}), tmp_path / "only", val_fraction=0.0)
    both = open_shards([tmp_path / "only", places[0]])
    with pytest.raises(ValueError, match="set 1 of 2 has no utterances in split val"):
        loader(both["val"], shares=[1, 1])
