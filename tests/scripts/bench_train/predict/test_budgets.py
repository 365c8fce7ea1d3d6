"""Schedules fill their budgets: checked by going through a run step by step, with a clock."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from scripts.bench_train.gpus import find
from scripts.bench_train.predict import budgets, steps
from scripts.bench_train.predict.budgets import BUDGETS, Budget, Plan, options, plan, table
from scripts.bench_train.predict.fuse import Kernel
from scripts.bench_train.predict.steps import Count
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.config.fields import Config

ROOT = Path(__file__).parents[4]
RESULT = json.loads((ROOT / "scripts" / "results" / "budgets.json").read_text())
HOUR = Budget("T4", 60, factor=1.5, start=300.0)


@cache
def config_of(command: str) -> Config:
    words = shlex.split(command)
    return parse_args(words[words.index("shardprep_trainer.train") + 1 :]).config


def seconds_of(found: Plan, rate: float, start: float, steps: int) -> float:
    """The time of all runs, each of so many steps."""
    clock = 0.0
    for _ in range(found.runs):
        clock += start
        for _ in range(steps):
            clock += found.batch / rate
    return clock


@pytest.mark.parametrize(("rate", "runs"), [(100.0, 1), (1000.0, 1), (9000.0, 3)])
def test_the_steps_fit_into_nine_tenths_of_the_budget_and_a_hundred_more_do_not(
    rate: float, runs: int
) -> None:
    found = plan(HOUR, lambda batch: rate, validation_s=1.0, averages=True)
    assert found.runs == runs
    assert seconds_of(found, rate, 300.0, found.total_steps) <= 0.9 * 3600
    assert seconds_of(found, rate, 300.0, found.total_steps + 100) > 0.9 * 3600
    seconds = seconds_of(found, rate, 300.0, found.total_steps)
    assert found.minutes_used == pytest.approx(seconds / 60)
    assert found.epochs == found.total_steps * found.batch / 51_000


def test_a_run_has_no_more_epochs_and_steps_than_make_sense() -> None:
    day = Budget("T4", 24 * 60, factor=1.5, start=300.0)
    found = plan(day, lambda batch: 40.0 * batch, validation_s=1.0, averages=True)
    assert found.runs == 3
    assert found.batch == 128
    assert 299 < found.epochs <= 300
    assert found.minutes_used < 0.9 * 24 * 60


def test_three_runs_have_a_hundred_epochs_each_or_there_is_one() -> None:
    for rate in range(200, 12_000, 200):
        found = plan(HOUR, lambda batch, rate=rate: rate, validation_s=1.0, averages=True)
        assert found.epochs > 99.8 if found.runs == 3 else found.epochs <= 300
        assert found.total_steps <= 200_000 or found.batch == 256


def test_validations_take_a_twentieth_of_the_budget_at_most_and_the_last_is_at_the_end() -> None:
    for validation in (0.1, 5.0, 30.0):
        found = plan(HOUR, lambda batch: 1000.0, validation_s=validation, averages=True)
        count = -(-found.total_steps // found.valid_steps)
        assert count * validation <= 180
        assert 2 <= count <= 20


def test_the_speed_is_that_of_the_kernels_and_the_range_is_the_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A kernel that moves 256 MB a segment at .8 of 320 GB/s: 1 ms.
    kernel = Kernel("memory", "copy", (0.0, 0.0), (0.0, 256e6), wide=False)
    counted = Count([kernel, kernel], [kernel], 0.0, (0.0, 0.0), 1)
    found = budgets.row("smoke", counted, HOUR)
    assert found["steps_per_s"] == pytest.approx(1000 / found["batch"])
    assert found["steps_per_s_not_compiled"] == pytest.approx(500 / found["batch"])
    assert found["lowest_steps_per_s"] == pytest.approx(found["steps_per_s"] / 1.5)
    assert found["highest_steps_per_s"] == pytest.approx(found["steps_per_s"] * 1.5)
    # 3.72 million frames in segments of 128, a third of a step's work, not compiled.
    assert found["validation_s"] == pytest.approx(29062.5 * 0.002 / 3)
    assert found["precision"] == "fp16"
    assert found["average_decay"] == 0


def test_the_commands_say_what_the_rows_say() -> None:
    for one in RESULT["rows"]:
        config = config_of(one["command"])
        assert config.train.total_steps == one["total_steps"]
        assert config.optim.warmup_steps == one["warmup_steps"]
        assert config.data.batch_size == one["batch"]
        assert config.train.valid_steps == one["valid_steps"] == config.train.save_steps
        assert config.train.average_decay == one["average_decay"]
        assert f"--mixed_precision {one['precision']} " in one["command"]
        gpu = find(one["gpu"])
        assert gpu is not None
        assert (one["precision"] == "bf16") == gpu.bfloat16
    names = [config_of(one["command"]).name for one in RESULT["rows"]]
    assert len(set(names)) == len(names)


def test_the_result_has_every_budget_for_every_recipe_and_says_that_it_is_predicted() -> None:
    assert RESULT["predicted"] is True
    found = [(one["gpu"], one["minutes"], one["recipe"]) for one in RESULT["rows"]]
    assert found == [(b.gpu, b.minutes, name) for b in BUDGETS for name in budgets.RECIPES]
    for one in RESULT["rows"]:
        assert one["minutes_used"] <= 0.9 * one["minutes"] + 1e-9


def test_several_runs_have_the_first_seed_in_their_command() -> None:
    found = plan(HOUR, lambda batch: 9000.0, validation_s=1.0, averages=False)
    command = options("boss", HOUR, found, bfloat16=False)
    assert config_of(command).name == "boss-t4-1h-0"
    assert config_of(command).train.seed == 0


def test_the_page_shows_the_table_and_the_commands_of_the_result() -> None:
    page = (ROOT / "docs" / "budgets.md").read_text()
    assert table(RESULT["rows"]) in page
    (block,) = (
        text for text in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) if "-t4-1h" in text
    )
    assert block == f"{budgets.commands(RESULT['rows'])}\n"
    assert all(len(line) <= 100 for line in block.splitlines())


def test_a_page_gets_the_rows_in_place_of_its_own_and_is_otherwise_the_same() -> None:
    rows = RESULT["rows"]
    page = (ROOT / "docs" / "budgets.md").read_text()
    changed = [{**rows[0], "total_steps": 7, "command": "accelerate launch x --a 1"}]
    text = budgets.refreshed(page, changed)
    assert "| 1 x 7 |" in text
    assert "```sh\naccelerate launch x --a 1\n```" in text
    assert budgets.refreshed(text, rows) == page
    with pytest.raises(click.UsageError, match="found 0 tables and 0 blocks"):
        budgets.refreshed("no table", rows)


@pytest.mark.slow
def test_the_command_counts_a_recipe_and_writes_a_row_for_each_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(steps, "FRAMES", 24)
    out = tmp_path / "budgets.json"
    done = CliRunner().invoke(budgets.main, ["--recipe", "smoke", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "not measured" in done.output
    rows = json.loads(out.read_text())["rows"]
    assert [one["minutes"] for one in rows] == [one.minutes for one in BUDGETS]
    assert all(one["steps_per_s"] > 0 for one in rows)
