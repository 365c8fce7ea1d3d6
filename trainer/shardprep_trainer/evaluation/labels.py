"""Names of speakers in CSV files, `Id,Category` as the homework's leaderboard wants them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.rejects import LeftOut

HEADER = ("Id", "Category")


def read_labels(path: Path) -> dict[str, str]:
    """Read rows of an utterance's file name and a speaker's name.

    Raises:
        PredictionError: The file cannot be read or is not such a CSV.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [tuple(row) for row in csv.reader(file)] or [()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{path}: cannot be read ({error})") from error
    if header != HEADER or any(len(row) != len(HEADER) for row in rows):
        raise PredictionError(f"{path}: not a CSV of {','.join(HEADER)} rows under that header")
    found = {row[0]: row[1] for row in rows}
    if len(found) != len(rows):
        raise PredictionError(f"{path}: an Id occurs twice; leave one row for each utterance")
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
