"""`shardprep bench DST...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardprep.cli.output import print_json, progress_bar, size
from shardprep.cli.places import Place

if TYPE_CHECKING:
    from shardprep.bench.report import BenchReport, SetResult
    from shardprep.storage.remote import Location


@click.command(short_help="Measure how fast the shard sets DST can be read.")
@click.argument("shards", type=Place(), metavar="DST...", nargs=-1, required=True)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, readable=False, path_type=Path),
    metavar="SRC",
    help="Also measure the files that DST was built from.",
)
@click.option("--split", default="train", show_default=True, help="Split to read.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Segments in a batch.",
)
@click.option(
    "--segment-frames",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Mel frames in a segment.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Measurements of each loader; the median counts.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Length of a measurement, after a warm-up of half that time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(shards: tuple[Location, ...], source: Path | None, as_json: bool, **options: Any) -> None:
    """Measure how fast the shard sets DST can be read on this machine.

    The figure is random segments a second from a warm page cache, read by webdataset, by
    SegmentLoader and, with --source, from the files themselves. The limit is a gather of as many
    bytes from memory. The report ends with the bottleneck of SegmentLoader. Several DST compare
    codecs; they must hold the same utterances. Sets behind URLs are copied into the cache first.
    """
    # Slow to import, and no other command needs all of it.
    from shardprep.bench.report import BenchOptions, bench_shards

    with _Progress() as progress:
        report = bench_shards(shards, source, BenchOptions(**options), progress.advance)
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)


class _Progress:
    """A bar of measurements; it appears with the first of them."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, name: str, expected: int) -> None:
        if self._bar is None:
            self._bar = progress_bar(expected, "measurement", "bench")
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update()


def _print_report(report: BenchReport) -> None:
    batch, frames, n_mels = report.batch
    click.echo(
        f"{report.split}: {report.utterances:,} utterances; batches of {batch} segments of "
        f"{frames} x {n_mels} {report.dtype}; {report.machine.cpu}, {report.machine.cores} cores; "
        f"medians of {report.rounds}"
    )
    width = max(len("loader"), *(len(loader.name) for loader in report.loaders)) + 1
    click.echo(f"{'loader':<{width}}{'samples/s':>12}{'GB/s':>9}{'to files':>10}{'to limit':>10}")
    for loader in report.loaders:
        to_files = "-" if loader.to_files is None else f"{loader.to_files:.1f}x"
        click.echo(
            f"{loader.name:<{width}}{loader.samples_per_s:>12,.0f}{loader.gb_per_s:>9.3f}"
            f"{to_files:>10}{loader.to_limit:>10.3f}"
        )
    click.echo(
        f"limit: the fastest way to gather was {report.limit.method}, from "
        f"{size(report.limit.nbytes)}"
    )
    for result in report.sets:
        click.echo(f"\n{result.shards} ({result.codec}), a batch: {_stages(result)}")
        click.echo(f"bottleneck: {result.bottleneck}")


def _stages(result: SetResult) -> str:
    stages = result.stages
    parts = {
        "in all": stages.batch,
        "order and segment starts": stages.order,
        "copying" if result.codec == "none" else "inflating": stages.gather,
        "the rest": result.rest,
    }
    return ", ".join(f"{name} {seconds * 1e6:,.0f} us" for name, seconds in parts.items())
