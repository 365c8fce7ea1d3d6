"""Every utterance once an epoch over all ranks, the same batches at any world size."""

from __future__ import annotations

import gc
import itertools
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep import (
    CorruptShardError,
    SegmentLoader,
    ShardprepError,
    Split,
    open_shards,
)
from shardprep.load.orders.epoch import epoch_order, segment_starts

Batch = dict[str, torch.Tensor]
T = 32


@pytest.fixture
def split(edge_set: Path) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


def loader(split: Split, **options: Any) -> SegmentLoader:
    return SegmentLoader(split, **{"batch_size": 4, "segment_frames": T, **options})


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def global_batches(split: Split, world_size: int, **options: Any) -> list[Batch]:
    """The batches of all ranks, joined."""
    ranks = [
        list(loader(split, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    return [joined(list(parts)) for parts in zip(*ranks, strict=True)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def indices_of(split: Split, batches: list[Batch]) -> list[int]:
    """Which utterance each segment comes from, by a search in all of them."""
    found = []
    for mel, length in (
        (m, int(n)) for b in batches for m, n in zip(b["mel"], b["length"], strict=True)
    ):
        bits = mel[:length].numpy().tobytes()
        found += [i for i in range(len(split)) if bits in split.read(i).tobytes()]
    return found


def test_batch_holds_the_documented_tensors(split: Split) -> None:
    batch = next(iter(loader(split)))
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "mel": ((4, T, 7), torch.float16),
        "label": ((4,), torch.int64),
        "length": ((4,), torch.int64),
    }


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_union_of_the_ranks_is_the_split_each_once(
    split: Split, world_size: int, drop_last: bool, shuffle: bool
) -> None:
    options = {"batch_size": 3, "drop_last": drop_last, "shuffle": shuffle}
    batches = global_batches(split, world_size, **options)
    rest = len(split) % (3 * world_size)
    expected = len(split) - rest if drop_last else len(split)
    found = indices_of(split, batches)
    assert len(found) == len(set(found)) == expected
    assert len(batches) == len(loader(split, world_size=world_size, **options))
    sizes = [len(batch["label"]) for batch in batches]
    assert sizes[:-1] == [3 * world_size] * (len(batches) - 1)
    if drop_last:
        assert sizes[-1] == 3 * world_size


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_last_batch_is_divided_evenly_without_drop_last(split: Split, world_size: int) -> None:
    last = [
        list(loader(split, batch_size=5, drop_last=False, rank=rank, world_size=world_size))[-1]
        for rank in range(world_size)
    ]
    sizes = [len(batch["label"]) for batch in last]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == len(split) % (5 * world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("epoch", [0, 3])
def test_global_batches_are_the_same_at_any_world_size(
    split: Split, world_size: int, epoch: int
) -> None:
    def batches(size: int) -> list[Batch]:
        ranks = []
        for rank in range(size):
            own = loader(split, batch_size=12 // size, rank=rank, world_size=size)
            own.set_epoch(epoch)
            ranks.append(list(own))
        return [joined(list(parts)) for parts in zip(*ranks, strict=True)]

    assert same(batches(world_size), batches(1))


def test_batches_are_the_segments_of_the_epochs_order(split: Split) -> None:
    own = loader(split, seed=9, batch_size=5, drop_last=False, pad_value=-3.0)
    own.set_epoch(2)
    every = joined(list(own))
    order = epoch_order(len(split), 9, 2)(np.arange(len(split)))
    starts = segment_starts(order, split.frames[order], T, seed=9, epoch=2)
    for row, (index, start) in enumerate(zip(order, starts, strict=True)):
        segment = split.read(int(index))[start : start + T]
        assert every["length"][row] == len(segment) == min(T, split.frames[index])
        np.testing.assert_array_equal(every["mel"][row, : len(segment)], segment)
        assert (every["mel"][row, len(segment) :] == -3.0).all()
        assert every["label"][row] == split.labels[index]


def test_padding_is_minus_twenty_by_default_and_after_the_speech(split: Split) -> None:
    every = joined(list(loader(split, segment_frames=300, drop_last=False)))
    short = every["length"] < 300
    assert short.any()
    assert not short.all()
    for mel, length in zip(every["mel"], every["length"], strict=True):
        assert (mel[int(length) :] == -20.0).all()


def test_without_shuffle_segments_begin_at_the_first_frame_in_the_splits_order(
    split: Split,
) -> None:
    every = joined(list(loader(split, shuffle=False, drop_last=False)))
    expected = split.segments(np.arange(len(split)), np.zeros(len(split), int), T)
    np.testing.assert_array_equal(every["mel"].numpy(), expected)
    np.testing.assert_array_equal(every["label"].numpy(), split.labels)


def test_epochs_follow_one_another_and_differ(split: Split) -> None:
    own = loader(split)
    epochs = [list(own) for _ in range(3)]
    assert own.epoch == 3
    assert not any(same(a, b) for a, b in itertools.combinations(epochs, 2))
    for number, batches in enumerate(epochs):
        fresh = loader(split)
        fresh.set_epoch(number)
        assert same(list(fresh), batches)
    assert not same(list(loader(split, seed=1)), epochs[0])


@given(st.integers(1, 17), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans())
@settings(deadline=None, max_examples=25)
def test_resume_is_exact_mid_epoch_across_its_end_and_at_another_world_size(
    edge_set: Path, taken: int, before: int, after: int, drop_last: bool
) -> None:
    split = open_shards(edge_set)["train"]

    def ranks(size: int) -> list[SegmentLoader]:
        return [
            loader(split, batch_size=4 // size, rank=r, world_size=size, drop_last=drop_last)
            for r in range(size)
        ]

    def run(loaders: list[SegmentLoader], count: int) -> list[Batch]:
        endless = [itertools.chain.from_iterable(itertools.repeat(one)) for one in loaders]
        return [joined([next(each) for each in endless]) for _ in range(count)]

    whole = run(ranks(1), taken + 9)
    first = ranks(before)
    assert same(run(first, taken), whole[:taken])
    states = [one.state_dict() for one in first]
    assert all(state == states[0] for state in states)
    second = ranks(after)
    for one in second:
        one.load_state_dict(states[0])
    assert same(run(second, 9), whole[taken:])


def test_state_is_plain_values(split: Split) -> None:
    own = loader(split)
    next(iter(own))
    assert own.state_dict() == {
        "epoch": 0,
        "position": 4,
        "seed": 0,
        "split": "train",
        "fingerprint": split.fingerprint,
        "order": "global",
    }


@pytest.mark.parametrize("field", ["seed", "split", "fingerprint"])
def test_state_of_another_seed_or_data_set_is_refused(
    split: Split, edge_sets: dict[tuple[str, str], Path], field: str
) -> None:
    other = {
        "seed": lambda: loader(split, seed=1),
        "split": lambda: loader(open_shards(edge_sets["float16", "none"])["val"]),
        "fingerprint": lambda: loader(open_shards(edge_sets["float32", "none"])["train"]),
    }[field]()
    own = loader(split)
    with pytest.raises(ShardprepError, match=f"has {field} .* Resume with") as caught:
        own.load_state_dict(other.state_dict())
    assert caught.value.key == field
    assert same(list(own), list(loader(split)))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"segment_frames": 0},
        {"rank": -1},
        {"rank": 2, "world_size": 2},
        {"batch_size": 29},
        {"batch_size": 8, "world_size": 4},
        {"prefetch": -1},
        {"order": "windows"},
        {"placement": "gpu"},
    ],
)
def test_arguments_out_of_range_are_refused(split: Split, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="batch_size|batch of|rank|prefetch|order|placement"):
        loader(split, **options)


WINDOWED: dict[str, Any] = {"order": "windowed", "lanes": 4, "window_shards": 1}


@pytest.mark.parametrize("options", [{"lanes": 0}, {"window_shards": 0}])
def test_lanes_that_are_not_positive_are_refused(split: Split, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="lanes"):
        loader(split, **{**WINDOWED, **options})


def test_lanes_that_cannot_be_divided_evenly_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        loader(split, **WINDOWED, world_size=3)
    with pytest.raises(ValueError, match="lanes 3: .* divide the 4 segments"):
        loader(split, **{**WINDOWED, "lanes": 3}, world_size=1)
    # The world size may be found later, and then lanes may fit.
    own = loader(split, **{**WINDOWED, "lanes": 3})
    for ask in (iter, len):
        with pytest.raises(ValueError, match="lanes 3: .* divide the 4 segments"):
            ask(own)


@pytest.mark.parametrize("options", [{}, WINDOWED], ids=["global", "windowed"])
@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("kind", [("float16", "none"), ("float32", "none"), ("float16", "zstd")])
def test_every_placement_and_prefetch_gives_the_same_bits(
    edge_sets: dict[tuple[str, str], Path],
    kind: tuple[str, str],
    prefetch: int,
    placement: str,
    options: dict[str, Any],
) -> None:
    split = open_shards(edge_sets[kind])["train"]
    options = {**options, "segment_frames": 100, "drop_last": False, "pad_value": -7.0}
    plain = loader(split, **options, prefetch=0, placement="host")
    other = loader(split, **options, prefetch=prefetch, placement=placement, device="cpu")
    assert other.placement == placement
    for _ in range(2):
        batches = list(other)
        assert same(batches, list(plain))
        assert len(indices_of(split, batches)) == len(split)


def test_on_a_cpu_the_split_stays_where_it_is(split: Split) -> None:
    assert loader(split, device="cpu", placement="auto").placement == "host"


def test_segments_are_converted_to_the_dtype_that_is_asked_for(split: Split) -> None:
    own = joined(list(loader(split, dtype=torch.bfloat16)))
    assert own["mel"].dtype == torch.bfloat16
    assert torch.equal(own["mel"], joined(list(loader(split)))["mel"].to(torch.bfloat16))


def test_batches_that_are_kept_are_not_overwritten(split: Split) -> None:
    own = loader(split, prefetch=3)
    kept = [next(iter(own)) for _ in range(5)]
    copies = [{name: t.clone() for name, t in batch.items()} for batch in kept]
    for _ in range(4):
        list(own)
    assert same(kept, copies)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_windowed_batches_are_the_same_at_any_world_size_that_divides_the_lanes(
    split: Split, world_size: int
) -> None:
    options = {**WINDOWED, "batch_size": 8 // world_size, "drop_last": False}
    batches = global_batches(split, world_size, **options)
    assert same(batches, list(loader(split, **{**options, "batch_size": 8})))
    found = indices_of(split, batches)
    assert sorted(found) == list(range(len(split)))


@pytest.mark.parametrize("options", [{}, WINDOWED], ids=["global", "windowed"])
def test_resuming_is_exact_with_batches_prepared_ahead(
    split: Split, options: dict[str, Any]
) -> None:
    whole = list(loader(split, **options))
    own = loader(split, **options, prefetch=4)
    taken = list(itertools.islice(own, 3))
    state = own.state_dict()
    other = loader(split, **options, prefetch=4)
    other.load_state_dict(state)
    assert same(taken + list(other), whole)


def test_position_of_another_order_is_refused(split: Split) -> None:
    state = loader(split, **WINDOWED).state_dict()
    for options in ({}, {**WINDOWED, "lanes": 2}, {**WINDOWED, "window_shards": 2}):
        with pytest.raises(ShardprepError, match="Resume with"):
            loader(split, **options).load_state_dict(state)
    with pytest.raises(ShardprepError, match="global_batch 4"):
        loader(split, **WINDOWED, batch_size=8).load_state_dict(state)


def test_damage_found_by_the_prefetching_thread_reaches_the_reader(
    edge_set: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(edge_set, folder)
    own = loader(open_shards(folder)["train"], prefetch=3)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(CorruptShardError, match=r"train-000001\.tar.*cannot be read"):
        list(own)


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_a_dropped_loader_is_freed_at_once(split: Split, order: str) -> None:
    # It wants shards of a store for as long as it lives: no cycle may keep it.
    own = loader(split, order=order, lanes=2)
    next(iter(own))
    freed = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert freed() is None
    finally:
        gc.enable()


def test_no_thread_remains(split: Split) -> None:
    before = set(threading.enumerate())
    own = loader(split, prefetch=3)
    for _ in range(3):
        iterator = iter(own)
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
    list(own)
    own.close()
    names = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in names if name.startswith("shardprep-prefetch")]


def test_split_smaller_than_a_batch_is_one_batch_without_drop_last(split: Split) -> None:
    (batch,) = loader(split, batch_size=100, drop_last=False)
    assert len(batch["label"]) == len(split)
