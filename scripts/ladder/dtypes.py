"""Accuracy by the element type that shards store: the same recipes, seeds and data with each.

    python -m scripts.ladder.dtypes --data FOLDER [--rung boss] [--rung best] [--seed N]...
        [--segments 32000] [--width 144] [--override RECIPE.FIELD=VALUE] [--out FILE]

FOLDER holds Dataset/ in the homework's layout, and test_labels.csv. For every element type the
program builds a shard set of the same data, trains each recipe with each seed on it, and scores the
test split, as `scripts.ladder` does. Then it scores every model of float16 on the test split of
uint8 too: the same weights, so that only the rounding differs.

Training on slightly other numbers ends elsewhere, as training with another seed does. So the
question is whether the types differ by more than the seeds of one type. An interrupted program
continues where it stopped. Exit codes: 0 all runs done, 1 a run failed, 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import click

import shardprep
from scripts.ladder.__main__ import describe, plan, run_all
from scripts.ladder.jobs import Places, Settings, run_command
from scripts.ladder.summary import Run, spread
from scripts.ladder.trials import write_trials
from shardprep.bench.machine import machine
from shardprep_trainer.evaluation.labels import read_labels
from shardprep_trainer.predict import score_submission

DTYPES = ("float16", "uint8")
RUNGS = ("boss", "best")


def places_of(data: Path, work: Path, dtype: str) -> Places:
    """Where the files of one element type are."""
    return Places(data / "Dataset", data / "test_labels.csv", work / dtype)


def compare(runs: dict[str, list[Run]], swapped: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The test accuracies of each recipe by element type, and whether they differ.

    Args:
        runs: Finished runs by element type.
        swapped: For each model of float16, its answers on the test split of uint8; see `swap`.

    Returns:
        By recipe: `float16` and `uint8`, each the spread over its seeds; `difference` of the means;
        `seeds`, the largest difference between two seeds of one type; `within`, whether the means
        differ by no more than that; and `same_weights`, the sums of what `swap` found.
    """
    found = {}
    for rung in dict.fromkeys(run["rung"] for run in runs[DTYPES[0]]):
        accuracies = {
            dtype: [run["test_accuracy"] for run in runs[dtype] if run["rung"] == rung]
            for dtype in DTYPES
        }
        means = [statistics.fmean(accuracies[dtype]) for dtype in DTYPES]
        widest = max(max(own) - min(own) for own in accuracies.values())
        counts = [entry for entry in swapped if entry["rung"] == rung]
        found[rung] = {
            **{dtype: spread(own) for dtype, own in accuracies.items()},
            "difference": means[1] - means[0],
            "seeds": widest,
            "within": abs(means[1] - means[0]) <= widest,
            "same_weights": {
                key: sum(entry[key] for entry in counts)
                for key in ("utterances", "correct", "correct_on_uint8", "other_answers")
            },
        }
    return found


def swap(run: Run, float16: Places, uint8: Places) -> dict[str, Any]:
    """What a model of float16 answers on the test split of uint8.

    Returns:
        `rung`, `seed`, the number of test utterances, the correct answers on either split, and how
        many answers differ.
    """
    before = float16.work / "submissions" / f"{run['name']}.csv"
    after = before.with_suffix(".uint8.csv")
    if not after.exists():
        model = float16.work / "runs" / run["name"]
        command = [sys.executable, "-m", "shardprep", "predict", str(model), "--split", "test"]
        command += ["--shards", str(uint8.shards), "--out", str(after)]
        run_command(command, float16.work / "logs" / f"{run['name']}.uint8.log", 1, Event())
    answers = [read_labels(path) for path in (before, after)]
    return {
        "rung": run["rung"],
        "seed": run["seed"],
        "utterances": run["test_utterances"],
        "correct": run["test_correct"],
        "correct_on_uint8": score_submission(after, uint8.labels)[0],
        "other_answers": sum(answers[1][name] != answer for name, answer in answers[0].items()),
    }


def table(comparison: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| recipe | float16 | uint8 | seeds of one type differ by | same weights: other answers |",
        "|---|---|---|---|---|",
    ]
    for rung, found in comparison.items():
        cells = [
            f"{found[dtype]['mean']:.4f} ({found[dtype]['min']:.4f} to {found[dtype]['max']:.4f})"
            for dtype in DTYPES
        ]
        same = found["same_weights"]
        cells += [f"{found['seeds']:.4f}", f"{same['other_answers']} of {same['utterances']:,}"]
        lines.append(f"| {rung} | {' | '.join(cells)} |")
    return "\n".join(lines)


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--data", type=_FOLDER, required=True, help="Holds Dataset/ and test_labels.csv.")
@click.option("--rung", "rungs", multiple=True, type=click.Choice(RUNGS), default=RUNGS)
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0, 1, 2))
@click.option("--segments", type=_COUNT, default=32000, help="Training segments in each run.")
@click.option("--width", type=_COUNT, help="Narrow boss to this width.")
@click.option("--override", "overrides", multiple=True, help="RECIPE.FIELD=VALUE, repeatable.")
@click.option("--precision", type=click.Choice(["no", "bf16"]), default="no")
@click.option("--validations", type=_COUNT, default=2, help="Validations in each run.")
@click.option("--jobs", "parallel", type=_COUNT, default=1, help="Runs to do at the same time.")
@click.option("--threads", type=_COUNT, default=1, help="CPU threads of each run.")
@click.option("--work", type=click.Path(path_type=Path), default="runs/dtypes", help="Work folder.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file to write (JSON)."
)
def main(
    data: Path,
    rungs: tuple[str, ...],
    seeds: tuple[int, ...],
    parallel: int,
    threads: int,
    work: Path,
    out: Path | None,
    **options: Any,
) -> None:
    """Train recipes on shards of each element type, and print how their accuracies compare."""
    settings = Settings(**options)
    places = {dtype: places_of(data.absolute(), work.absolute(), dtype) for dtype in DTYPES}
    runs: dict[str, list[Run]] = {}
    failed: dict[str, str] = {}
    try:
        for dtype, own in places.items():
            build = shardprep.BuildOptions(dtype=dtype, overwrite=True)
            shardprep.build_shards(own.dataset, own.shards, build)
            write_trials(own.trials, own.dataset, own.labels)
            jobs = plan(rungs, seeds, settings, own)
            runs[dtype], wrong = run_all(jobs, own, parallel=parallel, threads=threads)
            failed |= {f"{dtype}: {name}": reason for name, reason in wrong.items()}
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command to continue", err=True)
        sys.exit(130)
    if failed:
        sys.exit(1)
    swapped = [swap(run, places["float16"], places["uint8"]) for run in runs["float16"]]
    comparison = compare(runs, swapped)
    click.echo(table(comparison))
    if out is not None:
        result = {
            **asdict(machine()),
            "dataset": describe(places["float16"]),
            "settings": {**asdict(settings), "seeds": seeds},
            "shard_bytes": {
                dtype: sum(file.stat().st_size for file in own.shards.glob("*.tar"))
                for dtype, own in places.items()
            },
            "recipes": comparison,
            "same_weights": swapped,
        }
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
