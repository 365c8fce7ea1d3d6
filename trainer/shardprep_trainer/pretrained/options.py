"""What the commands on recordings share: arguments, and what happens at a faulty recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from shardprep import FormatError, recipe_at
from shardprep_trainer.errors import PredictionError
from shardprep_trainer.pretrained.model import SpeakerModel
from shardprep_trainer.pretrained.recordings import Recording, check_there
from shardprep_trainer.pretrained.results import Used

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def model_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command MODEL, --checkpoint and --features-from."""
    option = click.option("--checkpoint", default="best", help="best or last, of a run folder.")
    return click.argument("model")(option(features_option(command)))


features_option = click.option(
    "--features-from",
    metavar="PLACE",
    help="Set, model or run whose recipe makes log-mels of recordings, or homework, for a model "
    "that does not know its own.",
)


def open_model(
    model: str, checkpoint: str, features_from: str | None, encoders: Sequence[str] = ()
) -> SpeakerModel:
    """Open the model of a command.

    Raises:
        CheckpointError: See `SpeakerModel.from_pretrained`.
        FormatError: Nobody knows how to make features of recordings.
    """
    recipe = None if features_from is None else recipe_at(features_from)
    try:
        opened = SpeakerModel.from_pretrained(
            model, checkpoint=checkpoint, recipe=recipe, encoder=encoders
        )
        _ = opened.recipe
    except FormatError as error:
        error.remedy = (
            "Name a set or a model whose features are the same, or homework: --features-from."
        )
        raise
    return opened


def audio_argument(*, required: bool) -> Decorator:
    """Give a command AUDIO..."""
    return click.argument("audio", nargs=-1, required=required, type=click.Path(path_type=Path))


on_error_option = click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    help="Stop at a recording that cannot be used, or name it on stderr and leave it out.",
)


def use_all(
    models: Sequence[SpeakerModel], recordings: Sequence[Recording], on_error: str
) -> Iterator[tuple[Recording, list[Used]]]:
    """Embed and score the recordings of a command by each model, in their order.

    What was left out, and what was cut, is told.

    Raises:
        PredictionError: A recording cannot be used and `on_error` is "fail", or none can be used.
    """
    check_there(recordings)
    lost = kept = 0
    for each in zip(*(model.use(recordings) for model in models), strict=True):
        recording, found = each[0][0], [made for _, made in each]
        used = [made for made in found if isinstance(made, Used)]
        if error := next((made for made in found if isinstance(made, ValueError)), None):
            if on_error == "fail":
                raise PredictionError(
                    f"{recording}: {error}; correct it, or leave such recordings out with "
                    "--on-error skip"
                ) from error
            lost += 1
            _tell(f"warning: {recording}: {error}; left out")
        else:
            kept += 1
            for model, own in zip(models, used, strict=True):
                tell_pieces(model, recording, own)
            yield recording, used
    if not kept:
        raise PredictionError(f"none of the {lost:,} recordings can be used")
    if lost:
        _tell(f"warning: {lost:,} of {len(recordings):,} recordings are left out")


def tell_pieces(model: SpeakerModel, recording: Recording, used: Used) -> None:
    """Say that a recording was cut, if it was."""
    if used.pieces > 1:
        _tell(
            f"note: {recording}: {used.frames:,} frames, more than {model.longest_frames:,}: "
            f"embedded in {used.pieces} pieces, whose mean counts"
        )


def _tell(text: str) -> None:
    click.echo(text, err=True)
