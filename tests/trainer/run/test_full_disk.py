"""A disk that fills up while training costs checkpoints and records, not the run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from saved_models import BEST
from tensorboard.summary.writer.record_writer import RecordWriter

from shardprep import StorageError
from shardprep_trainer.checkpoint.files import CheckpointFolder, load
from shardprep_trainer.checkpoint.state import Best
from shardprep_trainer.config.fields import Config
from shardprep_trainer.run import validation as run
from shardprep_trainer.run.journal import Journal, MetricsLog
from shardprep_trainer.run.start import prepare
from shardprep_trainer.run.trainer import Trainer
from shardprep_trainer.train import main
from tests.conftest import mounted

ConfigFactory = Callable[..., Config]
SCRIPT = str(Path(__file__).resolve().parents[3] / "trainer" / "train.py")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_ROOM = StorageError("no room", file="x.pt", remedy="Buy a disk.")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the smoke recipe, some 500 kB, not for two."""
    with mounted(tmp_path / "disk", "1m") as place:
        (place / "other").write_bytes(bytes(300_000))
        yield place


def fit(config: Config) -> Trainer:
    trainer = Trainer(prepare(config))
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def records(config: Config, event: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (config.run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == event]


def refuse(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: set[int], error: Exception
) -> None:
    """Let a method fail at some of its calls, counted from 1."""
    method, made = getattr(owner, name), iter(range(1, 1000))

    def failing(*args: object, **options: object) -> object:
        if next(made) in calls:
            raise error
        return method(*args, **options)

    monkeypatch.setattr(owner, name, failing)


def names(config: Config) -> list[str]:
    return sorted(os.listdir(config.run / "checkpoints"))


def test_training_goes_on_without_a_checkpoint_and_the_next_save_tries_again(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"train.save_steps": 3, "train.valid_steps": 0})
    refuse(monkeypatch, CheckpointFolder, "save", {2, 3}, NO_ROOM)
    assert fit(config).step == 12
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 2
    for step, line in zip((6, 9), warnings, strict=True):
        assert f"step {step}: x.pt: no room; the newest that is saved is step-00000003.pt" in line
    assert names(config) == ["step-00000003.pt", "step-00000012.pt"]
    found = records(config, "warning")
    assert [row["step"] for row in found] == [6, 9]
    assert [f"WARNING: {row['text']}" for row in found] == warnings


