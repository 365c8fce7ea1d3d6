"""From the rows of a list to a source: each row checked, what is faulty put aside."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from shardprep.errors import SourceError
from shardprep.format.index import NO_LABEL
from shardprep.format.limits import MAX_N_MELS
from shardprep.format.manifest import Reject
from shardprep.source.contents import Reader, Source, Utterance
from shardprep.source.dataset import MOST_FRAMES, MOST_REJECTS, Finder, rejects_error
from shardprep.source.listing import FileState, listing_of
from shardprep.source.lists.table import Row
from shardprep.source.metadata import MOST_SHOWN, is_unicode
from shardprep.source.paths import Roots, check_key, key_of, relative_path, split_suffix
from shardprep.source.reader import FileReader
from shardprep.storage.remote import Location

FILES = (".pt", ".npy")
"""What the names of matrices end in."""

_SPLITS = ("train", "val", "test")


class Places(Protocol):
    """What a kind of list means by its rows."""

    def key(self, row: Row) -> str:
        """The key of a row. ValueError if readers of shards would not take it."""

    def find(self, row: Row) -> tuple[str, FileState]:
        """Where the matrix of a row lies. ValueError if it cannot be used."""


class _FilePlaces:
    """A row names a file."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def key(self, row: Row) -> str:
        """See `Places`."""
        if not row.path:
            raise ValueError("the path is empty")
        listed = self._finder.place_of(row.path)
        split_suffix(listed, FILES)
        return check_key(row.key) if row.key else key_of(listed, FILES)

    def find(self, row: Row) -> tuple[str, FileState]:
        """See `Places`."""
        return self._finder.find(row.path, self._finder.place_of(row.path))


class _Kept(NamedTuple):
    """A row that can be used.

    Attributes:
        row: The row.
        key: Its key.
        path: Where its matrix lies.
        state: What the place says of the file.
        entry: Position among the test rows; None for other rows.
    """

    row: Row
    key: str
    path: str
    state: FileState
    entry: int | None


def scan_files(
    rows: list[Row], root: Location, listing: str, *, follow_links: bool, n_mels: int | None
) -> Source:
    """The `.pt` and `.npy` files that the rows of a CSV, TSV or JSON Lines name.

    Args:
        rows: The rows.
        root: The folder of the list, which the paths in it are relative to.
        listing: Name of the list.
        follow_links: Whether files may be links out of the folder.
        n_mels: Mel bins F; None for those of the first matrix.

    Raises:
        SourceError: No row can be used.
        StorageError: The machine or the store gives no answer.
    """
    files, roots = listing_of(root, follow_links), Roots(root, listing)
    files.expect(paths_of(rows, roots))
    places = _FilePlaces(Finder(files, roots))
    return source_of_rows(rows, places, FileReader(root, "frames"), listing, n_mels)


def paths_of(rows: Iterable[Row], roots: Roots) -> Iterator[str]:
    """The paths of all rows, relative to the folder of the list, except faulty ones."""
    for row in rows:
        with contextlib.suppress(ValueError):
            yield relative_path(row.path, roots)


def source_of_rows(
    rows: Iterable[Row],
    places: Places,
    reader: Reader,
    listing: str,
    n_mels: int | None,
) -> Source:
    """The source that a list describes; speakers are numbered in sorted order.

    Args:
        rows: The rows.
        places: What its rows mean; a ValueError makes the row a reject.
        reader: Reads the matrices.
        listing: Name of the list, for messages.
        n_mels: Mel bins F; None for those of the first matrix.

    Raises:
        SourceError: No row can be used, or far too many cannot.
    """
    rejects: list[Reject] = []
    kept: dict[str, _Kept] = {}
    uses: dict[str, _Kept] = {}
    tests = 0

    def refuse(row: Row, key: str, fault: ValueError | str, entry: int | None) -> None:
        rejects.append(_reject(row, listing, key, fault, entry))
        if len(rejects) > MOST_REJECTS:
            raise rejects_error(rejects, reader.root)

    for row in rows:
        entry = tests if _split_of(row) == "test" else None
        tests += entry is not None
        key = ""
        try:
            key = places.key(row)
            _check(row)
            path, state = places.find(row)
            own = _Kept(row, key, path, state, entry)
            first = uses.setdefault(path, own)
            if first is not own:
                if first.row.speaker != row.speaker and kept.pop(first.key, None) is not None:
                    # Nobody knows whose utterance it is.
                    what = f"{row.where} lists the same file with another speaker"
                    refuse(first.row, first.key, what, first.entry)
                raise ValueError(f"lists the same file as {first.row.where}")
            if key in kept:
                raise ValueError(f"has the key of {kept[key].row.where}, {key}")
        except ValueError as fault:
            if isinstance(fault, UnicodeEncodeError) and fault.encoding != "utf-8":
                # The file may be healthy: this process cannot even ask for it.
                raise
            refuse(row, key, fault, entry)
            continue
        kept[key] = own
    return _source(kept.values(), rejects, reader, listing, n_mels)


