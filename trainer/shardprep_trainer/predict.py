"""Name the speaker of every utterance: `shardprep predict RUN --out submission.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from shardprep import Split, publish
from shardprep_trainer.commands import (
    EXIT_CODES,
    backend_option,
    model_options,
    note,
    reported_errors,
    tell,
)
from shardprep_trainer.evaluation.labels import HEADER, LeftOut, missing_rows, read_labels
from shardprep_trainer.inference import Inference, ModelOptions, open_inference


def predict_names(inference: Inference, part: Split) -> list[str]:
    """Name the speaker of every utterance of a split.

    Args:
        inference: The model; the speakers of its head may be others than those of the shards.
        part: The split.

    Returns:
        Names (N,) in the split's own order.
    """
    # The numbers of speakers differ between data sets: only names are compared, and not here.
    found = inference.recognise(part).evaluation
    return [inference.speakers[speaker] for speaker in found.predictions]


def write_submission(path: Path, keys: Iterable[str], names: Sequence[str]) -> None:
    """Write `Id,Category` rows, `KEY.pt` and a speaker's name, in the order given.

    The file appears whole or not at all.

    Raises:
        StorageError: The disk refused.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(HEADER)
    rows.writerows((f"{key}.pt", name) for key, name in zip(keys, names, strict=True))
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
    missing = [key for key in labels if key not in answers]
    if missing:
        raise missing_rows(str(path), missing, truth, len(labels), left_out)
    return sum(answers[key] == name for key, name in labels.items()), len(labels)


def _predict(options: ModelOptions, out: Path) -> LeftOut | None:
    inference = open_inference(options, tell)
    shards, split, part = inference.shards, options.split, inference.split(options.split)
    names = predict_names(inference, part)
    write_submission(out, part.keys, names)
    click.echo(f"{len(names):,} utterances of {split} -> {out}", err=True)
    truths = [shards.speakers[label] if label >= 0 else None for label in part.labels]
    known = [(name, truth) for name, truth in zip(names, truths, strict=True) if truth is not None]
    if known:
        _tell_accuracy(split, sum(name == truth for name, truth in known), len(known))
    strangers = {truth for _, truth in known} - set(inference.speakers)
    if strangers:
        note(f"{len(strangers)} speakers of {split} cannot be named")
    return inference.left_out


def _tell_accuracy(what: str, correct: int, total: int) -> None:
    click.echo(f"accuracy on {what}: {correct / max(1, total):.4f} ({correct:,} of {total:,})")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    help=f"""Name the speaker of every utterance of a split with the model of RUN.

    RUN is a run folder, a model folder or a checkpoint. Whole utterances are embedded, in batches
    of like length. The accuracy is printed where the labels are known. {EXIT_CODES}""",
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
def main(out: Path, labels: Path | None, **options: Any) -> None:
    """The command; its help is above."""
    with reported_errors():
        left_out = _predict(ModelOptions(**options), out)
        if labels is not None:
            _tell_accuracy(str(labels), *score_submission(out, labels, left_out))


if __name__ == "__main__":
    main()
