"""The entries of testdata.json: rows of the split test, merged with the lines of rejects.jsonl.

Both keep the order of testdata.json, and a line has its position there. So the rows fill the
positions that no line has. This holds whatever a foreign file claims: numbers that do not fit only
change the order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shardprep.format.manifest import Reject


@dataclass(frozen=True)
class Entry:
    """An entry of testdata.json.

    Attributes:
        file: Its file, as a submission names it.
        index: Position in the split test of the utterance of this file; None if there is none.
        reason: Why the entry has no utterance of its own; "" if it has one.
    """

    file: str
    index: int | None
    reason: str


def merged_entries(
    keys: Sequence[str], rejects: Iterable[Reject], first: int = 0, ending: str = "pt"
) -> tuple[Entry, ...]:
    """The entries of testdata.json, in its order.

    Args:
        keys: Keys of the split test, in its order.
        rejects: All lines of rejects.jsonl. Entries whose position a repair has lost come last.
        first: Position of the first key in the split test, which may begin with other sets'.
        ending: What the name of a file has after its key and a dot.
    """
    lines = [reject for reject in rejects if _is_entry(reject)]
    index_of = {key: index for index, key in enumerate(keys, first)}
    rows = row_positions(len(keys), lines)
    found = [
        (position, Entry(f"{key}.{ending}", index, ""))
        for index, (key, position) in enumerate(zip(keys, rows, strict=True), first)
    ]
    last = len(keys) + len(lines)
    for line in lines:
        file = f"{line.key}.{ending}" if line.key else line.file
        entry = Entry(file, index_of.get(line.key), line.reason)
        found.append((last if line.entry is None else line.entry, entry))
    return tuple(entry for _, entry in sorted(found, key=lambda item: item[0]))


def row_positions(count: int, rejects: Iterable[Reject]) -> list[int]:
    """The position in testdata.json of each of the first `count` rows of the split test."""
    taken = {reject.entry for reject in rejects if reject.split == "test"}
    free = (position for position in itertools.count() if position not in taken)
    return list(itertools.islice(free, count))


def later_reject(reject: Reject, before: int) -> Reject:
    """The same line where so many other entries come before those of its testdata.json."""
    entry, repeats = (x if x is None else x + before for x in (reject.entry, reject.repeats))
    return msgspec.structs.replace(reject, entry=entry, repeats=repeats)


def _is_entry(reject: Reject) -> bool:
    # A line without key and position stands for several utterances that a repair has lost.
    return reject.split == "test" and (bool(reject.key) or reject.entry is not None)
