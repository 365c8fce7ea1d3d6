"""The ways to pack are measured alike, pack the same, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.bench import build as bench

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


def test_ratios_are_those_of_the_medians() -> None:
    results = {
        "tar cf": {"warm": [4.0, 2.0, 3.0], "bytes": 7_000_000_000},
        "other": {"warm": [9.0, 1.0, 4.5], "bytes": 3_500_000_000},
    }
    rows = bench.summarise(results, ["warm"])
    assert rows[0]["warm"] == {"seconds": 3.0, "rounds": [4.0, 2.0, 3.0], "to_tar": 1.0}
    assert rows[1]["warm"] == {"seconds": 4.5, "rounds": [9.0, 1.0, 4.5], "to_tar": 1.5}
    assert bench.table(rows, ["warm"]).splitlines() == [
        "| way | GB | warm, s | to tar |",
        "|---|---|---|---|",
        "| tar cf | 7.00 | 3.0 | 1.00 |",
        "| other | 3.50 | 4.5 | 1.50 |",
    ]


def test_each_way_packs_every_utterance(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    root = make_dataset(speakers=2, utterances=3, test_utterances=2)
    keys = {path.stem for path in root.glob("uttr-*.pt")}
    ways = bench.commands(root, tmp_path / "out", "float16", [2])
    assert list(ways)[0] == "tar cf"
    for name, command in ways.items():
        target = tmp_path / "out"
        target.mkdir()
        subprocess.run(command, check=True, capture_output=True)
        packed = {path.stem for path in target.rglob("uttr-*.pt")}
        for path in target.rglob("*.tar"):
            with tarfile.open(path) as tar:
                packed |= {Path(member).name.split(".")[0] for member in tar.getnames()}
        assert packed >= keys, name
        target.rename(tmp_path / f"done {name}")


def test_result_tells_seconds_and_bytes_and_nothing_is_left(
    make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_dataset(speakers=2, utterances=3)
    before = sorted(root.parent.rglob("*"))
    options = ["--rounds", "2", "--no-cold", "--only", "cp -r", "--out", tmp_path / "build.json"]
    command = [sys.executable, "-m", "scripts.bench.build", root, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "build.json").read_text())
    (tmp_path / "build.json").unlink()
    assert sorted(root.parent.rglob("*")) == before
    size = sum(path.stat().st_size for path in root.iterdir())
    assert result["dataset"] == {"files": len(list(root.iterdir())), "bytes": size}
    tar, copy = result["ways"]
    assert (tar["way"], copy["way"]) == ("tar cf", "cp -r")
    assert copy["bytes"] == size < tar["bytes"]
    assert [len(row["warm"]["rounds"]) for row in (tar, copy)] == [2, 2]
    assert "| cp -r |" in done.stdout


def test_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="failed: .*nowhere"):
        bench.measure(["cp", "-r", str(tmp_path / "nowhere"), str(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
