"""What the commands predict, score, embed and export share: options, notes, errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, get_args

import click

from shardprep import ShardprepError, StorageError, storage_error
from shardprep_trainer.config.fields import Backend
from shardprep_trainer.errors import TrainerError, is_out_of_memory

EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 usage, else those of shardprep."


encoder_option = click.option(
    "--encoder",
    "encoders",
    metavar="PACKAGE.MODULE:CLASS",
    multiple=True,
    help="Encoder of one's own that the model was trained with: its code is imported only if it is "
    "named here. May be given repeatedly.",
)


def model_options(
    split: str, *, name: str = "runs", required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that make `ModelOptions`, and their argument.

    Args:
        split: The default of --split.
        name: Of the argument: "runs" for one or several, or "model" for one.
        required: Whether the argument must be given.
    """
    several = name == "runs"
    shown = {"runs": "RUN..." if required else "[RUN]...", "model": "MODEL"}[name]
    place = click.Path(path_type=Path)
    parameters = [
        click.argument(
            name, type=place, required=required, nargs=-1 if several else 1, metavar=shown
        ),
        click.option(
            "--shards",
            multiple=True,
            help="Folder of the shards, or its URL; given repeatedly, the sets are read as one.  "
            "[default: the run's]",
        ),
        click.option("--split", default=split, help="Split to read, in its own order."),
        click.option("--checkpoint", default="best", help="best, last, or a path as RUN is."),
        encoder_option,
        click.option(
            "--max-frames",
            type=click.IntRange(min=1),
            default=32768,
            help="Largest padded area of a batch of whole utterances [frames]; on a CPU, where "
            "larger ones are slower, at most 4,096.",
        ),
        click.option(
            "--tta",
            type=click.IntRange(min=0),
            default=0,
            help="Equidistant segments of each utterance, scored beside the whole utterance; the "
            "results are averaged.",
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
    "speakers of the train split, after within-class covariance normalisation; wccn embeds the "
    "train split first.  [default: the recipe's predict.backend]",
)


def given(context: click.Context) -> dict[str, str]:
    """The parameters that the command line gives, by name, as a user calls them."""
    return {
        parameter.name: parameter.opts[0] if isinstance(parameter, click.Option) else "RUN"
        for parameter in context.command.params
        if parameter.name
        and context.get_parameter_source(parameter.name) == click.core.ParameterSource.COMMANDLINE
        # Of arguments that may be many, none counts as given, too.
        and context.params[parameter.name] != ()
    }


def tell(text: str) -> None:
    """Show a line on stderr: stdout is for results."""
    click.echo(text, err=True)


def note(text: str) -> None:
    """Show something on stderr that the user should know and that is no error."""
    tell(f"note: {text}")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """End the process with a message and an exit code where a user can put things right."""
    try:
        yield
    except (TrainerError, ShardprepError) as error:
        _exit(str(error), error.exit_code)
    except BrokenPipeError:
        # Nobody reads our output any longer, which is no error of ours.
        raise
    except OSError as error:
        _exit(str(storage_error(error)), StorageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "the memory of the device does not suffice; lower --max-frames"
        _exit(message, TrainerError.exit_code)


def _exit(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)
