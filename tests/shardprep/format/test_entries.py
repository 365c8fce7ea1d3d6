"""Rows of the split test and lines of rejects.jsonl give the entries of testdata.json in order."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardprep.format.entries import merged_entries, row_positions
from shardprep.format.manifest import Reject


def line(key: str, entry: int | None, **values: Any) -> Reject:
    return Reject(f"{key}.pt", key, None, "test", "why", entry, **values)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())))
def test_rows_and_lines_give_the_list_that_they_were_made_from(
    listed: list[tuple[int, bool]],
) -> None:
    # A testdata.json: number of the file, and whether it can be packed. The first entry of a file
    # gets the row.
    rows: list[str] = []
    lines: list[Reject] = []
    for entry, (file, good) in enumerate(listed):
        key = f"{'good' if good else 'bad'}-{file}"
        if good and key not in rows:
            rows.append(key)
        else:
            lines.append(line(key, entry))
    other = Reject("a.pt", "a", "ann", "labelled", "why")
    found = merged_entries(rows, [*reversed(lines), other])
    assert [entry.file for entry in found] == [
        f"{'good' if good else 'bad'}-{file}.pt" for file, good in listed
    ]
    for entry, (file, good) in zip(found, listed, strict=True):
        assert entry.index == (rows.index(f"good-{file}") if good else None)
    own = [n for n, entry in enumerate(found) if entry.reason == ""]
    assert own == row_positions(len(rows), lines)


def test_an_entry_without_a_path_is_called_what_the_list_has() -> None:
    lines = [Reject("5", "", None, "test", "is no object", 1)]
    assert [entry.file for entry in merged_entries(["a", "b"], lines)] == ["a.pt", "5", "b.pt"]


def test_what_a_repair_has_lost_comes_last_and_a_count_is_no_entry() -> None:
    lines = [line("lost", None), line("bad", 0), Reject("test-000000.tar", "", None, "test", "3")]
    found = merged_entries(["a", "b"], lines)
    assert [entry.file for entry in found] == ["bad.pt", "a.pt", "b.pt", "lost.pt"]


@given(st.lists(st.integers(0, 2**32 - 1)), st.integers(0, 20))
def test_numbers_that_do_not_fit_only_change_the_order(numbers: list[int], rows: int) -> None:
    keys = [f"row-{n}" for n in range(rows)]
    lines = [line(f"line-{n}", number) for n, number in enumerate(numbers)]
    found = merged_entries(keys, lines)
    assert sorted(entry.file for entry in found) == sorted(
        f"{key}.pt" for key in itertools.chain(keys, (own.key for own in lines))
    )
    assert [entry.index for entry in found if entry.index is not None] == list(range(rows))


@pytest.mark.parametrize("number", ["-1", "4294967296", "1.5", '"1"', "1e400"])
def test_a_position_that_no_list_has_is_refused(number: str) -> None:
    text = msgspec.json.encode(line("a", 7)).replace(b'"entry":7', b'"entry":' + number.encode())
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(text, type=Reject)
