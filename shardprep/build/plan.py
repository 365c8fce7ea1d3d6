"""Which utterance goes into which shard: pure functions of (utterances, options, seed).

Choices come from a keyed hash of each utterance's key, not from a random generator, so they do
not depend on the order of the metadata or on NumPy's version. An utterance added later moves at
most one other of its speaker between train and val, to keep the fraction.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from shardprep.format.manifest import shard_name
from shardprep.source.dataset import Source, Utterance


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be written: its file name, its split, and its utterances in order."""

    file: str
    split: str
    utterances: tuple[Utterance, ...]


def plan_shards(
    source: Source, *, val_fraction: float, samples_per_shard: int, seed: int
) -> dict[str, tuple[ShardPlan, ...]]:
    """Lay out every shard of every split that has utterances.

    The labelled utterances are split by speaker into train and val and shuffled; the test
    utterances keep the order of testdata.json.

    Args:
        source: What `scan_dataset` found.
        val_fraction: Share of each speaker's utterances for val, in [0, 1).
        samples_per_shard: Most utterances a shard holds.
        seed: Decides the split and the shuffle.

    Returns:
        Split name ("train", "val", "test") to its shards.
    """
    train, val = split_validation(source.labelled, val_fraction, seed)
    splits = {
        "train": shuffled(train, seed),
        "val": shuffled(val, seed),
        "test": list(source.test),
    }
    return {
        name: cut_into_shards(name, utterances, samples_per_shard)
        for name, utterances in splits.items()
        if utterances
    }


def split_validation(
    utterances: Sequence[Utterance], fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split into train and val, speaker by speaker.

    A speaker of n utterances gives round(n * fraction) of them to val, yet keeps one in train.
    """
    by_speaker: dict[int, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_speaker[utterance.label].append(utterance)
    train, val = [], []
    for own in by_speaker.values():
        own.sort(key=lambda utterance: _draw(seed, "split", utterance.key))
        count = min(int(len(own) * fraction + 0.5), len(own) - 1)
        val.extend(own[:count])
        train.extend(own[count:])
    return train, val


def shuffled(utterances: Sequence[Utterance], seed: int) -> list[Utterance]:
    """The utterances in a seeded random order, the same for any order of the input."""
    return sorted(utterances, key=lambda utterance: _draw(seed, "order", utterance.key))


def cut_into_shards(
    split: str, utterances: Sequence[Utterance], samples_per_shard: int
) -> tuple[ShardPlan, ...]:
    """Cut a split into as few shards as the limit allows, their sizes differing by at most one.

    Even shards keep readers that hand out whole shards, such as webdataset's, in step.
    """
    total = len(utterances)
    shards = -(-total // samples_per_shard)
    bounds = [number * total // shards for number in range(shards + 1)]
    return tuple(
        ShardPlan(shard_name(split, number), split, tuple(utterances[begin:end]))
        for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False))
    )


def _draw(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{purpose}/{key}".encode(), digest_size=16).digest()
