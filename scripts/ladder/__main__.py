"""Train every rung of the homework's ladder on one data set, and compare them.

    python -m scripts.ladder --data FOLDER [--segments 48000] [--rung NAME]... [--seed N]...
        [--width 144] [--jobs 2] [--override RECIPE.FIELD=VALUE] [--dry-run]

FOLDER holds Dataset/ in the homework's layout, and test_labels.csv with the true speakers of the
test utterances. These labels are used for scoring only.

The rungs are the homework's code as published (`homework_baseline.py`), then our recipes simple,
medium, strong, boss, best, best-lm, trunk and mfa. Each recipe is trained by the command that a
user would give. All runs get the same number of training segments; the number of steps is
--segments divided by the segments in a step. best-lm starts from a run of best that is as much
shorter (--tuning-share), so that both together have this number. The checkpoint with the highest
validation accuracy, by the model's head, is the one that is tested. Test accuracy is measured on
whole utterances with the recipe's backend, the EER on pairs of test utterances, the same pairs for
all runs, by plain and by normalised scores (AS-norm).

Finished runs are also scored together, by `shardprep score RUN1 RUN2 ...`: all seeds of best, and
best with trunk for each seed.

The work folder keeps the result of each finished run, and such a run is not repeated. An
interrupted run continues from its newest checkpoint. --width makes the Conformers of homework,
strong and boss equally narrow (4 heads, feed-forward 4 x width), so that CPUs suffice; use
--override to make the others narrow, such as 'best.model.encoder_options={"dim": 96, ...}' with all
options of the encoder. What it sets of best's model holds for best-lm, too. Without --width the
models have their full width. A GPU is used where there is one. Exit codes: 0 all runs done, 1 a run
failed, 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import click
import torch

import shardprep
from scripts.ladder.combinations import Combination, plan_combinations, run_combination
from scripts.ladder.jobs import HEADS, Job, Places, Settings, data_digest, plan_job, run_job
from scripts.ladder.summary import RUNGS, Run, summarise, table
from scripts.ladder.trials import write_trials
from shardprep.bench.machine import machine
from shardprep_trainer.config.command_line import RECIPES
from shardprep_trainer.errors import TrainerError
from shardprep_trainer.model.cpu_kernels import SLOW_BFLOAT16, is_slow_in_bfloat16


def plan(
    rungs: Sequence[str], seeds: Sequence[int], settings: Settings, places: Places
) -> list[Job]:
    """All runs, seed after seed: an interrupted ladder then has complete seeds to compare."""
    digest = data_digest(places.dataset)
    return [plan_job(rung, seed, settings, places, digest) for seed in seeds for rung in rungs]


def run_all(
    jobs: Sequence[Job] | Sequence[Combination], places: Places, *, parallel: int, threads: int
) -> tuple[list[Run], dict[str, str]]:
    """Train and measure all runs, or score combinations of runs, several at a time.

    Args:
        jobs: The runs, or the combinations.
        places: Where files are.
        parallel: Runs at a time.
        threads: Threads that each run may compute with.

    Returns:
        The finished runs in the order of the jobs, and the reasons why others failed, by name.
    """
    stop, runs, failed = Event(), {}, {}
    with ThreadPoolExecutor(parallel) as pool:
        waiting: dict[Future[Run], Job | Combination] = {
            pool.submit(_run, job, places, threads, stop): job for job in jobs
        }
        try:
            for done in as_completed(waiting):
                job = waiting[done]
                try:
                    runs[job.name] = run = done.result()
                    score = f"test {run['test_accuracy']:.4f}"
                    if "val_accuracy" in run:
                        score += f", validation {run['val_accuracy']:.4f}"
                except Exception as error:
                    score = failed[job.name] = f"failed: {type(error).__name__}: {error}"
                click.echo(f"{job.label}: {score}", err=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [runs[job.name] for job in jobs if job.name in runs], failed


def _run(job: Job | Combination, places: Places, threads: int, stop: Event) -> Run:
    if isinstance(job, Combination):
        return run_combination(job, places, threads, stop)
    return run_job(job, places, threads, stop)


def describe(places: Places) -> dict[str, Any]:
    """The size of the data set."""
    metadata = json.loads((places.dataset / "metadata.json").read_text())
    test = json.loads((places.dataset / "testdata.json").read_text())
    return {
        "name": places.dataset.parent.name,
        "speakers": len(metadata["speakers"]),
        "labelled": sum(len(entries) for entries in metadata["speakers"].values()),
        "test": len(test["utterances"]),
    }


def _check(rungs: Sequence[str], settings: Settings) -> None:
    if settings.width is not None and settings.width % HEADS:
        raise click.UsageError(f"--width {settings.width}: take a multiple of {HEADS} heads")
    for override in settings.overrides:
        name, _, rest = override.partition(".")
        field, equals, _ = rest.partition("=")
        if name not in RUNGS or name == "homework" or not field or not equals:
            raise click.UsageError(
                f"--override {override}: write RECIPE.FIELD=VALUE, such as best.model.dim=96"
            )
    for rung in rungs:
        if rung != "homework" and not (RECIPES / f"{rung}.yaml").exists():
            raise click.UsageError(f"there is no recipe {rung}.yaml; name the rungs with --rung")


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_NEW = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--data", type=_FOLDER, required=True, help="Holds Dataset/ and test_labels.csv.")
@click.option("--rung", "rungs", multiple=True, type=click.Choice(RUNGS), default=RUNGS)
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), default=(0, 1, 2))
@click.option("--segments", type=_COUNT, default=48000, help="Training segments in each run.")
@click.option("--width", type=_COUNT, help="Narrow homework, strong and boss to this width.")
@click.option("--override", "overrides", multiple=True, help="RECIPE.FIELD=VALUE, repeatable.")
@click.option("--precision", type=click.Choice(["no", "bf16"]), default="no")
@click.option("--warmup-share", type=click.FloatRange(0, 1), default=0.1)
@click.option("--validations", type=_COUNT, default=15, help="Validations in each run.")
@click.option(
    "--tuning-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    help="Share of the segments that best-lm gets, after best.",
)
@click.option("--jobs", "parallel", type=_COUNT, default=1, help="Runs to do at the same time.")
@click.option("--threads", type=_COUNT, default=1, help="CPU threads of each run.")
@click.option("--cpu", is_flag=True, help="Do not use a GPU.")
@click.option("--work", type=click.Path(path_type=Path), default="runs/ladder", help="Work folder.")
@click.option("--out", type=_NEW, help="Result file to write (JSON).")
@click.option("--plot", type=_NEW, help="Picture of the result to write (PNG); needs matplotlib.")
@click.option("--dry-run", is_flag=True, help="Print the commands and do not run them.")
def main(
    data: Path,
    rungs: tuple[str, ...],
    seeds: tuple[int, ...],
    parallel: int,
    threads: int,
    work: Path,
    out: Path | None,
    plot: Path | None,
    dry_run: bool,
    cpu: bool,
    **options: Any,
) -> None:
    """Train all rungs, with each seed, and print how they compare."""
    on_gpu = torch.cuda.is_available() and not cpu
    settings = Settings(**options, cpu=not on_gpu)
    places = Places(
        data.absolute() / "Dataset", data.absolute() / "test_labels.csv", work.absolute()
    )
    _check(rungs, settings)
    rungs = tuple(rung for rung in RUNGS if rung in rungs)
    try:
        jobs = plan(rungs, seeds, settings, places)
    except TrainerError as error:
        raise click.UsageError(str(error)) from error
    if settings.cpu and settings.precision == "bf16" and is_slow_in_bfloat16():
        click.echo(f"WARNING: {SLOW_BFLOAT16}", err=True)
    if dry_run:
        click.echo(shlex.join(["shardprep", "build", str(places.dataset), str(places.shards)]))
        commands = [command for job in jobs for command in job.commands]
        commands += [combination.score for combination in plan_combinations(jobs, places)]
        for command in commands:
            click.echo(shlex.join(command))
        return
    # SIGTERM, which schedulers send, has the same effect as Ctrl-C: the runs save and end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    replace = shardprep.BuildOptions(overwrite=True)
    try:
        with shardprep.hold_lock(places.work / "lock"):
            # Existing shards are kept if they were built from the same data.
            shardprep.build_shards(places.dataset, places.shards, replace)
            write_trials(places.trials, places.dataset, places.labels)
            runs, failed = run_all(jobs, places, parallel=parallel, threads=threads)
            done = [job for job in jobs if job.name not in failed]
            combinations = plan_combinations(done, places) if places.trials.exists() else []
            combined, wrong = run_all(combinations, places, parallel=parallel, threads=threads)
            failed |= wrong
    except shardprep.LockHeldError as error:
        raise click.UsageError(f"--work {places.work}: {error.what}; name another folder") from None
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command to continue", err=True)
        sys.exit(130)
    result = {
        **asdict(machine()),
        "device": torch.cuda.get_device_name() if on_gpu else machine().cpu,
        "dataset": describe(places),
        "settings": {**asdict(settings), "seeds": seeds, "jobs": parallel, "threads": threads},
        **summarise(runs, combined),
        "runs": runs,
        "combined_runs": combined,
        "failed": failed,
    }
    click.echo(table(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    if plot is not None and runs:
        from scripts.ladder.plot import draw

        draw(result, plot)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
