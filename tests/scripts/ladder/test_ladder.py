"""The ladder: it runs the user's commands, sums up correctly, and marks a lower upper rung."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import shardprep
from scripts.ladder import __main__ as ladder
from scripts.ladder import combinations, jobs, plot, summary, trials
from shardprep_trainer.config.command_line import RECIPES, parse_args

OURS = ("simple", "medium", "strong", "boss")
# Options of the encoder of best that make it tiny.
TINY: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "channels": [4, 4, 4],
    "blocks": [1, 1, 1],
    "time_strides": [1, 2, 2],
    "mel_strides": [1, 1, 2],
    "stem_strides": [1, 2],
}
# What `shardprep score --as-norm --json` says, as far as a ladder takes it.
SCORED = {
    "accuracy": 0.9,
    "labelled": 10,
    "top5_accuracy": 1.0,
    "eer": 0.04,
    "min_dcf": 0.3,
    "plain": {"eer": 0.05, "min_dcf": 0.4},
}


def runs_of(**accuracies: list[float]) -> list[dict[str, Any]]:
    return [
        {"rung": rung, "seed": seed, "test_accuracy": test, "val_accuracy": 0.9, "eer": None}
        for rung, tests in accuracies.items()
        for seed, test in enumerate(tests)
    ]


def invoke(*words: object) -> Any:
    return CliRunner().invoke(ladder.main, [str(word) for word in words])


def plan(tmp_path: Path, rung: str, seed: int = 0, data: str = "d", **options: Any) -> Any:
    places = jobs.Places(tmp_path / "Dataset", tmp_path / "test_labels.csv", tmp_path / "work")
    return jobs.plan_job(rung, seed, jobs.Settings(**options), places, data)


def config_of(job: Any) -> Any:
    script = job.train.index(str(jobs.TRAIN))
    return parse_args(job.train[script + 1 :]).config


def test_two_ladders_in_one_work_folder_are_refused(
    make_dataset: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset()
    monkeypatch.setattr(ladder.signal, "signal", lambda *arguments: None)
    work = tmp_path / "work"
    with shardprep.hold_lock(work / "lock"):
        done = invoke("--data", tmp_path, "--work", work, "--rung", "simple", "--seed", 0, "--cpu")
        assert [path.name for path in work.iterdir()] == ["lock"]
    assert done.exit_code == 2
    assert f"--work {work}: is in use by process {os.getpid()} on " in done.output


def test_means_spreads_and_checks_are_those_of_the_runs() -> None:
    found = summary.summarise(
        runs_of(homework=[0.60, 0.62], strong=[0.70, 0.74], boss=[0.80, 0.84], best=[0.92])
    )
    assert list(found["rungs"]) == ["homework", "strong", "boss", "best"]
    assert found["rungs"]["boss"]["test_accuracy"] == pytest.approx(
        {"mean": 0.82, "min": 0.80, "max": 0.84}
    )
    assert found["rungs"]["boss"]["seeds"] == [0, 1]
    assert found["rungs"]["boss"]["eer"] is None
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["strong above homework"]["found"] == pytest.approx(0.11)
    assert checks["best above boss"]["found"] == pytest.approx(0.10)
    half = checks["boss without at least 50 % of the errors of homework (share gone)"]
    more = checks["best without at least 60 % of the errors of boss (share gone)"]
    assert (half["found"], half["passed"]) == (pytest.approx(1 - 0.18 / 0.39), True)
    assert (more["found"], more["passed"]) == (pytest.approx(1 - 0.08 / 0.18), False)
    assert sum(not check["passed"] for check in found["checks"]) == 1


def test_a_rung_below_the_one_before_fails() -> None:
    found = summary.summarise(
        runs_of(simple=[0.6], medium=[0.7], strong=[0.65], boss=[0.8], best=[0.79])
    )
    assert {check["name"]: check["passed"] for check in found["checks"]} == {
        "medium above simple": True,
        "strong above medium": False,
        "boss above strong": True,
        "best above boss": False,
        "best without at least 60 % of the errors of boss (share gone)": False,
    }
    text = summary.table(found)
    assert "FAILED: strong above medium: -0.0500" in text
    assert "| best | 0.7900 | 0.9000 | - | - | - | - | - |" in text


def test_less_than_the_share_of_the_errors_gone_fails() -> None:
    for best, enough in ((0.91, False), (0.93, True)):
        checks = summary.summarise(runs_of(boss=[0.8], best=[best]))["checks"]
        assert [check["passed"] for check in checks] == [True, enough]


def test_every_recipe_of_a_real_model_is_a_rung() -> None:
    recipes = {file.stem for file in RECIPES.glob("*.yaml")} - {"demo", "smoke"}
    assert {"homework", *recipes} == set(summary.RUNGS)


def test_trunk_and_mfa_have_no_place_in_the_order_and_best_lm_is_above_best_alone() -> None:
    found = summary.summarise(
        runs_of(mfa=[0.95], best=[0.9], **{"best-lm": [0.91], "trunk": [0.7]})
    )
    assert list(found["rungs"]) == ["best", "best-lm", "trunk", "mfa"]
    assert [check["name"] for check in found["checks"]] == ["best-lm above best"]


def test_combined_runs_are_checked_against_one_alone() -> None:
    combined = [
        {"rung": "best, all seeds", "seeds": [0, 1, 2], "alone": 0.8, "test_accuracy": 0.84},
        {"rung": "best + trunk", "seeds": [0], "alone": 0.9, "test_accuracy": 0.91, "eer": 0.05},
        {"rung": "best + trunk", "seeds": [1], "alone": 0.8, "test_accuracy": 0.83, "eer": 0.07},
    ]
    found = summary.summarise(runs_of(best=[0.8, 0.8, 0.8]), combined)
    assert found["combined"]["best + trunk"]["seeds"] == [0, 1]
    assert found["combined"]["best + trunk"]["eer"]["mean"] == pytest.approx(0.06)
    repeated, pair = found["checks"]
    assert repeated == {
        "name": "best, all seeds without at least 15 % of the errors of one (share gone)",
        "found": pytest.approx(0.2),
        "passed": True,
    }
    assert pair["name"].endswith("at least 20 % of the errors of the better one (share gone)")
    assert (pair["found"], pair["passed"]) == (pytest.approx(1 - 0.13 / 0.15), False)
    assert "| best + trunk | 0.8700 (0.8300 to 0.9100) | - | 0.0600 " in summary.table(found)


def test_an_order_that_seeds_cross_is_not_clear() -> None:
    crossing = runs_of(strong=[0.6, 0.8], boss=[0.7, 0.9])
    (order,) = summary.summarise(crossing)["checks"]
    assert (order["passed"], order["clear"]) == (True, False)
    assert "but not at every seed" in summary.table(summary.summarise(crossing))


def test_equal_rungs_do_not_pass() -> None:
    (order,) = summary.summarise(runs_of(strong=[0.5], boss=[0.5]))["checks"]
    assert not order["passed"]


@pytest.mark.parametrize("rung", OURS)
def test_runs_have_equally_many_segments_and_their_recipe(tmp_path: Path, rung: str) -> None:
    job = plan(tmp_path, rung, 3, segments=3200, validations=4)
    config, recipe = config_of(job), parse_args(["--config", str(RECIPES / f"{rung}.yaml")]).config
    assert config.train.total_steps * config.data.batch_size * config.train.accumulate == 3200
    assert config.optim.warmup_steps == config.train.total_steps // 10
    assert config.train.valid_steps == config.train.total_steps // 4
    assert config.train.seed == 3
    assert (config.model, config.loss) == (recipe.model, recipe.loss)
    assert config.run == tmp_path / "work" / "runs" / job.name


def test_the_homeworks_code_gets_as_many_segments(tmp_path: Path) -> None:
    words = list(plan(tmp_path, "homework", 3, segments=3200, width=48).train)
    given = dict(zip(words, words[1:], strict=False))
    assert int(given["--steps"]) * int(given["--batch"]) == 3200
    assert (given["--warmup"], given["--seed"]) == ("10", "3")
    assert (given["--width"], given["--heads"], given["--head-dim"]) == ("48", "4", "12")
    assert "--axis" not in words


def test_width_narrows_conformers_alike_and_nothing_else(tmp_path: Path) -> None:
    for rung in ("strong", "boss"):
        model = config_of(plan(tmp_path, rung, width=144)).model
        assert (model.dim, model.heads, model.head_dim, model.ff_dim) == (144, 4, 36, 576)
    for rung in ("simple", "medium"):
        assert plan(tmp_path, rung, width=144) == plan(tmp_path, rung)


def test_overrides_reach_their_own_recipe(tmp_path: Path) -> None:
    overrides = ("boss.model.dropout=0.3", "strong.data.batch_size=16", "boss.optim.lr=2e-3")
    boss, strong = (config_of(plan(tmp_path, r, overrides=overrides)) for r in ("boss", "strong"))
    assert (boss.model.dropout, boss.optim.lr, boss.data.batch_size) == (0.3, 2e-3, 32)
    assert (strong.data.batch_size, strong.train.total_steps) == (16, 3000)


def starting(tmp_path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The job of best-lm, and the configurations of its two trainings."""
    job = plan(tmp_path, "best-lm", 2, **options)
    return job, config_of(job.start), config_of(job)


