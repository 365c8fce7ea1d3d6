"""Lists of trials as people have them: text, one trial a line.

    1 ENROLL TEST            VoxCeleb; 0 for two speakers
    ENROLL TEST target       Kaldi; nontarget for two speakers
    ENROLL TEST 1            0 for two speakers

The fields are separated by blanks, or by tabs where names have blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import LeftOut, read_text
from shardprep_trainer.evaluation.names import SEVERAL, Names, forms_of
from shardprep_trainer.evaluation.trials import Bools, Trials

ANSWERS = {"1": True, "0": False, "target": True, "nontarget": False}
"""What a list says of a trial: whether the speaker is the same."""

Fields = list[str]


@dataclass(frozen=True)
class TrialList:
    """K trials by the names of their utterances."""

    path: Path
    lines: list[int]
    """Number of the line of each trial, from 1."""
    enroll: list[str]
    test: list[str]
    target: Bools
    """Whether the speaker is the same (K,)."""

    def positions(self, names: Names, left_out: LeftOut | None = None) -> Trials:
        """The trials by the positions of their utterances.

        Args:
            names: The utterances.
            left_out: What the build of the shards left out.

        Raises:
            PredictionError: A name means no utterance, or several; says which line has it.
        """
        found = names.find([*self.enroll, *self.test])
        if len(found) < len({*self.enroll, *self.test}) or SEVERAL in found.values():
            raise self._unclear(names, found, left_out)
        sides = ([found[name] for name in side] for side in (self.enroll, self.test))
        enroll, test = (np.array(side, np.int64) for side in sides)
        return Trials(enroll, test, self.target)

    def _unclear(
        self, names: Names, found: dict[str, int], left_out: LeftOut | None
    ) -> PredictionError:
        """The error about the first name that means no single utterance."""
        for line, *pair in zip(self.lines, self.enroll, self.test, strict=True):
            where = f"{self.path}, line {line}"
            for name in pair:
                if name not in found:
                    why = self._stranger(name, names, found, left_out)
                    return PredictionError(f"{where}: {why}")
                if found[name] == SEVERAL:
                    return ambiguous(name, where)
        raise AssertionError

    def _stranger(
        self, name: str, names: Names, found: dict[str, int], left_out: LeftOut | None
    ) -> str:
        """What is to be said of a name that means no utterance."""
        all_names = {*self.enroll, *self.test}
        missing = len(all_names - found.keys())
        told = [f"nearest: {near}"] if (near := names.nearest(name)) else []
        if missing > 1:
            told.append(f"{missing:,} of the list's {len(all_names):,} names are missing")
        remedy = "choose the --split that the list was made for"
        if left_out and any({form, f"{form}.pt"} & left_out.ids for form in forms_of(name)):
            remedy = f"the build left it out, as {left_out.listing} says: take the line out"
        what = f"the split has no utterance {name}"
        return f"{what} ({'; '.join(told)}); {remedy}" if told else f"{what}; {remedy}"


def ambiguous(name: str, where: str) -> PredictionError:
    """The error about a name that could mean several utterances; `where` says who gives it."""
    return PredictionError(
        f"{where}: {name} stands for several utterances: sets that are read as one have the key in "
        "common (name one of them with --shards), or only the folders before the name tell them "
        "apart (write these folders as the keys have them)"
    )


def read_list(path: Path) -> TrialList:
    """Read a list of trials in any of the forms above; blank lines are ignored.

    Raises:
        PredictionError: The file cannot be read, a line is no trial, or there is no target or no
            non-target trial.
    """
    rows = [
        (number, _fields(line))
        for number, line in enumerate(read_text(path, "a list of trials").split("\n"), 1)
        if line.strip()
    ]
    form = _form(path, rows)
    ordered = [form(fields) for _, fields in rows]
    target = np.array([ANSWERS[answer.lower()] for answer, _, _ in ordered], bool)
    if target.all() or not target.any():
        raise PredictionError(
            f"{path}: {target.sum():,} target and {(~target).sum():,} non-target trials; both "
            "kinds are needed"
        )
    return TrialList(
        path,
        [number for number, _ in rows],
        [enroll for _, enroll, _ in ordered],
        [test for _, _, test in ordered],
        target,
    )


def read_trials(path: Path, keys: Iterable[str], left_out: LeftOut | None = None) -> Trials:
    """Read a list of trials between the utterances of a split.

    Args:
        path: The list; see `TrialList` and `Names` for what it may hold.
        keys: Keys of the split's utterances, in its order.
        left_out: What the build of the shards left out.

    Raises:
        PredictionError: As `read_list` and `TrialList.positions`.
    """
    return read_list(path).positions(Names(keys), left_out)


def _fields(line: str) -> Fields:
    parts = [part.strip() for part in line.split("\t")]
    return parts if len(parts) == 3 else line.split()


def _answer_first(fields: Fields) -> Fields:
    return fields


def _answer_last(fields: Fields) -> Fields:
    return [fields[2], fields[0], fields[1]]


def _form(path: Path, rows: list[tuple[int, Fields]]) -> Callable[[Fields], Fields]:
    """Where the answer stands in all rows; the function puts the answer first."""
    best, right = _answer_first, -1
    for form in (_answer_first, _answer_last):
        wrong = (at for at, (_, fields) in enumerate(rows) if not _is_answer(form, fields))
        if (first := next(wrong, len(rows))) > right:
            best, right = form, first
    if right < len(rows):
        number, fields = rows[right]
        raise PredictionError(
            f"{path}, line {number}: found {' '.join(fields)[:80]!r}; write `1 ENROLL TEST` for a "
            "pair of one speaker and `0 ENROLL TEST` for one of two, or on all lines `ENROLL TEST "
            "target` and `ENROLL TEST nontarget`"
        )
    return best


def _is_answer(form: Callable[[Fields], Fields], fields: Fields) -> bool:
    return len(fields) == 3 and form(fields)[0].lower() in ANSWERS
