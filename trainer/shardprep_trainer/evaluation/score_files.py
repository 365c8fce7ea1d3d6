"""Files of scores: ours, and those of other toolkits. Text, one trial a line.

    enroll  test  score  target  llr         ours: tabs, with this header
    ENROLL TEST SCORE target                 or nontarget, or 1 and 0; in any order
    ENROLL TEST SCORE                        beside a list of the trials
    SCORE 1                                  without names

Without a header, the numbers that are not all 0 and 1 are the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep import publish
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import read_text
from shardprep_trainer.evaluation.names import SEVERAL, Names
from shardprep_trainer.evaluation.trial_lists import ANSWERS, TrialList, ambiguous
from shardprep_trainer.evaluation.trials import Bools, Trials

HEADER = ("enroll", "test", "score", "target", "llr")

Columns = dict[str, list[str]]

_WITH_A_HEADER = "write a header above the first row: enroll test score target"


@dataclass(frozen=True)
class ScoreFile:
    """Scores of K trials."""

    path: Path
    lines: list[int]
    """Number of the line of each trial, from 1."""
    scores: NDArray[np.float64]
    """(K,)"""
    target: Bools | None
    """Whether the speaker is the same (K,); None where the file does not say."""
    sides: tuple[list[str], list[str]] | None
    """Names of the utterances, enrolment and test; None where the file has none."""

    def labelled(self) -> tuple[NDArray[np.float64], Trials]:
        """The scores and the trials, as the file itself labels them.

        Without names, nothing is known of the speakers: every trial has two of its own.

        Raises:
            PredictionError: The file does not say which trials are targets, or has one kind.
        """
        if self.target is None:
            raise PredictionError(
                f"{self.path}: has no column that says which trials are of one speaker (1 or 0, "
                "target or nontarget); give the list of the trials with --trials"
            )
        if self.target.all() or not self.target.any():
            raise PredictionError(
                f"{self.path}: {self.target.sum():,} target and {(~self.target).sum():,} "
                "non-target trials; both kinds are needed"
            )
        if self.sides is None:
            count = len(self.scores)
            enroll, test = np.arange(count), np.arange(count, 2 * count)
            return self.scores, Trials(enroll, test, self.target)
        names = {
            name: number
            for number, name in enumerate(dict.fromkeys([*self.sides[0], *self.sides[1]]))
        }
        enroll, test = (np.array([names[name] for name in side]) for side in self.sides)
        return self.scores, Trials(enroll, test, self.target)

    def of(self, wanted: TrialList) -> tuple[NDArray[np.float64], Trials]:
        """The scores of the trials of a list, in its order; enrolment and test may be exchanged.

        Raises:
            PredictionError: A trial has no score, or two that differ; or the file has no names.
        """
        if self.sides is None:
            raise PredictionError(
                f"{self.path}: has no names of utterances, by which --trials would find its "
                "scores; give a file with a label in each row, without --trials"
            )
        number = _numbered(self.sides)
        found: dict[tuple[int, int], int] = {}
        for row, (one, other) in enumerate(zip(*self.sides, strict=True)):
            before = found.setdefault((number[one], number[other]), row)
            if self.scores[before] != self.scores[row]:
                raise PredictionError(
                    f"{self.path}, line {self.lines[row]}: {one} {other} has another score than "
                    f"in line {self.lines[before]}; leave one of them"
                )
        place = Names(number).find([*wanted.enroll, *wanted.test])
        rows, places = [], []
        for line, *pair in zip(wanted.lines, wanted.enroll, wanted.test, strict=True):
            if unclear := [name for name in pair if place.get(name) == SEVERAL]:
                raise ambiguous(unclear[0], f"{wanted.path}, line {line}")
            enroll, test = (place.get(name, SEVERAL) for name in pair)
            at = found.get((enroll, test), found.get((test, enroll)))
            if at is None:
                raise PredictionError(
                    f"{wanted.path}, line {line}: {self.path} has no score of {pair[0]} {pair[1]}; "
                    "score all trials of the list, or take the line out"
                )
            rows.append(at)
            places.append((enroll, test))
        enroll_at, test_at = np.array(places, np.int64).T
        return self.scores[rows], Trials(enroll_at, test_at, wanted.target)


def write_scores(
    path: Path,
    sides: tuple[Sequence[str], Sequence[str]],
    scores: NDArray[np.float64],
    target: Bools,
    llrs: NDArray[np.float64] | None,
) -> None:
    """Write every trial with its score, as the first form above; the file appears whole or not.

    Args:
        path: The file.
        sides: Names of the utterances of the K trials, enrolment and test.
        scores: (K,); read back, they are the same numbers.
        target: Whether the speaker is the same (K,).
        llrs: Log-likelihood ratios (K,); None leaves the column empty.

    Raises:
        StorageError: The disk refused.
    """
    ratios: Iterable[str] = [""] * len(scores) if llrs is None else map(repr, llrs.tolist())
    rows = zip(*sides, map(repr, scores.tolist()), target.astype(int).tolist(), ratios, strict=True)
    with publish(path) as file:
        file.write("\t".join(HEADER).encode() + b"\n")
        file.writelines("\t".join(map(str, row)).encode() + b"\n" for row in rows)


def read_scores(path: Path) -> ScoreFile:
    """Read a file of scores in any of the forms above; blank lines are ignored.

    Raises:
        PredictionError: The file cannot be read, a row is not like the others, a score is no finite
            number, or the columns cannot be told apart.
    """
    lines = read_text(path, "scores of trials").split("\n")
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise PredictionError(f"{path}: is empty; expected a row for each trial")
    divide = _divider(rows[0][1])
    header = [field.lower() for field in divide(rows[0][1])]
    named = "score" in header
    if named and len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise PredictionError(
            f"{path}: the header names the column {twice[:40]!a} twice; leave one of them"
        )
    fields = [(number, divide(line)) for number, line in rows[named:]]
    width = len(header)
    for number, row in fields:
        if len(row) != width:
            raise PredictionError(
                f"{path}, line {number}: {len(row)} fields, but the first line has {width}; write "
                "the same columns in every row"
            )
    columns = list(map(list, zip(*(row for _, row in fields), strict=True))) or [[]] * width
    if named:
        roles = dict(zip(header, columns, strict=True))
        roles["target"] = roles.get("target", roles.get("label", []))
        # Whatever the header calls them, two further columns are the names.
        others = [name for name in header if name not in (*HEADER, "label")]
        if len(others) == 2 and not {"enroll", "test"} & set(header):
            roles["enroll"], roles["test"] = (roles[name] for name in others)
    else:
        roles = _roles(path, columns)
    numbers = [number for number, _ in fields]
    return ScoreFile(
        path,
        numbers,
        _numbers(path, numbers, roles["score"]),
        _answers(path, numbers, roles.get("target") or []),
        (roles["enroll"], roles["test"]) if {"enroll", "test"} <= roles.keys() else None,
    )


def _numbered(sides: tuple[list[str], list[str]]) -> dict[str, int]:
    """A number for each name, from 0."""
    return {name: at for at, name in enumerate(dict.fromkeys([*sides[0], *sides[1]]))}


def _divider(line: str) -> Callable[[str], list[str]]:
    """How a line is divided into fields: at tabs or commas where the first line has some."""
    if "\t" in line:
        return lambda text: [field.strip() for field in text.split("\t")]
    if "," in line:
        # R puts names between quotation marks.
        return lambda text: [field.strip().strip('"') for field in text.split(",")]
    return str.split


def _roles(path: Path, columns: list[list[str]]) -> Columns:
    """Which column is which, by what they hold."""
    answers = [at for at, column in enumerate(columns) if _are_answers(column)]
    numbers = [
        at for at, column in enumerate(columns) if at not in answers and _are_numbers(column)
    ]
    names = [at for at in range(len(columns)) if at not in (*answers, *numbers)]
    if len(numbers) != 1 or len(answers) > 1 or len(names) not in (0, 2):
        raise PredictionError(
            f"{path}: which of the {len(columns)} columns are names, scores and labels cannot be "
            f"told ({len(names)}, {len(numbers)} and {len(answers)} look like some); "
            f"{_WITH_A_HEADER}"
        )
    found = {"score": columns[numbers[0]]}
    if answers:
        found["target"] = columns[answers[0]]
    if names:
        found["enroll"], found["test"] = (columns[at] for at in names)
    return found


def _are_answers(column: list[str]) -> bool:
    return {text.lower() for text in column} <= ANSWERS.keys()


def _are_numbers(column: list[str]) -> bool:
    try:
        return bool([float(text) for text in column])
    except ValueError:
        return False


def _numbers(path: Path, lines: list[int], texts: list[str]) -> NDArray[np.float64]:
    found = []
    for line, text in zip(lines, texts, strict=True):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise PredictionError(
                f"{path}, line {line}: the score is {text[:40]!a}, expected a finite number"
            )
        found.append(number)
    return np.array(found, np.float64)


def _answers(path: Path, lines: list[int], texts: list[str]) -> Bools | None:
    if not any(texts):
        return None
    for line, text in zip(lines, texts, strict=True):
        if text.lower() not in ANSWERS:
            raise PredictionError(
                f"{path}, line {line}: the label is {text[:40]!a}, expected {', '.join(ANSWERS)}"
            )
    return np.array([ANSWERS[text.lower()] for text in texts], bool)
