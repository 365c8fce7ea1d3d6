"""`shardprep build SRC DST`."""

from __future__ import annotations

from typing import Any, get_args

import click

from shardprep.build.existing.append import append_shards
from shardprep.build.options import CHUNK_FRAMES, DEFAULT_ZSTD_LEVEL, BuildOptions
from shardprep.build.report import BuildReport
from shardprep.build.writer import build_shards
from shardprep.cli.output import count, hours, one_line, print_json, size
from shardprep.cli.places import Place
from shardprep.cli.progress import BuildProgress
from shardprep.cli.recordings.options import recipe_of, recipe_options
from shardprep.errors import SourceError
from shardprep.format.limits import MAX_N_MELS
from shardprep.format.manifest import REJECTS_NAME, DType
from shardprep.source.dataset import kinds_of
from shardprep.storage.remote import Location

_EPILOG = """
\b
Examples:
  shardprep build Dataset/ shards/
  shardprep build More/ shards/ --append
  shardprep build Dataset/ s3://BUCKET/shards
  shardprep build list.csv shards/
  shardprep build Recordings/ shards/ --n-mels 80
"""


@click.command(epilog=_EPILOG)
@click.argument("source", type=Place(lists=True), metavar="SRC")
@click.argument("destination", type=Place(exists=False), metavar="DST")
@click.option(
    "--dtype",
    type=click.Choice(get_args(DType)),
    default="float16",
    show_default=True,
    help="Element type to store. uint8 keeps 256 levels between the smallest and the largest value "
    "of each utterance, in half the room of float16.",
)
@click.option(
    "--codec",
    type=click.Choice(["none", "zstd"]),
    default="none",
    show_default=True,
    help=f"Compress in chunks of {CHUNK_FRAMES} mel frames: about 8 % smaller, slower to read.",
)
@click.option(
    "--level",
    type=click.IntRange(1, 22),
    show_default=str(DEFAULT_ZSTD_LEVEL),
    help="zstd level; only with --codec zstd.",
)
@click.option(
    "--samples-per-shard",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Most utterances in a shard.",
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of each speaker's utterances for the split val; train keeps at least one.",
)
@click.option(
    "--val-speakers",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the speakers who are for val alone: training does not know them.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Decides the val split and the order."
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default="the cores",
    help="Processes; on Ray, tasks at a time (default: its CPUs). The bytes stay the same.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Processes of this machine, or tasks on Ray. The bytes stay the same.",
)
@click.option(
    "--address",
    metavar="ADDRESS",
    help="Ray cluster to build on: auto for the one of this machine, or HOST:PORT. Its nodes must "
    "share SRC and DST. By default, Ray is started here.",
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help=f"Stop at a faulty utterance, or leave it out and list it in DST/{REJECTS_NAME}.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the set in DST. Readers use the old set until the new one is complete; in a "
    "store, until it is copied.",
)
@click.option(
    "--append",
    is_flag=True,
    help="Add what is new in SRC to the set in DST, as new shards. The options that decide the "
    "bytes are those of the set.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Read and check every file, list all faulty utterances, write nothing.",
)
@click.option(
    "--follow-links",
    is_flag=True,
    help="Take files that are links out of SRC, as in caches of the Hugging Face Hub, DVC and "
    "DataLad, and arks that lie out of SRC. Only for an SRC that you trust.",
)
@click.option(
    "--n-mels",
    type=click.IntRange(1, MAX_N_MELS),
    show_default="40, or those of the first matrix",
    help="Mel bins: of recordings, to compute; of a list of matrices, to find in all of them.",
)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def build(
    context: click.Context,
    /,
    source: Location,
    destination: Location,
    append: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Pack the data set SRC into tar shards in DST.

    SRC has the layout of the NTU homework 4: metadata.json, optionally mapping.json and
    testdata.json, and the .pt files that they name. Or it is recordings (wav, flac, mp3, m4a, ogg
    and others): a folder SRC/SPEAKER/..., a list of them, or Kaldi's wav.scp; the options from
    --features-from on are for these. Or it is a list of .pt and .npy files: a CSV, TSV or JSON
    Lines with the columns path and speaker, and split if you like; or a folder with Kaldi's
    feats.scp and utt2spk. The same SRC, options and seed give the same bytes. To continue an
    interrupted build, run the same command again. SRC and DST may be URLs that fsspec knows, such
    as s3://BUCKET/shards; a URL of a web server, SRC only.
    """
    given = {
        name
        for name in options
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    if append and options["overwrite"]:
        raise click.UsageError("give --append or --overwrite, not both")
    if append and options["level"] is not None and "codec" not in given:
        options["codec"] = "zstd"
    if options["level"] is not None and options["codec"] != "zstd":
        raise click.UsageError("--level goes with --codec zstd")
    options["recipe"] = recipe_of(options)
    if options["address"] is not None and options["engine"] != "ray":
        raise click.UsageError("--address goes with --engine ray")
    asked = BuildOptions(**options)
    if append:
        report = append_shards(source, destination, asked, BuildProgress("append"), given=given)
    else:
        report = build_shards(source, destination, asked, BuildProgress("build"))
    if as_json:
        print_json(report)
    else:
        _print_summary(report, append)
    refused = report.dry_run and report.stops and bool(report.rejects)
    if report.rejects:
        click.echo(_refusal(report) if refused else _warning(report), err=True)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    context.exit(SourceError.exit_code if refused else 0)


def _print_summary(report: BuildReport, append: bool) -> None:
    done = "checked, nothing written" if report.dry_run else "complete"
    state = "up to date, nothing to do" if report.up_to_date else done
    click.echo(f"{report.destination}: {state}")
    if append:
        _print_added(report)
    click.echo(
        f"{'split':<7}{'utterances':>12}{'frames':>13}{'speech':>12}{'shards':>8}{'size':>12}"
    )
    for name, split in report.splits.items():
        speech = hours(split.frames, report.features)
        click.echo(
            f"{name:<7}{split.samples:>12,}{split.frames:>13,}{speech:>12}"
            f"{split.shards:>8}{size(split.bytes):>12}"
        )
    rejected = count(len(report.rejects), "utterance")
    click.echo(f"{count(report.speakers, 'speaker')}, {rejected} rejected")
    if report.shards_kept:
        click.echo(f"{report.shards_kept} shards kept from the unfinished build")
    if not report.up_to_date:
        own = report.added if append else report.splits
        written = sum(split.bytes for split in own.values())
        seconds = max(report.seconds, 1e-9)
        click.echo(
            f"read {report.utterances_read:,} files, {size(report.source_bytes)}; shards "
            f"{size(written)}; {report.seconds:.1f} s, "
            f"{report.utterances_read / seconds:,.0f} utterances/s, "
            f"{report.source_bytes / 1e6 / seconds:.1f} MB/s"
        )


def _print_added(report: BuildReport) -> None:
    parts = [
        f"{split.samples:,} in {name} ({count(split.shards, 'shard')})"
        for name, split in report.added.items()
    ]
    new = count(report.new_speakers, "new speaker")
    click.echo(f"added: {', '.join(parts) or 'no utterance'}; {new}")
    if report.present:
        click.echo(f"in the set before: {count(report.present, 'utterance')} of SRC")


def _warning(report: BuildReport) -> str:
    rejected = count(len(report.rejects), "utterance")
    if report.dry_run:
        return f"warning: {rejected} would be left out:\n{_listed(report)}"
    where = f"{report.destination}/{REJECTS_NAME}"
    return f"warning: {rejected} left out; {where} lists them with reasons"


def _refusal(report: BuildReport) -> str:
    kinds = "\n".join(f"  {number:>7,} {kind}" for kind, number in kinds_of(report.rejects))
    return (
        f"{_listed(report)}\n"
        f"error: {count(len(report.rejects), 'utterance')} faulty, all listed above:\n"
        f"{kinds}\n"
        "Correct the data set, or leave such utterances out with --on-error skip."
    )


def _listed(report: BuildReport) -> str:
    return "\n".join(one_line(f"  {own.file}: {own.reason}") for own in report.rejects)
