"""What few recordings of one's own speakers give: train anew, fine-tune, or only enrol.

    python -m scripts.own_data RECORDINGS... --model MODEL [--count 5]... [--seed 0]...
        [--segments 2400] [--out FILE.json]

Each RECORDINGS is a folder of speakers. The last recordings of every speaker, in the order of their
paths, are for testing: recordings of one session lie in one folder, so most of them are from
sessions that training never meets. Of the others, --count are drawn for each speaker. They become a
set with the features of MODEL, one of every five for validation, and three ways are compared on the
same test recordings:

- enrolled: no training. Each speaker is the mean embedding of the recordings, by MODEL as it is
  (`shardprep score --backend wccn`).
- from scratch: a model of the same shape, trained on these recordings alone.
- fine-tuned: the same, but with `train.start_from MODEL`.

Accuracy and equal error rate are those of `shardprep score --split test`. All models have the
recipe of MODEL and get the same number of segments.

Exit codes: 0 done, 1 a command failed, 2 usage.
"""

from __future__ import annotations

import csv
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from shardprep.bench.machine import machine
from shardprep.source.recordings.names import is_recording
from shardprep_trainer.checkpoint.files import load
from shardprep_trainer.checkpoint.find import find_checkpoint

WAYS = ("enrolled", "from scratch", "fine-tuned")
# Of the recordings of a speaker: how many are for testing, and one of how many for validation.
TESTED, VALIDATED = 5, 5
Speakers = dict[str, list[Path]]
Row = tuple[str, str, str]


def find_recordings(folders: Sequence[Path]) -> Speakers:
    """The recordings of each speaker, in the order of their paths."""
    found: Speakers = {}
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if is_recording(file.name):
                speaker = f"{folder.name}-{file.relative_to(folder).parts[0]}"
                found.setdefault(speaker, []).append(file.resolve())
    return found


def divide(speakers: Speakers, count: int, seed: int) -> list[Row]:
    """The rows of a list: path, speaker and split of every recording that is used.

    Args:
        speakers: The recordings of each speaker.
        count: How many of each speaker are for training and validation.
        seed: Which of them.

    Raises:
        ValueError: A speaker has too few.
    """
    rows = []
    for speaker, files in speakers.items():
        others, tested = files[:-TESTED], files[-TESTED:]
        if len(others) < count:
            raise ValueError(f"{speaker} has {len(files)} recordings, not {count + TESTED}")
        drawn = random.Random(f"{seed}/{speaker}").sample(others, count)
        for number, file in enumerate(drawn):
            split = "val" if number % VALIDATED == VALIDATED - 1 else "train"
            rows.append((str(file), speaker, split))
        rows += [(str(file), speaker, "test") for file in tested]
    return rows


def work_of(
    rows: Sequence[Row], model: Path, folder: Path, segments: int, seed: int, options: Sequence[str]
) -> dict[str, Any]:
    """Build the set of a list, and measure all ways on it.

    Raises:
        subprocess.CalledProcessError: A command failed; its output was shown.
    """
    folder.mkdir(parents=True)
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "speaker", "split"), *rows])
    shards = str(folder / "shards")
    _run("build", str(folder / "list.csv"), shards, "--follow-links", "--features-from", str(model))
    config = load(find_checkpoint(model)).config
    (folder / "recipe.yaml").write_text(config.to_yaml())
    steps = max(10, segments // config.data.batch_size)
    train = ["train", "--config", str(folder / "recipe.yaml"), "--data.shards", shards]
    train += ["--train.runs", str(folder / "runs"), "--train.seed", str(seed), *options]
    train += ["--train.total_steps", str(steps), "--optim.warmup_steps", str(steps // 10)]
    train += ["--train.valid_steps", str(steps // 4), "--train.save_steps", str(steps)]
    train += ["--train.trackers", "[]", "--train.start_from"]
    found = {WAYS[0]: _score(model, shards, "wccn")}
    for way, start in ((WAYS[1], "null"), (WAYS[2], str(model))):
        _run(*train, start, "--name", way.replace(" ", "-"))
        found[way] = _score(folder / "runs" / way.replace(" ", "-"), shards, "wccn")
    return found


def _score(model: Path, shards: str, backend: str) -> dict[str, float]:
    words = ("score", str(model), "--shards", shards, "--split", "test", "--backend", backend)
    told = json.loads(_run(*words, "--json"))
    return {name: told[name] for name in ("accuracy", "eer", "utterances", "trials")}


def _run(*words: str) -> str:
    """Run a command of `shardprep`; its standard output."""
    click.echo(f"shardprep {shlex.join(words)}", err=True)
    command = [sys.executable, "-m", "shardprep", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(found: dict[int, list[dict[str, Any]]]) -> str:
    """The results in Markdown: a row for each number of recordings, the mean over the seeds."""
    head = " | ".join(f"{way}: accuracy | EER" for way in WAYS)
    lines = [f"| recordings a speaker | {head} |", "|---" * (1 + 2 * len(WAYS)) + "|"]
    for count, runs in found.items():
        cells = [
            f"{statistics.mean(run[way][name] for run in runs):.3f}"
            for way in WAYS
            for name in ("accuracy", "eer")
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.argument(
    "recordings",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--count", "counts", multiple=True, type=click.IntRange(2), default=(5, 10, 15))
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0, 1))
@click.option("--segments", type=click.IntRange(320), default=2400, help="Of each training.")
@click.option("--override", "overrides", multiple=True, help="FIELD=VALUE for both trainings.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Result (JSON).")
def main(
    recordings: tuple[Path, ...],
    model: Path,
    counts: tuple[int, ...],
    seeds: tuple[int, ...],
    segments: int,
    overrides: tuple[str, ...],
    out: Path | None,
) -> None:
    """Compare ways to know speakers of whom there are few recordings."""
    speakers = find_recordings(recordings)
    options = [
        word for one in overrides for word in (f"--{one.partition('=')[0]}", one.partition("=")[2])
    ]
    found: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="own-data-") as work:
        for count in counts:
            for seed in seeds:
                try:
                    rows = divide(speakers, count, seed)
                except ValueError as error:
                    raise click.UsageError(f"--count {count}: {error}") from None
                folder = Path(work) / f"{count}-{seed}"
                try:
                    result = work_of(rows, model, folder, segments, seed, options)
                except subprocess.CalledProcessError as error:
                    click.echo(
                        f"error: {shlex.join(error.cmd)}: exit code {error.returncode}", err=True
                    )
                    sys.exit(1)
                found.setdefault(count, []).append(result)
    click.echo(table(found))
    if out is not None:
        step = load(find_checkpoint(model)).step
        about = {**asdict(machine()), "speakers": len(speakers), "segments": segments}
        out.write_text(json.dumps({**about, "model_step": step, "counts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
