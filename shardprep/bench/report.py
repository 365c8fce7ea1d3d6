"""`shardprep bench`: every way to read one data set on one machine, and what holds ours back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardprep.bench.bottleneck import Stages, cached_share, name_bottleneck, time_stages
from shardprep.bench.contenders import (
    SegmentShape,
    decode_member,
    file_candidate,
    limit_candidates,
    limit_rows,
    shard_candidate,
    webdataset_candidate,
)
from shardprep.bench.standings import (
    LimitResult,
    LoaderResult,
    Machine,
    best_limit,
    machine,
    summarise,
    usable_cores,
)
from shardprep.bench.turns import Candidate, Turns, in_own_process, take_turns, warm
from shardprep.errors import FormatError, SourceError
from shardprep.format.manifest import MANIFEST_NAME
from shardprep.read.shard_set import ShardSet, Split, open_shards
from shardprep.source.dataset import scan_dataset
from shardprep.storage.remote import Location

_STAGES_TIMEOUT = 300.0


@dataclass(frozen=True)
class SetResult:
    """Where the time of our loader goes, for one shard set.

    Attributes:
        shards: The folder.
        codec: How it is stored.
        loader: Name of our loader for it.
        stages: Seconds of a batch, in all and by parts.
        rest: Seconds of a batch that are in none of the parts.
        major_faults: Pages that the loader had to wait for, in all rounds.
        cached: Share of the shards in the page cache.
        bottleneck: What holds the loader back, as a sentence.
    """

    shards: str
    codec: str
    loader: str
    stages: Stages
    rest: float
    major_faults: int
    cached: float
    bottleneck: str


@dataclass(frozen=True)
class BenchReport:
    """All that `shardprep bench` found."""

    machine: Machine
    split: str
    utterances: int
    frames: int
    batch: tuple[int, int, int]
    dtype: str
    rounds: int
    seconds: float
    loaders: list[LoaderResult]
    limit: LimitResult
    sets: list[SetResult]
    notes: list[str]


@dataclass(frozen=True)
class BenchOptions:
    """What to measure and for how long.

    Attributes:
        split: Split to read.
        batch_size: Segments a batch.
        segment_frames: Mel frames a segment.
        rounds: Turns of every loader.
        seconds: Length of a turn, warming up not counted.
    """

    split: str = "train"
    batch_size: int = 256
    segment_frames: int = 128
    rounds: int = 3
    seconds: float = 2.0


def bench_shards(
    destinations: Sequence[Location],
    source: Path | None,
    options: BenchOptions,
    on_turn: Callable[[str, int], None],
) -> BenchReport:
    """Measure the loaders of one data set against each other.

    Args:
        destinations: Shard sets of the same data, e.g. one with each codec. Those behind URLs are
            fetched first, and then read from the cache.
        source: The data set that they were built from, to measure reading its files.
        options: What to measure.
        on_turn: Told of each turn: its loader, and the turns there will be in all.

    Raises:
        FormatError: A folder is no shard set, has no such split or an empty one, or is of other
            data than the first.
        CorruptShardError: A shard is missing or damaged.
        SourceError: The source is no data set, or not the one that the shards were built from.
    """
    sets = [open_shards(place) for place in dict.fromkeys(destinations)]
    splits = [shard_set[options.split] for shard_set in sets]
    _check_same(sets, splits)
    split = splits[0]
    shape = SegmentShape(
        min(options.batch_size, len(split)), options.segment_frames, split.n_mels, split.dtype
    )
    files = None if source is None else _source_files(source, sets[0], split)
    candidates, ours = _candidates(sets, files, options.split, shape)
    split_bytes = int(split.frames.sum()) * shape.n_mels * shape.dtype.itemsize
    rows = limit_rows(split_bytes, shape)
    limits = limit_candidates(rows, shape)
    expected = options.rounds * (len(candidates) + len(limits))
    turns = take_turns(
        [*candidates, *limits],
        rounds=options.rounds,
        seconds=options.seconds,
        on_turn=lambda name, _: on_turn(name, expected),
    )
    limit = best_limit(turns, limits, rows * shape.nbytes)
    return BenchReport(
        machine(),
        options.split,
        len(split),
        int(split.frames.sum()),
        (shape.batch_size, shape.frames, shape.n_mels),
        str(shape.dtype),
        options.rounds,
        options.seconds,
        summarise(turns, [*candidates, *limits], limit, shape.nbytes),
        limit,
        [
            _explain(shard_set, own, options, shape, turns, limit)
            for shard_set, own in zip(sets, ours, strict=True)
        ],
        list(_notes(options, shape, split_bytes, limit)),
    )


def _check_same(sets: Sequence[ShardSet], splits: Sequence[Split]) -> None:
    for shard_set, split in zip(sets, splits, strict=True):
        if not len(split):
            raise FormatError(f"the split {split.name!r} is empty", file=shard_set.path)
        if set(split.keys) != set(splits[0].keys) or split.dtype != splits[0].dtype:
            raise FormatError(
                f"its split {split.name!r} is not that of {sets[0].path}: other utterances or "
                "another dtype",
                file=shard_set.path / MANIFEST_NAME,
                remedy="Measure sets of different data one by one.",
            )


def _source_files(source: Path, shard_set: ShardSet, split: Split) -> list[tuple[Path, int]]:
    """The files of a split's utterances, with their labels."""
    found = scan_dataset(source)
    if found.fingerprint != shard_set.manifest.source_fingerprint:
        raise SourceError(
            f"is not the data set that {shard_set.path} was built from",
            file=source,
            remedy="Give --source the folder that was built from, or leave it out.",
        )
    return [
        (source / found.by_key[str(key)].path, int(label))
        for key, label in zip(split.keys, split.labels, strict=True)
    ]


