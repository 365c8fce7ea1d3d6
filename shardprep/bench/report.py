"""The report of `shardprep bench`: the loaders of one data set, and what limits our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shardprep.bench.bottleneck import Stages, cached_share, name_bottleneck, time_stages
from shardprep.bench.loaders import (
    SegmentShape,
    decode_adopted,
    decode_bytes,
    decode_member,
    file_candidate,
    shard_candidate,
    webdataset_candidate,
)
from shardprep.bench.machine import Machine, machine
from shardprep.bench.measure import Candidate, Measurements, in_own_process, measure_in_rounds, warm
from shardprep.bench.memory_limit import limit_candidates, limit_rows
from shardprep.bench.results import LimitResult, LoaderResult, best_limit, summarise
from shardprep.errors import FormatError, SourceError
from shardprep.format.manifest import MANIFEST_NAME
from shardprep.read.shard_set import ShardSet, open_shards
from shardprep.read.split import Split
from shardprep.source.scan import scan_source
from shardprep.storage.remote import Location
from shardprep.system import check_linux, usable_cores

_STAGES_TIMEOUT = 300.0


@dataclass(frozen=True)
class SetResult:
    """How our loader spends its time on one shard set.

    Attributes:
        shards: The folder.
        codec: Its codec.
        loader: Name of our loader in the tables.
        stages: Seconds of a batch, in total and by part.
        rest: Seconds of a batch that belong to no part.
        major_faults: Pages that the loader had to wait for, over all rounds.
        cached: Share of the shards in the page cache.
        bottleneck: What limits the loader, as a sentence.
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
    """The whole result of `shardprep bench`."""

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
        batch_size: Segments of a batch.
        segment_frames: Mel frames of a segment.
        rounds: Measurements of every loader.
        seconds: Length of a measurement, without the warm-up.
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
    on_measurement: Callable[[str, int], None],
) -> BenchReport:
    """Compare the loaders of one data set.

    Args:
        destinations: Shard sets of the same data, e.g. one for each codec. Sets behind URLs are
            fetched into the cache first.
        source: The data set that they were built from, to measure its files too.
        options: What to measure.
        on_measurement: Called after each measurement with the name of the loader and the number of
            all measurements.

    Raises:
        FormatError: A folder is no shard set, its split is missing or empty, or its data differ
            from those of the first set.
        CorruptShardError: A shard is missing or damaged.
        SourceError: The source is no data set, or not the one that the shards were built from.
        PlatformError: This system does not tell what is measured.
    """
    check_linux("shardprep bench")
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
    measured = measure_in_rounds(
        [*candidates, *limits],
        rounds=options.rounds,
        seconds=options.seconds,
        on_measurement=lambda name, _: on_measurement(name, expected),
    )
    limit = best_limit(measured, limits, rows * shape.nbytes)
    return BenchReport(
        machine(),
        options.split,
        len(split),
        int(split.frames.sum()),
        (shape.batch_size, shape.frames, shape.n_mels),
        str(shape.dtype),
        options.rounds,
        options.seconds,
        summarise(measured, [*candidates, *limits], limit, shape.nbytes),
        limit,
        [
            _explain(shard_set, own, options, shape, measured, limit)
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
    """The files of the utterances of a split, with their labels."""
    found = scan_source(source)
    if not all(utterance.path.endswith(".pt") for utterance in found.utterances):
        raise SourceError(
            "lists other files than .pt files, and only these are measured",
            file=source,
            remedy="Leave --source out.",
        )
    if found.fingerprint != shard_set.manifest.source_fingerprint:
        raise SourceError(
            f"is not the data set that {shard_set.path} was built from",
            file=source,
            remedy="Give --source the folder that the shards were built from, or leave it out.",
        )
    return [
        (source / found.by_key[str(key)].path, int(label))
        for key, label in zip(split.keys, split.labels, strict=True)
    ]


def _worker_counts(shards: int | None) -> list[int]:
    """The numbers of workers to try: none, and one per core, but not more than shards."""
    return [0, min(usable_cores(), shards or usable_cores())]


def _labels(sets: Sequence[ShardSet]) -> list[str]:
    """A label for each set: its codec, or its folder where codecs are equal; none for one set."""
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
    """All loaders to measure; and ours alone, one for each shard set."""
    candidates, ours = [], []
    if files is not None:
        candidates += [file_candidate(files, shape, workers) for workers in _worker_counts(None)]
    for label, shard_set in zip(_labels(sets), sets, strict=True):
        shards = shard_set.fetch(split)
        member = shard_set.manifest.member
        own = decode_bytes if shard_set.manifest.is_quantised else decode_member
        decode = own if member is None else partial(decode_adopted, member)
        candidates += [
            webdataset_candidate(f"webdataset{label}", shards, shape, workers, decode)
            for workers in _worker_counts(len(shards))
        ]
        ours.append(shard_candidate(f"shardprep{label}", shard_set, split, shape))
        candidates.append(ours[-1])
    return candidates, ours


def _explain(
    shard_set: ShardSet,
    ours: Candidate,
    options: BenchOptions,
    shape: SegmentShape,
    measured: Measurements,
    limit: LimitResult,
) -> SetResult:
    warm(ours.files)
    cached = cached_share(ours.files)
    stages = in_own_process(
        partial(time_stages, shard_set.path, options.split, shape, options.seconds / 2),
        _STAGES_TIMEOUT,
    )
    codec = shard_set.manifest.codec.name
    faults = sum(rate.major_faults for rate in measured.rates[ours.name])
    sentence = name_bottleneck(
        stages,
        codec,
        faults=faults,
        batches=sum(rate.batches for rate in measured.rates[ours.name]),
        cached=cached,
        to_limit=measured.median(ours.name) / limit.tried[limit.method],
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
