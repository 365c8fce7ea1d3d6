"""The rows of a submission, CSV files of `Id,Category`, and those that a build left out."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardprep import ShardSet, machine_errors
from shardprep_trainer.errors import PredictionError

HEADER = ("Id", "Category")


@dataclass(frozen=True)
class LeftOut:
    """The utterances that a build rejected."""

    listing: os.PathLike[str]
    """The file that lists them, with the reasons."""
    total: int
    ids: frozenset[str]
    """What a submission would call them, all splits together."""

    @property
    def note(self) -> str:
        """What a user must know, as a line of text."""
        return f"the build left {self.total:,} utterances out; {self.listing} lists them"


def read_left_out(shards: ShardSet) -> LeftOut | None:
    """Read rejects.jsonl; None where the build left no utterance out.

    Raises:
        CorruptShardError: The file is missing or not as the build wrote it.
    """
    # A test entry that lists a file again has the utterance of that file.
    rejects = [reject for reject in shards.rejects if reject.repeats is None]
    if shards.manifest.rejects is None or not rejects:
        return None
    return LeftOut(
        listing=shards.path / shards.manifest.rejects.file,
        total=len(rejects),
        ids=frozenset(name for reject in rejects for name in (reject.file, f"{reject.key}.pt")),
    )


def read_labels(path: Path) -> dict[str, str]:
    """Read rows of an utterance's file name and a speaker's name.

    Raises:
        PredictionError: There is no such file, or it is not such a CSV.
        StorageError: The disk or the machine refused.
    """
    try:
        with machine_errors(path), path.open(newline="", encoding="utf-8") as file:
            header, *rows = [tuple(row) for row in csv.reader(file)] or [()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{path}: cannot be read ({error})") from error
    if header != HEADER or any(len(row) != len(HEADER) for row in rows):
        raise PredictionError(f"{path}: not a CSV of {','.join(HEADER)} rows under that header")
    found = {row[0]: row[1] for row in rows}
    # A list of test utterances may name a file twice. Then its rows say the same.
    if len(found) != len(set(rows)):
        raise PredictionError(
            f"{path}: an Id occurs with two names; leave one name for each utterance"
        )
    return found


def missing_rows(
    where: str, missing: Sequence[str], truth: Path, total: int, left_out: LeftOut | None
) -> PredictionError:
    """The error that some of the `total` utterances that `truth` lists do not occur in `where`."""
    why = "was it made from another split?"
    if left_out is not None and left_out.ids.issuperset(missing):
        why = (
            f"the build left them out, as {left_out.listing} says; mend the data set and "
            "build it again, or take their rows out of the labels"
        )
    return PredictionError(
        f"{where}: {len(missing)} of the {total} utterances in {truth} are missing, "
        f"the first is {missing[0]}; {why}"
    )
