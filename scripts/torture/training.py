"""Kill training at random moments, resume it, and compare it with an undisturbed run.

    python -m scripts.torture.training [--rounds 20] [--data shards/] [--out kills.json]

Each round is a run of the smoke recipe, in one process or in two, that saves a checkpoint every one
or two steps. SIGKILL ends either all processes, and the run is started again with --resume, or one
of two processes, and `torchrun --max-restarts` restarts the group. The moments are drawn from
--seed; some are while a checkpoint is written. At the end the losses and the weights must equal
those of the undisturbed run bit for bit.

Without --data, `scripts.synthetic` makes a small set. The result file (JSON) has the number of
rounds, the number of equal rounds, and when and what was killed in each round. Exit codes: 0 all
rounds equal, 1 some differ or did not end, 2 usage.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

import shardprep
from shardprep.bench.machine import machine
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.state import to_plain

SCRIPT = Path(__file__).resolve().parents[2] / "trainer" / "train.py"
STEPS = 24
# Fields of metrics.jsonl that depend on the time or on restarts.
TIMES = ("samples_per_second", "waiting", "network", "peak_memory_mib", "seconds")
PATIENCE_SECONDS = 300.0
LONGEST_DELAY_SECONDS = 0.1


@dataclass(frozen=True)
class Kill:
    """When and what to kill."""

    after_step: int
    """Wait until this step is in metrics.jsonl ..."""
    delay: float
    """... and then so long [s]."""
    rank: int | None
    """The process to kill; None for all processes and the launcher."""


def plan(rng: random.Random, processes: int, kills: int) -> list[Kill]:
    """Draw the kills of a run, in the order of their steps."""
    ranks = [None] if processes == 1 else [None, *range(processes)]
    steps = sorted(rng.sample(range(2, STEPS - 1), kills))
    return [Kill(step, rng.uniform(0, LONGEST_DELAY_SECONDS), rng.choice(ranks)) for step in steps]


def command(run: Path, shards: Path, processes: int, *options: str) -> list[str]:
    """The command line that trains into a run folder with a number of processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--max-restarts=9"]
        launcher += [f"--nproc_per_node={processes}"]
    settings = {
        "name": run.name,
        "data.shards": shards,
        "data.batch_size": 4,
        "train.runs": run.parent,
        "train.total_steps": STEPS,
        "train.valid_steps": 5,
        "train.log_steps": 1,
        "train.save_steps": 1 + processes % 2,
        "train.trackers": "[]",
    }
    given = [f"--{key}={value}" for key, value in settings.items()]
    return [*launcher, str(SCRIPT), "--config", "smoke", *given, *options]


def undisturbed(run: Path, shards: Path, processes: int) -> None:
    """Train to the end without kills."""
    subprocess.run(command(run, shards, processes), check=True, capture_output=True, env=_quiet())


def disturbed(run: Path, shards: Path, processes: int, kills: list[Kill]) -> bool:
    """Train with all kills; whether the run reached its end."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_started(command(run, shards, processes)))
        for kill in kills:
            if not _wait_for_step(run, kill.after_step, process):
                break
            time.sleep(kill.delay)
            if kill.rank is None:
                _kill_all(process)
                again = command(run, shards, processes, "--resume")
                process = stack.enter_context(_started(again))
            else:
                _kill_rank(process, kill.rank)
        return process.wait(PATIENCE_SECONDS) == 0


def outcome(run: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """What equal runs have in common: the records, and the last and the best weights."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    curve = [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]
    names = f"checkpoints/step-{STEPS:08d}.pt", "model/model.safetensors"
    states = [load(run / name) for name in names]
    return curve, [(x.step, x.best, list(_tensors(to_plain(x)))) for x in states]


def equal(a: Any, b: Any) -> bool:
    """Whether two outcomes are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def measure(folder: Path, shards: Path, rounds: int, kills: int, seed: int) -> dict[str, Any]:
    """Run all rounds, with one and two processes alternately."""
    rng, rows, expected = random.Random(seed), [], {}
    for processes in {1 + number % 2 for number in range(rounds)}:
        run = folder / f"undisturbed{processes}"
        undisturbed(run, shards, processes)
        expected[processes] = outcome(run)
    for number in range(rounds):
        processes, run = 1 + number % 2, folder / f"round{number}"
        planned = plan(rng, processes, kills)
        began = time.monotonic()
        ended = disturbed(run, shards, processes, planned)
        same = ended and equal(outcome(run), expected[processes])
        row = {"processes": processes, "kills": [asdict(kill) for kill in planned]}
        rows.append({**row, "ended": ended, "equal": same, "seconds": time.monotonic() - began})
        click.echo(f"round {number + 1}: {'equal' if same else 'DIFFERS'} {row}", err=True)
    equals = [row for row in rows if row["equal"]]
    return {"asked": rounds, "equal": len(equals), "seed": seed, "rounds": rows}


def synthesise(folder: Path) -> Path:
    """Make shards of a few speakers."""
    sizes = ["--speakers", "3", "--utterances", "12", "--frames-min", "70", "--frames-max", "150"]
    made = [sys.executable, "-m", "scripts.synthetic", str(folder), *sizes, "--workers", "1"]
    subprocess.run(made, check=True, capture_output=True)
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1)
    shardprep.build_shards(folder / "Dataset", folder / "shards", options)
    return folder / "shards"


@contextlib.contextmanager
def _started(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program with a process group of its own, which is killed at the end."""
    process = subprocess.Popen(
        words,
        env=_quiet(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill_all(process)


def _quiet() -> dict[str, str]:
    """The environment of a program that uses one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether the run reached a step before it ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = (run / "metrics.jsonl").read_text().splitlines()[-1]
            if json.loads(last)["step"] >= step:
                return True
        time.sleep(0.005)
    return False


def _descendants(process: subprocess.Popen[bytes]) -> list[int]:
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(place.name)] = int(
                (place / "stat").read_text().rpartition(")")[2].split()[1]
            )
    found = [process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    for pid in [process.pid, *_descendants(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _kill_rank(process: subprocess.Popen[bytes], rank: int) -> None:
    """Kill the process of a rank as soon as it exists."""
    while process.poll() is None:
        for pid in _descendants(process):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in words:
                    os.kill(pid, signal.SIGKILL)
                    return
        time.sleep(0.01)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=1), default=20, help="Number of runs to disturb.")
@click.option("--kills", type=click.IntRange(1, STEPS - 3), default=3, help="Kills in each run.")
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Shards to train on.  [default: synthesised]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Decides the moments of the kills."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Result file to write (JSON)."
)
def main(rounds: int, kills: int, data: Path | None, seed: int, out: Path | None) -> None:
    """Kill training at random moments, and compare the result with an undisturbed run."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        shards = data or synthesise(folder)
        found = measure(folder, shards.resolve(), rounds, kills, seed)
    result = {**asdict(machine()), "steps": STEPS, "kills_in_each_run": kills, **found}
    click.echo(f"{found['equal']} of {rounds} rounds equal the undisturbed run bit for bit")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(found["equal"] != rounds)


if __name__ == "__main__":
    main()
