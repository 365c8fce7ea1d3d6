"""Whole utterances: each once over all ranks, similar lengths together, damage always found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shardprep import CorruptShardError, Split, UtteranceLoader, open_shards


@pytest.fixture
def split(edge_set: Path) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_whole_utterances_come_once_each_over_all_ranks(
    edge_sets: dict[tuple[str, str], Path], codec: str, world_size: int
) -> None:
    split = open_shards(edge_sets["float16", codec])["train"]
    seen = []
    for rank in range(world_size):
        own = UtteranceLoader(split, max_frames=600, rank=rank, world_size=world_size)
        batches = list(own)
        assert len(batches) == len(own)
        for batch in batches:
            size, longest = batch["mel"].shape[:2]
            assert size * longest <= 600 or size == 1
            assert longest == batch["length"].max()
            for row, index in enumerate(batch["index"].tolist()):
                mel = split.read(index)
                np.testing.assert_array_equal(batch["mel"][row, : len(mel)], mel)
                assert (batch["mel"][row, len(mel) :] == -20.0).all()
                assert batch["length"][row] == len(mel)
                assert batch["label"][row] == split.labels[index]
                seen.append(index)
    assert sorted(seen) == list(range(len(split)))


def test_utterances_of_similar_length_share_a_batch(split: Split) -> None:
    padded = sum(b["mel"].shape[0] * b["mel"].shape[1] for b in UtteranceLoader(split))
    assert sum(len(b["index"]) for b in UtteranceLoader(split)) == len(split)
    assert padded >= split.frames.sum()
    tight = sum(
        b["mel"].shape[0] * b["mel"].shape[1] for b in UtteranceLoader(split, max_frames=1000)
    )
    assert tight < 1.35 * split.frames.sum()


@pytest.mark.parametrize("options", [{"max_frames": 0}, {"rank": 1}, {"rank": -1}])
def test_utterance_loader_refuses_arguments_out_of_range(
    split: Split, options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="max_frames|rank"):
        UtteranceLoader(split, **options)


def test_damaged_utterance_is_an_error_that_names_it(
    damaged_split: Callable[..., tuple[Split, list[int]]],
) -> None:
    split, (bad,) = damaged_split([5])
    with pytest.raises(CorruptShardError, match="do not match their crc32") as caught:
        list(UtteranceLoader(split))
    assert caught.value.key == str(split.keys[bad])


def test_damaged_utterances_are_skipped_when_asked(
    damaged_split: Callable[..., tuple[Split, list[int]]],
) -> None:
    split, bad = damaged_split([0, 5, 6])
    loader = UtteranceLoader(split, max_frames=600, on_corrupt="skip", max_corrupt=3)
    for _ in range(2):
        seen = [index for batch in loader for index in batch["index"].tolist()]
        assert sorted(seen) == sorted({*range(len(split))} - {*bad})
    with pytest.raises(CorruptShardError, match="3 utterances are damaged, and max_corrupt is 2"):
        list(UtteranceLoader(split, on_corrupt="skip", max_corrupt=2))
