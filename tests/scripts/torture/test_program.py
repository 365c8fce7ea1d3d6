"""The script that kills programs with a ShardWriter counts what it did, and notices a loss."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from scripts.torture import program


@pytest.mark.slow
def test_killed_programs_give_the_same_set(tmp_path: Path) -> None:
    result = program.kills(tmp_path, random.Random(1), 3)
    assert result["held"]
    assert result["identical"] == 3 <= result["kills"] == sum(result["moments"].values())


@pytest.mark.slow
def test_a_set_with_other_bytes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = program.finish

    def other(folder: Path, *arguments: object) -> float:
        seconds = finish(folder, *arguments)  # type: ignore[arg-type]
        if folder.name == "killed":
            (folder / "test-000000.tar").unlink()
        return seconds

    monkeypatch.setattr(program, "finish", other)
    result = program.kills(tmp_path, random.Random(1), 1)
    assert (result["identical"], result["held"]) == (0, False)
