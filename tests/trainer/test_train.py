"""The entry of training: exit codes, one message for each error, signals, and launches."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed

from shardprep_trainer.config.command_line import RECIPES, parse_args
from shardprep_trainer.config.fields import Config
from shardprep_trainer.predict import main as predict_command
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.run.validation import Validation
from shardprep_trainer.train import main
from tests.conftest import PATIENCE, wait_until

ConfigFactory = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "trainer" / "train.py")
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


def test_no_module_hides_one_of_the_standard_library_or_of_a_dependency() -> None:
    # `accelerate launch trainer/train.py` puts the script's folder first on the path.
    folder = ROOT / "trainer"
    ours = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {"train", "shardprep_trainer"} == ours - {"__pycache__"}
    others = set(importlib.metadata.packages_distributions()) - {"shardprep_trainer"}
    assert not ours & (set(sys.stdlib_module_names) | others)


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
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", config_file(**{"train.stop_step": 5})]) == 0
    run = tmp_path / "runs" / "smoke"
    err = capsys.readouterr().err
    assert "stopped by --train.stop_step: saved step 5 of 12" in err
    command = "accelerate launch --num_processes 1 --cpu -m shardprep_trainer.train"
    assert f"continue with: {command} --config {run / 'config.yaml'} --resume\n" in err
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "continues after step 5" in err
    assert f"finished all 12 steps; the run is in {run}\n" in err
    given = f"{run} --shards {tmp_path / 'shards'} --out submission.csv"
    assert f"next: shardprep predict {given}\n" in err


def test_a_thread_trains_and_predicts(
    config_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--config", config_file(**{"train.runs": tmp_path / "runs"})]
    run, out = tmp_path / "runs" / "smoke", tmp_path / "out.csv"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, words).result() == 0
        predict = [str(run), "--shards", str(tmp_path / "shards"), "--out", str(out)]
        pool.submit(predict_command.main, predict, standalone_mode=False).result()
    assert len(out.read_text().splitlines()) == 6


def test_a_program_without_streams_trains(
    config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As in a service, or with pythonw.
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--config", config_file(), "--print-config"]) == 0
    assert main(["--config", config_file()]) == 0
    assert main(["--config", config_file()]) == 2


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_run_goes_on_where_nobody_reads_its_progress(
    config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    assert main(["--config", config_file()]) == 0


def test_a_run_without_validation_is_predicted_from_its_last_checkpoint(
    config_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--config", config_file(**{"train.valid_steps": 0})]) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("next: ")]
    words = shlex.split(line)
    assert words[-2:] == ["--checkpoint", "last"]
    assert words[:3] == ["next:", "shardprep", "predict"]
    command = [sys.executable, "-m", "shardprep_trainer.predict", *words[3:]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 6


def test_a_warm_up_longer_than_the_run_is_shortened_noted_saved_and_resumed(
    config_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The options are those of a recipe made for a longer run, cut short on the command line.
    long = config_file(**{"train.total_steps": 2000, "optim.warmup_steps": 1000})
    asked = ["--config", long, "--train.total_steps", "30", "--train.stop_step"]
    assert main([*asked, "5"]) == 0
    err = capsys.readouterr().err
    assert err.count("note: optim.warmup_steps 1,000 is not shorter than the run") == 1
    run = tmp_path / "runs" / "smoke"
    saved = ["--config", str(run / "config.yaml")]
    assert parse_args(saved).config.optim.warmup_steps == 3
    assert main([*saved, "--resume", "--train.stop_step", "7"]) == 0
    err = capsys.readouterr().err
    assert "note: train.stop_step was 5 and is now 7" in err
    assert "warmup_steps" not in err
    assert main([*asked, "9", "--resume"]) == 0
    err = capsys.readouterr().err
    assert "saved step 9 of 30" in err
    assert "note: optim.warmup_steps was" not in err


def test_a_changed_precision_is_noted_and_named_in_the_command_that_continues(
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", config_file(**{"train.stop_step": 2})]) == 0
    assert "--mixed_precision" not in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("shardprep_trainer.train.parent_command", list)
    assert main(["--config", config_file(**{"train.stop_step": 4}), "--resume"]) == 0
    err = capsys.readouterr().err
    assert "note: mixed precision was no and is now bf16\n" in err
    flags = "--num_processes 1 --cpu --mixed_precision bf16"
    assert f"accelerate launch {flags} -m shardprep_trainer.train --config" in err


def test_a_foreign_line_of_metrics_does_not_keep_a_run_from_resuming(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    assert main(["--config", config_file(**{"train.stop_step": 4})]) == 0
    path = tmp_path / "runs" / "smoke" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text("5\n" + whole)
    assert main(["--config", config_file(), "--resume"]) == 0
    assert path.read_text().startswith(whole)


def test_the_launcher_s_accumulation_is_refused_before_any_work(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    command = [*ACCELERATE, "--gradient_accumulation_steps", "4", SCRIPT]
    process = outside(*command, "--config", config_file(), cwd=tmp_path)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "error: accelerate launch --gradient_accumulation_steps: found 4" in err
    assert "--train.accumulate 4" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--optim.lr", "x"], 2, "optim.lr"),
        (["--data.shards", "none"], 2, "shardprep build Dataset/ none"),
        (["--resume"], 1, "no checkpoint to resume from"),
        (["--data.shards", "."], 4, "manifest.json"),
        (["--train.seed", "9" * 23], 2, "train.seed: found 9999"),
        (["--train.runs", "file"], 6, "file"),
        (["--name", "n" * 300], 6, "File name too long"),
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
    Path("file").write_text("")
    assert main(["--config", config_file(), *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert part in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 40]"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_message(
    failure: Exception,
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(*args: object) -> None:
        raise failure

    monkeypatch.setattr("shardprep_trainer.run.start.build_model", exhausted)
    assert main(["--config", config_file()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the memory of the device does not suffice")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4"),
        distributed.DistBackendError("NCCL error: remote process exited"),
        distributed.DistNetworkError("Failed to recv, got 0 bytes"),
    ],
)
def test_the_loss_of_another_process_is_one_message(
    failure: Exception,
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def alone(*args: object) -> None:
        raise failure

    monkeypatch.setattr("shardprep_trainer.run.start.build_model", alone)
    assert main(["--config", config_file()]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: another process is gone, or the network to it")
    assert str(failure) in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(
    config_file: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("shardprep_trainer.run.start.build_model", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["--config", config_file()])


def test_a_disk_that_fails_while_training_is_one_message(
    config_file: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "smoke" / "metrics.jsonl").mkdir(parents=True)
    assert main(["--config", config_file()]) == 6
    err = capsys.readouterr().err
    assert "metrics.jsonl: Is a directory" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_gives_its_code(
    number: signal.Signals,
    config_file: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    validate = Trainer._validate

    def interrupted(self: Trainer, validation: Validation) -> None:
        validate(self, validation)
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
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shardprep_trainer.train.parse_args", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_sigterm_to_a_real_process_and_resume_give_the_uninterrupted_run(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    steps = {"train.total_steps": 200, "train.valid_steps": 50, "train.save_steps": 50}
    cut = config_file(name="cut", **steps)
    process = outside(sys.executable, SCRIPT, "--config", cut, cwd=tmp_path)
    run = tmp_path / "runs" / "cut"
    wait_until((run / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM: saved step" in err
    assert "Traceback" not in err
    assert main(["--config", str(run / "config.yaml"), "--resume"]) == 0
    assert main(["--config", config_file(name="uninterrupted", **steps)]) == 0
    assert len(losses(run)) == 104
    assert losses(run) == losses(tmp_path / "runs" / "uninterrupted")


def test_a_shard_that_is_lost_under_a_map_leaves_a_trace(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    path = config_file(**{"train.total_steps": 100_000, "train.save_steps": 100_000})
    process = outside(sys.executable, SCRIPT, "--config", path, cwd=tmp_path)
    wait_until((tmp_path / "runs" / "smoke" / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGBUS)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in err
    assert "shardprep_trainer/run/trainer.py" in err


def test_shardprep_train_takes_the_same_arguments_and_trains_in_one_process(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "shardprep", "train"]
    helps = []
    arguments = "[--config NAME|FILE] [--FIELD VALUE ...]"
    module = [sys.executable, "-m", "shardprep_trainer.train"]
    launch = "accelerate launch [flags] -m shardprep_trainer.train"
    for program, start in (("shardprep train", command), (launch, module)):
        out, err = outside(*start, "--help", cwd=tmp_path).communicate(timeout=PATIENCE)
        usage, separator, rest = out.partition("\n\n")
        assert usage.split() == f"usage: {program} {arguments}".split()
        helps.append((separator, rest, err))
    assert helps[0] == helps[1]
    options = ("--config", config_file(), "--train.stop_step=2", "--optim.lr", "1e-3")
    process = outside(*command, *options, cwd=tmp_path)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, ""), err
    assert "1 process(es) on cpu" in err
    assert "saved step 2 of 12" in err


@pytest.mark.slow
def test_two_processes_of_the_module_train_like_one_and_the_script_can_take_over(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    """`-m shardprep_trainer.train` anywhere and `trainer/train.py` in a checkout do the same."""
    plain = {
        "model.encoder": "transformer",
        "model.dropout": 0,
        "model.classifier": "linear",
        "loss.name": "softmax",
        "loss.margin": "null",
        "loss.scale": "null",
        "train.log_steps": 1,
    }
    pair = config_file(name="pair", **plain, **{"train.stop_step": 4})
    module = ["-m", "shardprep_trainer.train", "--config", pair, "--data.batch_size", "2"]
    process = outside(*ACCELERATE, "--num_processes", "2", *module, cwd=tmp_path)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "2 process(es) on cpu" in err
    assert err.count("step 4/12") == 1
    assert "Warning" not in err
    # As it is printed, but for the environment in which `accelerate` is found.
    (printed,) = [x for x in err.splitlines() if x.startswith("continue with: accelerate launch ")]
    command = [*ACCELERATE[:-1], *shlex.split(printed)[4:], "--train.stop_step", "8"]
    process = outside(*command, cwd=tmp_path)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "2 process(es) on cpu" in err
    assert "saved step 8 of 12" in err
    run = tmp_path / "runs" / "pair"
    rest = ["trainer/train.py", "--config", config_file(name="pair", **plain), "--resume"]
    process = outside(*ACCELERATE, "--num_processes", "1", *rest, cwd=ROOT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert main(["--config", config_file(name="single", **plain)]) == 0
    both, single = losses(run), losses(tmp_path / "runs" / "single")
    assert [step for step, _ in both] == [step for step, _ in single]
    assert [x for _, x in both] == pytest.approx([x for _, x in single], rel=1e-3)


@pytest.mark.slow
def test_the_death_of_the_launcher_saves_what_two_processes_have_learnt(
    config_file: Callable[..., str], tmp_path: Path
) -> None:
    steps = {"train.total_steps": 100_000, "train.valid_steps": 0, "train.save_steps": 100_000}
    command = [*ACCELERATE, "--num_processes", "2", SCRIPT, "--config", config_file(**steps)]
    process = outside(*command, cwd=tmp_path)
    run = tmp_path / "runs" / "smoke"
    wait_until((run / "metrics.jsonl").exists, process)
    process.kill()
    # The pipe closes when the last worker has gone.
    _, err = process.communicate(timeout=PATIENCE)
    assert "stopped by SIGTERM: saved step" in err
    assert len(list((run / "checkpoints").glob("step-*.pt"))) == 1