@pytest.mark.parametrize("end", [{}, {"train.stop_step": 10}])
def test_a_run_whose_last_checkpoint_is_refused_ends_with_the_code_of_disks(
    end: dict[str, int],
    make_config: ConfigFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    config = make_config(**{"train.save_steps": 6, **end})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    refuse(monkeypatch, CheckpointFolder, "save", {2}, NO_ROOM)
    assert main(["--config", str(tmp_path / "config.yaml")]) == StorageError.exit_code
    err = capsys.readouterr().err
    assert err.count("WARNING: ") == 1
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"step {end.get('train.stop_step', 12)}, at which the run ends, is not saved" in last
    assert "(no room); --resume continues from " in last
    assert last.endswith("step-00000006.pt. Buy a disk.")


def test_the_best_is_what_is_on_the_disk(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(**{"train.valid_steps": 3, "train.save_steps": 3})
    accuracies = iter([0.4, 0.8, 0.6, 0.5])
    evaluate = run.evaluate  # type: ignore[attr-defined]

    class Scored:
        def __init__(self, real: Any) -> None:
            self.loss, self.correct, self.labelled = real.loss, real.correct, real.labelled
            self.accuracy, self.embeddings = next(accuracies), None

    monkeypatch.setattr(
        "shardprep_trainer.run.validation.evaluate", lambda *a, **o: Scored(evaluate(*a, **o))
    )
    refuse(monkeypatch, CheckpointFolder, "save_best", {2}, NO_ROOM)
    # The .8 of step 6 was never saved, so that the .6 of step 9 is the best.
    assert fit(config).best == Best(0.6, 9)
    best = load(config.run / BEST)
    assert (best.step, best.best) == (9, Best(0.6, 9))
    assert load(config.run / "checkpoints" / "step-00000012.pt").best == best.best
    assert "step 6: x.pt: no room; the newest that is saved is" in capsys.readouterr().err


def test_records_that_had_no_room_are_written_later_and_that_is_said_once(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = MetricsLog.write
    refused = iter([False, True, True, True])

    def full(self: MetricsLog, data: bytes) -> None:
        if next(refused, False):
            raise FULL
        write(self, data)

    monkeypatch.setattr(MetricsLog, "write", full)
    config = make_config()
    fit(config)
    assert [row["step"] for row in records(config, "train")] == [2, 4, 6, 8, 10, 12]
    err = capsys.readouterr().err
    assert err.count("WARNING: metrics.jsonl cannot be written (No space left on device)") == 1


def test_trackers_that_fail_are_left_alone_from_then_on(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def full(values: dict[str, Any], step: int) -> None:
        calls.append(step)
        raise FULL

    init = Journal.__init__

    def begin(self: Journal, accelerator: Any, *args: Any, **options: Any) -> None:
        init(self, accelerator, *args, **options)
        accelerator.log = full

    monkeypatch.setattr(Journal, "__init__", begin)
    config = make_config()
    assert fit(config).step == 12
    assert calls == [2]
    assert len(records(config, "train")) == 6
    err = capsys.readouterr().err
    assert err.count("WARNING: the files of train.trackers cannot be written (No space") == 1


def test_trackers_that_cannot_begin_do_not_stop_a_run(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, Accelerator, "init_trackers", {1}, FULL)
    config = make_config()
    assert fit(config).step == 12
    assert len(records(config, "train")) == 6
    err = capsys.readouterr().err
    assert err.count("WARNING: the files of train.trackers cannot be written (No space") == 1


def test_a_tracker_that_fails_in_its_own_thread_is_told_without_a_traceback(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: RecordWriter, data: bytes) -> None:
        raise FULL

    hook = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)
    assert fit(make_config(**{"train.trackers": ["tensorboard"]})).step == 12
    err = capsys.readouterr().err
    assert err.count("WARNING: the files of train.trackers cannot be written (No space") == 1
    assert "Traceback" not in err
    assert threading.excepthook is hook


def test_records_that_have_no_room_until_the_end_are_said_to_be_missing(
    make_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(monkeypatch, MetricsLog, "write", set(range(1, 100)), FULL)
    fit(make_config())
    assert "WARNING: the end of metrics.jsonl cannot be written" in capsys.readouterr().err


def test_a_disk_that_is_really_full_keeps_the_old_checkpoint_whole(
    make_config: ConfigFactory, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        **{"train.runs": small_disk, "train.save_steps": 4, "train.valid_steps": 0}
    )
    trainer = Trainer(prepare(config))
    with pytest.raises(StorageError, match=r"step 12, at which the run ends, is not saved"):
        trainer.fit()
    trainer.close()
    err = capsys.readouterr().err
    assert err.count("WARNING: step ") == 2
    assert "No space left on device" in err
    assert names(config) == ["step-00000004.pt"]
    assert load(config.run / "checkpoints" / "step-00000004.pt").step == 4
    # With room again, the run continues as if nothing had happened.
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    again = Trainer(prepare(config, resume=True))
    assert again.fit().finished
    again.close()
    assert [row["step"] for row in records(config, "train")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_no_process_waits_for_one_that_could_not_save(
    make_config: ConfigFactory, small_disk: Path, tmp_path: Path
) -> None:
    sizes = {"data.batch_size": 2, "train.save_steps": 4, "train.valid_steps": 0}
    config = make_config(**sizes, **{"train.runs": small_disk})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, SCRIPT, "--config", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
    )
    # The launcher itself ends with 1.
    assert done.returncode == 1
    assert f"returned non-zero exit status {StorageError.exit_code}" in done.stderr
    assert "step 12/12" in done.stderr
    assert done.stderr.count("WARNING: step ") == 2
    # A slow machine may let the other process say it as well.
    assert ": step 12, at which the run ends, is not saved" in done.stderr


def test_a_torn_line_of_a_full_disk_is_taken_back(small_disk: Path) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl")
    log.append({"step": 1})
    record: dict[str, Any] = {"step": 2, "text": "a" * 2**20}
    with pytest.raises(OSError, match="No space left on device"):
        log.append(record)
    assert log.path.read_text() == '{"step": 1}\n'
