"""Processes that are started here: each knows its rank, and one failure ends all."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from shardprep_trainer.processes.launch import Share
from shardprep_trainer.processes.workers import start_processes


def run_workers(monkeypatch: pytest.MonkeyPatch, code: str, share: Share = Share(3)) -> int:  # noqa: B008
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", code])
    return start_processes(share)


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


def test_processes_of_a_second_machine_have_the_places_behind_those_of_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29511")
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = (
        f"import os; e = os.environ; open({str(tmp_path)!r} + '/' + e['RANK'], 'w')"
        f".write(' '.join(e[n] for n in {names}))"
    )
    assert run_workers(monkeypatch, code, Share(2, machine=1, machines=3)) == 0
    found = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    rest = ["6", "2", "10.0.0.1", "29511"]
    assert found == {"2": ["0", *rest], "3": ["1", *rest]}


@pytest.mark.parametrize(
    ("ending", "expected"),
    [("raise SystemExit(2)", 2), ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_one_failure_ends_the_others_and_gives_its_code(
    monkeypatch: pytest.MonkeyPatch, ending: str, expected: int
) -> None:
    monkeypatch.setattr("shardprep_trainer.processes.workers._GRACE_SECONDS", 0.2)
    code = f"import os, time\nif os.environ['RANK'] == '1':\n    {ending}\ntime.sleep(600)"
    assert run_workers(monkeypatch, code) == expected


def test_the_death_of_the_launcher_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    parents = iter([os.getppid()])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    assert run_workers(monkeypatch, "import time; time.sleep(600)", Share(2)) == 143


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
    tmp_path: Path,
) -> None:
    # Usually, both are found dead at once.
    monkeypatch.setattr("shardprep_trainer.processes.workers._POLL_SECONDS", 1.0)
    code = f"""
import fcntl, os, resource, time
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
# Process 1 holds the lock as long as it lives, and process 0 fails when it has the lock.
lock = open({str(tmp_path / "lock")!r}, "w")
if os.environ["RANK"] == "1":
    fcntl.flock(lock, fcntl.LOCK_EX)
    open({str(tmp_path / "locked")!r}, "w").close()
    os.kill(os.getpid(), {int(number)})
while not os.path.exists({str(tmp_path / "locked")!r}):
    time.sleep(0.01)
fcntl.flock(lock, fcntl.LOCK_EX)
raise SystemExit(1)
"""
    assert run_workers(monkeypatch, code, Share(2)) == 128 + number
    err = capsys.readouterr().err
    assert err.startswith(f"error: process 1 was {part}")
    assert err.count("error: ") == 1
