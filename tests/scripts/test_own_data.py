"""The comparison of few recordings tests on recordings that no training has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from scripts.own_data import TESTED, WAYS, divide, find_recordings, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for speaker in ("ann", "bea"):
        for number in range(12):
            path = tmp_path / "corpus" / speaker / f"s{number // 4}" / f"{number:02d}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    (tmp_path / "corpus" / "ann" / "notes.txt").write_text("")
    return tmp_path / "corpus"


def test_recordings_are_found_by_speaker_in_the_order_of_their_paths(folder: Path) -> None:
    found = find_recordings([folder])
    assert found.keys() == {"corpus-ann", "corpus-bea"}
    names = [path.name for path in found["corpus-ann"]]
    assert names == [f"{number:02d}.flac" for number in range(12)]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_recordings_are_for_testing_alone(folder: Path, seed: int) -> None:
    speakers = find_recordings([folder])
    rows = divide(speakers, 5, seed)
    assert len({path for path, _, _ in rows}) == len(rows)
    for speaker, files in speakers.items():
        own = {path: split for path, name, split in rows if name == speaker}
        assert Counter(own.values()) == {"train": 4, "val": 1, "test": TESTED}
        assert {p for p, split in own.items() if split == "test"} == set(map(str, files[-TESTED:]))
    assert rows == divide(speakers, 5, seed)
    assert rows != divide(speakers, 5, seed + 2)


def test_too_few_recordings_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="corpus-ann has 12 recordings, not 13"):
        divide(find_recordings([folder]), 8, 0)


def test_the_table_has_means_over_the_seeds() -> None:
    runs = [{way: {"accuracy": n / 4, "eer": n / 8} for way in WAYS} for n in (1, 2)]
    assert table({5: runs}).splitlines()[-1] == "| 5 |" + " 0.375 | 0.188 |" * 3
