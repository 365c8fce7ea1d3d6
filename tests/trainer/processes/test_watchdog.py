"""A run that hangs ends with a report of who was doing what, and a code that a launcher sees."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from shardprep_trainer.config.fields import Config
from shardprep_trainer.processes.watchdog import (
    COMPUTING,
    READING,
    Report,
    Silence,
    Standstill,
    Watchdog,
    describe,
)
from tests.conftest import PATIENCE, wait_until

ConfigFactory = Callable[..., Config]
SCRIPT = str(Path(__file__).resolve().parents[3] / "trainer" / "train.py")
# What a busy machine does not keep a process waiting for.
HANG_SECONDS = 8
PAIR = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]

# Process `rank` of the run in config.yaml waits for ever for its third batch.
_BLOCKED = """
import sys, time
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.config.command_line import parse_args

trainer = Trainer(prepare(parse_args(["--config", "config.yaml"]).config))
loader = trainer.loader

class Blocked:
    def __getattr__(self, name):
        return getattr(loader, name)
    def __iter__(self):
        for number, batch in enumerate(loader):
            if number == 2 and trainer.rank == int(sys.argv[1]):
                time.sleep(1000)
            yield batch

trainer.loader = Blocked()
trainer.fit()
"""


def computing(ticks: int, count: int = 1) -> Report:
    return Report(ticks, count, 12, COMPUTING, 3.0)


def test_the_run_stands_still_only_if_no_process_begins_anything() -> None:
    standstill = Standstill()
    assert standstill.update({0: computing(1), 1: computing(1)}, 0.5) == 0
    assert standstill.update({0: computing(2), 1: computing(2)}, 0.5) == 0.5
    assert standstill.update({0: computing(3), 1: computing(3)}, 0.5) == 1.0
    assert standstill.update({0: computing(4), 1: computing(4, count=2)}, 0.5) == 0
    assert standstill.update({0: computing(5), 1: computing(5, count=2)}, 0.5) == 0.5


def test_a_process_is_silent_if_it_no_longer_says_that_it_runs() -> None:
    silence = Silence(range(3))
    for tick in range(5):
        # Process 1 stops after its second report, process 2 never reports.
        silence.update({0: computing(tick), 1: computing(min(tick, 1))}, 0.5)
    assert silence.beyond(1.5) == [1, 2]
    assert silence.beyond(2.5) == [2]


def test_the_report_names_the_silent_then_those_who_keep_the_others_waiting() -> None:
    reading = Report(9, 5, 12, READING, 4.0)
    text = describe({0: computing(9), 1: reading}, [], 3.0)
    assert text.startswith("error: no process has begun anything for 3 s, train.hang_seconds; ")
    assert "process 1 is stuck in reading data: look at its disks\n" in text
    assert "  process 0: after step 12, computing for 3 s\n" in text
    assert "  process 1: after step 12, reading data for 4 s\n" in text
    assert text.endswith("--resume continues from the newest checkpoint")
    text = describe({0: computing(9), 1: reading, 2: computing(3)}, [2], 3.0)
    assert "process 2 no longer answers" in text
    assert "computing for 3 s, no answer since" in text
    assert "process 3: has never reported" in describe({0: reading}, [3], 3.0)
    # Without the store of process 0, no process gets the reports of the others.
    text = describe({2: reading}, [0, 1], 3.0)
    assert "; processes 0 and 1 no longer answer: they were stopped, or a machine hangs, " in text
    assert "or process 0 hangs" in text
    text = describe({0: reading, 1: reading}, [], 3.0)
    assert "; processes 0 and 1 are stuck in reading data: look at their disks\n" in text
    assert "all are computing" in describe({0: computing(9), 1: computing(9)}, [], 3.0)


def test_the_report_names_the_machines_if_there_are_several() -> None:
    places = [Report(9, 5, 12, READING, 4.0, machine) for machine in ("a", "b", "b")]
    text = describe(dict(enumerate(places)), [], 3.0)
    assert "  process 0 on a: after" in text
    assert "  process 2 on b: after" in text
    assert "process 1: after" in describe(dict(enumerate(places[1:])), [], 3.0)


@pytest.mark.parametrize(
    ("rank", "silent", "reports"),
    [(0, [1], True), (1, [], False), (1, [0], True), (2, [0], False), (2, [0, 1], True)],
)
def test_the_lowest_rank_that_answers_reports(
    rank: int,
    silent: list[int],
    reports: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    watchdog = Watchdog(2, rank=rank, world_size=3, store=HashStore())
    watchdog._end({number: computing(9) for number in range(3)}, silent)
    assert codes == [124]
    assert ("error: no process has begun anything" in capsys.readouterr().err) == reports


def test_a_process_that_makes_progress_raises_no_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    # An alarm would end this very process, which a busy machine may keep waiting for a while.
    with Watchdog(3) as watchdog:
        for step in watchdog.each(range(8), COMPUTING, 3):
            time.sleep(0.5 if step else 0)
    with Watchdog(0):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def start(config: Config, folder: Path, *command: str) -> subprocess.Popen[str]:
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "blocked.py").write_text(_BLOCKED)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def long(make_config: ConfigFactory) -> Config:
    steps = {"train.total_steps": 100_000, "train.valid_steps": 0, "train.save_steps": 100_000}
    return make_config(**steps, **{"train.log_steps": 1, "train.hang_seconds": HANG_SECONDS})


@pytest.mark.slow
def test_data_that_never_come_end_a_run_of_one_process(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    process = start(long(make_config), tmp_path, sys.executable, "blocked.py", "0")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 124, err
    assert "process 0 is stuck in reading data" in err
    assert f"  process 0: after step 2, reading data for {HANG_SECONDS} s" in err
    # Where in the program it was.
    assert 'blocked.py", line' in err


@pytest.mark.slow
def test_the_process_whose_data_never_come_is_named(
    make_config: ConfigFactory, tmp_path: Path
) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start(long(make_config), tmp_path, *run, "blocked.py", "1")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    # On a busy machine the other process may take this one for silent, and report too.
    assert 1 <= err.count(f"error: no process has begun anything for {HANG_SECONDS} s") <= 2
    assert "process 1 is stuck in reading data" in err
    assert "  process 0: after step 2, computing for" in err


def test_a_process_that_never_comes_is_not_waited_for_in_silence(
    make_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    process = start(long(make_config), tmp_path, sys.executable, SCRIPT, "--config", "config.yaml")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 124, err
    assert "some processes have not come" in err
    assert f"  process 0: after step 0, meeting the other processes for {HANG_SECONDS} s" in err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_was_stopped_is_named(
    rank: int, make_config: ConfigFactory, tmp_path: Path
) -> None:
    config = long(make_config)
    process = start(config, tmp_path, *PAIR, SCRIPT, "--config", "config.yaml")
    try:
        os.kill(wait_for_rank(config, rank), signal.SIGSTOP)
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0
    # On a busy machine the other process may take this one for silent, and report too.
    assert 1 <= err.count(f"error: no process has begun anything for {HANG_SECONDS} s") <= 2
    assert f"process {rank} no longer answers" in err
    assert f"  process {1 - rank}: after step" in err


def wait_for_rank(config: Config, rank: int) -> int:
    """The process of a rank, after its first steps."""
    wait_until((config.run / "metrics.jsonl").exists)
    for place in Path("/proc").glob("[0-9]*"):
        try:
            here = Path(os.readlink(place / "cwd")) == config.run.parents[1]
            if here and f"RANK={rank}".encode() in (place / "environ").read_bytes().split(b"\0"):
                return int(place.name)
        except OSError:
            continue
    raise AssertionError("no such process")
