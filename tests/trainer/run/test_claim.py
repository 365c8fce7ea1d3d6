"""A run folder has one run at a time; another is refused by the name of the process, or waits."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep.storage import lock
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.run import claim
from shardprep_trainer.run.claim import RunClaim, jobs_of
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.train import main

ConfigFactory = Callable[..., Config]

HOLD = """
import sys
from pathlib import Path
from shardprep_trainer.run.claim import RunClaim

claim = RunClaim(Path(sys.argv[1]), main=True)
claim.take(sys.argv[2:])
print("taken", flush=True)
for line in sys.stdin:
    claim.leave_soon() if line.strip() == "leave" else claim.release()
    print("done", flush=True)
"""


class Other:
    """Another process, which has taken a run folder."""

    def __init__(self, run: Path, *jobs: str) -> None:
        command = [sys.executable, "-c", HOLD, str(run), *jobs]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "taken\n"

    @property
    def name(self) -> str:
        return f"process {self.process.pid} on {socket.gethostname()}"

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    """`other(run, *jobs) -> Other`; ended with the test."""
    started: list[Other] = []

    def start(run: Path, *jobs: str) -> Other:
        started.append(Other(run, *jobs))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens at each pause of a process that waits; without anything left, time is up."""
    events: list[Callable[[], object]] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        if events:
            events.pop(0)()
        else:
            clock[0] += 1e6

    monkeypatch.setattr(claim.time, "sleep", sleep)
    monkeypatch.setattr(claim.time, "monotonic", lambda: clock[0])
    return events


def take(run: Path, *jobs: str) -> None:
    taken = RunClaim(run, main=True)
    taken.take(jobs)
    taken.release()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_of_one_name_is_refused_and_changes_nothing(
    make_config: ConfigFactory,
    other: Callable[..., Other],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    resume: bool,
) -> None:
    config = make_config(**{"train.stop_step": 6, "train.total_steps": 12})
    (tmp_path / "one.yaml").write_text(config.to_yaml())
    assert main(["--config", str(tmp_path / "one.yaml")]) == 0
    holder = other(config.run)
    before = files(config.run)
    capsys.readouterr()
    words = ["--config", str(tmp_path / "one.yaml"), "--optim.lr", "0.5"]
    assert main([*words, "--resume"] if resume else words) == 2
    assert files(config.run) == before
    said = capsys.readouterr().err
    assert said == (
        f"error: name: the run folder {config.run} is in use by {holder.name}; choose another "
        "--name, or wait for it\n"
    )


def test_the_claim_of_a_killed_run_is_free(tmp_path: Path, other: Callable[..., Other]) -> None:
    holder = other(tmp_path / "run")
    with pytest.raises(ConfigError, match=holder.name):
        take(tmp_path / "run")
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    take(tmp_path / "run")


def test_only_process_0_claims(tmp_path: Path, other: Callable[..., Other]) -> None:
    other(tmp_path / "run")
    second = RunClaim(tmp_path / "run", main=False)
    second.take([])
    second.leave_soon()
    second.release()
    assert (tmp_path / "run" / "lock").exists()


def test_a_run_waits_for_one_that_saves_and_is_let_in(
    tmp_path: Path,
    other: Callable[..., Other],
    waits: list[Callable[[], object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    holder = other(tmp_path / "run")
    holder.do("leave")
    waits += [lambda: None, lambda: None, lambda: holder.do("release")]
    take(tmp_path / "run")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"note: the run folder {tmp_path / 'run'} is in use by {holder.name}, which is about to "
        "end; waiting up to 120 s for it"
    )


def test_a_wait_in_vain_ends_in_the_refusal(
    tmp_path: Path, other: Callable[..., Other], waits: list[Callable[[], object]]
) -> None:
    holder = other(tmp_path / "run")
    holder.do("leave")
    with pytest.raises(ConfigError, match=holder.name):
        take(tmp_path / "run")


def test_a_run_waits_for_its_predecessor_in_the_same_job_only(
    tmp_path: Path, other: Callable[..., Other], waits: list[Callable[[], object]]
) -> None:
    (job,) = jobs_of({"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "big"})
    assert jobs_of({"TORCHELASTIC_RUN_ID": "none"}) == []
    assert jobs_of({"TORCHELASTIC_RUN_ID": "17"}) != [job]
    holder = other(tmp_path / "run", "launcher", job)
    (array_task,) = jobs_of({"SLURM_JOB_ID": "18", "SLURM_CLUSTER_NAME": "big"})
    waits.append(lambda: pytest.fail("waits"))
    with pytest.raises(ConfigError, match=holder.name):
        take(tmp_path / "run", "another launcher", array_task)
    waits[:] = [lambda: holder.do("release")]
    take(tmp_path / "run", "another launcher", job)
    assert not waits


def test_a_run_that_waits_is_refused_if_another_comes_first(
    tmp_path: Path, other: Callable[..., Other], waits: list[Callable[[], object]]
) -> None:
    holder, names = other(tmp_path / "run"), []
    holder.do("leave")

    def come_first() -> None:
        holder.do("release")
        names.append(other(tmp_path / "run").name)

    waits += [come_first, lambda: pytest.fail("waits for a run that does not leave")]
    with pytest.raises(ConfigError) as caught:
        take(tmp_path / "run")
    assert names[0] in str(caught.value)


def test_a_signal_and_the_last_save_announce_the_end(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"train.valid_steps": 0, "train.save_steps": 100})
    trainer = Trainer(prepare(config))
    seen: list[Any] = []
    save = trainer._save

    def note() -> Any:
        return json.loads(json.loads((config.run / "lock").read_text())["note"])["leaves"]

    def watch(**options: Any) -> None:
        seen.append(note())
        save(**options)

    monkeypatch.setattr(trainer, "_save", watch)
    batches = trainer._batches()

    def interrupted() -> Iterator[Any]:
        seen.append(note())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(note())
        yield from batches

    monkeypatch.setattr(trainer, "_batches", interrupted)
    assert trainer.fit().signal == signal.SIGTERM
    trainer.close()
    assert seen == [False, True, True]


def test_a_run_in_the_same_process_is_let_in_after_the_first(make_config: ConfigFactory) -> None:
    trainer = Trainer(prepare(make_config(**{"train.stop_step": 6})))
    trainer.fit()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
        prepare(make_config(), resume=True)
    trainer.close()
    again = Trainer(prepare(make_config(), resume=True))
    assert again.step == 6
    again.close()
    names = {path.name for path in make_config().run.iterdir()}
    assert names == {"checkpoints", "config.yaml", "metrics.jsonl", "model"}


def test_a_run_that_cannot_begin_leaves_no_folder(make_config: ConfigFactory) -> None:
    config = make_config(**{"data.batch_size": 25})
    with pytest.raises(ConfigError, match="batch_size"):
        prepare(config)
    assert not config.run.exists()


def test_without_locks_of_the_system_a_second_run_is_refused_too(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    trainer = Trainer(prepare(make_config(**{"train.stop_step": 6})))
    trainer.claim.leave_soon()
    holder = make_config().run / "lock.holder"
    assert '\\"leaves\\": true' in holder.read_text()
    trainer.claim._say(leaves=False)
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(), resume=True)
    assert f"in use by process {os.getpid()} on " in str(caught.value)
    assert str(caught.value).endswith(f"If that process no longer runs, remove {holder}")
    trainer.fit()
    trainer.close()
    assert not holder.exists()
    Trainer(prepare(make_config(), resume=True)).close()
