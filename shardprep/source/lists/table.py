"""Reads a list of matrices or recordings: CSV, TSV or JSON Lines, within limits.

A fault of the list itself (no header, a row of another length, no JSON) always raises, with the
number of the line. What its rows say is checked later, row by row.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from shardprep.errors import SourceError
from shardprep.source.lists.place import check_rows, read_listing
from shardprep.storage.remote import Location
from shardprep.storage.sniff import sniff

SUFFIXES = (".csv", ".tsv", ".jsonl")

_REQUIRED = ("path", "speaker")
_KNOWN = (*_REQUIRED, "split", "frames", "key", "start", "end")
_COLUMNS = "the columns path and speaker, and split, frames, key, start or end if you like"
_MOST_SHOWN = 80


class Row(NamedTuple):
    """One row of a list; values are as they are written, "" where there is none.

    Attributes:
        line: Number of its line, from 1; 0 for a file that was found without a list.
        path: The file, relative to the list's folder.
        speaker: Speaker name.
        split: "train", "val" or "test".
        frames: Length in mel frames.
        key: The key in the shards.
        start: Of a recording, where its piece begins [s].
        end: Of a recording, where its piece ends [s].
    """

    line: int
    path: str
    speaker: str = ""
    split: str = ""
    frames: str = ""
    key: str = ""
    start: str = ""
    end: str = ""

    @property
    def where(self) -> str:
        """Its line, or the file where there is no list."""
        return f"line {self.line}" if self.line else self.path


def read_table(place: Location) -> list[Row]:
    """The rows of a list.

    Raises:
        SourceError: There is no such list, or it is faulty.
        StorageError: The machine cannot read it now, or the store gives no answer.
    """
    text = _text(read_listing(place), place)
    found = _json_rows(text, place) if place.name.endswith(".jsonl") else _csv_rows(text, place)
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        check_rows(len(rows), place)
    return rows


def _text(data: bytes, place: Location) -> str:
    """The text of a list: UTF-8, or another Unicode by its byte order mark."""
    found = sniff(data)
    if found is not None and found.kind not in ("text", "json"):
        raise SourceError(f"{found.what}, not a list", file=place)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError(
            f"is not UTF-8 text (line {line}, byte {error.start})",
            file=place,
            remedy="Save it as UTF-8.",
        ) from None


def _csv_rows(text: str, place: Location) -> Iterator[Row]:
    first = text.lstrip().partition("\n")[0]
    marks = "\t" if place.name.endswith(".tsv") else ",;\t"
    delimiter = next((mark for mark in marks if mark in first), marks[0])
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for values in lines:
            if not any(map(str.strip, values)):
                continue
            if not header:
                header = _header(values, lines.line_num, place)
                continue
            if len(values) != len(header):
                raise SourceError(
                    f"line {lines.line_num} has {len(values)} values, expected {len(header)}",
                    file=place,
                    remedy=f"Its header is {','.join(header)[:_MOST_SHOWN]}.",
                )
            named = zip(header, map(str.strip, values), strict=True)
            yield Row(lines.line_num, **{n: value for n, value in named if n in _KNOWN})
    except csv.Error as error:
        raise SourceError(f"line {lines.line_num} is no row ({error})", file=place) from None
    if not header:
        raise SourceError(f"is empty, expected a header with {_COLUMNS}", file=place)


def _header(values: list[str], line: int, place: Location) -> list[str]:
    header = [value.strip() for value in values]
    shown = ",".join(header)[:_MOST_SHOWN]
    missing = [name for name in _REQUIRED if name not in header]
    if len(missing) == len(_REQUIRED):
        what = f"line {line} is {shown!a}, expected a header with {_COLUMNS}"
    elif missing:
        what = f"its header is {shown!a}, and the column {missing[0]} is missing"
    elif twice := [name for name in _KNOWN if header.count(name) > 1]:
        what = f"its header has the column {twice[0]} twice"
    else:
        return header
    raise SourceError(what, file=place, remedy="A speaker may be empty where it is unknown.")


class _Line(msgspec.Struct):
    """A line of JSON Lines."""

    path: str
    speaker: str | int | None
    split: str | None = None
    frames: int | float | str | None = None
    key: str | None = None
    start: int | float | str | None = None
    end: int | float | str | None = None


def _json_rows(text: str, place: Location) -> Iterator[Row]:
    decoder, empty = msgspec.json.Decoder(_Line), True
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            found = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise SourceError(
                f"line {number}: {str(error)[:200]}",
                file=place,
                remedy='Each line is an object such as {"path": "a.npy", "speaker": "ann"}.',
            ) from None
        empty = False
        values = (getattr(found, name) for name in _KNOWN)
        yield Row(number, *("" if value is None else str(value).strip() for value in values))
    if empty:
        raise SourceError("lists no utterance", file=place)
