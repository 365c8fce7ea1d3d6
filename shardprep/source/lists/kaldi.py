"""Features of Kaldi: feats.scp and the utt2spk beside it."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardprep.errors import SourceError, needs
from shardprep.source.contents import Source
from shardprep.source.listing import AbsentError, FileState, FolderListing
from shardprep.source.lists.ark import ArkReader, parse_entry
from shardprep.source.lists.listed import source_of_rows
from shardprep.source.lists.place import check_rows, read_listing
from shardprep.source.lists.table import Row
from shardprep.source.paths import Roots, check_key, relative_path

SCP, UTT2SPK = "feats.scp", "utt2spk"


def scan_kaldi(scp: Path, *, follow_links: bool = False, n_mels: int | None = None) -> Source:
    """Read a feats.scp, and the utt2spk beside it.

    Args:
        scp: The feats.scp. Paths in it are relative to its folder, or to the current folder.
        follow_links: Whether arks may lie out of its folder.
        n_mels: Mel bins F; None for those of the first matrix.

    Raises:
        SourceError: A file is missing or faulty.
        MissingExtraError: kaldiio is not installed.
        StorageError: The machine cannot read a file now.
    """
    with needs("kaldi"):
        import kaldiio  # noqa: F401
    root = scp.parent
    speakers = dict(columns(root / UTT2SPK))
    entries = [
        Row(number, path, speakers.get(utterance, ""), key=utterance)
        for number, (utterance, path) in enumerate(columns(scp), 1)
    ]
    places = _ArkPlaces(OuterFiles(root, scp.name, follow_links), _begins(entries))
    return source_of_rows(entries, places, ArkReader(root), scp.name, n_mels)


def columns(path: Path) -> Iterator[tuple[str, str]]:
    """The two columns of a file of Kaldi; the second one may have spaces.

    Raises:
        SourceError: The file is missing or faulty.
    """
    try:
        lines = read_listing(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"is not UTF-8 text (byte {error.start})", file=path) from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        values = line.split(None, 1)
        if not values:
            continue
        if len(values) < 2:
            raise SourceError(f"line {number} has one column, expected two", file=path)
        if values[0] in seen:
            raise SourceError(
                f"line {number} has the utterance {values[0][:60]} of line {seen[values[0]]} again",
                file=path,
            )
        seen[values[0]] = number
        check_rows(len(seen), path)
        yield values[0], values[1].strip()


def _begins(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Where the matrices of each ark begin, in order: there an earlier one has ended."""
    found: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        with contextlib.suppress(ValueError):
            entry = parse_entry(row.path)
            found[entry.file].add(entry.offset)
    return {file: sorted(offsets) for file, offsets in found.items()}


class _ArkPlaces:
    """A row names a place in an ark; see `Places`."""

    def __init__(self, arks: OuterFiles, begins: dict[str, list[int]]) -> None:
        self._arks, self._begins = arks, begins

    def key(self, row: Row) -> str:
        """See `Places`."""
        return check_key(row.key)

    def find(self, row: Row) -> tuple[str, FileState]:
        """See `Places`."""
        if not row.speaker:
            raise ValueError(f"{row.key} is not in {UTT2SPK}")
        entry = parse_entry(row.path)
        file, state = self._arks.look(entry.file)
        own = self._begins[entry.file]
        after = bisect.bisect_right(own, entry.offset)
        end = min(own[after], state.nbytes) if after < len(own) else state.nbytes
        if entry.offset >= end:
            raise ValueError(f"begins at byte {entry.offset} of a file of {state.nbytes} bytes")
        place = file + row.path.removeprefix(entry.file)
        return place, FileState(end - entry.offset, state.version)


class OuterFiles:
    """Looks at files that may lie out of the folder of a list, at each once.

    Args:
        root: The folder.
        listing: Name of the list, for messages.
        follow_links: Whether files may lie out of the folder.
    """

    def __init__(self, root: Path, listing: str, follow_links: bool) -> None:
        self.follow_links = follow_links
        self._root, self._roots = root, Roots(root, listing)
        self._files = FolderListing(root, follow_links)
        self._known: dict[str, tuple[str, FileState] | ValueError] = {}

    def look(self, path: str) -> tuple[str, FileState]:
        """Where a file lies, and its state. ValueError if it cannot be used."""
        if path not in self._known:
            try:
                self._known[path] = self._look(path)
            except ValueError as fault:
                self._known[path] = fault
        found = self._known[path]
        if isinstance(found, ValueError):
            raise found
        return found

    def _look(self, path: str) -> tuple[str, FileState]:
        with contextlib.suppress(ValueError):
            # Beside the scp; if it is not there, Kaldi means the current folder.
            inner = relative_path(path, self._roots)
            with contextlib.suppress(AbsentError):
                return inner, self._files.look(inner)
        outer = os.path.abspath(path)
        inside = self._roots.inner(outer)
        if inside is None and not self.follow_links:
            raise ValueError(
                f"{path[:200]} lies out of the folder, or does not exist; --follow-links takes "
                "such files, if you trust the data set"
            )
        try:
            return inside or outer, self._files.look(inside or outer)
        except AbsentError:
            raise ValueError(f"the file {path[:200]} does not exist") from None
