"""Notices that a shard set was replaced while somebody reads it.

A build that replaces a set removes the manifest before it moves the first file, and writes the new
one last. So whoever opens a file of the set, and then finds the manifest as it was, has a file of
the set that was opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from shardprep.errors import CorruptShardError, FormatError
from shardprep.format.manifest import MANIFEST_NAME, load_manifest
from shardprep.storage.remote import Location

_NONE = "it has no manifest that can be read now"


class ManifestWatch:
    """Compares a set's manifest with the one that was opened; costs a `stat` where it is the same.

    Args:
        folder: The shard folder.
        fingerprint: Of the set as it was opened.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self.fingerprint = fingerprint
        self._seen: tuple[int, ...] | None = None

    def check(self) -> None:
        """Make sure that the folder still holds the set that was opened.

        Raises:
            CorruptShardError: It holds another set, or none.
        """
        try:
            found = os.stat(self._folder / MANIFEST_NAME)
            state = (
                found.st_dev,
                found.st_ino,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            )
        except OSError:
            raise _replaced(self._folder, _NONE) from None
        if state != self._seen:
            check_fingerprint(self._folder, self.fingerprint)
            self._seen = state


def check_fingerprint(place: Location, expected: str) -> None:
    """Make sure that the set in a place, here or behind a URL, has the fingerprint expected.

    Raises:
        CorruptShardError: It has another, or there is no set.
        StorageError: The store behind the URL cannot be reached.
    """
    try:
        found = load_manifest(place).fingerprint
    except FormatError:
        raise _replaced(place, _NONE) from None
    if found != expected:
        raise _replaced(place, f"its fingerprint was {expected} and is now {found}")


def _replaced(place: Location, what: str) -> CorruptShardError:
    return CorruptShardError(
        f"the set was changed while it was being read: {what}",
        file=place,
        remedy="Start again when the set is complete, or go on with the set that was read.",
    )
