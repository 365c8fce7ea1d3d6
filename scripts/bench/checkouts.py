"""Compare the speed of the loader and of the training step in this checkout and in another one.

    git worktree add /tmp/before COMMIT
    python -m scripts.bench.checkouts /tmp/before shards/ [--pairs 10] [--out checkouts.json]

Both checkouts run in this environment, one after the other, each time in new processes. The result
is the median of the ratios of all pairs, because both of a pair see about the same machine load.

- loader: segments a second of `SegmentLoader`, batches of 256 segments of 128 frames;
- step: segments a second of the training loop, from `metrics.jsonl`: a small boss model, batches of
  32, on one thread, without validation.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from shardprep.bench.machine import machine

HERE = Path(__file__).resolve().parents[2]

LOADER = """
import itertools, sys, time, shardprep
train = shardprep.open_shards(sys.argv[1])["train"]
loader = shardprep.SegmentLoader(train, batch_size=256, segment_frames=128)
seconds, batches = float(sys.argv[2]), itertools.chain.from_iterable(itertools.repeat(loader))
found = []
for _ in range(2):
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        count += len(next(batches)["label"])
    found.append(count / passed)
print(found[-1])
"""

RECIPE = """
name: step
data: {segment_frames: 128, batch_size: 32}
model:
  {encoder: conformer, dim: 144, layers: 1, heads: 4, head_dim: 36, ff_dim: 576, conv_expansion: 2,
   kernel_size: 31, dropout: 0.1, pooling: self_attentive, classifier: cosine}
loss: {name: am_softmax, margin: 0.2, scale: 30.0}
optim: {lr: 0.001, warmup_steps: 4}
train: {total_steps: STEPS, valid_steps: 0, log_steps: 10, save_steps: 100000}
"""


def environment(checkout: Path) -> dict[str, str]:
    """The environment of a process that imports the packages of a checkout, on one thread."""
    places = f"{checkout}{os.pathsep}{checkout / 'trainer'}"
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def loader_rate(checkout: Path, shards: Path, seconds: float) -> float:
    """Segments a second of the loader, after a warm-up of the same length."""
    command = [sys.executable, "-c", LOADER, str(shards), str(seconds)]
    done = subprocess.run(
        command, env=environment(checkout), check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def step_rate(checkout: Path, shards: Path, steps: int) -> float:
    """Segments a second of the training loop: the median over its log records but the first."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "step.yaml"
        recipe.write_text(RECIPE.replace("STEPS", str(steps)))
        command = [sys.executable, str(checkout / "trainer/train.py"), "--config", str(recipe)]
        command += ["--data.shards", str(shards.resolve()), "--train.runs", folder]
        command += ["--train.trackers", "[]"]
        subprocess.run(
            command, env=environment(checkout), check=True, capture_output=True, cwd=folder
        )
        lines = (Path(folder) / "step" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rates = [row["samples_per_second"] for row in records if row["event"] == "train"]
    return statistics.median(rates[1:])


def compare(other: Path, shards: Path, pairs: int, seconds: float, steps: int) -> dict[str, Any]:
    """Rates of both checkouts, and the median of the ratios of this checkout to the other."""
    found: dict[str, Any] = {"machine": msgspec.to_builtins(machine()), "pairs": pairs}
    for name, measure in (
        ("loader", lambda place: loader_rate(place, shards, seconds)),
        ("step", lambda place: step_rate(place, shards, steps)),
    ):
        here, there = [], []
        for pair in range(pairs):
            # The checkout that is first in one pair is second in the next.
            for place, rates in ((HERE, here), (other, there))[:: 1 if pair % 2 else -1]:
                rates.append(measure(place))
            click.echo(f"{name}: {here[-1]:,.0f}/s, before {there[-1]:,.0f}/s", err=True)
        ratios = [new / old for new, old in zip(here, there, strict=True)]
        found[name] = {
            "samples_per_s": round(statistics.median(here), 1),
            "samples_per_s_before": round(statistics.median(there), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return found


@click.command()
@click.argument("other", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("shards", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--pairs", default=10, show_default=True)
@click.option(
    "--seconds", default=2.0, show_default=True, help="Length of each measurement of the loader."
)
@click.option("--steps", default=60, show_default=True, help="Training steps in each measurement.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file (JSON).")
def main(
    other: Path, shards: Path, pairs: int, seconds: float, steps: int, out: Path | None
) -> None:
    """Compare this checkout with OTHER, reading and training on SHARDS."""
    result = compare(other.resolve(), shards, pairs, seconds, steps)
    for name in ("loader", "step"):
        click.echo(f"{name}: {result[name]['ratio']:.3f} of before")
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
