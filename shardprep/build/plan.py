"""Which utterance goes into which shard: pure functions of (utterances, options, seed).

Random choices come from a keyed hash of each utterance's key, not from a random generator. So they
do not depend on the order of the metadata, nor on NumPy's version. If a speaker gets one more
utterance, at most one other utterance of the speaker moves between train and val.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shardprep.build.options import BuildOptions
from shardprep.format.manifest import CodecInfo, DType, Features, shard_name
from shardprep.source.contents import Reader, Source, Utterance


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its file name, its split, and its utterances in order."""

    file: str
    split: str
    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class ShardTask:
    """What a worker must know to write a shard.

    Attributes:
        plan: File name, split and utterances.
        reader: Gives the matrices.
        n_mels: Mel bins F.
        dtype: Element type to store.
        codec: How matrices are stored.
        skip: Whether to leave out faulty utterances; otherwise the first one raises an error.
        features: The recipe of the features, where it is known.
    """

    plan: ShardPlan
    reader: Reader
    n_mels: int
    dtype: DType
    codec: CodecInfo
    skip: bool
    features: Features | None = None

    @property
    def inputs(self) -> str:
        """SHA-256 over everything that decides the bytes; of files, their sizes and versions."""
        codec = msgspec.to_builtins(self.codec)
        listed = [self.plan.utterances, self.n_mels, self.dtype, codec, self.skip, self.features]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def shard_tasks(source: Source, options: BuildOptions) -> list[ShardTask]:
    """The task of every shard that a build with these options has to write, in order."""
    plans = plan_shards(
        source,
        val_fraction=options.val_fraction,
        val_speakers=options.val_speakers,
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
    )

    def task(plan: ShardPlan) -> ShardTask:
        return ShardTask(
            plan,
            source.reader,
            source.n_mels,
            options.dtype,
            options.codec_info,
            options.on_error == "skip",
            source.features,
        )

    return [task(plan) for shards in plans.values() for plan in shards]


def utterances_of(tasks: Iterable[ShardTask]) -> list[Utterance]:
    """The utterances of some tasks."""
    return [utterance for task in tasks for utterance in task.plan.utterances]


def plan_shards(
    source: Source,
    *,
    val_fraction: float,
    samples_per_shard: int,
    seed: int,
    val_speakers: float = 0.0,
) -> dict[str, tuple[ShardPlan, ...]]:
    """Lay out every shard of every split that has utterances.

    Some speakers are held out whole, for val. The labelled utterances of the others are split by
    speaker into train and val. Both are shuffled, with those that the source puts there. The test
    utterances keep the order of testdata.json.

    Args:
        source: The data set, from `scan_dataset`.
        val_fraction: Share of each speaker's utterances for val, in [0, 1).
        val_speakers: Share of the speakers who are held out, in [0, 1).
        samples_per_shard: Most utterances in a shard.
        seed: Seed of the split and of the shuffle.

    Returns:
        The shards of each split, by its name ("train", "val", "test").
    """
    held = held_out(source, val_speakers, seed)
    known = [utterance for utterance in source.labelled if utterance.speaker not in held]
    unseen = [utterance for utterance in source.labelled if utterance.speaker in held]
    train, val = split_validation(known, val_fraction, seed)
    splits = {
        "train": shuffled([*train, *source.fixed.get("train", ())], seed),
        "val": shuffled([*val, *unseen, *source.fixed.get("val", ())], seed),
        "test": list(source.test),
    }
    return {
        name: cut_into_shards(name, utterances, samples_per_shard)
        for name, utterances in splits.items()
        if utterances
    }


def held_out(source: Source, share: float, seed: int) -> frozenset[str]:
    """The speakers of a source who are held out whole: of n, round(n * share), but one at least.

    Speakers whom the source or a set puts into train take no part, and one speaker stays.
    """
    if not share:
        return frozenset()
    fixed = {utterance.speaker for own in source.fixed.values() for utterance in own}
    free = {utterance.speaker for utterance in source.labelled} - fixed - source.trained
    names = sorted((name for name in free if name), key=lambda name: _draw(seed, "speaker", name))
    kept = 0 if fixed or source.trained else 1
    return frozenset(names[: min(max(1, int(len(names) * share + 0.5)), len(names) - kept)])


def split_validation(
    utterances: Sequence[Utterance], fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Split into train and val, speaker by speaker.

    Of n utterances of a speaker, round(n * fraction) go to val, but at least one stays in train.
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
    """The utterances in a seeded random order that does not depend on the order of the input."""
    return sorted(utterances, key=lambda utterance: _draw(seed, "order", utterance.key))


def cut_into_shards(
    split: str, utterances: Sequence[Utterance], samples_per_shard: int
) -> tuple[ShardPlan, ...]:
    """Cut a split into as few shards as the limit allows, whose sizes differ by at most one.

    Readers that distribute whole shards, such as webdataset, need shards of equal size.
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
