"""If one process of a launch fails, all fail; all start from the same step."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep
from shardprep_trainer.config.fields import Config
from shardprep_trainer.errors import CheckpointError, ConfigError
from shardprep_trainer.processes.agreement import check_alike, exchange, together
from shardprep_trainer.train import main

ConfigFactory = Callable[..., Config]

PROGRAM = """
import json, os, pathlib, sys
from dataclasses import replace
from shardprep_trainer.processes.agreement import together
from shardprep_trainer.errors import ConfigError, TrainerError
from shardprep_trainer.processes.meeting import join_processes, parting
from shardprep_trainer.config.command_line import parse_args
from shardprep_trainer.run.claim import RunClaim
from shardprep_trainer.run.start import find_start

rank = int(os.environ["RANK"])
base = parse_args(["--config", "base.yaml"]).config
told = {}

def change(config, part, **values):
    return replace(config, **{part: replace(getattr(config, part), **values)})

def attempt(name, work):
    try:
        told[name] = work()
    except TrainerError as error:
        told[name] = [type(error).__name__, error.exit_code, str(error)]

def fail():
    if rank == 1:
        raise ConfigError("no disk")

def begin(config, resume=True):
    claim = RunClaim(config.run, main=rank == 0)
    try:
        found = find_start(config, claim, resume=resume).newest
    finally:
        claim.release()
    return None if found is None else found.checkpoint.file.name

with parting():
    join_processes(base.run, trackers=(), hang_seconds=60)
    other = change(base, "data", shards="other")
    attempt("fails", lambda: together(fail))
    attempt("resumes", lambda: begin(base))
    attempt("data", lambda: begin(other if rank else base))
    attempt("folder", lambda: begin(change(base, "train", runs="empty") if rank else base, False))
    attempt("missing", lambda: begin(change(base, "data", shards="nowhere") if rank else base))
    older = change(base, "train", runs="older")
    attempt("older", lambda: begin(older if rank else base))
    attempt("options", lambda: begin(change(base, "optim", lr=0.5) if rank else base))
    attempt("places", lambda: begin(change(base, "train", runs="copy") if rank else base))
pathlib.Path(f"{rank}.json").write_text(json.dumps(told))
# A thread of gloo sometimes aborts a process whose interpreter cleans up.
sys.stderr.flush()
os._exit(0)
"""


def test_a_process_on_its_own_agrees_with_itself() -> None:
    assert together(lambda: 3) == 3
    assert [value for _, value in exchange("a")] == ["a"]
    check_alike({"a": 1}, "none")
    with pytest.raises(CheckpointError, match="own"):
        together(lambda: (_ for _ in ()).throw(CheckpointError("own")))
    with pytest.raises(ConfigError, match="begins"):
        together(lambda: (_ for _ in ()).throw(ConfigError("begins")))
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "runs/x")
    with pytest.raises(shardprep.StorageError, match=r"^runs/x: Stale file handle"):
        together(lambda: (_ for _ in ()).throw(stale))


@pytest.mark.remote
def test_two_processes_begin_from_the_same_or_not_at_all(
    make_config: ConfigFactory,
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"train.total_steps": 4, "train.save_steps": 2, "train.valid_steps": 0}
    config = make_config(**sizes, **{"train.runs": "runs"})
    (tmp_path / "base.yaml").write_text(config.to_yaml())
    assert main(["--config", "base.yaml"]) == 0
    for name in ("older", "copy"):
        shutil.copytree("runs", name)
    (tmp_path / "older/smoke/checkpoints/step-00000004.pt").unlink()
    source = make_dataset("Other", speakers=3, utterances=10, seed=7)
    options = shardprep.BuildOptions(val_fraction=0.2, workers=1)
    shardprep.build_shards(source, tmp_path / "other", options)
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    done = subprocess.run([sys.executable, "-m", *launch], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))

    # Its own error is that of the process, and the other is told whose it is.
    assert second["fails"] == ["ConfigError", 2, "no disk"]
    kind, code, text = first["fails"]
    assert (kind, code) == ("ElsewhereError", 2)
    assert text.startswith("process 1 on ")
    assert text.endswith(": no disk")
    assert "there is no folder nowhere" in first["missing"][2]
    # Where things lie may differ from machine to machine, and what they are may not.
    assert first["resumes"] == first["places"] == "step-00000004.pt"
    for name, part in {
        "data": "the fingerprint of data.shards: process 1 on ",
        "older": "has step-00000002.pt, but process 0 on ",
        "options": "optim.lr: process 1 on ",
    }.items():
        kind, code, text = first[name]
        assert (kind, code) == ("ConfigError", 2), name
        assert part in text
    assert "must be the same folder on all machines" in first["older"][2]
    # Process 1 would begin from scratch: process 0 is the one that refuses, and it is told.
    assert "already has checkpoints" in first["folder"][2]
    assert second["folder"][0] == "ElsewhereError"
    # Each names the run folder as it knows it.
    assert second["older"] != first["older"]
    for name in ("resumes", "places", "data", "options"):
        assert second[name] == first[name]
