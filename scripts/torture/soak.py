"""Read, train, kill and resume for a given time, and check that nothing grows.

    python -m scripts.torture.soak [--dataset Dataset/] [--minutes 10] [--out FILE.json]

The program builds a shard set, and then does the same in every round:

- It reads epochs of `SegmentLoader` in both orders and of `UtteranceLoader` in this process. It
  opens the set again each time, and interrupts and resumes the epochs at random places.
- It starts or resumes a training run of two processes, and kills it (SIGKILL to one process or to
  all) at a random moment. When the run has done its last step, another run begins.

After each round it records the resident memory, file descriptors, memory maps and threads of this
process, the largest resident memory of a training process, the number of files in /dev/shm, and the
processes that a killed run left. Memory counts as flat if the median (for training processes: the
maximum) of the last quarter of the rounds is at most --growth MiB above that of the second quarter.
Other programs that use /dev/shm disturb the result; `unshare -m` with its own tmpfs avoids that.

Exit codes: 0 nothing grew, 1 something grew, 2 usage.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

import shardprep
from scripts.torture.injuries import group
from shardprep.bench.machine import machine

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
STEPS = 400


@dataclass
class Round:
    """The figures after a round."""

    seconds: float
    """Since the start."""
    memory_mib: float
    """Resident memory of this process."""
    descriptors: int
    maps: int
    threads: int
    epochs: int
    """Epochs read in this process so far."""
    steps: int
    """Steps that training had done when it was killed."""
    training_mib: float
    """Largest resident memory of a training process in this round."""
    orphans: int
    """Processes of a killed run that still existed 30 s later."""
    shared_files: int
    """Files in /dev/shm that did not exist at the start."""


class Reader:
    """Epochs in this process."""

    def __init__(self, shards: Path, rng: random.Random) -> None:
        self.shards = shards
        self.rng = rng
        self.epochs = 0
        self.states: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Read a few epochs, from where the last round stopped."""
        shard_set = shardprep.open_shards(self.shards)
        for order in ("global", "windowed"):
            loader = shardprep.SegmentLoader(
                shard_set["train"], batch_size=16, order=order, lanes=2, verify_reads="once"
            )
            if order in self.states:
                loader.load_state_dict(self.states[order])
            end = loader.epoch + 3
            while loader.epoch < end:
                left = self.rng.randrange(1, 2 * len(loader))
                for _, batch in zip(range(left), loader, strict=False):
                    assert batch["mel"].isfinite().all()
            self.epochs += 3
            self.states[order] = loader.state_dict()
        seen = sum(len(batch["index"]) for batch in shardprep.UtteranceLoader(shard_set["val"]))
        assert seen == len(shard_set["val"])


