"""The report of a build says what a user should know, in few words."""

from __future__ import annotations

import pytest

from shardprep.build.report import BuildReport, note_untrained
from shardprep.build.shard import ShardRecord
from shardprep.format.index import IndexRow
from shardprep.format.manifest import ShardInfo


@pytest.mark.parametrize(("held", "said"), [(0, []), (10, ["s09"]), (12, ["s09 and 2 others"])])
def test_speakers_of_val_alone_are_named_the_first_ten_of_them(held: int, said: list[str]) -> None:
    names = tuple(f"s{number:02d}" for number in range(20))
    report = BuildReport("shards")
    records = []
    for split, labels in (("train", range(held, 20)), ("val", range(20))):
        rows = tuple(IndexRow(0, 0, 1, label, 0, str(label)) for label in labels)
        info = ShardInfo(f"{split}-000000.tar", len(rows), len(rows), 0, "")
        records.append(ShardRecord("", info, rows, (), 0))
    note_untrained(report, names, records)
    assert [note.partition("s00, ")[2].rpartition("s08, ")[2] for note in report.notes] == said
