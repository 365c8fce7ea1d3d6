"""The map-style Dataset gives what `Split.read` reads, in every kind of worker."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from shardprep import CorruptShardError, SegmentDataset, Split, open_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(params=[("float16", "none"), ("float32", "zstd")], ids=["none", "zstd"])
def split(edge_sets: dict[tuple[str, str], Path], request: pytest.FixtureRequest) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_sets[request.param])["train"]


def check(batch: dict[str, Any], split: Split, frames: int | None, begin: bool = False) -> None:
    """Every segment of a batch is a stretch of its utterance, as `Split.read` reads it."""
    indices = batch["index"].tolist()
    whole = [split.read(index) for index in indices]
    length = max(map(len, whole)) if frames is None else frames
    assert batch["mel"].shape == (len(indices), length, split.n_mels)
    assert batch["label"].tolist() == split.labels[indices].tolist()
    assert batch["length"].tolist() == [min(len(mel), length) for mel in whole]
    for mel, expected in zip(batch["mel"].numpy(), whole, strict=True):
        assert mel.dtype == split.dtype
        count = min(len(expected), length)
        assert (mel[count:] == -20).all()
        starts = range(1 if begin else len(expected) - count + 1)
        assert any(np.array_equal(mel[:count], expected[s : s + count]) for s in starts)


@pytest.mark.parametrize("frames", [1, 64, 300, None])
@pytest.mark.parametrize("own", [True, False], ids=["collate", "default_collate"])
def test_batches_hold_what_split_read_gives(split: Split, frames: int | None, own: bool) -> None:
    dataset = SegmentDataset(split, frames)
    if frames is None and not own:
        # PyTorch's own cannot stack utterances of several lengths.
        with pytest.raises(RuntimeError):
            list(DataLoader(dataset, batch_size=5))
        return
    loader = DataLoader(
        dataset, batch_size=5, shuffle=True, collate_fn=dataset.collate if own else None
    )
    seen = []
    for batch in loader:
        check(batch, split, frames)
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(len(split)))


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind_give_the_same_batches(edge_split: Split, start: str) -> None:
    dataset = SegmentDataset(edge_split, 32)

    def batches(context: str) -> list[dict[str, Any]]:
        return list(
            DataLoader(
                dataset,
                batch_size=8,
                shuffle=True,
                num_workers=1,
                multiprocessing_context=context,
                generator=torch.Generator().manual_seed(7),
                collate_fn=dataset.collate,
            )
        )

    # Before the first worker, so that it inherits shards that are mapped.
    check(dataset.collate([dataset[0]]), edge_split, 32)
    found, forked = batches(start), batches("fork")
    for batch, same in zip(found, forked, strict=True):
        check(batch, edge_split, 32)
        assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_starts_come_from_pytorchs_generator_and_cover_every_place(edge_split: Split) -> None:
    (long,) = np.flatnonzero(edge_split.frames == 65)[:1].tolist()
    dataset = SegmentDataset(edge_split, 62)
    mel = edge_split.read(long)
    torch.manual_seed(3)
    drawn = dataset.__getitems__([long] * 400)
    torch.manual_seed(3)
    again = dataset.__getitems__([long] * 400)
    assert all(torch.equal(a["mel"], b["mel"]) for a, b in zip(drawn, again, strict=True))
    starts = [
        next(s for s in range(4) if np.array_equal(item["mel"].numpy(), mel[s : s + 62]))
        for item in drawn
    ]
    counts = np.bincount(starts, minlength=4)
    assert counts.min() > 60
    # From the beginning, nothing is drawn.
    before = torch.get_rng_state()
    fixed = SegmentDataset(edge_split, 62, random_start=False)
    check(fixed.collate(fixed.__getitems__(range(len(fixed)))), edge_split, 62, begin=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_a_sequence(edge_split: Split) -> None:
    dataset = SegmentDataset(edge_split, None)
    assert len(dataset) == len(edge_split)
    for index, item in enumerate(dataset):
        assert np.array_equal(item["mel"].numpy(), edge_split.read(index))
        assert (item["label"], item["length"]) == (edge_split.labels[index], len(item["mel"]))
        assert item["index"] == index
    assert dataset[-1]["index"] == len(dataset) - 1
    for wrong in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[wrong]
        with pytest.raises(IndexError, match=f"utterance {wrong} of a split of"):
            dataset.__getitems__([0, wrong])
    assert len(dataset.__getitems__([])) == 0
    with pytest.raises(IndexError):
        dataset.__getitems__([0, 1 << 70])
    with pytest.raises(TypeError):
        dataset.__getitems__([0, 1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="segment_frames 0"):
        SegmentDataset(edge_split, 0)


@pytest.mark.parametrize("frames", [16, None])
def test_a_batch_takes_the_indices_that_an_item_takes(
    edge_split: Split, frames: int | None
) -> None:
    dataset = SegmentDataset(edge_split, frames)
    asked = [-1, 3, -len(edge_split), np.int64(2), torch.tensor(-2)]
    (batch,) = DataLoader(Subset(dataset, asked), batch_size=5, collate_fn=dataset.collate)
    assert batch["index"].tolist() == [dataset[index]["index"] for index in asked]
    check(batch, edge_split, frames)


def test_parts_and_unions_of_datasets_collate_too(edge_split: Split) -> None:
    dataset = SegmentDataset(edge_split, None)
    subset = Subset(dataset, [5, 9, 2])
    (batch,) = DataLoader(subset, batch_size=3, collate_fn=dataset.collate)
    assert batch["index"].tolist() == [5, 9, 2]
    check(batch, edge_split, None)
    both = ConcatDataset([dataset, SegmentDataset(edge_split, None)])
    for batch in DataLoader(both, batch_size=7, collate_fn=dataset.collate):
        check(batch, edge_split, None)


def test_damage_raises_where_it_is_looked_for(
    damaged_split: Callable[..., tuple[Split, list[int]]],
) -> None:
    split, (bad,) = damaged_split([3])
    for dataset in (SegmentDataset(split, None), SegmentDataset(split, 8, verify_reads="once")):
        assert dataset[bad - 1]["index"] == bad - 1
        with pytest.raises(CorruptShardError, match="crc32"):
            dataset.__getitems__([0, bad])
    assert SegmentDataset(split, 8)[bad]["index"] == bad


def test_a_pickled_dataset_carries_no_matrices(edge_split: Split) -> None:
    dataset = SegmentDataset(edge_split, 16)
    list(dataset)
    data = pickle.dumps(dataset)
    assert len(data) < edge_split.nbytes / 10
    copy = pickle.loads(data)
    check(copy.collate(copy.__getitems__([4, 2])), edge_split, 16)
