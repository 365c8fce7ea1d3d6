"""Flags that `accelerate launch` ignores, and processes that it leaves to us."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardprep_trainer.errors import ConfigError
from shardprep_trainer.processes import launch
from shardprep_trainer.processes.launch import (
    Share,
    check_launch,
    launch_command,
    launcher_identity,
    parent_command,
    processes_to_start,
    training_program,
)

ROOT = Path(__file__).resolve().parents[3]

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
SEVERAL = {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "command", "expected"),
    [
        ({}, "python train.py", None),
        ({"MASTER_PORT": "1"}, "sh --num_processes 9", None),
        (LAUNCHED, "accelerate launch --cpu train.py", None),
        (SEVERAL, "accelerate launch --num_processes 1 --cpu train.py", None),
        (SEVERAL, "accelerate launch --num_processes 2 --cpu train.py", Share(2)),
        (SEVERAL, "accelerate launch --cpu --num-processes=12 train.py", Share(12)),
        ({**SEVERAL, "LOCAL_RANK": "0"}, "accelerate launch --num_processes 2 train.py", None),
        ({**SEVERAL, "PMI_RANK": "1"}, "mpirun -n 2", None),
        (SEVERAL, "accelerate launch --num_processes 4 --num_machines 2 train.py", Share(2, 0, 2)),
        (
            SEVERAL,
            "accelerate launch --num-processes 2 --num-machines=2 --machine-rank=1 train.py",
            Share(1, 1, 2),
        ),
    ],
)
def test_number_of_processes_is_what_the_launcher_was_asked_for(
    environment: dict[str, str], command: str, expected: Share | None
) -> None:
    assert processes_to_start(environment, command.split()) == expected


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --config_file c.yaml train.py",
        "",
    ],
)
def test_what_cannot_be_made_up_for_is_refused_not_shrunk_to_one_process(command: str) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        processes_to_start(SEVERAL, command.split())


@pytest.mark.parametrize(
    "numbers",
    [
        "--num_processes 3 --num_machines 2 --machine_rank 0",
        "--num_processes 4 --num_machines 2 --machine_rank 2",
        "--num_processes 1 --num_machines 2",
    ],
)
def test_processes_that_the_machines_cannot_share_are_refused(numbers: str) -> None:
    with pytest.raises(ConfigError, match="counts the processes of all machines"):
        processes_to_start(SEVERAL, f"accelerate launch {numbers} train.py".split())


@pytest.mark.parametrize(
    ("environment", "command", "part"),
    [
        (LAUNCHED, "accelerate launch --gradient_accumulation_steps 4 train.py", "found 4"),
        (LAUNCHED, "accelerate launch --gradient-accumulation-steps=8 train.py", "found 8"),
        ({**LAUNCHED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "", "found 2"),
    ],
)
def test_accumulation_that_the_launcher_would_lose_is_refused_with_our_own_option(
    environment: dict[str, str], command: str, part: str
) -> None:
    with pytest.raises(ConfigError, match=f"{part}.* --train.accumulate {part[-1]} ") as caught:
        check_launch(environment, command.split())
    assert "--gradient_accumulation_steps" in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "shares", "refused"),
    [
        ("--nnodes 1:2", "True", True),
        ("--nnodes=2:8", "True", True),
        ("--nnodes 1:2", "False", False),
        ("--nnodes 2", "True", False),
        ("--nnodes 2:2", "True", False),
    ],
)
def test_machines_that_join_later_need_a_torchrun_that_tells_them_where(
    nodes: str, shares: str, refused: bool
) -> None:
    words = f"python torchrun {nodes} --nproc-per-node 2 train.py".split()
    environment = {"TORCHELASTIC_USE_AGENT_STORE": shares}
    if not refused:
        check_launch(environment, words)
        return
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launch(environment, words)


@pytest.mark.parametrize("flag", ["fsdp", "deepspeed", "megatron_lm"])
def test_ways_of_training_in_pieces_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--use_{flag}"):
        check_launch({**LAUNCHED, f"ACCELERATE_USE_{flag.upper()}": "true"}, [])


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        (LAUNCHED, "accelerate launch --gradient_accumulation_steps 1 train.py"),
        ({**LAUNCHED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, "accelerate launch"),
        ({**LAUNCHED, "ACCELERATE_USE_FSDP": "false"}, "accelerate launch train.py"),
        ({}, "sh other.sh --gradient_accumulation_steps 4"),
    ],
)
def test_launches_that_mean_what_they_say_pass(environment: dict[str, str], command: str) -> None:
    check_launch(environment, command.split())


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ({"processes": 1, "device": "cuda", "precision": "no"}, "--num_processes 1"),
        ({"processes": 2, "device": "cpu", "precision": "no"}, "--num_processes 2 --cpu"),
        (
            {"processes": 8, "device": "cuda", "precision": "bf16"},
            "--num_processes 8 --mixed_precision bf16",
        ),
    ],
)
def test_the_launch_is_spelt_out(asked: dict[str, Any], flags: str) -> None:
    assert launch_command(**asked) == f"accelerate launch {flags} {training_program()}"


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (ROOT, "trainer/train.py"),
        (ROOT / "trainer", "train.py"),
        (ROOT / "docs", "-m shardprep_trainer.train"),
        (Path("/"), shlex.quote(str((ROOT / "trainer/train.py").relative_to("/")))),
    ],
)
def test_in_a_checkout_the_program_is_its_script_and_elsewhere_the_module(
    folder: Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert training_program() == expected


def test_from_a_wheel_the_program_is_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "shardprep_trainer"
    # Some other package may install a train.py.
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "train.py").touch()
    monkeypatch.setattr(launch, "__file__", str(package / "processes" / "launch.py"))
    monkeypatch.chdir(tmp_path)
    assert training_program() == "-m shardprep_trainer.train"


def test_the_parent_command_is_read_from_the_system() -> None:
    code = (
        "from shardprep_trainer.processes.launch import parent_command; print(parent_command()[0])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    # This very process is the parent.
    assert found.stdout.strip() == Path("/proc/self/cmdline").read_text().split("\0")[0]
    assert parent_command()


def test_a_launcher_is_the_same_to_all_that_it_starts_and_no_other_is() -> None:
    assert launcher_identity({}) is None
    assert launcher_identity({"ACCELERATE_MIXED_PRECISION": "no"}) is None
    code = (
        "import subprocess, sys\n"
        "inner = 'from shardprep_trainer.processes.launch import launcher_identity; "
        'print(launcher_identity({"TORCHELASTIC_RUN_ID": "none"}))\'\n'
        "for _ in range(2): subprocess.run([sys.executable, '-c', inner], check=True)"
    )
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        first, second = done.stdout.splitlines()
        assert first == second
        found.append(first)
    assert found[0] != found[1]
