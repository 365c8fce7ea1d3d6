"""The runs of a ladder: their commands, their processes and their results."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from scripts.ladder.summary import Run
from scripts.ladder.trials import verify_embeddings
from shardprep import publish
from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.predict import score_submission

HOMEWORK_BATCH = 32
HEADS, FF_MULT = 4, 4
# The recipes that --width changes: simple and medium are narrow anyway, `best` has other widths.
NARROWED = ("strong", "boss")
# Recipes that start from a run of another recipe.
TUNED = {"best-lm": "best"}
TRAIN = RECIPES.parents[1] / "train.py"
SHARDPREP = (sys.executable, "-m", "shardprep")
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Settings:
    """What all runs of a ladder share.

    Attributes:
        segments: Training segments of a run; of both together where a run starts from another.
        width: Width of the Conformer blocks; None for the recipes' own.
        precision: Mixed precision of our runs; the homework's is float32.
        warmup_share: Share of the steps in which the learning rate rises.
        validations: Validations in each run.
        overrides: `RECIPE.FIELD=VALUE`, each for one of our recipes.
        cpu: Whether to use the CPU although there is a GPU.
        tuning_share: Share of the segments that is left to a run that starts from another.
    """

    segments: int = 48000
    width: int | None = None
    precision: str = "no"
    warmup_share: float = 0.1
    validations: int = 15
    overrides: tuple[str, ...] = ()
    cpu: bool = True
    tuning_share: float = 0.1


@dataclass(frozen=True)
class Places:
    """Where a ladder's files are: the data set, its test labels, and the work folder."""

    dataset: Path
    labels: Path
    work: Path

    @property
    def shards(self) -> Path:
        """The shards that our runs read."""
        return self.work / "shards"

    @property
    def trials(self) -> Path:
        """The pairs of test utterances for speaker verification, the same for all runs."""
        return self.work / "trials.txt"


@dataclass(frozen=True)
class Job:
    """One run of one rung.

    Attributes:
        rung: Which rung.
        seed: Its seed.
        name: Name of its folder and files; other settings give another name.
        steps: Optimiser steps.
        batch_size: Segments a step.
        train: The command that trains. The homework's command also predicts, and prints JSON.
        score: The command that prints the measures of the test split as JSON, for recipes.
        start: The run that this one starts from.
    """

    rung: str
    seed: int
    name: str
    steps: int
    batch_size: int
    train: tuple[str, ...]
    score: tuple[str, ...] = ()
    start: Job | None = None

    @property
    def label(self) -> str:
        """What is told of it to people."""
        return f"{self.rung}, seed {self.seed}"

    @property
    def trainings(self) -> list[Job]:
        """The run that this one starts from, if any, and this one."""
        return [*([self.start] if self.start else []), self]

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """All commands, in order."""
        return [*(job.train for job in self.trainings), *([self.score] if self.score else [])]

    @property
    def segments(self) -> int:
        """Training segments, without those of the run that this one starts from."""
        return self.steps * self.batch_size


