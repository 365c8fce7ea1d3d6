"""What a build did: the report for its caller."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from shardprep.build.plan import ShardTask
from shardprep.build.shard import ShardRecord
from shardprep.build.work import split_of
from shardprep.format.manifest import Reject
from shardprep.source.contents import Source


@dataclass
class SplitReport:
    """Totals of a split: utterances, mel frames, shards, bytes of the shards."""

    samples: int = 0
    frames: int = 0
    shards: int = 0
    bytes: int = 0


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        destination: The shard folder.
        splits: Totals by split.
        speakers: Number of speakers.
        rejects: Utterances that were left out.
        repeats: Entries of testdata.json that list the file of an earlier entry again.
        notes: What a user should know about the result.
        shards_kept: Number of shards taken over from an unfinished build.
        up_to_date: Whether the set was there already, from the same source and options.
        dry_run: Whether nothing was written.
        utterances_read: Utterances read in this run.
        source_bytes: Bytes of `.pt` files read in this run.
        seconds: Time taken.
    """

    destination: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    speakers: int = 0
    rejects: list[Reject] = field(default_factory=list)
    repeats: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shards_kept: int = 0
    up_to_date: bool = False
    dry_run: bool = False
    utterances_read: int = 0
    source_bytes: int = 0
    seconds: float = 0.0


def count_read(report: BuildReport, tasks: Iterable[ShardTask]) -> None:
    """Put into the report what is read to carry out these tasks."""
    utterances = [utterance for task in tasks for utterance in task.plan.utterances]
    report.utterances_read = len(utterances)
    report.source_bytes = sum(utterance.nbytes for utterance in utterances)


def fill_report(report: BuildReport, source: Source, records: list[ShardRecord]) -> None:
    """Put into the report what the records of a build say."""
    report.splits = totals(records)
    report.rejects = [*source.rejects, *(r for record in records for r in record.rejects)]
    if "val" not in report.splits:
        report.notes.append("there is no val split: no speaker can spare an utterance for it")
    note_untrained(report, source.speakers, records)


def totals(records: Iterable[ShardRecord]) -> dict[str, SplitReport]:
    """The totals of some shards, by split."""
    found: dict[str, SplitReport] = {}
    for record in records:
        # A shard is left out if all its utterances were rejected, and so is a split.
        if record.info.samples:
            split = found.setdefault(split_of(record), SplitReport())
            split.samples += record.info.samples
            split.frames += record.info.frames
            split.shards += 1
            split.bytes += record.info.bytes
    return found


def note_untrained(
    report: BuildReport,
    speakers: tuple[str, ...],
    records: Iterable[ShardRecord],
    trained: Set[int] = frozenset(),
) -> None:
    """Note the speakers that are in val and not in train, nor among the labels `trained`."""
    labels: dict[str, set[int]] = {"train": set(trained), "val": set(), "test": set()}
    for record in records:
        labels[split_of(record)].update(row.label for row in record.rows)
    if missing := sorted(speakers[label] for label in labels["val"] - labels["train"]):
        report.notes.append(f"these speakers are in val, but not in train: {', '.join(missing)}")
