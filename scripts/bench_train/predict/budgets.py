"""Schedules that fill hours of a T4 or minutes of an H200, from predicted speeds.

    python -m scripts.bench_train.predict.budgets [--recipe boss] [--recipe best]
        [--out scripts/results/budgets.json] [--page docs/budgets.md]

Nothing of it is measured on a GPU: the speeds are those of `scripts.bench_train.predict`, and each
comes with the factor that it may be wrong by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from scripts.bench_train.gpus import GPU, find
from scripts.bench_train.predict.rates import step_seconds
from scripts.bench_train.predict.steps import FRAMES, Count, count, recipe
from shardprep.bench.machine import machine

RECIPES = ("boss", "trunk", "best")
# Utterances that the homework's data leave to train and to validate on, a tenth of each speaker's,
# and frames of the latter.
TRAIN, VAL_FRAMES = 51_000, 3_720_000
# Of the budget; the rest is for validations, prediction and what the prediction left out.
SHARE = 0.9
VALIDATIONS, VALIDATION_SHARE = 20, 0.05
BATCHES = (32, 64, 128, 256)
# More steps than this become a larger batch, and more epochs become runs to combine. The longest
# published run has 400,000 steps: https://wen-chuangchou.github.io/Speaker-identification
MOST_STEPS, MOST_EPOCHS = 200_000, 300
RUNS, LEAST_EPOCHS = 3, 100


@dataclass(frozen=True)
class Budget:
    """What one has of a GPU.

    Attributes:
        gpu: As `gpus.find` knows it.
        minutes: Time for all, from the start of the first run.
        factor: By which the predicted speed may be wrong, either way.
        start: Time from the start of a run to its steps, with compiling; assumed [s].
    """

    gpu: str
    minutes: int
    factor: float
    start: float

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.minutes // 60} h" if self.minutes % 60 == 0 else f"{self.minutes} min"


BUDGETS = (
    *(Budget("T4", minutes, factor=1.5, start=300.0) for minutes in (60, 240, 720)),
    *(Budget("H200", minutes, factor=2.0, start=90.0) for minutes in (5, 15, 60)),
)


@dataclass(frozen=True)
class Plan:
    """The schedule of a run.

    Attributes:
        runs: Runs in the budget, with seeds of their own, to be combined.
        batch: Segments of a step.
        total_steps: Steps of each run.
        warmup_steps: Steps of its warm-up.
        valid_steps: Steps from one validation to the next.
        average_decay: Of the moving average of the weights; 0 for none.
        epochs: Epochs of each run.
        steps_per_s: Predicted.
        minutes_used: Time of all runs, with their starts; less than the budget where a run is as
            long as makes sense [min].
    """

    runs: int
    batch: int
    total_steps: int
    warmup_steps: int
    valid_steps: int
    average_decay: float
    epochs: float
    steps_per_s: float
    minutes_used: float


def plan(
    budget: Budget,
    rate: Callable[[int], float],
    *,
    validation_s: float,
    averages: bool,
    train: int = TRAIN,
) -> Plan:
    """Fill a budget.

    Args:
        budget: The time.
        rate: Segments a second for a batch size.
        validation_s: Time of a validation [s].
        averages: Whether the recipe averages its weights.
        train: Utterances of an epoch.
    """
    seconds = SHARE * 60 * budget.minutes

    def fitting(runs: int, batch: int) -> int:
        """Steps of each run that fit, or that are as many as make sense."""
        steps = (seconds / runs - budget.start) * rate(batch) / batch
        return min(int(steps), MOST_EPOCHS * train // batch)

    least = LEAST_EPOCHS * train // BATCHES[0]
    runs = RUNS if fitting(RUNS, BATCHES[0]) >= least else 1
    batch = next((b for b in BATCHES if fitting(runs, b) <= MOST_STEPS), BATCHES[-1])
    total = fitting(runs, batch) // 100 * 100
    affordable = VALIDATION_SHARE * seconds / SHARE / runs / validation_s
    validations = max(2, min(VALIDATIONS, int(affordable)))
    return Plan(
        runs=runs,
        batch=batch,
        total_steps=total,
        # As the recipes have it for 70,000 steps.
        warmup_steps=max(1000, round(total / 7000) * 100),
        valid_steps=-(-total // validations // 100) * 100,
        average_decay=round(1 - 70 / total, 5) if averages else 0.0,
        epochs=total * batch / train,
        steps_per_s=rate(batch) / batch,
        minutes_used=runs * (budget.start + total * batch / rate(batch)) / 60,
    )


def options(name: str, budget: Budget, found: Plan, *, bfloat16: bool) -> str:
    """The command to type for a row; for several runs, that of the first seed."""
    run = f"{name}-{budget.gpu.lower()}-{budget.name.replace(' ', '')}"
    run += "-0 --train.seed 0" if found.runs > 1 else ""
    given = [
        f"--config {name} --name {run}",
        f"--data.batch_size {found.batch}",
        f"--train.total_steps {found.total_steps} --optim.warmup_steps {found.warmup_steps}",
        f"--train.valid_steps {found.valid_steps} --train.save_steps {found.valid_steps}",
    ]
    if found.average_decay:
        given.append(f"--train.average_decay {found.average_decay}")
    precision = "bf16" if bfloat16 else "fp16"
    launch = f"accelerate launch --mixed_precision {precision} -m shardprep_trainer.train"
    return " ".join([launch, *given])


def rate_of(counted: Count, gpu: GPU, way: str) -> Callable[[int], float]:
    """Predicted segments a second for a batch size."""

    def rate(batch: int) -> float:
        kernels = counted.eager if way == "eager" else counted.fused
        return batch / max(step_seconds(kernels, gpu, way, batch))

    return rate


def row(name: str, counted: Count, budget: Budget) -> dict[str, Any]:
    """All that the result says of a recipe and a budget."""
    gpu = find(budget.gpu)
    assert gpu is not None
    eager = rate_of(counted, gpu, "eager")
    # The forward pass is a third of a step's arithmetic; validation runs operation by operation.
    validation = VAL_FRAMES / FRAMES / 3 / eager(BATCHES[-1])
    averages = bool(recipe(name).train.average_decay)
    # What `train.compile auto` takes for such batches.
    rate = rate_of(counted, gpu, "graphs")
    found = plan(budget, rate, validation_s=validation, averages=averages)
    return {
        "gpu": gpu.name,
        "minutes": budget.minutes,
        "budget": budget.name,
        "recipe": name,
        "precision": "bf16" if gpu.bfloat16 else "fp16",
        **asdict(found),
        "lowest_steps_per_s": found.steps_per_s / budget.factor,
        "highest_steps_per_s": found.steps_per_s * budget.factor,
        "steps_per_s_not_compiled": eager(found.batch) / found.batch,
        "validation_s": validation,
        "command": options(name, budget, found, bfloat16=gpu.bfloat16),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| budget | recipe | steps/s, predicted (range) | not compiled | batch | runs x steps "
        "| warm-up | epochs | time |",
        "|" + "---|" * 9,
    ]
    for one in rows:
        speeds = (one[f"{which}steps_per_s"] for which in ("", "lowest_", "highest_"))
        predicted, lowest, highest = map(_short, speeds)
        lines.append(
            f"| {one['gpu']}, {one['budget']} | {one['recipe']} "
            f"| {predicted} ({lowest} to {highest}) "
            f"| {_short(one['steps_per_s_not_compiled'])} | {one['batch']} "
            f"| {one['runs']} x {one['total_steps']:,} | {one['warmup_steps']:,} "
            f"| {one['epochs']:.0f} | {_time(one['minutes_used'])} |"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Two figures: no prediction is more exact."""
    return f"{float(f'{value:.2g}'):,g}"


