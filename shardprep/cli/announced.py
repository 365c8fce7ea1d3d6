"""Commands that other packages announce by entry points, `shardprep train` among them.

`shardprep --help` lists them without importing them: the trainer brings PyTorch, which takes
seconds to load, or is not installed.
"""

from __future__ import annotations

import ast
import os
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

import click

from shardprep.errors import StorageError, needs

GROUP = "shardprep.commands"
"""Entry points of this group are click commands."""

_EXTRA = "train"


def announced_commands() -> dict[str, click.Command]:
    """All commands of other packages, by name."""
    return {entry.name: AnnouncedCommand(entry) for entry in entry_points(group=GROUP)}


class AnnouncedCommand(click.Command):
    """An entry in the list of commands; it imports the command only to run it."""

    def __init__(self, entry: EntryPoint) -> None:
        self._entry = entry
        super().__init__(
            entry.name,
            short_help=_summary(entry.module),
            params=[click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)],
            # Options, --help too, are for the command itself.
            add_help_option=False,
            context_settings={"ignore_unknown_options": True},
        )

    def invoke(self, ctx: click.Context) -> object:
        """Import the command and run it.

        Raises:
            MissingExtraError: A package is not installed.
            StorageError: The current folder was removed.
        """
        _check_folder()
        # Not around the run: a module that is missing there is a fault of its own.
        with needs(_EXTRA):
            command: click.Command = self._entry.load()
        words = list(ctx.params["words"])
        return command.main(words, prog_name=ctx.command_path, standalone_mode=False)


def _check_folder() -> None:
    """StorageError if the current folder was removed: PyTorch may end the program there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise StorageError(
            "the current folder was removed, and PyTorch does not start there",
            remedy="Go to another folder (cd).",
        ) from None


def _summary(module: str) -> str:
    """What the first line of a module's docstring says before a colon, from the module's file."""
    try:
        found = find_spec(module)
    # An uninstalled package may leave its entry points behind.
    except ModuleNotFoundError:
        return ""
    if found is None or found.origin is None:
        return ""
    source = Path(found.origin).read_text(encoding="utf-8")
    line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return line.partition(":")[0].rstrip(".") + "."
