"""The script that damages sets counts what it did, and notices what verify does not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.torture import shards as torture

COUNTS = {"flips": 4, "truncations": 3, "kills": 1, "drops": 3}


@pytest.fixture
def case(make_dataset: Callable[..., Path], tmp_path: Path) -> Any:
    source = make_dataset(speakers=2, utterances=5, test_utterances=2, frames=(5, 20))
    (tmp_path / "work").mkdir()
    return torture.Case(source, tmp_path / "work", random.Random(0), COUNTS)


@pytest.mark.parametrize("part", ["flips", "truncations", "kills", "appends", "drops"])
def test_each_part_holds(case: Any, part: str) -> None:
    result = torture.PARTS[part](case)
    assert torture.is_held(part, result)
    assert result["asked"] >= COUNTS["kills" if part == "appends" else part]


def test_every_refusal_is_an_error(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    source = make_dataset(speakers=1, utterances=1, test_utterances=0)
    (tmp_path / "work").mkdir()
    result = torture.refusals(torture.Case(source, tmp_path / "work", random.Random(0), COUNTS))
    assert torture.is_held("refusals", result)
    assert result["EIO"]["errors"] > 15
    assert result["EIO"] == result["ENOSPC"]


def test_what_goes_unnoticed_is_counted(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torture.verify_shards

    def blind(folder: Path, **options: Any) -> Any:
        report = original(folder, **options)
        report.faults = [f for f in report.faults if not f.file.endswith(".tar")]
        return report

    monkeypatch.setattr(torture, "verify_shards", blind)
    result = torture.flips(case)
    assert result["missed"]
    assert not torture.is_held("flips", result)
    result = torture.truncations(case)
    assert result["found"] < result["refused_on_opening"] == result["asked"]
    assert not torture.is_held("truncations", result)


def test_a_build_that_is_not_identical_is_counted() -> None:
    good = {"asked": 3, "kills": 4, "identical": 3}
    assert torture.is_held("kills", good)
    assert not torture.is_held("kills", {**good, "identical": 2})
    assert not torture.is_held("kills", {**good, "kills": 2})
    good = {"asked": 9, "errors": 8, "made_no_difference": 1, "identical": 9}
    assert torture.is_held("refusals", {"EIO": good})
    assert not torture.is_held("refusals", {"EIO": good, "ENOSPC": {**good, "identical": 8}})
    good = {"asked": 4, "identical_with_source": 4, "intact_without": 3, "nothing_left": 1}
    assert torture.is_held("drops", good)
    assert not torture.is_held("drops", {**good, "intact_without": 2})


def test_command_writes_its_result(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    source = make_dataset(speakers=2, utterances=4, test_utterances=0, frames=(5, 20))
    out = tmp_path / "torture.json"
    command = [sys.executable, "-m", "scripts.torture.shards", "--dataset", source, "--out", out]
    parts = ["--only", "flips", "--only", "drops", "--flips", "2", "--drops", "1"]
    done = subprocess.run([*command, *parts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {name: part["held"] for name, part in report["parts"].items()} == {
        "flips": True,
        "drops": True,
    }
    assert report["machine"]["cores"] >= 1