def test_best_lm_and_the_best_before_it_share_the_segments(tmp_path: Path) -> None:
    overrides = ("best.model.dim=96", "best.data.batch_size=20", "best-lm.data.batch_size=8")
    overrides += (f"best.model.encoder_options={json.dumps(TINY)}",)
    job, first, second = starting(
        tmp_path, segments=3200, tuning_share=0.25, overrides=overrides, validations=4
    )
    assert first.train.total_steps * first.data.batch_size == 2400
    assert second.train.total_steps * second.data.batch_size == 800
    assert (first.train.start_from, second.train.start_from) == (None, str(first.run))
    assert first.run == tmp_path / "work" / "runs" / job.start.name
    # The same network, and each recipe's own margin, rate and lengths.
    assert (first.model.dim, first.model) == (96, second.model)
    assert first.model.encoder_options == TINY
    recipes = [parse_args(["--config", name]).config for name in ("best", "best-lm")]
    for config, recipe in zip((first, second), recipes, strict=True):
        assert (config.loss, config.augment) == (recipe.loss, recipe.augment)
        assert config.optim.lr == recipe.optim.lr
        assert config.train.seed == 2
    assert job.commands[:2] == [job.start.train, job.train]
    assert job.start.name.startswith("best-s2-")


def test_best_lm_continues_where_it_stopped_and_a_finished_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, work = plan(tmp_path, "best-lm"), tmp_path / "work"
    places = jobs.Places(tmp_path / "Dataset", tmp_path / "test_labels.csv", work)
    places.labels.write_text("Id,Category\nu.pt,a\n")
    checkpoints = work / "runs" / job.start.name / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step-5.pt").touch()
    places.trials.touch()
    rates = {"samples_per_second": 9.0, "waiting": 0.0, "peak_memory_mib": 1.0}
    rows = [{"event": "train", **rates}, {"event": "valid", "accuracy": 0.5}]
    (work / "runs" / job.name).mkdir()
    (work / "runs" / job.name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ran: list[list[str]] = []

    def run(command: tuple[str, ...], *_: Any) -> str:
        ran.append(list(command))
        return json.dumps(SCORED)

    monkeypatch.setattr(jobs, "run_command", run)
    found = jobs.run_job(job, places, 1, Event())
    assert ran == [[*job.start.train, "--resume"], *map(list, job.commands[1:])]
    assert (found["seconds"], found["test_accuracy"], found["test_correct"]) == (None, 0.9, 9)
    assert (found["eer"], found["eer_as_norm"]) == (0.05, 0.04)
    kept = jobs.result_file(places, job)
    before = kept.stat().st_mtime_ns
    assert jobs.run_job(job, places, 1, Event()) == found
    assert (len(ran), kept.stat().st_mtime_ns) == (3, before)


def test_best_lm_is_another_run_where_its_start_is(tmp_path: Path) -> None:
    plain, changed = (
        plan(tmp_path, "best-lm", overrides=overrides)
        for overrides in ((), ("best.optim.lr=0.003",))
    )
    assert plain.name != changed.name
    assert config_of(plain).optim == config_of(changed).optim


def test_the_last_segments_of_a_step_that_is_not_whole_go_to_best_lm(tmp_path: Path) -> None:
    job, _, _ = starting(tmp_path, segments=640, tuning_share=0.06)
    assert job.segments + job.start.segments == 640


def test_finished_runs_are_combined_by_recipe_and_by_seed(tmp_path: Path) -> None:
    places = jobs.Places(tmp_path / "Dataset", tmp_path / "labels.csv", tmp_path / "work")
    runs = [
        jobs.Job(rung, seed, f"{rung}-{seed}", 1, 1, ())
        for seed in (0, 1)
        for rung in ("boss", "best", "trunk")
        if (rung, seed) != ("trunk", 1)
    ]
    found = combinations.plan_combinations(runs, places)
    members = {row.rung: [job.name for job in row.members] for row in found}
    assert members == {
        "best, all seeds": ["best-0", "best-1"],
        "best + trunk": ["best-0", "trunk-0"],
    }
    for row in found:
        at = row.score.index("score")
        folders = [str(tmp_path / "work" / "runs" / name) for name in members[row.rung]]
        assert list(row.score[at + 1 : at + 4]) == [*folders, "--shards"]
    assert combinations.plan_combinations(runs[:1], places) == []


def test_a_combination_is_scored_once_and_beside_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = jobs.Places(tmp_path / "Dataset", tmp_path / "labels.csv", tmp_path)
    (tmp_path / "results").mkdir()
    names = {"best-0": ("best", 0.8), "best-1": ("best", 0.9), "trunk-0": ("trunk", 0.7)}
    for name, (_, accuracy) in names.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"test_accuracy": accuracy}))
    runs = [jobs.Job(rung, int(name[-1]), name, 1, 1, ()) for name, (rung, _) in names.items()]
    commands = []

    def run(command: tuple[str, ...], *_: Any) -> str:
        commands.append(command)
        return json.dumps(SCORED)

    monkeypatch.setattr(jobs, "run_command", run)
    seeds, pair = combinations.plan_combinations(runs, places)
    found, failed = ladder.run_all([seeds, pair], places, parallel=1, threads=1)
    assert not failed
    assert [row["alone"] for row in found] == [pytest.approx(0.85), 0.8]
    assert [(row["test_accuracy"], row["eer"], row["eer_as_norm"]) for row in found] == [
        (0.9, 0.05, 0.04)
    ] * 2
    assert ladder.run_all([seeds, pair], places, parallel=1, threads=1)[0] == found
    assert len(commands) == 2


