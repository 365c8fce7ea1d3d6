"""The file of suspects, read back by Python's csv."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from shardprep_trainer.evaluation.suspects.leave_one_out import Judged
from shardprep_trainer.evaluation.suspects.listing import HEADER, Listed, write_suspects


def test_rows_are_in_order_with_the_names_as_they_are(tmp_path: Path) -> None:
    judged = Judged(
        position=np.array([0, 1, 3]),
        own=np.array([0.25, 0.5, 0.125]),
        other=np.array([0.5, 0.25, 0.875]),
        nearest=np.array([1, 0, 0]),
        alone=1,
        threshold=0.75,
    )
    names = ['Ann "A", B', "Zoë", None, "Zoë"]
    out = tmp_path / "new" / "out.csv"
    out.parent.mkdir()
    write_suspects(out, judged, ["u/0", "u/1", "u/2", "u/3"], names)
    with out.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == HEADER
    assert rows == [
        ["u/3", "Zoë", 'Ann "A", B', "0.1250", "0.8750", "-0.7500", "wrong speaker"],
        ["u/0", 'Ann "A", B', "Zoë", "0.2500", "0.5000", "-0.2500", "sounds like nobody"],
    ]


def test_only_what_a_user_must_know_is_noted() -> None:
    listed = Listed("f", "train", 9, 9, 9, 0, 0, 0, 0.5)
    assert listed.notes == []
    assert [line.split()[0] for line in Listed("f", "val", 9, 7, 4, 0, 0, 0, 0.5).notes] == [
        "3",
        "2",
    ]