def _time(minutes: float) -> str:
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min"


def commands(rows: Sequence[dict[str, Any]]) -> str:
    """The commands of the rows as a block of shell code, in lines of at most 100 characters."""
    return "\n".join(_wrapped(one["command"]) for one in rows)


def refreshed(page: str, rows: Sequence[dict[str, Any]]) -> str:
    """A page with the table and the block of commands of these rows in place of its own."""
    new = table(rows)
    head = re.escape(new.split("\n")[0])
    page, tables = re.subn(rf"^{head}\n(?:\|.*\n)+", lambda _: f"{new}\n", page, flags=re.M)
    block = f"```sh\n{commands(rows)}\n```"
    given = r"^```sh\n(?:accelerate launch .*\n|  .*\n)+```"
    page, blocks = re.subn(given, lambda _: block, page, flags=re.M)
    if (tables, blocks) != (1, 1):
        raise click.UsageError(
            f"--page: found {tables} tables and {blocks} blocks of commands to replace, not 1 and 1"
        )
    return page


def _wrapped(command: str) -> str:
    lines, line = [], ""
    for part in command.replace(" --", "\n--").split("\n"):
        if line and len(line) + len(part) + 3 > 100:
            lines.append(f"{line} \\")
            line = " "
        line = f"{line} {part}" if line else part
    return "\n".join([*lines, line])


@click.command(context_settings={"show_default": True})
@click.option("--recipe", "recipes", multiple=True, default=RECIPES, help="A recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file (JSON).")
@click.option(
    "--page",
    type=click.Path(exists=True, path_type=Path, dir_okay=False),
    help="Page whose table and commands are replaced.",
)
def main(recipes: tuple[str, ...], out: Path | None, page: Path | None) -> None:
    """Predict what fits into hours of a T4 and minutes of an H200."""
    counts = {}
    for name in recipes:
        click.echo(f"counting {name}", err=True)
        counts[name] = count(name)
    rows = [row(name, counts[name], budget) for budget in BUDGETS for name in recipes]
    click.echo("Predicted, not measured.\n")
    click.echo(table(rows))
    click.echo(f"\n{commands(rows)}")
    if page is not None:
        page.write_text(refreshed(page.read_text(), rows))
    if out is not None:
        assumed = {
            "share_of_budget": SHARE,
            "utterances_of_an_epoch": TRAIN,
            "frames_of_a_validation": VAL_FRAMES,
            "budgets": [asdict(one) for one in BUDGETS],
        }
        result = {**asdict(machine()), "predicted": True, "assumed": assumed, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