def plan_job(rung: str, seed: int, settings: Settings, places: Places, data: str) -> Job:
    """The commands of a run.

    Args:
        rung: "homework" or the name of a recipe.
        seed: Its seed.
        settings: What all runs share.
        places: Where files are.
        data: Digest of the data set.

    Raises:
        ConfigError: The recipe does not allow these settings.
        OSError: There is no such recipe.
    """
    if rung == "homework":
        return _plan_homework(seed, settings, places, data)
    start = None
    if rung in TUNED:
        share = round(settings.segments * settings.tuning_share)
        first = replace(settings, segments=settings.segments - share)
        start = plan_job(TUNED[rung], seed, first, places, data)
        settings = replace(settings, segments=settings.segments - start.segments)
    recipe = RECIPES / f"{rung}.yaml"
    options = ["--config", str(recipe), *_narrow(rung, settings.width)]
    options += _overrides(rung, settings.overrides)
    asked = parse_args(options).config
    batch_size = asked.data.batch_size * asked.train.accumulate
    steps = max(1, settings.segments // batch_size)
    every = max(1, steps // settings.validations)
    options += ["--optim.warmup_steps", str(int(steps * settings.warmup_share))]
    options += ["--train.total_steps", str(steps), "--train.seed", str(seed)]
    options += ["--train.valid_steps", str(every), "--train.save_steps", str(every)]
    options += ["--train.log_steps", str(max(1, steps // 50)), "--train.trackers", "[]"]
    config = parse_args(options).config
    about = [config.to_dict(), settings.precision, settings.cpu, data]
    name = _name(rung, seed, [*about, start.name] if start else about)
    runs = places.work / "runs"
    options += ["--train.start_from", str(runs / start.name)] if start else []
    options += ["--name", name, "--train.runs", str(runs), "--data.shards", str(places.shards)]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--cpu"] if settings.cpu else []
    launch += ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", settings.precision, str(TRAIN)]
    return Job(
        rung=rung,
        seed=seed,
        name=name,
        steps=steps,
        batch_size=batch_size,
        train=(*launch, *options),
        score=score_command(places, [name]),
        start=start,
    )


def score_command(places: Places, names: Sequence[str]) -> tuple[str, ...]:
    """The command that prints measures of the test split as JSON, of several runs combined."""
    runs = [str(places.work / "runs" / name) for name in names]
    split = ("--shards", str(places.shards), "--split", "test", "--labels", str(places.labels))
    trials = ("--trials", str(places.trials), "--as-norm", "--json")
    return (*SHARDPREP, "score", *runs, *split, *trials)


def _plan_homework(seed: int, settings: Settings, places: Places, data: str) -> Job:
    steps = max(1, settings.segments // HOMEWORK_BATCH)
    options = ["--steps", str(steps), "--batch", str(HOMEWORK_BATCH), "--seed", str(seed)]
    options += ["--warmup", str(int(steps * settings.warmup_share))]
    options += ["--valid-steps", str(max(1, steps // settings.validations))]
    if settings.width is not None:
        options += ["--width", str(settings.width), "--heads", str(HEADS)]
        options += ["--head-dim", str(settings.width // HEADS)]
    name = _name("homework", seed, [options, settings.cpu, data])
    script = [sys.executable, "-m", "scripts.bench_train.homework_baseline", str(places.dataset)]
    out = ["--out", str(_submission(places, name)), "--json"]
    out += ["--embeddings", str(_embeddings(places, name))]
    return Job("homework", seed, name, steps, HOMEWORK_BATCH, (*script, *options, *out))


def _overrides(rung: str, overrides: Sequence[str]) -> list[str]:
    """The options of a recipe; a model that starts from another takes the sizes of that one."""
    options = []
    for override in overrides:
        name, _, value = override.partition("=")
        recipe, _, field = name.partition(".")
        if recipe == rung or (recipe == TUNED.get(rung) and field.startswith("model.")):
            options += [f"--{field}", value]
    return options


def _narrow(rung: str, width: int | None) -> list[str]:
    if width is None or rung not in NARROWED:
        return []
    sizes = {"dim": width, "heads": HEADS, "head_dim": width // HEADS, "ff_dim": FF_MULT * width}
    return [word for key, size in sizes.items() for word in (f"--model.{key}", str(size))]


def _name(rung: str, seed: int, about: Sequence[Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{rung}-s{seed}-{digest[:8]}"


def _submission(places: Places, name: str) -> Path:
    return places.work / "submissions" / f"{name}.csv"


def _embeddings(places: Places, name: str) -> Path:
    return places.work / "submissions" / f"{name}.npz"


def data_digest(dataset: Path) -> str:
    """A digest of what the data set lists."""
    files = [dataset / name for name in ("metadata.json", "testdata.json")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def result_file(places: Places, job: Job) -> Path:
    """The file of a run's result; it exists only if the run is finished."""
    return places.work / "results" / f"{job.name}.json"


def run_job(job: Job, places: Places, threads: int, stop: Event) -> Run:
    """Do a run, or read its result if it was finished earlier.

    Args:
        job: The run.
        places: Where files are.
        threads: Threads that its processes may compute with.
        stop: Ends the run when set.

    Raises:
        RuntimeError: A command failed; the message names its log.
    """
    kept = result_file(places, job)
    for folder in ("logs", "submissions", "results", "runs"):
        (places.work / folder).mkdir(parents=True, exist_ok=True)
    log = places.work / "logs" / f"{job.name}.log"
    if kept.exists():
        run: Run = json.loads(kept.read_text())
    else:
        run = _train_and_score(job, places, log, threads, stop)
        keep(kept, run)
    if not job.score and "eer" not in run and places.trials.exists():
        run.update(verify_embeddings(_embeddings(places, job.name), places.trials))
        keep(kept, run)
    return run


def measures(
    score: Sequence[str], places: Places, log: Path, threads: int, stop: Event
) -> dict[str, Any]:
    """What a command of `score_command` finds: accuracies, plain and normalised trials.

    Trials are left out where the test split makes none.
    """
    if not places.trials.exists():
        score = (*score[: score.index("--trials")], "--pairs", "0", "--json")
    answer = json.loads(run_command(score, log, threads, stop))
    found = {
        "test_accuracy": answer["accuracy"],
        "test_correct": round(answer["accuracy"] * answer["labelled"]),
        "test_utterances": answer["labelled"],
        "top5_accuracy": answer["top5_accuracy"],
    }
    if answer["plain"] is not None:
        found |= answer["plain"]
        found |= {f"{key}_as_norm": answer[key] for key in ("eer", "min_dcf")}
    return found


def keep(file: Path, run: Run) -> None:
    """Write the result of a finished run."""
    with publish(file) as out:
        out.write((json.dumps(run, indent=2) + "\n").encode())


def _train_and_score(job: Job, places: Places, log: Path, threads: int, stop: Event) -> Run:
    began, resumed, answer = time.perf_counter(), False, ""
    for training in job.trainings:
        command = training.train
        if any((places.work / "runs" / training.name / "checkpoints").glob("step-*.pt")):
            command, resumed = (*command, "--resume"), True
        answer = run_command(command, log, threads, stop)
    seconds = time.perf_counter() - began
    if job.score:
        metrics = places.work / "runs" / job.name / "metrics.jsonl"
        measured = {"seconds": None if resumed else seconds, **read_metrics(metrics)}
        measured |= measures(job.score, places, log, threads, stop)
    else:
        measured = json.loads(answer)
        correct, total = score_submission(_submission(places, job.name), places.labels)
        measured |= {
            "test_accuracy": correct / total,
            "test_correct": correct,
            "test_utterances": total,
        }
    return {
        "rung": job.rung,
        "seed": job.seed,
        "name": job.name,
        "batch_size": job.batch_size,
        "steps": job.steps,
        **measured,
    }


def run_command(command: Sequence[str], log: Path, threads: int, stop: Event) -> str:
    """Run a command, log its stderr and a copy of its stdout, and return the stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a+") as errors, log.with_suffix(".out").open("w+") as answer:
        # A process group of its own: a signal to the launcher alone would not end the training.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        while process.poll() is None:
            if stop.wait(_POLL_SECONDS):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        answer.seek(0)
        text = answer.read()
        errors.write(text)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}; {log} tells why")
    return text


def read_metrics(file: Path) -> dict[str, Any]:
    """The best validation of a run and medians of its rates, from `metrics.jsonl`."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    valid = [record["accuracy"] for record in records if record["event"] == "valid"]
    train = [record for record in records if record["event"] == "train"]
    return {
        "val_accuracy": max(valid),
        "samples_per_s": statistics.median(record["samples_per_second"] for record in train),
        "waiting": statistics.median(record["waiting"] for record in train),
        "peak_memory_mib": max(record["peak_memory_mib"] for record in train),
    }
