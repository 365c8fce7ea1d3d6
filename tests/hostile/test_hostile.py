"""Every hostile file is refused with a clear error, and does nothing else.

Each kind is read in a process of its own, by every function that may read such a file: whole
utterances and segments, `verify --deep`, `stream` and `repair` for shards, both kinds of build for
data sets.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forge import edit_record, options, write_dataset
from kinds import KINDS, Canary

import shardprep

HERE = Path(__file__).parent
SECURITY = (HERE.parents[1] / "SECURITY.md").read_text()
MOST_MEMORY = 200 << 20


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, str(HERE / "run_kinds.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {report["kind"]: report for report in lines}


@pytest.mark.parametrize("name", KINDS)
def test_hostile_input_is_refused_by_name_and_does_nothing(
    reports: dict[str, dict[str, Any]], name: str
) -> None:
    report = reports[name]
    assert report["crashes"] == []
    assert report["refusals"]
    for text in report["refusals"]:
        # An absolute path is named as in the metadata.
        assert name in text or text.startswith("/etc/passwd"), "does not name the file"
        assert len(text) < 2000
        # No control character reaches a terminal.
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert not report["canary"]
    assert not report["outside_changed"]
    assert report["growth"] < MOST_MEMORY


def test_security_lists_every_kind() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.+) \|$", SECURITY, re.MULTILINE)
    assert dict(rows) == {name: kind.sentence for name, kind in KINDS.items()}
    assert len(KINDS) >= 40


def test_unpickling_the_canary_makes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary()))
    assert (tmp_path / "canary").exists()


def test_a_record_that_is_right_is_accepted(tmp_path: Path) -> None:
    write_dataset(tmp_path / "Dataset")
    (tmp_path / "target").mkdir()
    edit_record(tmp_path / "target", lambda record: None)
    report = shardprep.build_shards(tmp_path / "Dataset", tmp_path / "target", options())
    assert report.shards_kept == 1
