"""The command line: `shardprep build`, `shardprep train` and the others, one module a command.

The commands for speaker models are in another package, the trainer, and are found by entry points.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

import click

from shardprep import __version__
from shardprep.cli.adopt import adopt
from shardprep.cli.announced import announced_commands
from shardprep.cli.bench import bench
from shardprep.cli.build import build
from shardprep.cli.inspect import inspect
from shardprep.cli.recordings.features import features
from shardprep.cli.repair import repair
from shardprep.cli.streams import READER_LEFT, discard_output, open_closed_streams
from shardprep.cli.verify import verify
from shardprep.errors import PlatformError, ShardprepError
from shardprep.storage.trouble import storage_error

_EPILOG = """
\b
Exit codes, of every command:
  0    success
  1    damage found in a shard set; training, prediction or export failed
  2    wrong usage of the command, or a package is not installed
  3    the data set to pack is faulty
  4    not a shard folder, or one of a version that cannot be read
  5    the build cannot start or continue
  6    the machine refused (permissions, limits, mount, disk), or a store did
       not answer; nothing is said about the data
  124  training stood still for train.hang_seconds
  130  Ctrl-C      143  SIGTERM      141  nobody reads the output any longer
"""


class _Terminated(BaseException):
    """SIGTERM, raised in the main thread, so that open files get closed."""


class _NobodyReads(Exception):
    """A BrokenPipeError, of which click would make the exit code 1, that of damage."""


class _Commands(click.Group):
    """Our own commands in order of use; those of other packages are looked up when needed."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the command line, and print the help; see `click.Command`."""
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError:
            raise _NobodyReads from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; see `click.Command`."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _NobodyReads from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands; see `click.Group`."""
        return [*self.commands, *announced_commands()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; see `click.Group`."""
        return self.commands.get(cmd_name) or announced_commands().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both lists of commands; see `click.Group`."""
        announced = announced_commands()
        width = max(map(len, [*self.commands, *announced]))
        sections = {"Commands for shards": self.commands, "Commands for speaker models": announced}
        for title, commands in sections.items():
            if not commands:
                continue
            limit = formatter.width - width - 6
            rows = [
                (name.ljust(width), command.get_short_help_str(limit))
                for name, command in commands.items()
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG
)
@click.version_option(__version__, prog_name="shardprep")
def cli() -> None:
    """Pack mel-spectrogram files into shards, and train speaker models on them.

    The commands for speaker models need: pip install 'shardprep[train]'
    """


for _command in (build, features, adopt, inspect, verify, repair, bench):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line and exit with the documented code."""
    open_closed_streams()
    # Python gives signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        # As `head` does, once it has its lines.
        discard_output()
        code = READER_LEFT
    except (OSError, MemoryError) as error:
        discard_output()
        code = _report(storage_error(error))
    sys.exit(code)


def _run() -> int | str | None:
    """Run the command line; its exit code.

    Raises:
        OSError: The output cannot be written, or the machine refused in another way.
        MemoryError: Memory is short.
    """
    try:
        code = cli.main(prog_name="shardprep", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code
    except _NobodyReads:
        raise BrokenPipeError from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except ShardprepError as error:
        return _report(error)
    except UnicodeEncodeError as error:
        return _report(
            PlatformError(
                f"the locale's encoding, {error.encoding}, cannot express the name",
                key=ascii(error.object),
                remedy="Set PYTHONUTF8=1, or a locale such as C.UTF-8.",
            )
        )
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue", err=True)
        return 128 + signal.SIGINT
    except _Terminated:
        click.echo("terminated; run the same command again to continue", err=True)
        return 128 + signal.SIGTERM


def _report(error: ShardprepError) -> int:
    click.echo(f"error: {error}", err=True)
    return error.exit_code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
