"""The bar of commands that read a data set."""

from __future__ import annotations

import time

import click

from shardprep.build.pools.pool import ProgressListener
from shardprep.cli.output import progress_bar


class BuildProgress(ProgressListener):
    """A bar with utterances/s, MB/s and the time left; `action` is written before it."""

    def __init__(self, action: str) -> None:
        self._action = action

    def note(self, text: str) -> None:
        """Show a line on stderr; see `ProgressListener`."""
        click.echo(f"note: {text}", err=True)

    def start(self, utterances: int, nbytes: int) -> None:
        """Show a bar; see `ProgressListener`."""
        self._bar = progress_bar(utterances, "utt", self._action)
        self._began, self._nbytes = time.monotonic(), 0

    def advance(self, utterances: int, nbytes: int) -> None:
        """Advance the bar."""
        self._nbytes += nbytes
        rate = self._nbytes / 1e6 / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
        self._bar.update(utterances)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
