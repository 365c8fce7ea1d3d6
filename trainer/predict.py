"""Predict speakers of whole utterances: `python -m trainer.predict RUN --out submission.csv`."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import numpy as np
import torch

from shardprep import (
    ShardprepError,
    ShardSet,
    StorageError,
    UtteranceLoader,
    open_shards,
    publish,
)
from trainer.checkpoint import CheckpointFolder, State, load
from trainer.config import config_from_dict
from trainer.errors import CheckpointError, PredictionError, TrainerError, is_out_of_memory
from trainer.evaluation import evaluate
from trainer.rejects import LeftOut, read_left_out
from trainer.snapshot import PREDICTED, load_model

HEADER = ("Id", "Category")


def find_checkpoint(run: Path, choice: str) -> Path:
    """The checkpoint file that a name stands for.

    Args:
        run: A run folder.
        choice: "best", "last", or a path to a file.

    Raises:
        CheckpointError: The run has no such checkpoint.
    """
    if choice not in ("best", "last"):
        return Path(choice)
    folder = CheckpointFolder(run)
    newest = folder.latest()
    if choice == "best" and folder.best.exists():
        return folder.best
    if choice == "last" and newest is not None:
        return newest
    remedy = "train it first: accelerate launch trainer/train.py"
    if choice == "best" and newest is not None:
        remedy = "the run has not been validated yet: take --checkpoint last"
    raise CheckpointError(f"{folder.folder}: there is no {choice} checkpoint; {remedy}")


def predict_names(
    saved: State, file: Path, shards: ShardSet, split: str, *, max_frames: int, device: torch.device
) -> list[str]:
    """Name the speaker of every utterance of a split, heard whole.

    Args:
        saved: A checkpoint; its configuration, speakers and weights make the model.
        file: Where it comes from, to be named in errors.
        shards: The shards; their speakers may be others than the checkpoint's.
        split: Name of the split.
        max_frames: Largest padded area of a batch [frames].
        device: Where to compute.

    Returns:
        Names (N,) in the split's own order.

    Raises:
        CheckpointError: The weights and the configuration beside them do not fit together.
        PredictionError: The shards have another number of mel bins, or nothing in such a split.
    """
    n_mels, expected = shards.manifest.n_mels, saved["n_mels"]
    if n_mels != expected:
        raise PredictionError(
            f"{shards.path} has {n_mels} mel bins a frame, but the model was trained on "
            f"{expected}; build shards from features like those it was trained on"
        )
    filled = [name for name, part in shards.manifest.splits.items() if part.samples]
    if split not in filled:
        raise PredictionError(f"{shards.path} has no split {split}, only {', '.join(filled)}")
    model, names, part = load_model(saved, file), saved["speakers"], shards[split]
    pad_value = config_from_dict(saved["config"]).data.pad_value
    loader = UtteranceLoader(part, max_frames=max_frames, pad_value=pad_value)
    # The numbers of speakers differ between data sets: only names are compared, and not here.
    unlabelled = np.full(len(part), -1)
    found = evaluate(model.to(device), loader, unlabelled, device=device)
    return [names[speaker] for speaker in found.predictions]


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
    answers, labels = _read_rows(path), _read_rows(truth)
    missing = [key for key in labels if key not in answers]
    if missing:
        why = "was it made from another split?"
        if left_out is not None and left_out.ids.issuperset(missing):
            why = (
                f"the build left them out, as {left_out.listing} says; mend the data set and "
                "build it again, or take their rows out of the labels"
            )
        raise PredictionError(
            f"{path}: {len(missing)} of the {len(labels)} utterances in {truth} are missing, "
            f"the first is {missing[0]}; {why}"
        )
    return sum(answers[key] == name for key, name in labels.items()), len(labels)


def _read_rows(path: Path) -> dict[str, str]:
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


def _predict(
    run: Path, shards_path: str | None, out: Path, split: str, checkpoint: str, max_frames: int
) -> LeftOut | None:
    file = find_checkpoint(run, checkpoint)
    saved = load(file, needs=PREDICTED)
    shards = open_shards(shards_path or config_from_dict(saved["config"]).data.shards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(f"{file}, after {saved['step']:,} steps, on {device.type}", err=True)
    left_out = read_left_out(shards)
    for note in left_out.notes(split) if left_out else ():
        click.echo(f"note: {note}", err=True)
    names = predict_names(saved, file, shards, split, max_frames=max_frames, device=device)
    part = shards[split]
    write_submission(out, part.keys, names)
    click.echo(f"{len(names):,} utterances of {split} -> {out}", err=True)
    truths = [shards.speakers[label] if label >= 0 else None for label in part.labels]
    known = [(name, truth) for name, truth in zip(names, truths, strict=True) if truth is not None]
    if known:
        _tell_accuracy(split, sum(name == truth for name, truth in known), len(known))
    strangers = {truth for _, truth in known} - set(saved["speakers"])
    if strangers:
        click.echo(f"note: {len(strangers)} speakers of {split} are unknown to the model", err=True)
    return left_out


def _tell_accuracy(what: str, correct: int, total: int) -> None:
    click.echo(f"accuracy on {what}: {correct / max(1, total):.4f} ({correct:,} of {total:,})")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--shards", default=None, help="Folder of the shards.  [default: the run's own]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="submission.csv",
    help="CSV to write, Id,Category.",
)
@click.option("--split", default="test", help="Split to predict, in its own order.")
@click.option("--checkpoint", default="best", help="best, last, or a file.")
@click.option(
    "--max-frames",
    type=click.IntRange(min=1),
    default=32768,
    help="Largest padded area of a batch of whole utterances [frames].",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="CSV of true labels, Id,Category, to score the result against.",
)
def main(
    run: Path,
    shards: str | None,
    out: Path,
    split: str,
    checkpoint: str,
    max_frames: int,
    labels: Path | None,
) -> None:
    """Name the speaker of every utterance of a split with the model of RUN, a run folder.

    Utterances are heard whole, in batches of like length. The accuracy is printed where the
    labels are known. Exit codes: 0 done, 1 failed, 2 usage, else those of shardprep.
    """
    try:
        left_out = _predict(run, shards, out, split, checkpoint, max_frames)
        if labels is not None:
            _tell_accuracy(str(labels), *score_submission(out, labels, left_out))
    except (TrainerError, ShardprepError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        what = error.strerror or str(error)
        click.echo(f"error: {StorageError(what, file=error.filename)}", err=True)
        sys.exit(StorageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        click.echo("error: the memory of the device does not suffice; lower --max-frames", err=True)
        sys.exit(TrainerError.exit_code)


if __name__ == "__main__":
    main()
