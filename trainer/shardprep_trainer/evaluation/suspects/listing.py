"""The list of suspects: a CSV, and what is told of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardprep import Split, publish
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import number_speakers
from shardprep_trainer.evaluation.suspects.leave_one_out import Judged, judge_labels
from shardprep_trainer.evaluation.verification import Floats

HEADER = ("key", "speaker", "nearest", "own", "other", "margin", "verdict")
LIKE_OTHER, LIKE_NOBODY = "wrong speaker", "sounds like nobody"


@dataclass(frozen=True)
class Listed:
    """What is printed of a list of suspects."""

    file: str
    split: str
    utterances: int
    labelled: int
    judged: int
    """Those whose speaker has another utterance."""
    suspects: int
    """Those that are nearer to another speaker; the rows of the list."""
    wrong_speaker: int
    """Suspects that sound like the other speaker."""
    nobody: int
    """Suspects that sound like neither."""
    threshold: float
    """Cosine at or above which an utterance sounds like a speaker."""

    @property
    def notes(self) -> list[str]:
        """What a user must know of the utterances that are not judged."""
        alone, unknown = self.labelled - self.judged, self.utterances - self.labelled
        told = []
        if alone:
            told.append(
                f"{alone:,} utterances of {self.split} are the only ones of their speaker and "
                "cannot be judged"
            )
        if unknown:
            told.append(f"{unknown:,} utterances of {self.split} have no label")
        return told

    def lines(self) -> list[str]:
        """The same for people."""
        return [
            f"suspects in {self.split}: {self.suspects:,} of {self.judged:,} utterances are nearer "
            f"to another speaker -> {self.file}",
            f"{LIKE_OTHER}: {self.wrong_speaker:,}",
            f"{LIKE_NOBODY}: {self.nobody:,}",
        ]


def list_suspects(
    embeddings: Floats, part: Split, names: Sequence[str | None], out: Path
) -> Listed:
    """List the utterances of a split whose label looks wrong.

    Args:
        embeddings: (N, D).
        part: The split.
        names: Speakers of its utterances (N,), None where unknown.
        out: The CSV.

    Raises:
        PredictionError: There are too few speakers or utterances to compare with.
        StorageError: The disk refused.
    """
    try:
        judged = judge_labels(embeddings, number_speakers(names))
    except ValueError as error:
        raise PredictionError(
            f"split {part.name}: {error}; take another --split, or give --labels if the split has "
            "none"
        ) from error
    write_suspects(out, judged, part.keys.tolist(), names)
    count, wrong = len(judged.suspects), int(judged.is_like_other[judged.suspects].sum())
    return Listed(
        file=str(out),
        split=part.name,
        utterances=len(part),
        labelled=len(judged.position) + judged.alone,
        judged=len(judged.position),
        suspects=count,
        wrong_speaker=wrong,
        nobody=count - wrong,
        threshold=judged.threshold,
    )


def write_suspects(
    path: Path, judged: Judged, keys: Sequence[str], names: Sequence[str | None]
) -> None:
    """Write the suspects, the most suspicious first; the file appears whole or not.

    Args:
        path: The CSV.
        judged: The utterances, their speakers numbered by `number_speakers(names)`.
        keys: Keys of the utterances (N,).
        names: Their speakers (N,), None where unknown.

    Raises:
        StorageError: The disk refused.
    """
    speakers = sorted(set(filter(None, names)))
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEADER)
    for row in judged.suspects:
        at, nearest = judged.position[row], speakers[judged.nearest[row]]
        scores = (f"{score[row]:.4f}" for score in (judged.own, judged.other, judged.margin))
        verdict = LIKE_OTHER if judged.is_like_other[row] else LIKE_NOBODY
        rows.writerow((keys[at], names[at], nearest, *scores, verdict))
    with publish(path) as file:
        file.write(text.getvalue().encode())
