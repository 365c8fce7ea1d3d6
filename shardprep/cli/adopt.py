"""`shardprep adopt TARS... DST`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shardprep.build.foreign.adopt import SPEAKER_FIELD, AdoptReport, adopt_shards
from shardprep.build.foreign.tars import SPLITS
from shardprep.build.pools.pool import ProgressListener
from shardprep.cli.output import count, hours, print_json, progress_bar, size
from shardprep.cli.places import Place
from shardprep.format.manifest import REJECTS_NAME
from shardprep.storage.remote import Location

_EPILOG = """
\b
Examples:
  shardprep adopt train/ --val 'val/{000..004}.tar' shards/
  shardprep adopt features/*.tar shards/ --member mel.npy --speaker spk_id
"""


class _Progress(ProgressListener):
    """A bar that counts the bytes of the tars."""

    def note(self, text: str) -> None:
        """Show a line on stderr; see `ProgressListener`."""
        click.echo(f"note: {text}", err=True)

    def start(self, utterances: int, nbytes: int) -> None:
        """Show a bar; see `ProgressListener`."""
        self._bar = progress_bar(nbytes, "B", "adopt")

    def advance(self, utterances: int, nbytes: int) -> None:
        """Advance the bar."""
        self._bar.update(nbytes)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@click.command(epilog=_EPILOG, short_help="Make a set of WebDataset tars, without a copy.")
@click.argument("tars", nargs=-1, required=True, metavar="TARS...")
@click.argument("destination", type=Place(exists=False), metavar="DST")
@click.option(
    "--member",
    metavar="EXT",
    show_default="the only one that ends in npy",
    help="Extension of the members that have the matrices, such as mel.npy.",
)
@click.option(
    "--speaker",
    metavar="FIELD",
    show_default=f"{SPEAKER_FIELD}, or else .cls",
    help="Field of the .json members that names the speaker.",
)
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    show_default="by the names of tars and folders",
    help="Split of all TARS.",
)
@click.option("--val", multiple=True, metavar="TAR", help="Tar of the split val; repeatable.")
@click.option("--test", multiple=True, metavar="TAR", help="Tar of the split test; repeatable.")
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help=f"Stop if a matrix cannot be mapped, or leave it out and list it in DST/{REJECTS_NAME}.",
)
@click.option("--overwrite", is_flag=True, help="Replace the set in DST.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default="the cores",
    help="Processes that read tars.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def adopt(tars: tuple[str, ...], destination: Location, as_json: bool, **options: Any) -> None:
    """Make a shard set in DST of WebDataset tars of .npy matrices, without a copy.

    DST gets links to the tars, an index and a manifest. The tars are read once and stay as they
    are, where they are. TARS are files, folders, or patterns such as '{000000..000009}.tar'. Each
    matrix is (frames, n_mels) in float16 or float32, as numpy.save writes it. To continue after an
    interruption, run the same command again.
    """
    report = adopt_shards(tars, destination, listener=_Progress(), **options)
    if as_json:
        print_json(report)
    else:
        _print_summary(report)
    if report.rejects:
        click.echo(
            f"warning: {count(len(report.rejects), 'utterance')} left out; "
            f"{Path(report.destination) / REJECTS_NAME} lists them with reasons",
            err=True,
        )
    for note in report.notes:
        click.echo(f"note: {note}", err=True)


def _print_summary(report: AdoptReport) -> None:
    state = "up to date, nothing to do" if report.up_to_date else "complete"
    click.echo(f"{report.destination}: {state}")
    click.echo(f"{'split':<7}{'utterances':>12}{'frames':>13}{'speech':>12}{'tars':>8}{'size':>12}")
    for name, split in report.splits.items():
        click.echo(
            f"{name:<7}{split.samples:>12,}{split.frames:>13,}{hours(split.frames, None):>12}"
            f"{split.shards:>8}{size(split.bytes):>12}"
        )
    click.echo(
        f"member .{report.member}: {report.dtype}, {report.n_mels} columns; "
        f"{report.speakers} speakers, {count(len(report.rejects), 'utterance')} rejected"
    )
    if report.tars_kept:
        click.echo(f"{report.tars_kept} tars read by an earlier run")
    seconds = max(report.seconds, 1e-9)
    click.echo(
        f"read {size(report.bytes_read)}; {report.seconds:.1f} s, "
        f"{report.bytes_read / 1e6 / seconds:.1f} MB/s"
    )
