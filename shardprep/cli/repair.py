"""`shardprep repair DST`."""

from __future__ import annotations

import dataclasses

import click

from shardprep.check.repair import repair_shards
from shardprep.check.report import RepairReport
from shardprep.cli.output import count, print_json
from shardprep.cli.places import Place
from shardprep.cli.progress import BuildProgress
from shardprep.format.manifest import REJECTS_NAME, Reject
from shardprep.storage.remote import Location, Remote

_MOST_LINES = 20


@click.command(short_help="Repair the damaged shard set DST.")
@click.argument("shards", type=Place(), metavar="DST")
@click.option(
    "--source",
    type=Place(lists=True),
    multiple=True,
    metavar="SRC",
    help="Data set that DST was built from, to take damaged utterances from. Give it once for each "
    "data set if others were appended.",
)
@click.option(
    "--drop", is_flag=True, help=f"Leave damaged utterances out, and list them in {REJECTS_NAME}."
)
@click.option(
    "--follow-links",
    is_flag=True,
    help="Take files that are links out of SRC; see `shardprep build --help`.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default="the cores",
    help="Processes that build the shards whose index is damaged too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.pass_context
def repair(
    context: click.Context,
    shards: Location,
    source: tuple[Location, ...],
    drop: bool,
    follow_links: bool,
    workers: int,
    as_json: bool,
) -> None:
    """Repair the damaged shard set DST.

    DST alone suffices to restore an index from its shards, and a shard from its index if the
    matrices in it are undamaged. Damaged matrices come from --source, and every file gets the bytes
    that it had. With --drop, the set is built again without them; it is then another set, and
    runs that were trained on the old one cannot be resumed on it. The exit code is 0 for an intact
    set and 1 if damage is left.
    """
    if source and drop:
        raise click.UsageError("give --source or --drop, not both")
    if isinstance(shards, Remote):
        raise click.UsageError(
            f"{shards} is repaired by building it again: `shardprep build SRC {shards} --overwrite`"
        )
    report = repair_shards(
        shards,
        source=source or None,
        drop=drop,
        follow_links=follow_links,
        workers=workers,
        listener=BuildProgress("repair"),
        before_drop=_announce,
    )
    if as_json:
        print_json({**dataclasses.asdict(report), "intact": report.intact})
    else:
        _print(report, asked=bool(source) or drop)
    context.exit(0 if report.intact else 1)


def _announce(lost: list[Reject]) -> None:
    """Say on stderr what will be left out, before it is."""
    for reject in lost[:_MOST_LINES]:
        click.echo(f"shardprep: leaving out {_line(reject)}", err=True)
    if len(lost) > _MOST_LINES:
        click.echo(f"shardprep: and {len(lost) - _MOST_LINES} more", err=True)


def _line(reject: Reject, done: str = "") -> str:
    return f"{reject.key or reject.file}: {done}{reject.reason}"


def _print(report: RepairReport, *, asked: bool) -> None:
    for name in report.repaired:
        click.echo(f"{name}: restored")
    for name in report.removed:
        click.echo(f"{name}: removed, belongs to no set")
    dropped = [_line(one, "dropped, ") for one in report.dropped]
    _print_some(dropped, f"{REJECTS_NAME} lists them all")
    _print_some([f"note: {note}" for note in report.notes], "--json has them all")
    for fault in report.faults:
        click.echo(str(fault))
    state = "intact" if report.intact else f"{count(len(report.faults), 'fault')} left"
    click.echo(
        f"{report.path}: {state} ({count(len(report.repaired), 'file')} repaired, "
        f"{count(report.lost, 'utterance')} dropped, {report.seconds:.1f} s)"
    )
    if not all(fault.by_hand for fault in report.faults) and not asked:
        note = "give the data set as --source SRC; without one, see `shardprep repair --help`"
        click.echo(f"note: {note}", err=True)


def _print_some(lines: list[str], where: str) -> None:
    for line in lines[:_MOST_LINES]:
        click.echo(line)
    if len(lines) > _MOST_LINES:
        click.echo(f"... and {len(lines) - _MOST_LINES} more; {where}")
