"""`shardprep features AUDIO DST`."""

from __future__ import annotations

from typing import Any

import click

from shardprep.audio.recipe import FeatureRecipe
from shardprep.build.homework import write_features
from shardprep.cli.output import count, one_line, print_json
from shardprep.cli.places import Place
from shardprep.cli.progress import BuildProgress
from shardprep.cli.recordings.options import recipe_of, recipe_options
from shardprep.format.limits import MAX_N_MELS
from shardprep.storage.remote import Location


@click.command()
@click.argument("source", type=Place(lists=True), metavar="AUDIO")
@click.argument("destination", type=click.Path(file_okay=False), metavar="DST")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default="the cores", help="Processes."
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Stop at a faulty recording, or leave it out and name it.",
)
@click.option(
    "--follow-links",
    is_flag=True,
    help="Take files that are links out of AUDIO. Only for an AUDIO that you trust.",
)
@click.option(
    "--n-mels",
    type=click.IntRange(1, MAX_N_MELS),
    show_default="40",
    help="Mel bins.",
)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def features(source: Location, destination: str, as_json: bool, **options: Any) -> None:
    """Write the log-mels of recordings in the homework's layout.

    AUDIO is a folder AUDIO/SPEAKER/..., a list of recordings, or Kaldi's wav.scp, as for `shardprep
    build`, which packs recordings without this step. DST gets a .pt file an utterance,
    metadata.json and mapping.json, and testdata.json if a list names test recordings. Needs pip
    install 'shardprep[torch,audio]'.
    """
    recipe = recipe_of(options)
    n_mels = options.pop("n_mels")
    if recipe is None and n_mels is not None:
        recipe = FeatureRecipe(n_mels=n_mels)
    report = write_features(
        source, destination, recipe, listener=BuildProgress("features"), **options
    )
    if as_json:
        print_json(report)
    else:
        click.echo(
            f"{report.destination}: {count(report.utterances, 'utterance')} of "
            f"{count(report.speakers, 'speaker')}, {report.frames:,} frames, {report.seconds:.1f} s"
        )
    for reject in report.rejects:
        click.echo(one_line(f"warning: left out {reject.file}: {reject.reason}"), err=True)
