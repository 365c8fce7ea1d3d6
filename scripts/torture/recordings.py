"""Kill builds from recordings at random moments, with one worker and with two.

    python -m scripts.torture.recordings [--recordings 1000] [--kills 20] [--out FILE.json]

`scripts.synthetic` makes the recordings. Builds with one and with two workers must give the same
set. Then builds are killed (SIGKILL to the build or to its process group) when some of their shards
are done, half of them twice, and continued: the set must be that of a build that nobody killed.

Exit codes: 0 every set was identical, 1 otherwise, 2 usage.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from scripts.torture.shards import SAMPLES_PER_SHARD, Case, contents, kill_often
from shardprep.bench.machine import machine

SPEAKERS = 20


def make_recordings(folder: Path, count: int, seed: int) -> Path:
    """Recordings of half a second to a second and a half, by speaker."""
    size = ["--speakers", str(SPEAKERS), "--utterances", str(-(-count // SPEAKERS))]
    size += ["--test-utterances", "0", "--frames-min", "50", "--frames-max", "150"]
    command = [sys.executable, "-m", "scripts.synthetic", str(folder), "--recordings"]
    subprocess.run([*command, *size, "--seed", str(seed)], check=True)
    return folder / "recordings"


def torture(work: Path, source: Path, rng: random.Random, rounds: int) -> dict[str, Any]:
    """Build with one and two workers, and kill builds of both."""
    build = [sys.executable, "-m", "shardprep", "build", str(source)]
    options = ["--samples-per-shard", str(SAMPLES_PER_SHARD), "--val-speakers", "0.1"]
    case = Case(source, work, rng, {"kills": rounds // 2})
    killed, sets = [], []
    for workers in ("1", "2"):
        folder = work / f"workers-{workers}"
        killed.append(
            kill_often(case, [*build, str(folder), *options, "--workers", workers], folder, None)
        )
        sets.append(contents(folder))
    total = {name: sum(one[name] for one in killed) for name in killed[0]}
    equal = sets[0] == sets[1]
    held = equal and total["identical"] == total["asked"]
    files = sum(1 for path in source.rglob("*.wav"))
    return {"recordings": files, **total, "one_and_two_workers_equal": equal, "held": held}


@click.command()
@click.option("--recordings", type=click.IntRange(SPEAKERS), default=1000, show_default=True)
@click.option("--kills", "rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(recordings: int, rounds: int, seed: int, out: Path | None) -> None:
    """Kill builds from recordings, and continue them.

    Exit codes: 0 every set was identical, 1 otherwise, 2 usage.
    """
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        work = Path(folder)
        source = make_recordings(work, recordings, seed)
        began = time.monotonic()
        result = torture(work, source, random.Random(seed), rounds)
        result["seconds"] = round(time.monotonic() - began, 1)
    click.echo(json.dumps(result))
    report = {"machine": msgspec.to_builtins(machine()), "seed": seed, "recordings": result}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if result["held"] else 1)


if __name__ == "__main__":
    main()
