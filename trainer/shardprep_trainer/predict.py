"""Name the speaker of every utterance: `shardprep predict RUN --out submission.csv`."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from shardprep import Entry, Split, publish
from shardprep_trainer.commands import (
    EXIT_CODES,
    backend_option,
    model_options,
    note,
    reported_errors,
    tell,
)
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.evaluation.labels import HEADER, LeftOut, missing_rows, read_labels
from shardprep_trainer.inference import ModelOptions, open_inference
from shardprep_trainer.pretrained.on_shards import Inference

COMMONEST = "commonest"
"""The value of --fill that stands for the speaker who is predicted most often."""


def predict_names(inference: Inference, part: Split) -> list[str]:
    """Name the speaker of every utterance of a split.

    Args:
        inference: The models; the speakers of a head may be others than those of the shards.
        part: The split.

    Returns:
        Names (N,) in the split's own order.
    """
    speakers = inference.speakers
    # The numbers of speakers differ between data sets: only names are compared, and not here.
    found = inference.recognise(part).evaluation
    assert found is not None, "models that know the same speakers name some together"
    return [speakers[speaker] for speaker in found.predictions]


def submission_rows(
    entries: Iterable[Entry], names: Sequence[str], fill: str | None
) -> list[tuple[str, str]]:
    """The rows of a submission: a file and the name of its speaker.

    Args:
        entries: The entries of testdata.json; those that list a file again get its answer, too.
        names: The speaker of each utterance of the split (N,).
        fill: Stands in where an entry has no utterance, because its file could not be packed.
            `COMMONEST` is the name that most utterances have. None writes no such row.
    """
    if fill == COMMONEST:
        fill = Counter(names).most_common(1)[0][0]
    found = ((e.file, fill if e.index is None else names[e.index]) for e in entries)
    return [(file, name) for file, name in found if name is not None]


def write_submission(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write `Id,Category` rows, a file and the name of its speaker, in the order given.

    The file appears whole or not at all.

    Raises:
        StorageError: The disk refused.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    table.writerows(rows)
    with publish(path) as file:
        file.write(text.getvalue().encode())


def score_submission(path: Path, truth: Path, left_out: LeftOut | None = None) -> tuple[int, int]:
    """Compare a submission with the true labels.

    Args:
        path: A CSV with the header `Id,Category`.
        truth: Another, with the utterances to be counted.
        left_out: What the build of the shards left out.

    Returns:
        Number of rows of `truth` that the submission has right, and number of rows.

    Raises:
        PredictionError: A file is not such a CSV, or the submission lacks an utterance.
    """
    answers, labels = read_labels(path), read_labels(truth)
    # Both may name utterances with or without .pt; `shardprep score` takes such labels, too.
    found = {key.removesuffix(".pt"): name for key, name in answers.items()}
    missing = [key for key in labels if key.removesuffix(".pt") not in found]
    if missing:
        raise missing_rows(str(path), missing, truth, len(labels), left_out)
    correct = sum(found[key.removesuffix(".pt")] == name for key, name in labels.items())
    return correct, len(labels)


def _predict(options: ModelOptions, out: Path, fill: str | None, ids: str) -> LeftOut | None:
    # A stand-in that is named needs no prediction.
    may_be_empty = fill not in (None, COMMONEST)
    inference = open_inference(options, tell, may_be_empty)
    shards, split = inference.shards, options.split
    part = None if may_be_empty and inference.lacks_test else inference.split(split)
    if fill not in (None, COMMONEST, *inference.speakers):
        raise PredictionError(
            f"--fill {fill}: the model knows no such speaker; take one that it knows, such as "
            f"{inference.speakers[0]}, or {COMMONEST}"
        )
    names = [] if part is None else predict_names(inference, part)
    entries: Sequence[Entry] = (
        shards.test_entries
        if part is None or split == "test"
        else [Entry(f"{key}.pt", index, "") for index, key in enumerate(part.keys)]
    )
    rows = submission_rows(entries, names, fill)
    if ids == "key":
        rows = [(file.removesuffix(".pt"), name) for file, name in rows]
    lost = [entry for entry in entries if entry.index is None]
    write_submission(out, rows)
    click.echo(f"{len(names):,} utterances of {split}, {len(rows):,} rows -> {out}", err=True)
    if lost:
        tell(f"warning: {_without_utterance(lost, len(rows), fill)}")
    if again := len(names) - len({} if part is None else set(part.keys.tolist())):
        tell(
            f"warning: {again:,} Ids occur again for another utterance, as the sets have keys in "
            "common: Kaggle refuses such a file; predict each set by itself"
        )
    labels: Sequence[int] = [] if part is None else part.labels.tolist()
    truths = [shards.speakers[label] if label >= 0 else None for label in labels]
    known = [(name, truth) for name, truth in zip(names, truths, strict=True) if truth is not None]
    if known:
        _tell_accuracy(split, sum(name == truth for name, truth in known), len(known))
    strangers = {truth for _, truth in known} - set(inference.speakers)
    if strangers:
        note(f"{len(strangers)} speakers of {split} cannot be named")
    return inference.left_out


def _without_utterance(lost: list[Entry], rows: int, fill: str | None) -> str:
    first = f"such as {lost[0].file} ({lost[0].reason})"
    if fill is not None:
        return (
            f"{len(lost):,} of {rows:,} rows have a stand-in, not a prediction: the shards "
            f"have no utterance for them, {first}"
        )
    return (
        f"{len(lost):,} of {rows + len(lost):,} entries of testdata.json have no row: the "
        f"shards have no utterance for them, {first}. Kaggle refuses a file that lacks rows; "
        f"--fill SPEAKER or --fill {COMMONEST} writes a stand-in"
    )


def _tell_accuracy(what: str, correct: int, total: int) -> None:
    click.echo(f"accuracy on {what}: {correct / max(1, total):.4f} ({correct:,} of {total:,})")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Name the speaker of every utterance of a split with the model of RUN.

    RUN is a run folder, a model folder or a checkpoint; several models name speakers together.
    Whole utterances are embedded, in batches of like length. Every entry of testdata.json gets a
    row, in its order. The accuracy is printed where the labels are known. {EXIT_CODES}""",
)
@model_options(split="test")
@backend_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="submission.csv",
    help="CSV to write, Id,Category.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="CSV of true labels, Id,Category, to score the result against.",
)
@click.option(
    "--fill",
    metavar="SPEAKER",
    default=None,
    help="Speaker to write for entries of testdata.json whose files could not be packed, or "
    f"{COMMONEST} for the one that is predicted most often.  [default: no row]",
)
@click.option(
    "--ids",
    type=click.Choice(["file", "key"]),
    default="file",
    help="What Id is: KEY.pt, as the homework wants it, or the KEY of the utterance in the shards.",
)
def main(out: Path, labels: Path | None, fill: str | None, ids: str, **options: Any) -> None:
    """The command; its help is above."""
    if fill is not None and options["split"] != "test":
        raise click.UsageError("--fill goes with --split test")
    with reported_errors():
        if labels is not None:
            # What is wrong with them is said before the long work.
            read_labels(labels)
        left_out = _predict(ModelOptions(**options), out, fill, ids)
        if labels is not None:
            _tell_accuracy(str(labels), *score_submission(out, labels, left_out))


if __name__ == "__main__":
    main()