def _worker_counts(shards: int | None) -> list[int]:
    """No workers, and one a core; no more than there are shards to share out."""
    return [0, min(usable_cores(), shards or usable_cores())]


def _labels(sets: Sequence[ShardSet]) -> list[str]:
    """What tells the sets apart: nothing, their codecs, or their folders."""
    codecs = [shard_set.manifest.codec.name for shard_set in sets]
    if len(sets) == 1:
        return [""]
    if max(Counter(codecs).values()) == 1:
        return [f" {codec}" for codec in codecs]
    return [f" {shard_set.path}" for shard_set in sets]


def _candidates(
    sets: Sequence[ShardSet],
    files: Sequence[tuple[Path, int]] | None,
    split: str,
    shape: SegmentShape,
) -> tuple[list[Candidate], list[Candidate]]:
    """All loaders to measure, and among them ours, one a shard set."""
    found, ours = [], []
    if files is not None:
        found += [file_candidate(files, shape, workers) for workers in _worker_counts(None)]
    for label, shard_set in zip(_labels(sets), sets, strict=True):
        shards = shard_set.fetch(split)
        found += [
            webdataset_candidate(f"webdataset{label}", shards, shape, workers, decode_member)
            for workers in _worker_counts(len(shards))
        ]
        ours.append(shard_candidate(f"shardprep{label}", shard_set, split, shape))
        found.append(ours[-1])
    return found, ours


def _explain(
    shard_set: ShardSet,
    ours: Candidate,
    options: BenchOptions,
    shape: SegmentShape,
    turns: Turns,
    limit: LimitResult,
) -> SetResult:
    warm(ours.files)
    cached = cached_share(ours.files)
    stages = in_own_process(
        partial(time_stages, shard_set.path, options.split, shape, options.seconds / 2),
        _STAGES_TIMEOUT,
    )
    codec = shard_set.manifest.codec.name
    faults = sum(rate.major_faults for rate in turns.rates[ours.name])
    sentence = name_bottleneck(
        stages,
        codec,
        faults=faults,
        batches=sum(rate.batches for rate in turns.rates[ours.name]),
        cached=cached,
        to_limit=turns.median(ours.name) / limit.tried[limit.method],
    )
    return SetResult(
        str(shard_set.path), codec, ours.name, stages, stages.rest, faults, cached, sentence
    )


def _notes(
    options: BenchOptions, shape: SegmentShape, split_bytes: int, limit: LimitResult
) -> Iterator[str]:
    if shape.batch_size < options.batch_size:
        yield (
            f"batches of {shape.batch_size}, not {options.batch_size}: the split has no more "
            "utterances"
        )
    if limit.nbytes + shape.nbytes <= split_bytes:
        yield (
            f"the limit gathers from {limit.nbytes:,} bytes, not from the split's {split_bytes:,}: "
            "memory is short"
        )
