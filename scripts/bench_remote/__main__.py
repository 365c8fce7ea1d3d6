"""Shards behind a network: how fast they are read, and what comes of faults.

    python -m scripts.bench_remote [--only PART]... [--out FILE.json]

A real S3 server (SeaweedFS) runs on this machine for it; faults come from a proxy before it. The
set is made of noise: matrices of 300 x 40, float16, in shards of 24 MB for speed (cold, warm), and
of small shards for the rest.

- cold: an epoch of `SegmentLoader` in windowed order into an empty cache, in turns with getting the
  same objects into files by `s3fs.get` (all at once) and by threads with botocore, as `aws s3 cp`
  does; the faster of the two is the yardstick. Bytes a second, medians.
- warm: training (recipe demo) from S3 with a warm cache, in turns with training from the same
  shards on the disk; samples a second of the log windows, medians.
- budget: an epoch with a cache of a tenth of the data, whose files are summed all the time.
- ranks: four processes share a cache for an epoch; bytes that the server sent of each object.
- outage: an epoch while the server is stopped for 20 s, 5 % of requests are answered with 503, and
  one in 50 bodies is cut short and one in 50 changed; every segment is compared with the local one.
- kills: a reader is killed (SIGKILL) at a random moment of its downloads, over and over; then every
  file in the cache is compared with its name, and an epoch with the local one.
- builds: a build into S3 is killed (SIGKILL, the whole group) at a random moment and continued;
  there must be no manifest before, the set must be byte for byte the local one, and no shard may be
  sent again that was sent whole.

Exit codes: 0 all holds that must (speed is only reported), 1 something was lost, 2 usage.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scripts.bench_remote.faults import budget, builds, kills, outage, ranks
from scripts.bench_remote.sets import Bench, Result
from scripts.bench_remote.speed import cold, warm
from scripts.servers.object_store import object_store
from shardprep.bench.machine import machine

PARTS: dict[str, Callable[[Bench], Result]] = {
    "cold": cold, "warm": warm, "budget": budget, "ranks": ranks, "outage": outage,
    "kills": kills, "builds": builds,
}  # fmt: skip


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Parts to do.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the sets; below 1 to try the script.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
def main(only: tuple[str, ...], rounds: int, scale: float, out: Path | None) -> None:
    """The command; its help is above."""
    results: dict[str, Any] = {}
    if out is not None and out.exists():
        results = json.loads(out.read_text())
    results["machine"] = machine().__dict__
    with tempfile.TemporaryDirectory(prefix="remote-") as name, object_store() as store:
        os.environ.update(store.environment)
        bench = Bench(Path(name), store, scale, rounds)
        for part in only or PARTS:
            click.echo(f"{part} ...", err=True)
            result = PARTS[part](bench)
            results[part] = result
            shown = {k: v for k, v in result.items() if k not in ("rounds", "windows")}
            click.echo(f"{part}: {json.dumps(shown)}")
            if out is not None:
                out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(results[part].get("holds", True) for part in only or PARTS) else 1)


if __name__ == "__main__":
    main()