def test_without_trials_a_run_is_scored_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = jobs.Places(tmp_path / "Dataset", tmp_path / "labels.csv", tmp_path)
    commands: list[tuple[str, ...]] = []

    def run(command: tuple[str, ...], *_: Any) -> str:
        commands.append(command)
        return json.dumps({**SCORED, "plain": None, "eer": None, "min_dcf": None})

    monkeypatch.setattr(jobs, "run_command", run)
    score = jobs.score_command(places, ["a"])
    found = jobs.measures(score, places, tmp_path / "log", 1, Event())
    assert found == {
        "test_accuracy": 0.9,
        "test_correct": 9,
        "test_utterances": 10,
        "top5_accuracy": 1.0,
    }
    assert commands[0][-3:] == ("--pairs", "0", "--json")


def test_names_differ_where_runs_do(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"data": "e"},
        {"segments": 640},
        {"width": 48},
        {"precision": "bf16"},
        {"overrides": ("boss.optim.lr=2e-3",)},
    ]
    names = [plan(tmp_path, "boss", **change).name for change in changes]
    assert len(set(names)) == len(names)
    assert plan(tmp_path, "boss", overrides=("strong.optim.lr=2e-3",)).name == names[0]


def test_a_gpu_is_used_unless_the_cpu_is_asked_for(tmp_path: Path) -> None:
    assert "--cpu" in plan(tmp_path, "boss", cpu=True).train
    assert "--cpu" not in plan(tmp_path, "boss", cpu=False).train