class Training:
    """A run that is killed again and again."""

    def __init__(self, shards: Path, runs: Path, rng: random.Random) -> None:
        self.shards = shards
        self.runs = runs
        self.rng = rng
        self.number = 0
        self.kills = 0
        self.finished = 0

    def train(self) -> tuple[int, float, int]:
        """Start or resume the run, and kill it; steps done, largest memory [MiB], orphans."""
        name = f"run{self.number}"
        folder = self.runs / name
        resumes = any((folder / "checkpoints").glob("step-*.pt"))
        options = {
            "--config": "smoke",
            "--name": name,
            "--train.runs": self.runs,
            "--data.shards": self.shards,
            "--train.total_steps": STEPS,
            "--train.save_steps": 10,
            "--train.valid_steps": 40,
            "--train.log_steps": 1,
            "--train.trackers": "[]",
        }
        launch = ["accelerate", "launch", "--cpu", "--num_processes", "2", "trainer/train.py"]
        words = [str(word) for pair in options.items() for word in pair]
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch[1:], *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(
            [*command, *(["--resume"] if resumes else [])],
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        memory = self._watch(run, time.monotonic() + self.rng.uniform(6, 25))
        if run.poll() is None:
            self.kills += 1
            self._kill(run)
        else:
            self.finished += 1
            self.number += 1
        run.wait()
        end = time.monotonic() + 30
        while (left := group(run.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return steps_of(folder / "metrics.jsonl"), memory, len(left)

    def _watch(self, run: subprocess.Popen[bytes], until: float) -> float:
        most = 0.0
        while run.poll() is None and time.monotonic() < until:
            most = max([most, *(resident_mib(pid) for pid in group(run.pid))])
            time.sleep(0.1)
        return most

    def _kill(self, run: subprocess.Popen[bytes]) -> None:
        """SIGKILL to all processes, or to one; the others must then end by themselves."""
        members = group(run.pid)
        if members and self.rng.random() < 0.5:
            os.kill(self.rng.choice(members), signal.SIGKILL)
        else:
            os.killpg(run.pid, signal.SIGKILL)


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process [MiB], 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def steps_of(metrics: Path) -> int:
    """The last step that a run has recorded."""
    if not metrics.exists():
        return 0
    last = 0
    for line in metrics.read_text().splitlines():
        try:
            last = json.loads(line)["step"]
        except (ValueError, KeyError):
            # The kill came while this line was written.
            continue
    return last


def own_state() -> dict[str, float]:
    """Memory, descriptors, maps and threads of this process."""
    gc.collect()
    return {
        "memory_mib": resident_mib("self"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": threading.active_count(),
    }


def summarise(rounds: list[Round], growth: float) -> dict[str, Any]:
    """How each figure changed, and whether it stayed below its limit."""
    quarter = max(1, len(rounds) // 4)
    early, late = rounds[quarter : 2 * quarter] or rounds[:1], rounds[-quarter:]

    def medians(name: str) -> tuple[float, float]:
        first, last = ([getattr(one, name) for one in part] for part in (early, late))
        return statistics.median(first), statistics.median(last)

    figures: dict[str, Any] = {}
    limits = {"memory_mib": growth, "descriptors": 0, "maps": 5, "threads": 0}
    for name, limit in {**limits, "training_mib": growth}.items():
        first, last = medians(name)
        if name == "training_mib":
            # Not the median: a run that is killed while it starts has not used its memory yet.
            first, last = (max(one.training_mib for one in part) for part in (early, late))
        held = last - first <= limit
        figures[name] = {"second_quarter": first, "last_quarter": last, "held": held}
    for name in ("orphans", "shared_files"):
        most = max(getattr(one, name) for one in rounds)
        figures[name] = {"most": most, "held": most == 0}
    return figures


@click.command()
@click.option(
    "--dataset",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Data.  [default: synthesised]",
)
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True
)
@click.option(
    "--growth",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Allowed growth of memory [MiB].",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(dataset: Path | None, minutes: float, growth: float, seed: int, out: Path | None) -> None:
    """Read, train, kill and resume for some minutes, and check that nothing grows.

    Exit codes: 0 nothing grew, 1 something grew, 2 usage.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        work = Path(folder)
        if dataset is None:
            sample = work / "sample"
            dataset = sample / "Dataset"
            size = ["--speakers", "6", "--utterances", "40", "--frames-min", "50"]
            size += ["--frames-max", "300", "--test-utterances", "10", "--seed", str(seed)]
            subprocess.run(
                [sys.executable, "-m", "scripts.synthetic", str(sample), *size], check=True
            )
        shards = work / "shards"
        options = shardprep.BuildOptions(samples_per_shard=20, workers=1)
        shardprep.build_shards(dataset, shards, options)
        reader, training = Reader(shards, rng), Training(shards, work / "runs", rng)
        before = set(os.listdir(SHARED_MEMORY))
        rounds: list[Round] = []
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes or len(rounds) < 2:
            reader.read()
            steps, memory, orphans = training.train()
            more = len(set(os.listdir(SHARED_MEMORY)) - before)
            state: Any = own_state()
            seconds = round(time.monotonic() - began, 1)
            rounds.append(
                Round(
                    seconds=seconds,
                    epochs=reader.epochs,
                    steps=steps,
                    training_mib=memory,
                    orphans=orphans,
                    shared_files=more,
                    **state,
                )
            )
            click.echo(json.dumps(asdict(rounds[-1])))
    figures = summarise(rounds, growth)
    click.echo(json.dumps(figures, indent=1))
    if out is not None:
        report = {
            "machine": msgspec.to_builtins(machine()),
            "minutes": round(rounds[-1].seconds / 60, 1),
            "kills": training.kills,
            "runs_finished": training.finished,
            "epochs_read": reader.epochs,
            "figures": figures,
            "rounds": [asdict(one) for one in rounds],
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(figure["held"] for figure in figures.values()) else 1)


if __name__ == "__main__":
    main()
