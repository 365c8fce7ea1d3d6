"""Recordings that a user names: files, folders of them, and lists. Decoded ahead, in threads."""

from __future__ import annotations

import collections
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shardprep import key_of_recording, machine_errors, recordings_in
from shardprep_trainer.errors import PredictionError

_LISTS = (".csv", ".tsv", ".jsonl")
# Decoding keeps to few threads: a recording of hours takes 100 MB as log-mels.
_MOST_THREADS = 4

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Recording:
    """A recording, or a piece of one."""

    path: Path
    key: str
    """Its path without suffix, relative to the folder that was named; or as its list says."""
    start: float | None = None
    """Where it begins [s]; None for the beginning."""
    end: float | None = None
    """Where it ends [s]; None for the end."""

    def __str__(self) -> str:
        if self.start is None and self.end is None:
            return str(self.path)
        return f"{self.path} ({self.start or 0:g} s to {_shown(self.end)})"


def find_recordings(places: Iterable[Path]) -> list[Recording]:
    """The recordings that are meant by files, folders and lists.

    A folder stands for all recordings below it, in the order of their paths. A list is a CSV, TSV
    or JSON Lines with the column path, relative to its folder, and perhaps key, start and end [s].

    Raises:
        PredictionError: Nothing is there, or a list is faulty.
        StorageError: The machine refused.
    """
    found: list[Recording] = []
    for place in places:
        with machine_errors(place):
            if place.is_dir():
                found += _of_folder(place)
            elif place.suffix.lower() in _LISTS:
                found += _of_list(place)
            else:
                found.append(Recording(place, _key(place.as_posix())))
    return found


def ahead(make: Callable[[Given], Made], items: Sequence[Given]) -> Iterator[Made | ValueError]:
    """What a function makes of each item, in order; a few are made ahead, in threads.

    A ValueError of the function is given in the place of what it would have made.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1, max(1, len(items)))

    def attempt(item: Given) -> Made | ValueError:
        try:
            return make(item)
        except ValueError as error:
            return error

    waiting: collections.deque[Future[Made | ValueError]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(attempt, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def name_of(audio: object) -> str:
    """What a recording is called in errors."""
    if isinstance(audio, (str, os.PathLike, Recording)):
        return str(audio)
    if isinstance(audio, np.ndarray):
        return f"the {audio.shape} samples"
    return "the bytes of the recording"


def _shown(time: float | None) -> str:
    return "the end" if time is None else f"{time:g} s"


def _key(path: str, *times: float | None) -> str:
    """The key that shards would have, of a path that may lead out of the folder."""
    return key_of_recording(path, *times).lstrip("./") or path


def _of_folder(folder: Path) -> list[Recording]:
    paths = recordings_in(folder)
    if not paths:
        raise PredictionError(
            f"{folder}: there is no recording in it (wav, flac, mp3, m4a, ogg and others); name "
            "another folder, or the files"
        )
    return [Recording(folder / path, key_of_recording(path)) for path in paths]


def _of_list(file: Path) -> list[Recording]:
    try:
        text = file.read_text("utf-8-sig")
        rows = _json_rows(text) if file.suffix.lower() == ".jsonl" else _table_rows(text, file)
    except FileNotFoundError:
        raise PredictionError(f"{file}: there is no such list") from None
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise PredictionError(f"{file}: is no list of recordings ({error})") from error
    return [_of_row(row, number, file) for number, row in rows]


def _table_rows(text: str, file: Path) -> list[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    table = csv.DictReader(text.splitlines(), delimiter=delimiter)
    if "path" not in (table.fieldnames or ()):
        raise PredictionError(
            f"{file}: the first line names no column path, only {table.fieldnames}; add one"
        )
    return [(table.line_num, row) for row in table]


def _json_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    lines = enumerate(text.splitlines(), 1)
    return [(number, json.loads(line)) for number, line in lines if line.strip()]


def _of_row(row: Any, number: int, file: Path) -> Recording:
    path = row.get("path") if isinstance(row, dict) else None
    if not isinstance(path, str) or not path:
        raise PredictionError(f"{file}: line {number} has no path")
    times = []
    for name in ("start", "end"):
        value = row.get(name)
        try:
            times.append(None if value in (None, "") else float(value))
        except (TypeError, ValueError):
            raise PredictionError(
                f"{file}: line {number}: {name} is {str(value)[:20]!r}, expected seconds"
            ) from None
    key = row.get("key") or _key(path, *times)
    return Recording(file.parent / path, str(key), *times)


def check_there(recordings: Iterable[Recording]) -> None:
    """PredictionError if a recording is not there: that is said before the long work."""
    for recording in recordings:
        with machine_errors(recording.path):
            there = os.path.lexists(recording.path)
        if not there:
            raise PredictionError(f"{recording.path}: there is no such recording")
