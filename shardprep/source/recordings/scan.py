"""From a folder, a list or Kaldi's wav.scp to a source of recordings."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardprep.audio.recipe import FeatureRecipe
from shardprep.errors import SourceError, needs
from shardprep.source.contents import Source
from shardprep.source.dataset import Finder
from shardprep.source.listing import FileState, listing_of
from shardprep.source.lists.kaldi import UTT2SPK, OuterFiles, columns
from shardprep.source.lists.listed import Places, paths_of, source_of_rows
from shardprep.source.lists.table import Row
from shardprep.source.paths import Roots, check_key
from shardprep.source.recordings.folders import rows_of
from shardprep.source.recordings.names import (
    SUFFIXES,
    Piece,
    is_recording,
    key_of_recording,
    seconds,
)
from shardprep.source.recordings.reader import RecordingReader
from shardprep.storage.local import exists
from shardprep.storage.remote import Location

# Of a path out of the folder, how many names make the key: speaker, session, recording.
_DEPTH = 3

WAV_SCP, SEGMENTS = "wav.scp", "segments"


def scan_recordings(
    root: Location, paths: list[str], recipe: FeatureRecipe, *, follow_links: bool = False
) -> Source:
    """The recordings below a folder or a URL, by speaker; see `folders`.

    Args:
        root: Folder or URL.
        paths: The recordings, by `recordings_in`.
        recipe: From recordings to log-mels.
        follow_links: Whether files and folders may be links out of the folder.

    Raises:
        SourceError: No recording can be used.
        StorageError: The machine or the store gives no answer.
    """
    finder = Finder(listing_of(root, follow_links), Roots(root))
    return _source(rows_of(paths), _FolderPlaces(finder), root, recipe, "the folder")


def scan_rows(
    rows: list[Row], root: Location, listing: str, recipe: FeatureRecipe, *, follow_links: bool
) -> Source:
    """The recordings that the rows of a CSV, TSV or JSON Lines name.

    Raises:
        SourceError: No recording can be used.
        StorageError: The machine or the store gives no answer.
    """
    files, roots = listing_of(root, follow_links), Roots(root, listing)
    files.expect(paths_of(rows, roots))
    outer = OuterFiles(root, listing, follow_links) if isinstance(root, Path) else None
    return _source(rows, _ListPlaces(Finder(files, roots), outer), root, recipe, listing)


def scan_wav_scp(scp: Path, recipe: FeatureRecipe, *, follow_links: bool = False) -> Source:
    """A data directory of Kaldi: wav.scp, utt2spk, and segments if it is there.

    Args:
        scp: The wav.scp. Paths in it are relative to its folder, or to the current folder.
        recipe: From recordings to log-mels.
        follow_links: Whether recordings may lie out of its folder.

    Raises:
        SourceError: A file is missing or faulty, or no recording can be used.
        StorageError: The machine cannot read a file now.
    """
    root = scp.parent
    speakers, recordings = dict(columns(root / UTT2SPK)), dict(columns(scp))
    rows = []
    if exists(root / SEGMENTS):
        for number, (key, rest) in enumerate(columns(root / SEGMENTS), 1):
            recording, *times = rest.split()
            if len(times) != 2:
                what = f"line {number} has {2 + len(times)} values, expected 4"
                remedy = "It has the columns utterance, recording, start and end."
                raise SourceError(what, file=root / SEGMENTS, remedy=remedy)
            start, end = times
            path = recordings.get(recording, "")
            own = Row(number, path, speakers.get(key, ""), key=key, start=start, end=end)
            # Kaldi writes -1 for the end of the recording.
            rows.append(own._replace(end="") if own.end.startswith("-") else own)
        listing = SEGMENTS
    else:
        rows = [
            Row(number, path, speakers.get(key, ""), key=key)
            for number, (key, path) in enumerate(recordings.items(), 1)
        ]
        listing = scp.name
    files = OuterFiles(root, scp.name, follow_links)
    return _source(rows, _KaldiPlaces(files), root, recipe, listing)


def _source(
    rows: list[Row], places: Places, root: Location, recipe: FeatureRecipe, listing: str
) -> Source:
    with needs("audio"):
        import av  # noqa: F401
        import soundfile  # noqa: F401
        import soxr  # noqa: F401
    reader = RecordingReader(root, recipe)
    source = source_of_rows(rows, places, reader, listing, recipe.n_mels)
    return replace(source, features=recipe.to_features())


def _piece(file: str, row: Row) -> Piece:
    """The piece that a row asks for. ValueError if there is none such."""
    start, end = seconds(row.start, "start"), seconds(row.end, "end")
    if end is not None and end <= (start or 0):
        raise ValueError(f"end is {row.end[:20]}, not after start, {row.start[:20] or 0}")
    return Piece(file, start, end)


def _check_suffix(path: str) -> None:
    if not is_recording(path):
        raise ValueError(f"the file name ends in none of {', '.join(SUFFIXES)}")


class _ListPlaces:
    """A row names a recording, and perhaps a piece of it; see `Places`."""

    def __init__(self, finder: Finder, outer: OuterFiles | None) -> None:
        self._finder, self._outer = finder, outer

    def key(self, row: Row) -> str:
        """See `Places`."""
        if not row.path:
            raise ValueError("the path is empty")
        if row.key:
            return check_key(row.key)
        try:
            listed = self._finder.place_of(row.path)
        except ValueError as error:
            if self._outer is None:
                raise
            if not self._outer.follow_links:
                raise ValueError(
                    f"{error}, or give --follow-links, if you trust the list"
                ) from None
            # Out of the folder: only its last folders tell utterances apart, and keys are short.
            listed = "/".join(os.path.normpath(row.path).replace("..", "").split("/")[-_DEPTH:])
        _check_suffix(listed)
        return check_key(key_of_recording(*_piece(listed, row)))

    def find(self, row: Row) -> tuple[str, FileState]:
        """See `Places`."""
        try:
            place = self._finder.place_of(row.path)
        except ValueError:
            if self._outer is None or not self._outer.follow_links:
                raise
            file, state = self._outer.look(row.path)
        else:
            file, state = self._finder.find(row.path, place)
        return _piece(file, row).path, state


class _FolderPlaces(_ListPlaces):
    """A row is a recording in the folder of a speaker."""

    def __init__(self, finder: Finder) -> None:
        super().__init__(finder, None)

    def find(self, row: Row) -> tuple[str, FileState]:
        """See `Places`."""
        if not row.speaker and row.split != "test":
            raise ValueError("lies in no folder of a speaker")
        return super().find(row)


class _KaldiPlaces:
    """A row names a recording of wav.scp; see `Places`."""

    def __init__(self, files: OuterFiles) -> None:
        self._files = files

    def key(self, row: Row) -> str:
        """See `Places`."""
        return check_key(row.key)

    def find(self, row: Row) -> tuple[str, FileState]:
        """See `Places`."""
        if not row.speaker:
            raise ValueError(f"{row.key} is not in {UTT2SPK}")
        if not row.path:
            raise ValueError(f"the recording of {row.key} is not in {WAV_SCP}")
        if row.path.startswith("|") or row.path.endswith("|"):
            raise ValueError("is a command, and commands are not executed; write its result as wav")
        _check_suffix(row.path)
        file, state = self._files.look(row.path)
        return _piece(file, row).path, state
