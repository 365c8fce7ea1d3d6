"""What `accelerate launch` passes over, and the processes that it leaves to us."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainer
from trainer.errors import ConfigError
from trainer.launch import (
    check_launch,
    launch_command,
    parent_command,
    processes_to_start,
    restarted_since,
    start_processes,
)

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
SEVERAL = {**LAUNCHED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "command", "expected"),
    [
        ({}, "python train.py", 1),
        ({"MASTER_PORT": "1"}, "sh --num_processes 9", 1),
        (LAUNCHED, "accelerate launch --cpu train.py", 1),
        (SEVERAL, "accelerate launch --num_processes 2 --cpu train.py", 2),
        (SEVERAL, "accelerate launch --cpu --num-processes=12 train.py", 12),
        ({**SEVERAL, "LOCAL_RANK": "0"}, "accelerate launch --num_processes 2 train.py", 1),
        ({**SEVERAL, "PMI_RANK": "1"}, "mpirun -n 2", 1),
    ],
)
def test_number_of_processes_is_what_the_launcher_was_asked_for(
    environment: dict[str, str], command: str, expected: int
) -> None:
    assert processes_to_start(environment, command.split()) == expected


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --config_file c.yaml train.py",
        "accelerate launch --num_processes 4 --num_machines 2 train.py",
        "",
    ],
)
def test_what_cannot_be_made_up_for_is_refused_not_shrunk_to_one_process(command: str) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        processes_to_start(SEVERAL, command.split())


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
    ("launch", "flags"),
    [
        ({"processes": 1, "device": "cuda", "precision": "no"}, "--num_processes 1"),
        ({"processes": 2, "device": "cpu", "precision": "no"}, "--num_processes 2 --cpu"),
        (
            {"processes": 8, "device": "cuda", "precision": "bf16"},
            "--num_processes 8 --mixed_precision bf16",
        ),
    ],
)
def test_the_launch_is_spelt_out(launch: dict[str, Any], flags: str) -> None:
    script = Path(trainer.__path__[0]) / "train.py"
    words = shlex.split(launch_command(**launch))
    assert words[:-1] == ["accelerate", "launch", *flags.split()]
    assert Path(words[-1]).resolve() == script.resolve()


def test_the_script_is_named_as_it_is_found_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(trainer.__path__[0]).parent)
    assert launch_command(processes=1, device="cuda", precision="no").endswith(" trainer/train.py")


def test_the_parent_command_is_read_from_the_system() -> None:
    code = "from trainer.launch import parent_command; print(parent_command()[0])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    # This very process is the parent.
    assert found.stdout.strip() == Path("/proc/self/cmdline").read_text().split("\0")[0]
    assert parent_command()


def run_workers(monkeypatch: pytest.MonkeyPatch, code: str, number: int = 3) -> int:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", code])
    return start_processes(number)


def test_every_process_learns_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = (
        f"import os; e = os.environ; open({str(tmp_path)!r} + '/' + e['RANK'], 'w')"
        f".write(' '.join(e[n] for n in {names}))"
    )
    assert run_workers(monkeypatch, code) == 0
    rows = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    port = rows[0][4]
    assert rows == [[str(r), str(r), "3", "127.0.0.1", port] for r in range(3)]


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("raise SystemExit(2)", 2), ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_one_failure_ends_the_others_and_gives_its_code(
    monkeypatch: pytest.MonkeyPatch, ending: str, expected: int
) -> None:
    monkeypatch.setattr("trainer.launch._GRACE_SECONDS", 0.2)
    code = f"import os, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(60)"
    assert run_workers(monkeypatch, code) == expected


def test_the_death_of_the_launcher_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parents = iter([os.getppid()])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    assert run_workers(monkeypatch, "import time; time.sleep(60)", 2) == 143


@pytest.mark.parametrize(
    ("number", "part"),
    [
        (signal.SIGKILL, "killed by SIGKILL (out of memory?); give the same command with --resume"),
        (signal.SIGBUS, "killed by SIGBUS (a shard was changed or its disk failed while it was "),
        (signal.SIGSEGV, "killed by SIGSEGV; give the same command"),
    ],
)
def test_a_killed_process_is_named_though_the_others_fail_because_of_it(
    number: signal.Signals,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.launch._GRACE_SECONDS", 0.5)
    # Both are found dead at once.
    monkeypatch.setattr("trainer.launch._POLL_SECONDS", 1.0)
    code = (
        "import os, resource, time; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"if os.environ['RANK'] == '1': os.kill(os.getpid(), {int(number)})\n"
        "time.sleep(0.05); raise SystemExit(1)"
    )
    assert run_workers(monkeypatch, code, 2) == 128 + number
    err = capsys.readouterr().err
    assert err.startswith(f"error: process 1 was {part}")
    assert err.count("error: ") == 1


def test_a_first_start_is_no_restart_and_a_restart_knows_when_its_launcher_began() -> None:
    assert restarted_since({}) is None
    assert restarted_since({"TORCHELASTIC_RESTART_COUNT": "0"}) is None
    code = (
        "import subprocess, sys, time; begun = time.time(); time.sleep(1)\n"
        "inner = 'from trainer.launch import restarted_since; "
        'print(restarted_since({"TORCHELASTIC_RESTART_COUNT": "2"}))\'\n'
        "done = subprocess.run([sys.executable, '-c', inner], capture_output=True, check=True)\n"
        "print(begun, done.stdout.decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    begun, found = map(float, done.stdout.split())
    # The interpreter itself takes a moment to start; the clock of /proc ticks 100 times a second.
    assert begun - 2 < found < begun + 0.2
