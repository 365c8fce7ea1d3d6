"""What is to be packed, whatever it is: a data set, a list of files, features of Kaldi."""

from __future__ import annotations

import os
from pathlib import Path

from shardprep.errors import SourceError
from shardprep.source.contents import Source
from shardprep.source.dataset import scan_dataset
from shardprep.source.lists.kaldi import SCP, scan_kaldi
from shardprep.source.lists.listed import scan_table
from shardprep.source.lists.table import SUFFIXES
from shardprep.source.metadata import METADATA
from shardprep.storage.local import exists
from shardprep.storage.remote import Remote, locate
from shardprep.storage.trouble import storage_errors

LISTS = (*SUFFIXES, ".scp")
"""What the names of files end in that are sources."""


def scan_source(
    place: str | os.PathLike[str], *, follow_links: bool = False, n_mels: int | None = None
) -> Source:
    """Read what lists the utterances of a source, and look at every file that it names.

    Args:
        place: Folder in the homework's layout or with Kaldi's feats.scp, or a list: CSV, TSV, JSON
            Lines, or a feats.scp; or the URL of one (not Kaldi's).
        follow_links: Whether files may be links out of the folder; Kaldi's may lie out of it.
        n_mels: Mel bins F; None for what the source says.

    Raises:
        SourceError: There is no source, or what lists its utterances is faulty.
        StorageError: The machine cannot read it now, or the store behind the URL gives no answer.
    """
    found = locate(place)
    is_list = found.name.endswith(LISTS)
    if isinstance(found, Path):
        with storage_errors(found):
            is_folder = found.is_dir()
            kaldi = is_folder and exists(found / SCP) and not exists(found / METADATA)
            if is_folder and is_list and not exists(found / METADATA):
                raise SourceError("is a folder, expected a list", file=found)
            is_list = is_list and not is_folder
        if kaldi:
            found, is_list = found / SCP, True
    if not is_list:
        source = scan_dataset(found, follow_links=follow_links)
        if n_mels not in (None, source.n_mels):
            raise SourceError(
                f"is {source.n_mels}, not {n_mels}", file=found / METADATA, key="n_mels"
            )
        return source
    if found.name.endswith(".scp"):
        if isinstance(found, Remote):
            raise SourceError("Kaldi's features are read from folders of this machine", file=found)
        return scan_kaldi(found, follow_links=follow_links, n_mels=n_mels)
    return scan_table(found, follow_links=follow_links, n_mels=n_mels)