def test_all_trials_are_pairs_of_test_utterances_with_the_true_answer(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_dataset(speakers=3, utterances=2, test_utterances=12)
    file = tmp_path / "trials.txt"
    count = trials.write_trials(file, root, root.parent / "test_labels.csv")
    rows = (root.parent / "test_labels.csv").read_text().splitlines()[1:]
    truth = dict(row.removesuffix("\n").split(",") for row in rows)
    lines = [line.split() for line in file.read_text().splitlines()]
    assert len(lines) == count > 0
    assert sum(answer == "1" for answer, _, _ in lines) == count // 2
    for answer, one, other in lines:
        assert one != other
        assert (truth[f"{one}.pt"] == truth[f"{other}.pt"]) == (answer == "1")
    keys = [name.removesuffix(".pt") for name in truth]
    perfect = np.eye(3)[[sorted(set(truth.values())).index(name) for name in truth.values()]]
    np.savez(tmp_path / "e.npz", key=keys, embedding=perfect)
    assert trials.verify_embeddings(tmp_path / "e.npz", file) == {"eer": 0.0, "min_dcf": 0.0}


def test_without_pairs_of_one_speaker_there_are_no_trials(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_dataset(test_utterances=1)
    assert trials.write_trials(tmp_path / "t", root, root.parent / "test_labels.csv") == 0
    assert not (tmp_path / "t").exists()


@pytest.fixture
def data(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(speakers=4, utterances=88, frames=(100, 140)).parent


def test_a_dry_run_prints_commands_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--work", tmp_path / "work", "--seed", 0, "--seed", 1, "--dry-run")
    done = invoke(*words, "--rung", "simple", "--rung", "homework")
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines[0][:2] == ["shardprep", "build"]
    assert sum(str(jobs.TRAIN) in line for line in lines) == 2
    assert sum("scripts.bench_train.homework_baseline" in line for line in lines) == 2
    assert sum(line[1:4] == ["-m", "shardprep", "score"] for line in lines) == 2
    assert sum("--as-norm" in line for line in lines) == 2
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_a_cpu_that_is_slow_in_bf16_is_warned_of(
    data: Path, monkeypatch: pytest.MonkeyPatch, capability: str, warned: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    words = ("--data", data, "--rung", "simple", "--cpu", "--dry-run")
    assert "WARNING" not in invoke(*words).stderr
    assert ("WARNING: this CPU" in invoke(*words, "--precision", "bf16").stderr) == warned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--width", 50), "multiple of 4 heads"),
        (("--override", "homework.x=1"), "write RECIPE.FIELD=VALUE"),
        (("--override", "boss.model.dim"), "write RECIPE.FIELD=VALUE"),
        (("--rung", "boss", "--override", "boss.model.dim=100"), "model.ff_dim"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    data: Path, words: tuple[object, ...], message: str
) -> None:
    done = invoke("--data", data, "--dry-run", "--rung", "simple", *words)
    assert done.exit_code == 2
    assert message in done.output


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(job: Any, *_: Any) -> dict[str, Any]:
        if job.rung == "medium":
            raise RuntimeError("exit code 1")
        return {"rung": job.rung, "test_accuracy": 0.5, "val_accuracy": 0.6}

    monkeypatch.setattr(ladder, "run_job", run)
    planned = [plan(tmp_path, rung) for rung in OURS]
    places = jobs.Places(tmp_path, tmp_path, tmp_path)
    runs, failed = ladder.run_all(planned, places, parallel=2, threads=1)
    assert [run["rung"] for run in runs] == ["simple", "strong", "boss"]
    assert failed == {planned[1].name: "failed: RuntimeError: exit code 1"}


def test_a_command_that_fails_names_its_log_and_a_stop_ends_it(tmp_path: Path) -> None:
    log, stop = tmp_path / "x.log", Event()
    script = (
        "import sys; print('answer'); print('talk', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    )
    command = (sys.executable, "-c", script)
    assert jobs.run_command((*command, "0"), log, 1, stop) == "answer\n"
    with pytest.raises(RuntimeError, match=r"exit code 3; .*x\.log tells why"):
        jobs.run_command((*command, "3"), log, 1, stop)
    assert log.read_text().count("talk") == 2
    stop.set()
    with pytest.raises(RuntimeError, match="exit code -15"):
        jobs.run_command((sys.executable, "-c", "import time; time.sleep(60)"), log, 1, stop)


@pytest.mark.slow
def test_finished_runs_are_not_repeated(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    words = ["--data", data, "--work", tmp_path / "work", "--segments", 64, "--seed", 0]
    words += ["--rung", "homework", "--rung", "simple", "--width", 16, "--validations", 1, "--cpu"]
    words += ["--rung", "best-lm"]
    words += ["--override", f"best.model.encoder_options={json.dumps(TINY)}"]
    first = invoke(*words, "--out", out)
    assert first.exit_code == 0, first.output
    result = json.loads(out.read_text())
    assert [run["rung"] for run in result["runs"]] == ["homework", "simple", "best-lm"]
    assert all("eer_as_norm" in run for run in result["runs"][1:])
    # The run of best that best-lm starts from is no run of its own.
    assert len(list((tmp_path / "work" / "runs").glob("best-s0-*"))) == 1
    assert all(run["test_utterances"] == 5 for run in result["runs"])
    assert all(0 <= run["val_accuracy"] <= 1 for run in result["runs"])
    assert all(0 <= run["eer"] <= 1 and 0 <= run["min_dcf"] <= 1 for run in result["runs"])
    assert result["dataset"]["labelled"] == 352
    assert {"cpu", "cores", "date", "versions", "device", "settings", "checks"} <= set(result)
    assert "| homework's code, as published |" in first.stdout
    kept = sorted((tmp_path / "work" / "results").iterdir())
    before = [file.stat().st_mtime_ns for file in kept]
    assert invoke(*words, "--out", out).exit_code == 0
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert json.loads(out.read_text())["runs"] == result["runs"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = runs_of(homework=[0.6], strong=[0.7, 0.71], boss=[0.8])
    result = {
        "runs": runs,
        "device": "X",
        "date": "2026-01-01",
        "settings": {"segments": 64, "width": 16, "seeds": [0, 1]},
        "dataset": {"speakers": 4, "labelled": 9, "test": 5},
        **summary.summarise(runs),
    }
    plot.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
