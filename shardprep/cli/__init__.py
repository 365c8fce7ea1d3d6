"""The command line: `shardprep build | inspect | verify | repair | bench`. One module a command."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from shardprep import __version__
from shardprep.cli.bench import bench
from shardprep.cli.build import build
from shardprep.cli.inspect import inspect
from shardprep.cli.repair import repair
from shardprep.cli.verify import verify
from shardprep.errors import ShardprepError

_EPILOG = """
\b
Exit codes, of every command:
  0    success
  1    damage found in a shard set
  2    wrong usage of the command
  3    the data set to pack is not as it should be
  4    not a shard folder, or of a version that cannot be read
  5    the build cannot start or go on
  6    the disk refused (full, read-only, gone), or a store gave no answer
  130  Ctrl-C      143  SIGTERM
"""


class _Terminated(BaseException):
    """SIGTERM, raised where the main thread is, so that what is open gets closed."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, prog_name="shardprep")
def cli() -> None:
    """Pack folders of mel-spectrogram files into tar shards, and look after them."""


cli.add_command(build)
cli.add_command(inspect)
cli.add_command(verify)
cli.add_command(repair)
cli.add_command(bench)


def main() -> NoReturn:
    """Run the command line and exit with the documented code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(prog_name="shardprep", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ShardprepError as error:
        click.echo(f"shardprep: error: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("shardprep: interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except _Terminated:
        click.echo("shardprep: terminated; run the same command again to go on", err=True)
        sys.exit(143)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated
