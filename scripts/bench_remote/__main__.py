"""Shards behind a network: how fast they are read, and what faults do to them.

    python -m scripts.bench_remote [--only PART]... [--out FILE.json]

A real S3 server (SeaweedFS) runs on this machine. A proxy in front of it adds faults. The set is
noise: float16 matrices of 300 x 40, in shards of 24 MB to measure speed (cold, warm), and in small
shards for the other parts.

- cold: an epoch of `SegmentLoader` in windowed order into an empty cache, beside two other ways to
  download the same objects: `s3fs.get` for all at once, and threads with botocore, as `aws s3 cp`
  does. The loader is compared with the faster of the two. Bytes a second, medians.
- warm: training (recipe demo) from S3 with a warm cache, beside training from the same shards on
  the disk. Samples a second in the log, medians.
- budget: an epoch with a cache of a tenth of the data. The size of its files is checked all the
  time.
- ranks: four processes share a cache for an epoch. Counted are the bytes that the server sends of
  each object.
- outage: an epoch in which the server stops for 20 s, 5 % of the requests get the answer 503, one
  in 50 bodies is truncated, and one in 50 has a changed byte. Every batch must equal the local one.
- kills: a reader is killed (SIGKILL) at a random moment of its downloads, many times. Afterwards
  the contents of every file in the cache must match its name, and an epoch must equal the local
  one.
- builds: a build into S3 is killed (SIGKILL to its process group) at a random moment and continued.
  No manifest may exist before the end, the set must equal the local one byte for byte, and no
  complete shard may be uploaded again.

Exit codes: 0 nothing was lost (speed is only reported), 1 something was lost, 2 usage.
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


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="Do only these parts.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Size of the sets; below 1 to test the script.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
def main(only: tuple[str, ...], rounds: int, scale: float, out: Path | None) -> None:
    """Measure how fast shards behind a network are read, and what faults do to them.

    Exit codes: 0 nothing was lost (speed is only reported), 1 something was lost, 2 usage.
    """
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
            shown = {k: v for k, v in result.items() if k not in ("rounds", "records")}
            click.echo(f"{part}: {json.dumps(shown)}")
            if out is not None:
                out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(results[part].get("holds", True) for part in only or PARTS) else 1)


if __name__ == "__main__":
    main()
