"""What is to be packed, whatever it is: a data set, recordings, a list of files, Kaldi's data."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from shardprep.audio.recipe import FeatureRecipe
from shardprep.errors import SourceError
from shardprep.source.contents import Source
from shardprep.source.dataset import scan_dataset
from shardprep.source.lists.kaldi import SCP, scan_kaldi
from shardprep.source.lists.listed import FILES, scan_files
from shardprep.source.lists.place import folder_of
from shardprep.source.lists.table import SUFFIXES, read_table
from shardprep.source.metadata import METADATA
from shardprep.source.recordings.folders import recordings_in
from shardprep.source.recordings.names import is_recording
from shardprep.source.recordings.scan import WAV_SCP, scan_recordings, scan_rows, scan_wav_scp
from shardprep.storage.local import exists
from shardprep.storage.remote import Location, Remote, locate
from shardprep.storage.trouble import storage_errors

LISTS = (*SUFFIXES, ".scp")
"""What the names of files end in that are sources."""


def scan_source(
    place: str | os.PathLike[str],
    *,
    follow_links: bool = False,
    n_mels: int | None = None,
    recipe: FeatureRecipe | None = None,
) -> Source:
    """Read what lists the utterances of a source, and look at every file that it names.

    Args:
        place: A folder in the homework's layout, of recordings by speaker, or of Kaldi (feats.scp
            or wav.scp); or a list, of features or of recordings: CSV, TSV, JSON Lines, or an scp;
            or the URL of one (not Kaldi's).
        follow_links: Whether files may be links out of the folder; Kaldi's may lie out of it.
        n_mels: Mel bins F; None for what the source says.
        recipe: From recordings to log-mels; None for the homework's, with `n_mels` bins if given.
            Of a source of features, it is what its matrices were made by.

    Raises:
        SourceError: There is no source, or what lists its utterances is faulty.
        StorageError: The machine cannot read it now, or the store behind the URL gives no answer.
    """
    found = locate(place)
    own = recipe or (FeatureRecipe() if n_mels is None else FeatureRecipe(n_mels=n_mels))
    if n_mels not in (None, own.n_mels):
        raise SourceError(f"is {n_mels}, but {own.n_mels} in the recipe", key="n_mels")
    source = _scan(found, own, follow_links, n_mels if recipe is None else own.n_mels)
    if recipe is None or source.features is not None:
        return source
    return replace(source, features=recipe.to_features())


def _scan(found: Location, recipe: FeatureRecipe, follow_links: bool, n_mels: int | None) -> Source:
    listed = found.name.endswith(LISTS)
    if isinstance(found, Path):
        with storage_errors(found):
            is_folder = found.is_dir()
            if is_folder and not exists(found / METADATA):
                if listed:
                    raise SourceError("is a folder, expected a list", file=found)
                for scp in (SCP, WAV_SCP):
                    if not listed and exists(found / scp):
                        found, listed = found / scp, True
            elif is_folder:
                listed = False
    if not listed:
        if paths := _recordings_of(found, follow_links):
            return scan_recordings(found, paths, recipe, follow_links=follow_links)
        source = scan_dataset(found, follow_links=follow_links)
        if n_mels not in (None, source.n_mels):
            raise SourceError(
                f"is {source.n_mels}, not {n_mels}", file=found / METADATA, key="n_mels"
            )
        return source
    if found.name.endswith(".scp"):
        if isinstance(found, Remote):
            raise SourceError("Kaldi's data are read from folders of this machine", file=found)
        if found.name.endswith(WAV_SCP):
            return scan_wav_scp(found, recipe, follow_links=follow_links)
        return scan_kaldi(found, follow_links=follow_links, n_mels=n_mels)
    rows, root = read_table(found), folder_of(found)
    # The first file of a known kind says what the list is of.
    known = (row.path for row in rows if is_recording(row.path) or row.path.endswith(FILES))
    if is_recording(next(known, "")):
        return scan_rows(rows, root, found.name, recipe, follow_links=follow_links)
    return scan_files(rows, root, found.name, follow_links=follow_links, n_mels=n_mels)


def _recordings_of(place: Location, follow_links: bool) -> list[str]:
    """Paths of the recordings of a folder or a URL; none where there is a metadata.json."""
    if isinstance(place, Remote):
        if place.is_http:
            return []
        with contextlib.suppress(FileNotFoundError):
            (place / METADATA).info()
            return []
    elif not place.is_dir() or exists(place / METADATA):
        return []
    return recordings_in(place, follow_links=follow_links)
