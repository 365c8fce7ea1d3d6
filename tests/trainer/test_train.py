"""The entry: exit codes, one message, signals, and the launches that users type."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trainer
from trainer.config import Config
from trainer.engine import Trainer
from trainer.options import RECIPES, parse_args
from trainer.train import main

ConfigFactory = Callable[..., Config]
PACKAGE = Path(trainer.__path__[0])
SCRIPT = str(PACKAGE / "train.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]


@pytest.fixture
def config_file(make_config: ConfigFactory, tmp_path: Path) -> Callable[..., str]:
    """`config_file(**changes) -> path` of a configuration in YAML."""

    def make(**changes: Any) -> str:
        config = make_config(**changes)
        path = tmp_path / f"{config.name}.yaml"
        path.write_text(config.to_yaml())
        return str(path)

    return make


def outside(*command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a program as a user would, somewhere else than in the checkout."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_module_hides_one_of_the_standard_library_or_of_a_dependency() -> None:
    # `accelerate launch trainer/train.py` puts the package's own folder first on the path.
    ours = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert {"train", "engine", "recipes"} <= ours
    assert not ours & taken


def test_the_printed_configuration_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--config", str(RECIPES / "strong.yaml"), "--optim.lr", "3e-4", "--name=x"]
    for spelling in ("--print-config", "--print_config"):
        assert main([*options, spelling]) == 0
        path = tmp_path / "printed.yaml"
        path.write_text(capsys.readouterr().out)
        assert parse_args(["--config", str(path)]).config == parse_args(options).config


def test_a_run_ends_with_what_comes_next_and_can_be_continued_from_its_folder(
    config_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--config", config_file(**{"train.stop_step": 5})]) == 0
    run = tmp_path / "runs" / "smoke"
    err = capsys.readouterr().err
    assert "stopped by --train.stop_step: saved step 5 of 12" in err
    assert f"--config {run / 'config.yaml'} --resume\n" in err
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "continues after step 5" in err
    assert f"finished all 12 steps; the run is in {run}\n" in err
    assert f"next: python -m trainer.predict {run} --shards {tmp_path / 'shards'} --out" in err


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--optim.lr", "x"], 2, "optim.lr"),
        (["--data.shards", "none"], 2, "shardprep build Dataset/ none"),
        (["--resume"], 1, "no checkpoint to resume from"),
        (["--data.shards", "."], 4, "manifest.json"),
    ],
)
def test_errors_of_users_are_one_message_and_a_code(
    options: list[str],
    code: int,
    part: str,
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", config_file(), *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_gives_its_code(
    number: signal.Signals,
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    validate = Trainer._validate

    def interrupted(self: Trainer) -> None:
        validate(self)
        signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "_validate", interrupted)
    assert main(["--config", config_file()]) == {2: 130, 15: 143}[number]
    err = capsys.readouterr().err
    assert f"stopped by {number.name}: saved step 6 of 12" in err
    assert "--resume" in err
    assert (tmp_path / "runs/smoke/checkpoints/step-00000006.pt").exists()


def test_ctrl_c_before_training_leaves_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.train.parse_args", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_sigterm_to_a_real_process_and_resume_give_the_uninterrupted_run(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    steps = {"train.total_steps": 200, "train.valid_steps": 50, "train.save_steps": 50}
    cut = config_file(name="cut", **steps)
    process = outside(sys.executable, SCRIPT, "--config", cut, cwd=tmp_path)
    run = tmp_path / "runs" / "cut"
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM: saved step" in err
    assert "Traceback" not in err
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0
    assert main(["--config", config_file(name="whole", **steps)]) == 0
    assert len(losses(run)) == 104
    assert losses(run) == losses(tmp_path / "runs" / "whole")


def test_two_processes_train_like_one_and_one_can_take_over(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    plain = {
        "model.encoder": "transformer",
        "model.dropout": 0,
        "model.classifier": "linear",
        "loss.name": "softmax",
        "loss.margin": "null",
        "loss.scale": "null",
        "train.log_steps": 1,
    }
    pair = config_file(name="pair", **plain, **{"train.stop_step": 8})
    command = [*ACCELERATE, "--num_processes", "2", SCRIPT, "--config", pair]
    process = outside(*command, "--data.batch_size", "2", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "2 process(es) on cpu" in err
    assert err.count("step 8/12") == 1
    assert "Warning" not in err
    run = tmp_path / "runs" / "pair"
    assert main(["--config", config_file(name="pair", **plain), "--resume"]) == 0
    assert main(["--config", config_file(name="single", **plain)]) == 0
    both, single = losses(run), losses(tmp_path / "runs" / "single")
    assert [step for step, _ in both] == [step for step, _ in single]
    assert [x for _, x in both] == pytest.approx([x for _, x in single], rel=1e-3)


def test_the_death_of_the_launcher_saves_what_two_processes_have_learnt(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    steps = {"train.total_steps": 100_000, "train.valid_steps": 0, "train.save_steps": 100_000}
    command = [*ACCELERATE, "--num_processes", "2", SCRIPT, "--config", config_file(**steps)]
    process = outside(*command, cwd=tmp_path)
    run = tmp_path / "runs" / "smoke"
    wait_for(run / "metrics.jsonl", process)
    process.kill()
    # The pipe closes when the last worker has gone.
    _, err = process.communicate(timeout=60)
    assert "stopped by SIGTERM: saved step" in err
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 1
