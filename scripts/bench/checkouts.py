"""Compare the speed of the loader and of the training step in this checkout and in another one.

    git worktree add /tmp/before COMMIT
    python -m scripts.bench.checkouts /tmp/before shards/ [--pairs 10] [--out checkouts.json]

Both checkouts run in this environment, each time in new processes. The result is the median of the
ratios of all pairs.

- loader: segments a second of `SegmentLoader`, batches of 256 segments of 128 frames; the processes
  of a pair run one after the other;
- step: segments a second of CPU time of the training loop: a small boss model, batches of 32, on
  one thread, without validation. The processes of a pair run side by side, so that other load
  slows down both. Two processes of the same code differ by up to 9 %, by where their memory
  happens to lie, so that ten pairs are too few.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
train: {total_steps: 100000, valid_steps: 0, log_steps: 1, save_steps: 100000}
"""
BATCH, WARM_UP = 32, 10


def environment(checkout: Path) -> dict[str, str]:
    """The environment of a process that imports the packages of a checkout, on one thread."""
    places = f"{checkout}{os.pathsep}{checkout / 'trainer'}"
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def loader_rate(checkout: Path, shards: Path, seconds: float) -> float:
    """Segments a second of the loader, after a warm-up of the same length."""
    command = [sys.executable, "-c", LOADER, str(shards.resolve()), str(seconds)]
    # With -c, Python imports from the current folder first.
    done = subprocess.run(
        command,
        env=environment(checkout),
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def step_rates(checkouts: tuple[Path, Path], shards: tuple[Path, Path], steps: int) -> list[float]:
    """Segments a second of CPU time of two training loops that run side by side.

    The first `WARM_UP` steps do not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = zip(checkouts, shards, strict=True)
        runs = [_Run(*place, Path(folder, str(n))) for n, place in enumerate(places)]
        try:
            going = runs
            while going := [run for run in going if run.watch(steps)]:
                time.sleep(0.005)
        finally:
            for run in runs:
                run.process.kill()
                run.process.wait()
    return [BATCH * steps / run.seconds for run in runs]


class _Run:
    """A training in a process of its own, and the CPU time that its steps take."""

    def __init__(self, checkout: Path, shards: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "step.yaml").write_text(RECIPE)
        command = [sys.executable, str(checkout / "trainer/train.py"), "--config", "step.yaml"]
        command += ["--data.shards", str(shards.resolve()), "--train.runs", str(folder)]
        command += ["--train.trackers", "[]"]
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env=environment(checkout), cwd=folder, stdout=nowhere, stderr=nowhere
        )
        self.seconds = 0.0
        self._metrics = folder / "step" / "metrics.jsonl"
        self._began, self._first = 0.0, 0

    def watch(self, steps: int) -> bool:
        """Whether the training goes on; after `steps` steps it is stopped."""
        if self.process.poll() is not None:
            raise click.ClickException(f"a training ended early: {self.process.args}")
        done = 0
        if self._metrics.exists():
            done = self._metrics.read_bytes().count(b'"event": "train"')
        if done >= WARM_UP and not self._began:
            self._began, self._first = self._cpu_seconds(), done
        elif self._began and done >= self._first + steps:
            self.seconds = self._cpu_seconds() - self._began
            self.process.kill()
            return False
        return True

    def _cpu_seconds(self) -> float:
        # proc(5): utime and stime are the 14th and 15th field, and the 2nd may contain spaces.
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loader_rates(
    checkouts: tuple[Path, Path], shards: tuple[Path, Path], seconds: float
) -> list[float]:
    """Segments a second of the loader of each checkout, one after the other."""
    return [loader_rate(*place, seconds) for place in zip(checkouts, shards, strict=True)]


def compare(
    other: Path, shards: tuple[Path, Path], pairs: int, seconds: float, steps: int
) -> dict[str, Any]:
    """Rates of both checkouts, and the median of the ratios of this checkout to the other.

    Args:
        other: The other checkout.
        shards: The shard folder for this checkout, and the one for the other.
        pairs: Measurements of each.
        seconds: Length of each measurement of the loader.
        steps: Training steps of each measurement of the step.
    """
    found: dict[str, Any] = {"machine": msgspec.to_builtins(machine()), "pairs": pairs}
    for name, measure, size in (("loader", loader_rates, seconds), ("step", step_rates, steps)):
        here, there = [], []
        for pair in range(pairs):
            # The checkout that is first in one pair is second in the next.
            turn = 1 if pair % 2 else -1
            rates = measure((HERE, other)[::turn], shards[::turn], size)[::turn]
            here.append(rates[0])
            there.append(rates[1])
            click.echo(f"{name}: {here[-1]:,.0f}/s, before {there[-1]:,.0f}/s", err=True)
        ratios = [new / old for new, old in zip(here, there, strict=True)]
        found[name] = {
            "samples_per_s": round(statistics.median(here), 1),
            "samples_per_s_before": round(statistics.median(there), 1),
            "ratio": round(statistics.median(ratios), 3),
            "geometric_mean": round(statistics.geometric_mean(ratios), 3),
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
@click.option(
    "--other-shards",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Shard folder for OTHER, where it reads another version of the format.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file (JSON).")
def main(
    other: Path,
    shards: Path,
    pairs: int,
    seconds: float,
    steps: int,
    other_shards: Path | None,
    out: Path | None,
) -> None:
    """Compare this checkout with OTHER, reading and training on SHARDS."""
    result = compare(other.resolve(), (shards, other_shards or shards), pairs, seconds, steps)
    for name in ("loader", "step"):
        click.echo(f"{name}: {result[name]['ratio']:.3f} of before")
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
