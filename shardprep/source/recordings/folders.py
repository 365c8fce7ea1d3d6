"""Recordings that lie in folders of speakers.

AUDIO/SPEAKER/.../NAME.wav          any folders below a speaker, as in VoxCeleb and LibriSpeech
AUDIO/SPLIT/SPEAKER/.../NAME.wav    where there are no other folders than train, val and test
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shardprep.source.lists.table import Row
from shardprep.source.recordings.names import is_recording
from shardprep.storage.remote import Location, Remote
from shardprep.storage.trouble import machine_errors

_SPLITS = {"train", "val", "test"}


def recordings_in(root: Location, *, follow_links: bool = False) -> list[str]:
    """Paths of the recordings below a folder, sorted, with forward slashes.

    A web server has no list of its files: of one, nothing is found.

    Raises:
        StorageError: The machine cannot list a folder now, or the store gives no answer.
    """
    if isinstance(root, Remote):
        names = () if root.is_http else root.listing()
        return sorted(filter(is_recording, names))
    with machine_errors(root):
        return sorted(_walk(root, follow_links))


def _walk(root: Path, follow_links: bool) -> Iterator[str]:
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=follow_links):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in folders if not _leads_up(folder, name)]
        inner = os.path.relpath(folder, root)
        for name in names:
            if is_recording(name):
                yield name if inner == "." else f"{inner}/{name}"


def _leads_up(folder: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in: it would never end."""
    path = os.path.join(folder, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.commonpath([target, os.path.realpath(folder)]) == target


def _raise(error: OSError) -> None:
    raise error


def rows_of(paths: list[str]) -> list[Row]:
    """Rows as of a list of these recordings: the speaker is the first folder."""
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    split = bool(tops) and tops <= _SPLITS
    rows = []
    for path in paths:
        parts = path.split("/")
        own = parts.pop(0) if split and len(parts) > 1 else ""
        rows.append(Row(0, path, parts[0] if len(parts) > 1 else "", own))
    return rows
