"""What a build did: the report for its caller."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass, field

from shardprep.audio.mel import empty_bins
from shardprep.audio.recipe import known_recipe
from shardprep.build.shard import ShardRecord
from shardprep.build.work import split_of
from shardprep.format.manifest import Features, Reject
from shardprep.source.contents import Source, Utterance
from shardprep.source.metadata import TESTDATA
from shardprep.source.recordings.reader import RecordingReader

# Speakers that a note names.
_SHOWN = 10
# So few speakers are more likely a mistake than a set.
_FEW_SPEAKERS = 4


@dataclass
class SplitReport:
    """Totals of a split: utterances, mel frames, shards, bytes of the shards."""

    samples: int = 0
    frames: int = 0
    shards: int = 0
    bytes: int = 0

    def add(self, other: SplitReport) -> None:
        """Add the totals of another part of the split."""
        self.samples += other.samples
        self.frames += other.frames
        self.shards += other.shards
        self.bytes += other.bytes


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        destination: The shard folder.
        splits: Totals by split.
        added: What an append has added, by split.
        present: Utterances of the data set that the set had before an append.
        speakers: Number of speakers.
        features: How the features were made, where it is known.
        new_speakers: How many of them are new with an append.
        rejects: Utterances that were left out; of an append, those that are not listed yet.
        repeats: Entries of testdata.json that list the file of an earlier entry again.
        notes: What a user should know about the result.
        shards_kept: Number of shards taken over from an unfinished build.
        up_to_date: Whether the set was there already, from the same source and options, or an
            append had nothing to add.
        dry_run: Whether nothing was written.
        stops: Whether rejects stop a build with these options.
        utterances_read: Utterances read in this run.
        source_bytes: Bytes of `.pt` files read in this run.
        seconds: Time taken.
    """

    destination: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    added: dict[str, SplitReport] = field(default_factory=dict)
    present: int = 0
    speakers: int = 0
    features: Features | None = None
    new_speakers: int = 0
    rejects: list[Reject] = field(default_factory=list)
    repeats: list[Reject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shards_kept: int = 0
    up_to_date: bool = False
    dry_run: bool = False
    stops: bool = False
    utterances_read: int = 0
    source_bytes: int = 0
    seconds: float = 0.0


def count_read(report: BuildReport, utterances: Collection[Utterance]) -> None:
    """Put into the report that these utterances are read."""
    report.utterances_read += len(utterances)
    report.source_bytes += sum(utterance.nbytes for utterance in utterances)


def fill_report(report: BuildReport, source: Source, records: list[ShardRecord]) -> None:
    """Put into the report what the records of a build say."""
    report.splits = totals(records)
    report.features = source.features
    note_recordings(report, source)
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
            info = record.info
            split.add(SplitReport(info.samples, info.frames, 1, info.bytes))
    return found


def note_recordings(report: BuildReport, source: Source) -> None:
    """Note what is likely a mistake where recordings are packed."""
    recipe = known_recipe(source.features)
    if recipe is None or not isinstance(source.reader, RecordingReader):
        return
    if empty := empty_bins(recipe):
        report.notes.append(
            f"{empty} of {recipe.n_mels} mel bins are so narrow that they hold no frequency of the "
            "transform, and are constant; take fewer with --n-mels, or a larger --n-fft"
        )
    if len(source.speakers) < _FEW_SPEAKERS:
        # Perhaps the folder above that of the speakers was named.
        report.notes.append(
            f"the speakers are {', '.join(source.speakers)}: of a folder, the first folders in it"
        )


def note_repeats(report: BuildReport, source: Source) -> None:
    """Note the entries of testdata.json that list a file again."""
    if source.repeats:
        report.notes.append(
            f"{len(source.repeats)} of {source.test_entries} entries of {TESTDATA} list a file "
            f"again, such as {source.repeats[0].file}; it is packed once, and each entry gets its "
            "row in predictions"
        )


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
        more = f" and {len(missing) - _SHOWN} others" if len(missing) > _SHOWN else ""
        shown = ", ".join(missing[:_SHOWN]) + more
        report.notes.append(f"these speakers are in val, but not in train: {shown}")
