"""Kill a program that packs its own features with `ShardWriter`, at random moments.

    python -m scripts.torture.program [--kills 100] [--out FILE.json]

The program adds utterances and closes its writer, which packs them with one or two workers. It is
killed (SIGKILL to it or to its process group), half of the times twice; then it runs to its end.
The set must be that of a program that nobody killed; a set that is there after a kill must be
complete.
Every other program asks `keep` before it adds.

Exit codes: 0 every set was identical, 1 otherwise, 2 usage.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import msgspec
from tqdm import tqdm

from scripts.torture.injuries import group
from scripts.torture.shards import contents
from shardprep import verify_shards
from shardprep.bench.machine import machine
from shardprep.format.manifest import MANIFEST_NAME, WORK_FOLDER

# Two workers take longer to start than all the rest.
WORKERS = (1, 1, 2)

# Slow on purpose where it packs (zstd 22), and where it adds, so that kills come everywhere.
PROGRAM = """
import sys, time
import numpy as np
import shardprep
folder, keeps, workers = sys.argv[1], sys.argv[2] == "keep", int(sys.argv[3])
options = dict(samples_per_shard=10, workers=workers, codec="zstd", level=22, dtype="float32")
with shardprep.ShardWriter(folder, 40, **options) as writer:
    for number in range(120):
        key = f"part-{number % 7}/{number:03d}"
        time.sleep(0.002)
        if keeps and writer.keep(key):
            continue
        mel = np.random.default_rng(number).normal(size=(60 + number, 40))
        writer.add(key, mel, f"id{number % 6}" if number % 5 else None)
"""


def run(folder: Path, keeps: bool, workers: int) -> subprocess.Popen[bytes]:
    """Start the program."""
    command = [sys.executable, "-c", PROGRAM, str(folder), "keep" if keeps else "add"]
    command.append(str(workers))
    return subprocess.Popen(command, start_new_session=True)


def finish(folder: Path, keeps: bool = False, workers: int = 1) -> float:
    """Run the program to its end; the seconds that it took."""
    began = time.monotonic()
    with run(folder, keeps, workers) as program:
        if program.wait():
            raise subprocess.CalledProcessError(program.returncode, "the program")
    return time.monotonic() - began


def kill_once(folder: Path, rng: random.Random, seconds: float) -> str | None:
    """Start the program and kill it; while it did what, or None if it had ended."""
    at = rng.uniform(0, 1.1 * seconds)
    with run(folder, rng.random() < 0.5, rng.choice(WORKERS)) as program:
        with suppress(subprocess.TimeoutExpired):
            program.wait(at)
        alive = program.poll() is None
        # If only the program is killed, its workers must end by themselves.
        with suppress(ProcessLookupError):
            (os.killpg if rng.random() < 0.5 else os.kill)(program.pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while group(program.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not group(program.pid), "workers were left behind"
    if not alive:
        return None
    if (folder / MANIFEST_NAME).exists() or list(folder.glob("*.tar")):
        return "publish"
    if list(folder.glob(f"{WORK_FOLDER}/*.tar*")):
        return "pack"
    return "add" if list(folder.glob(f"{WORK_FOLDER}/spool-*")) else "start"


def kills(work: Path, rng: random.Random, rounds: int) -> dict[str, Any]:
    """Kill programs at random moments and run them again."""
    folder, whole = work / "killed", work / "whole"
    seconds = finish(whole)
    expected = contents(whole)
    assert verify_shards(whole, deep=True).intact
    moments = dict.fromkeys(("start", "add", "pack", "publish"), 0)
    identical = incomplete = kept = 0
    for _ in tqdm(range(rounds), desc="kills", disable=None):
        shutil.rmtree(folder, ignore_errors=True)
        while (moment := kill_once(folder, rng, seconds)) is None:
            shutil.rmtree(folder)
        moments[moment] += 1
        if rng.random() < 0.5 and (again := kill_once(folder, rng, seconds)) is not None:
            moments[again] += 1
        if (folder / MANIFEST_NAME).exists():
            incomplete += not verify_shards(folder).intact
        kept += len(list(folder.glob(f"{WORK_FOLDER}/*.tar")))
        finish(folder, rng.random() < 0.5, rng.choice(WORKERS))
        identical += contents(folder) == expected
    return {
        "asked": rounds,
        "kills": sum(moments.values()),
        "moments": moments,
        "identical": identical,
        "incomplete_sets": incomplete,
        "finished_shards_kept": kept,
        "seconds_undisturbed": round(seconds, 2),
        "held": identical == rounds and not incomplete,
    }


@click.command()
@click.option("--kills", "rounds", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(rounds: int, seed: int, out: Path | None) -> None:
    """Kill programs that pack their own features, and run them again.

    Exit codes: 0 every set was identical, 1 otherwise, 2 usage.
    """
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        began = time.monotonic()
        result = kills(Path(folder), random.Random(seed), rounds)
        result["seconds"] = round(time.monotonic() - began, 1)
    click.echo(json.dumps(result))
    report = {"machine": msgspec.to_builtins(machine()), "seed": seed, "program": result}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if result["held"] else 1)


if __name__ == "__main__":
    main()
