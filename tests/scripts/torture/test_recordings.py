"""The script that kills builds from recordings counts what it did, and notices other sets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from scripts.torture import recordings


@pytest.mark.slow
def test_killed_builds_give_the_same_set(tmp_path: Path) -> None:
    source = recordings.make_recordings(tmp_path, 20, 0)
    result = recordings.torture(tmp_path, source, random.Random(1), 2)
    assert result["held"]
    assert (result["recordings"], result["asked"], result["identical"]) == (20, 2, 2)
    assert 2 <= result["kills"] <= 4


def test_sets_that_differ_between_workers_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(case: Any, command: list[str], folder: Path, begin: Path | None) -> dict[str, int]:
        folder.mkdir()
        (folder / "file").write_text(command[-1])
        return {"asked": 1, "identical": 1}

    monkeypatch.setattr(recordings, "Case", lambda *arguments: None)
    monkeypatch.setattr(recordings, "kill_often", build)
    result = recordings.torture(tmp_path, tmp_path / "none", random.Random(1), 2)
    assert (result["one_and_two_workers_equal"], result["held"]) == (False, False)
