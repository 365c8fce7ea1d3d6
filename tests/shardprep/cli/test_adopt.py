"""`shardprep adopt` tells what it made, what it left out, and why it stops."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
MEL = np.ones((100, 40), np.float16)


@pytest.fixture
def tars(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    for split, first in (("train", 0), ("val", 4)):
        members: list[tuple[str, Any]] = []
        for number in range(first, first + 4):
            members += [(f"{number:09d}.npy", MEL), (f"{number:09d}.cls", str(number % 2).encode())]
        write_tar(tmp_path / "mels" / split / "00000.tar", members)
    return tmp_path / "mels"


def test_a_summary_goes_to_stdout_and_again_there_is_nothing_to_do(
    run_cli: Cli, tars: Path, tmp_path: Path
) -> None:
    done = run_cli("adopt", tars, tmp_path / "set", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'set'}: complete"
    assert [line.split()[:3] for line in lines[2:4]] == [["train", "4", "400"], ["val", "4", "400"]]
    assert "member .npy: float16, 40 columns; 2 speakers, 0 utterances rejected" in done.stdout
    again = run_cli("adopt", tars, tmp_path / "set", "--workers", "1")
    assert again.stdout.startswith(f"{tmp_path / 'set'}: up to date, nothing to do\n")
    assert "reading the tars, to compare" in again.stderr
    shown = run_cli("inspect", tmp_path / "set")
    assert "codec none, adopted tars, member .npy" in shown.stdout
    assert json.loads(run_cli("inspect", tmp_path / "set", "--json").stdout)["member"] == "npy"


def test_json_has_the_whole_report(run_cli: Cli, tars: Path, tmp_path: Path) -> None:
    pattern = f"{tars}/{{train,val}}/00000.tar"
    done = run_cli("adopt", pattern, tmp_path / "set", "--split", "test", "--json")
    report = json.loads(done.stdout)
    assert report["splits"]["test"]["samples"] == 4 + 4
    assert report["rejects"] == []
    assert "no train split" in report["notes"][0]


def test_faults_have_their_exit_codes(
    run_cli: Cli, tars: Path, tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    write_tar(tars / "train" / "00001.tar", [("x.npy", MEL[0]), ("x.cls", b"0"), ("y.npy", MEL)])
    failed = run_cli("adopt", tars, tmp_path / "set", "--workers", "1")
    assert failed.returncode == 3
    assert (
        "00001.tar: x: has the shape (40,), expected (frames, n_mels) (and 1 more" in failed.stderr
    )
    skipped = run_cli("adopt", tars, tmp_path / "set", "--workers", "1", "--on-error", "skip")
    assert skipped.returncode == 0
    assert "2 utterances left out" in skipped.stderr
    assert len((tmp_path / "set" / "rejects.jsonl").read_text().splitlines()) == 2
    assert run_cli("repair", tmp_path / "set", "--drop").returncode == 5
    assert run_cli("adopt", tars, tmp_path / "set").returncode == 3
    assert run_cli("adopt", tmp_path / "nowhere", tmp_path / "other").returncode == 3
    assert run_cli("adopt", tmp_path / "other").returncode == 2
