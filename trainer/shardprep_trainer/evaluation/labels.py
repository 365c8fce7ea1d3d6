"""The rows of a submission, CSV files of `Id,Category`, and those that a build left out."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardprep import OpenShards, machine_errors, sniff
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.trials import Ints

HEADER = ("Id", "Category")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class LeftOut:
    """The utterances that a build rejected."""

    listing: str
    """The files that list them, with the reasons."""
    total: int
    ids: frozenset[str]
    """What a submission would call them, all splits together."""

    @property
    def note(self) -> str:
        """What a user must know, as a line of text."""
        return f"the build left {self.total:,} utterances out; they are listed in {self.listing}"


def read_left_out(shards: OpenShards) -> LeftOut | None:
    """Read rejects.jsonl; None where the build left no utterance out.

    Raises:
        CorruptShardError: The file is missing or not as the build wrote it.
    """
    # A test entry that lists a file again has the utterance of that file.
    rejects = [reject for reject in shards.rejects if reject.repeats is None]
    if not rejects:
        return None
    return LeftOut(
        listing=" and ".join(map(str, shards.reject_lists)),
        total=len(rejects),
        ids=frozenset(name for reject in rejects for name in (reject.file, f"{reject.key}.pt")),
    )


def read_labels(path: Path) -> dict[str, str]:
    """Read rows of an utterance's file name and a speaker's name.

    A byte order mark, semicolons or tabs instead of commas, spaces around values and empty lines,
    as spreadsheets write them, are passed over.

    Raises:
        PredictionError: There is no such file, or it is not such a CSV.
        StorageError: The disk or the machine refused.
    """
    wanted = ",".join(HEADER)
    text = read_text(path, f"a CSV of {wanted} rows")
    first = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in ";\t" if mark in first and "," not in first), ",")
    found: dict[str, str] = {}
    has_header = False
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in lines:
            values = tuple(value.strip() for value in row)
            if not any(values):
                continue
            if not has_header:
                _check_header(path, values)
                has_header = True
            elif len(values) != len(HEADER):
                raise PredictionError(
                    f"{path}, line {lines.line_num}: {len(values)} values, expected {wanted}"
                )
            elif bad := next(filter(_CONTROL.search, values), None):
                raise PredictionError(
                    f"{path}, line {lines.line_num}: {bad[:80]!a} has a line break or another "
                    "control character; remove it"
                )
            elif found.get(values[0], values[1]) != values[1]:
                # A list of test utterances may name a file twice. Then its rows say the same.
                raise PredictionError(
                    f"{path}, line {lines.line_num}: {values[0]} occurs with two names; leave one "
                    "name for each utterance"
                )
            else:
                found[values[0]] = values[1]
    except csv.Error as error:
        raise PredictionError(f"{path}: is not a CSV of {wanted} rows ({error})") from error
    if not has_header:
        raise PredictionError(f"{path}: has no row; expected the header {wanted} and rows under it")
    return found


def _check_header(path: Path, values: tuple[str, ...]) -> None:
    """PredictionError if the first row of a CSV is not the header; it says what the row is."""
    if values == HEADER:
        return
    wanted = ",".join(HEADER)
    shown = ",".join(values)[:80]
    if len(values) == len(HEADER) and values[0].endswith(".pt"):
        remedy = f"the header is missing; write {wanted} above the first row"
    elif set(HEADER) <= set(values):
        remedy = f"leave only the columns {wanted}, in this order"
    else:
        remedy = f"make {wanted} the first row"
    raise PredictionError(f"{path}: the first row is {shown!a}, expected {wanted}: {remedy}")


def number_speakers(names: Sequence[str | None]) -> Ints:
    """A number for each speaker, in the order of their names (N,), -1 where unknown."""
    known = {name: number for number, name in enumerate(sorted(set(filter(None, names))))}
    return np.array([known[name] if name else -1 for name in names], np.int64)


def read_text(path: Path, expected: str) -> str:
    """The text of a file: UTF-8, or another Unicode by its byte order mark.

    Raises:
        PredictionError: There is no such file, or it is something else than text.
        StorageError: The disk or the machine refused.
    """
    try:
        with machine_errors(path):
            data = path.read_bytes()
    except OSError as error:
        raise PredictionError(f"{path}: cannot be read ({error.strerror or error})") from error
    found = sniff(data)
    if found is not None and found.kind not in ("text", "empty", "json"):
        raise PredictionError(f"{path}: {found.what}; expected {expected}")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise PredictionError(
            f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def missing_rows(
    where: str, missing: Sequence[str], truth: Path, total: int, left_out: LeftOut | None
) -> PredictionError:
    """The error that some of the `total` utterances that `truth` lists do not occur in `where`."""
    why = "was it made from another split? --split names one, such as test"
    if left_out is not None and left_out.ids.issuperset(missing):
        why = (
            f"the build left them out, as {left_out.listing} says; mend the data set and "
            "build it again, or take their rows out of the labels"
        )
    return PredictionError(
        f"{where}: {len(missing)} of the {total} utterances in {truth} are missing, "
        f"the first is {missing[0]}; {why}"
    )