def _source(
    kept: Collection[_Kept],
    rejects: list[Reject],
    reader: Reader,
    listing: str,
    n_mels: int | None,
) -> Source:
    speakers = tuple(sorted({one.row.speaker for one in kept if one.row.speaker}))
    labels = {name: label for label, name in enumerate(speakers)}
    parts: dict[str, list[Utterance]] = {name: [] for name in ("", *_SPLITS)}
    for row, key, path, state, entry in kept:
        parts[_split_of(row)].append(
            Utterance(
                key,
                path,
                row.speaker or None,
                labels.get(row.speaker, NO_LABEL),
                int(_frames(row) or 0),
                *state,
                entry,
            )
        )
    every = [utterance for own in parts.values() for utterance in own]
    if not every and rejects:
        raise rejects_error(rejects, reader.root)
    return Source(
        reader,
        n_mels or _bins(reader, every, listing),
        speakers,
        tuple(parts[""]),
        tuple(parts["test"]),
        tuple(rejects),
        listing=listing,
        fixed={name: tuple(parts[name]) for name in ("train", "val") if parts[name]},
    )


def _split_of(row: Row) -> str:
    """The split of a row; "" for one that the build draws."""
    return row.split or ("" if row.speaker else "test")


def _frames(row: Row) -> str:
    """The length that a row says; pandas writes 435.0 for 435 where other rows say none."""
    return row.frames.removesuffix(".0")


def _check(row: Row) -> None:
    """ValueError if a row says what cannot be."""
    if row.split not in ("", *_SPLITS):
        raise ValueError(f"the split is {row.split[:60]!a}, expected train, val, test or nothing")
    if row.split in ("train", "val") and not row.speaker:
        raise ValueError(f"has no speaker, which the split {row.split} needs")
    if len(row.speaker) > MOST_SHOWN or not is_unicode(row.speaker):
        raise ValueError(f"the speaker is not valid Unicode of at most {MOST_SHOWN} characters")
    if row.frames:
        frames = _frames(row)
        plain = frames.isascii() and frames.isdigit() and len(frames) < 12
        if not plain or not 1 <= int(frames) < MOST_FRAMES:
            raise ValueError(f"frames is {row.frames[:20]!a}, expected a whole number from 1")


def _reject(row: Row, listing: str, key: str, fault: ValueError | str, entry: int | None) -> Reject:
    shown = row.path[:MOST_SHOWN].encode(errors="backslashreplace").decode()
    return Reject(
        shown,
        key,
        row.speaker[:MOST_SHOWN].encode(errors="backslashreplace").decode() or None,
        "labelled" if entry is None else "test",
        f"{fault} ({row.where} of {listing})" if row.line else str(fault),
        entry,
    )


def _bins(reader: Reader, utterances: list[Utterance], listing: str) -> int:
    """The mel bins of the first matrix that can be read."""
    faults: list[ValueError] = []
    for utterance in utterances:
        ((_, mel),) = reader.read([utterance], 0)
        if not isinstance(mel, ValueError) and mel.shape[1] <= MAX_N_MELS:
            return int(mel.shape[1])
        faults.append(mel if isinstance(mel, ValueError) else ValueError("has too many bins"))
    if not utterances:
        raise SourceError("lists no utterance", file=reader.root / listing)
    raise SourceError(
        f"none of the {len(utterances)} files that it lists can be read: {utterances[0].path} "
        f"{faults[0]}",
        file=reader.root / listing,
    )
