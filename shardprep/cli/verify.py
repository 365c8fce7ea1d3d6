"""`shardprep verify DST`."""

from __future__ import annotations

import dataclasses

import click

from shardprep.check.verify import verify_shards
from shardprep.cli.output import count, print_json, progress_bar, size
from shardprep.cli.places import Place
from shardprep.errors import RESTORE, FormatError, StorageError
from shardprep.read.manifest_file import load_manifest
from shardprep.storage.remote import Location


@click.command(short_help="Check the integrity of the shard set DST.")
@click.argument("shards", type=Place(), metavar="DST")
@click.option("--deep", is_flag=True, help="Also walk every tar and read every utterance.")
@click.option(
    "--against",
    type=Place(lists=True),
    multiple=True,
    metavar="SRC",
    help="Also compare every utterance with the data set that DST was built from. Give it once for "
    "each data set if others were appended.",
)
@click.option(
    "--follow-links",
    is_flag=True,
    help="Take files that are links out of SRC; see `shardprep build --help`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def verify(
    context: click.Context,
    shards: Location,
    deep: bool,
    against: tuple[Location, ...],
    follow_links: bool,
    as_json: bool,
) -> None:
    """Check the integrity of the shard set DST: sizes and sha256 of all files.

    A set behind a URL is first copied into a temporary folder.

    The exit code is 0 for an intact set, 1 for faults, and 6 if the machine could not read all
    files; stdout names each fault and each file that was not read.
    """
    with progress_bar(_total(shards, deep or bool(against)), "B", "verify") as bar:
        report = verify_shards(
            shards,
            deep=deep,
            against=against or None,
            follow_links=follow_links,
            advance=bar.update,
        )
    if as_json:
        print_json({**dataclasses.asdict(report), "intact": report.intact})
    else:
        for fault in report.faults:
            click.echo(str(fault))
        for fault in report.unread:
            click.echo(f"{fault.file}: not verified, {fault.what}")
        read = f", {report.samples:,} utterances read" if report.samples else ""
        state = "intact" if report.intact else count(len(report.faults), "fault")
        if report.unread:
            state += f", {count(len(report.unread), 'file')} not verified"
        click.echo(
            f"{shards}: {state} "
            f"({report.files} files, {size(report.bytes)}{read}, {report.seconds:.1f} s)"
        )
        for note in report.notes:
            click.echo(f"note: {note}", err=True)
        helps = not all(fault.by_hand for fault in report.faults)
        if helps and report.files and not report.unread and not against:
            remedy = f"`shardprep repair {shards}` restores the set, or says what it needs"
            click.echo(f"note: {RESTORE if report.adopted else remedy}", err=True)
    if report.unread:
        context.exit(StorageError.exit_code)
    context.exit(0 if report.intact else 1)


def _total(shards: Location, every_utterance: bool) -> int:
    try:
        manifest = load_manifest(shards)
    except FormatError:
        return 0
    tars = sum(shard.bytes for split in manifest.splits.values() for shard in split.shards)
    return sum(info.bytes for info in manifest.files().values()) + (tars if every_utterance else 0)
