"""From a folder of mels to a scored submission, by the commands that a user types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEST_DATA = os.environ.get("SHARDPREP_TEST_DATA")


def run(*command: str | Path) -> str:
    """Run a command of this environment and return its stdout."""
    program = Path(sys.executable).parent / command[0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [program, *command[1:]], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def chain(data: Path, work: Path, steps: int, *overrides: str) -> dict[str, float]:
    """Build, verify, train in two processes, predict; returns the accuracies by split."""
    shards, runs = work / "shards", work / "runs"
    run("shardprep", "build", data / "Dataset", shards)
    assert ": intact (" in run("shardprep", "verify", shards, "--against", data / "Dataset")
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "2", "trainer/train.py")
    recipe = (
        "--config",
        "demo",
        "--train.total_steps",
        str(steps),
    )
    places = ("--data.shards", shards, "--train.runs", runs)
    run(*launch, *recipe, *places, "--train.valid_steps", str(steps), *overrides)
    predict = ("shardprep", "predict", runs / "demo", "--shards", shards)
    out = run(*predict, "--split", "val", "--out", work / "val.csv")
    out += run(*predict, "--out", work / "submission.csv", "--labels", data / "test_labels.csv")
    val, test = map(float, re.findall(r"accuracy on .*?: (\d\.\d+)", out))
    return {"val": val, "test": test}


@pytest.mark.slow
def test_the_whole_chain_learns_to_tell_synthetic_speakers_apart(tmp_path: Path) -> None:
    data = tmp_path / "synthetic"
    script = ("python", "-m", "scripts.synthetic", data)
    run(*script, "--speakers", "6", "--utterances", "30", "--test-utterances", "60")
    narrow = ("--model.dim", "64", "--model.heads", "2", "--model.head_dim", "32")
    short = ("--model.ff_dim", "128", "--optim.warmup_steps", "20")
    accuracy = chain(data, tmp_path, 120, *narrow, *short)
    assert accuracy["val"] > 3 / 6
    # Test recordings come from sessions that training has not seen; chance is 1/6.
    assert 2 / 6 < accuracy["test"] < 1


@pytest.mark.skipif(not TEST_DATA, reason="SHARDPREP_TEST_DATA names no folder of real speech")
def test_the_whole_chain_learns_from_real_speech(tmp_path: Path) -> None:
    assert TEST_DATA is not None
    data = Path(TEST_DATA)
    labels = (data / "test_labels.csv").read_text().splitlines()[1:]
    speakers = len({line.split(",")[1] for line in labels})
    accuracy = chain(data, tmp_path, 300)
    assert accuracy["test"] > 10 / speakers
