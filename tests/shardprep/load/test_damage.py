"""Damaged utterances end the reading, or undamaged ones of the batch replace them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shardprep import CorruptShardError, SegmentLoader, Split
from shardprep.load.damage import ReadGuard

DamagedSplit = Callable[..., tuple[Split, list[int]]]


def loader(split: Split, **options: Any) -> SegmentLoader:
    return SegmentLoader(split, **{"batch_size": 4, "segment_frames": 32, **options})


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("verify", ["once", "always"])
def test_damage_is_raised_with_file_and_key(
    damaged_split: DamagedSplit, codec: str, verify: str
) -> None:
    split, (bad,) = damaged_split([3], codec)
    with pytest.raises(CorruptShardError, match="do not match their crc32.*repair") as caught:
        list(loader(split, verify_reads=verify))
    assert caught.value.key == str(split.keys[bad])
    assert caught.value.file is not None
    assert caught.value.file.endswith(f"train-{split.locations[bad]['shard']:06d}.tar")


def test_segments_are_not_checked_by_default(damaged_split: DamagedSplit) -> None:
    split, _ = damaged_split([3])
    assert len(list(loader(split))) == 7


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("order", ["global", "windowed"])
def test_skipped_utterances_are_never_delivered_and_batches_keep_their_size(
    damaged_split: DamagedSplit, order: str, world_size: int, placement: str
) -> None:
    split, bad = damaged_split([3, 4, 20])
    options: dict[str, Any] = {
        "order": order,
        "lanes": 2,
        "world_size": world_size,
        "batch_size": 8 // world_size,
        "placement": placement,
        "verify_reads": "once",
        "on_corrupt": "skip",
    }
    reference = {"verify_reads": "never", "on_corrupt": "raise", "placement": "host"}
    found: set[str] = set()
    for rank in range(world_size):
        own, plain = (loader(split, **{**options, **o}, rank=rank) for o in ({}, reference))
        twice = 0
        for _ in range(2):
            for batch, before in zip(own, plain, strict=True):
                # The segments of a rank are all different: each identifies its utterance.
                was = [segment.numpy().tobytes() for segment in before["mel"]]
                now = [segment.numpy().tobytes() for segment in batch["mel"]]
                assert len(now) == len(was)
                assert set(now) <= set(was)
                for place, segment in enumerate(now):
                    home = was.index(segment)
                    assert batch["label"][place] == before["label"][home]
                    assert batch["length"][place] == before["length"][home]
                    twice += home != place
                    if home != place:
                        # The utterances in between were damaged too.
                        between = was[place:home] if home > place else was[place:] + was[:home]
                        assert not set(between) & set(now)
        assert own.replaced == twice
        found |= own.damaged.keys()
    assert found == {str(split.keys[index]) for index in bad}


def test_segments_of_damaged_utterances_are_never_delivered(damaged_split: DamagedSplit) -> None:
    split, bad = damaged_split([3, 4, 20])
    guard = ReadGuard(split, "once", "skip", 3)
    everything = np.arange(len(split))
    places = guard.replacements(everything)
    assert places is not None
    assert not set(everything[places].tolist()) & set(bad)
    intact = [index for index in everything.tolist() if index not in bad]
    np.testing.assert_array_equal(everything[places][intact], intact)
    assert everything[places][bad].tolist() == [5, 5, 21]
    assert guard.replacements(np.array(intact)) is None
    # After the last place comes the first.
    assert guard.replacements(np.array([0, 20])).tolist() == [0, 0]  # type: ignore[union-attr]


def test_more_damage_than_max_corrupt_ends_the_reading(damaged_split: DamagedSplit) -> None:
    split, bad = damaged_split([3, 4, 20])
    skip = {"verify_reads": "once", "on_corrupt": "skip"}
    assert len(list(loader(split, **skip, max_corrupt=3))) == 7
    with pytest.raises(CorruptShardError, match="3 utterances are damaged, and max_corrupt is 2"):
        list(loader(split, **skip, max_corrupt=2))
    # If the caller catches the error and continues, the error comes again.
    own = loader(split, **skip, max_corrupt=0)
    for _ in range(3):
        with pytest.raises(CorruptShardError, match="1 utterances are damaged"):
            list(own)
    with pytest.raises(CorruptShardError, match="every utterance of a batch is damaged"):
        ReadGuard(split, "once", "skip", 9).replacements(np.array(bad))


def test_a_skipped_utterance_is_logged(
    damaged_split: DamagedSplit, caplog: pytest.LogCaptureFixture
) -> None:
    split, (bad,) = damaged_split([3])
    with caplog.at_level(logging.WARNING, "shardprep"):
        list(loader(split, verify_reads="once", on_corrupt="skip"))
    (record,) = caplog.records
    assert str(split.keys[bad]) in record.getMessage()


@pytest.mark.parametrize(("verify", "times"), [("never", 0), ("once", 1), ("always", 3)])
def test_each_utterance_is_checked_as_often_as_verify_reads_says(
    edge_split: Split, verify: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    original = zlib.crc32
    monkeypatch.setattr(
        "shardprep.read.split.zlib.crc32", lambda data: checked.append(1) or original(data)
    )
    # Nothing of a fourth epoch is read ahead.
    own = loader(edge_split, verify_reads=verify, prefetch=0)
    for _ in range(3):
        assert len(torch.cat([batch["label"] for batch in own])) == 28
    assert len(checked) == times * 28


def test_a_split_on_the_device_is_always_checked(damaged_split: DamagedSplit) -> None:
    split, _ = damaged_split([3])
    with pytest.raises(CorruptShardError, match="crc32"):
        loader(split, placement="device", device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"on_corrupt": "skip"},
        {"verify_reads": "twice"},
        {"on_corrupt": "ignore", "verify_reads": "once"},
        {"max_corrupt": -1},
    ],
)
def test_arguments_out_of_range_are_refused(edge_split: Split, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="on_corrupt|max_corrupt"):
        loader(edge_split, **options)
