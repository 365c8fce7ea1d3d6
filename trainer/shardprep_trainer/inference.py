"""What predict, score and embed have in common: options, opening a `Session`, errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import torch

from shardprep import ShardprepError, StorageError
from shardprep_trainer.checkpoint.files import CheckpointFolder
from shardprep_trainer.checkpoint.state import load_described, load_model
from shardprep_trainer.config.fields import Backend, config_from_dict
from shardprep_trainer.errors import (
    CheckpointError,
    PredictionError,
    TrainerError,
    is_out_of_memory,
)
from shardprep_trainer.evaluation.rejects import read_left_out
from shardprep_trainer.evaluation.views import Views
from shardprep_trainer.run.preflight import open_shards_of
from shardprep_trainer.session import Session

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 usage, else those of shardprep."


@dataclass(frozen=True)
class ModelOptions:
    """The options of `model_options`, as they were given."""

    run: Path
    shards: str | None
    split: str
    checkpoint: str
    max_frames: int
    tta: int
    tta_frames: int
    backend: Backend | None = "head"
    """None is the recipe's."""


def model_options(split: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command RUN and the options that make `ModelOptions`; `split` is the default."""
    parameters = [
        click.argument("run", type=click.Path(path_type=Path)),
        click.option(
            "--shards", default=None, help="Folder of the shards, or its URL.  [default: the run's]"
        ),
        click.option("--split", default=split, help="Split to hear, in its own order."),
        click.option("--checkpoint", default="best", help="best, last, or a file."),
        click.option(
            "--max-frames",
            type=click.IntRange(min=1),
            default=32768,
            help="Largest padded area of a batch of whole utterances [frames].",
        ),
        click.option(
            "--tta",
            type=click.IntRange(min=0),
            default=0,
            help="Equidistant segments of each utterance, scored beside the whole; the answers to "
            "all of them are averaged.",
        ),
        click.option(
            "--tta-frames",
            type=click.IntRange(min=0),
            default=0,
            help="Length of these segments [frames]; 0 is that of the run's training segments.",
        ),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


backend_option = click.option(
    "--backend",
    type=click.Choice(get_args(Backend)),
    default=None,
    help="What names a speaker: the head of the model, or (wccn) the nearest mean embedding of the "
    "speakers of the train split, after within-class covariance normalisation; that hears the "
    "train split first.  [default: the recipe's predict.backend]",
)


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


def open_session(options: ModelOptions) -> Session:
    """Load the model, open the shards, and say on stderr what there is to know of them.

    Raises:
        CheckpointError: The checkpoint is missing or damaged, or its parts do not fit together.
        PredictionError: The shards have another number of mel bins, or nothing in the split.
        ShardprepError: The shards cannot be read.
    """
    file = find_checkpoint(options.run, options.checkpoint)
    saved = load_described(file)
    config = config_from_dict(saved["config"])
    shards = open_shards_of(config.data, options.shards)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(f"{file}, after {saved['step']:,} steps, on {device.type}", err=True)
    n_mels, expected = shards.manifest.n_mels, saved["n_mels"]
    if n_mels != expected:
        raise PredictionError(
            f"{shards.path} has {n_mels} mel bins a frame, but the model was trained on "
            f"{expected}; build shards from features like those it was trained on"
        )
    left_out = read_left_out(shards)
    for line in left_out.notes(options.split) if left_out else ():
        note(line)
    frames = options.tta_frames or config.data.segment_frames
    session = Session(
        file=file,
        step=saved["step"],
        classes=tuple(saved["speakers"]),
        backend=options.backend or config.predict.backend,
        views=Views(load_model(saved, file).to(device), options.tta, frames).eval(),
        shards=shards,
        left_out=left_out,
        device=device,
        max_frames=options.max_frames,
        pad_value=config.data.pad_value,
    )
    session.split(options.split)
    if session.backend != "head":
        who = f"those of the train split of {shards.path}, which is heard first"
        note(f"speakers are named by --backend {session.backend}: {who}")
        if options.split == "train":
            note("the accuracy on train says nothing: speakers are known by these very utterances")
    return session


def note(text: str) -> None:
    """Say something on stderr that is no error."""
    click.echo(f"note: {text}", err=True)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """End the process with a message and an exit code where a user can put things right."""
    try:
        yield
    except (TrainerError, ShardprepError) as error:
        _leave(str(error), error.exit_code)
    except OSError as error:
        what = error.strerror or str(error)
        _leave(str(StorageError(what, file=error.filename)), StorageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "the memory of the device does not suffice; lower --max-frames"
        _leave(message, TrainerError.exit_code)


def _leave(message: str, code: Any) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
