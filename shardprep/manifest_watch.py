"""Notices that a shard set was replaced while somebody reads it.

A build that replaces a set removes the manifest before it moves the first file, and writes the new
one last. So whoever opens a file of the set, and then finds the manifest as it was, has a file of
the set that was opened.
"""

from __future__ import annotations

import os
from pathlib import Path

from shardprep.errors import CorruptShardError, FormatError
from shardprep.format import MANIFEST_NAME, load_manifest


class ManifestWatch:
    """Compares a set's manifest with the one that was opened; costs a `stat` where it is the same.

    Args:
        folder: The shard folder.
        fingerprint: Of the set as it was opened.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
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
            if state == self._seen:
                return
            fingerprint = load_manifest(self._folder).fingerprint
        except (OSError, FormatError):
            raise self._replaced("it has no manifest that can be read now") from None
        if fingerprint != self._fingerprint:
            raise self._replaced(
                f"its fingerprint was {self._fingerprint} and is now {fingerprint}"
            )
        self._seen = state

    def _replaced(self, what: str) -> CorruptShardError:
        return CorruptShardError(
            f"the set was changed while it was being read: {what}",
            file=self._folder,
            remedy="Start again when the set is complete, or go on with the set that was read.",
        )
