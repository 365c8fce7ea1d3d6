"""manifest.json of a set, in a folder or behind a URL: reads it, and finds out if it changes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from shardprep.errors import CorruptShardError, FormatError, StorageError
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    OTHER_RELEASE,
    REPAIR_FOLDER,
    WORK_FOLDER,
    Manifest,
    decode_manifest,
)
from shardprep.storage.local import exists, read_at_most
from shardprep.storage.remote import Location, Remote
from shardprep.storage.sniff import refuse_stand_in, sniff
from shardprep.storage.trouble import FileFault, machine_errors, storage_errors


def load_manifest(folder: Location) -> Manifest:
    """Read and check the manifest of a shard set, in a folder or behind a URL.

    Raises:
        FormatError: There is no manifest, it is not of this format or version, or it was altered.
        StorageError: The machine cannot read it now, or the store does not answer.
    """
    path = folder / MANIFEST_NAME
    if isinstance(path, Remote):
        return _fetched_manifest(path)
    assert isinstance(folder, Path)
    try:
        with machine_errors(path):
            data = read_at_most(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        with machine_errors(folder):
            what, remedy = _instead_of_manifest(folder)
        raise FormatError(what, file=folder, remedy=remedy) from error
    except OSError as error:
        # A name that is too long, or a circle of links, is no place of shards at all.
        remedy = OTHER_RELEASE if isinstance(error, FileFault) else _BUILD_REMEDY
        raise FormatError(f"cannot be read: {error.strerror}", file=path, remedy=remedy) from None
    return _decoded(data, path)


def _decoded(data: bytes, path: Location) -> Manifest:
    """The manifest in these bytes; an error names what they are instead."""
    try:
        return decode_manifest(data, path)
    except FormatError:
        found = sniff(data)
        if found is None or found.kind == "json":
            raise
        if found.kind == "pointer":
            refuse_stand_in(data, path)
        what = found.what
        if found.kind == "text" and data.startswith(b"{"):
            if data.rstrip().endswith(b"}"):
                raise
            what = f"ends early, after {len(data)} bytes, as after an aborted download"
        raise FormatError(what, file=path, remedy=_COPY_AGAIN) from None


def _instead_of_manifest(folder: Path) -> tuple[str, str]:
    """What a place without a manifest is, and what to do."""
    if os.path.isfile(folder):
        remedy = f"Name its folder, {folder.parent}."
        return "is not a shard folder, but a file", remedy if _is_set(
            folder.parent
        ) else _BUILD_REMEDY
    if not exists(folder):
        return "does not exist", _BUILD_REMEDY
    for name, what, remedy in _OTHER_FOLDERS:
        if exists(folder / name):
            return what, remedy.format(folder=folder)
    inner = [path for path in itertools.islice(folder.iterdir(), _MOST_ENTRIES) if _is_set(path)]
    remedy = f"Name {min(inner)}, which has one." if inner else _BUILD_REMEDY
    return "is not a shard folder: no manifest.json", remedy


def _is_set(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _fetched_manifest(path: Remote) -> Manifest:
    """The manifest of a store; if it is faulty, it is fetched until it comes the same twice."""
    data = _fetch(path)
    while True:
        try:
            return _decoded(data, path)
        except (FormatError, StorageError):
            before, data = data, _fetch(path)
            if data == before:
                raise


def _fetch(path: Remote) -> bytes:
    try:
        data = path.read(0, MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise FormatError(
            "there is no shard set, or none that is complete: no manifest.json",
            file=path,
            remedy=_BUILD_REMEDY,
        ) from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise FormatError("is too large for a manifest", file=path, remedy=OTHER_RELEASE)
    return data


_NONE = "it has no manifest that can be read now"


class ManifestWatch:
    """Compares a set's manifest with the one that was opened; costs a `stat` if it is the same.

    Args:
        folder: The shard folder.
        fingerprint: Fingerprint of the set that was opened.
        seen: The file's state when it had this fingerprint, see `manifest_state`; None if unknown.

    Attributes:
        fingerprint: Fingerprint of the set that was opened.
    """

    def __init__(self, folder: Path, fingerprint: str, seen: tuple[int, ...] | None = None) -> None:
        self._folder = folder
        self.fingerprint = fingerprint
        self._seen = seen

    def check(self) -> None:
        """Make sure that the folder still holds the set that was opened.

        Raises:
            CorruptShardError: The folder holds another set, or none.
            StorageError: The folder is gone or empty, or the machine cannot look into it now.
        """
        state = manifest_state(self._folder)
        if state is None:
            check_present(self._folder)
            raise _replaced(self._folder, _NONE)
        if state != self._seen:
            check_fingerprint(self._folder, self.fingerprint)
            self._seen = state


def check_present(folder: Path) -> None:
    """Make sure that a shard folder did not go away as a whole, as when its disk is unmounted.

    Raises:
        StorageError: The folder is gone or empty.
    """
    with storage_errors(folder):
        if not os.listdir(folder):
            raise StorageError(
                "is empty, and was not when it was opened",
                file=folder,
                remedy="Make sure that its disk is mounted, then run the same command again.",
            )


def manifest_state(folder: Path) -> tuple[int, ...] | None:
    """Numbers that change whenever the manifest of a folder does; None if there is none.

    Raises:
        StorageError: The machine cannot look at it now.
    """
    try:
        with machine_errors(folder):
            found = os.stat(folder / MANIFEST_NAME)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_fingerprint(place: Location, expected: str) -> None:
    """Make sure that the set in a folder or behind a URL has the expected fingerprint.

    Raises:
        CorruptShardError: There is another set, or none.
        StorageError: The machine cannot read it now, or the store does not answer.
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
        remedy="Start again when the set is complete, or put the set back that was read.",
    )


_COPY_AGAIN = "Copy the shard set again, or build it again with --overwrite."
_BUILD_REMEDY = (
    "Run `shardprep build SRC DST` to make one, e.g. `shardprep build Dataset/ shards/`."
)
# What else a folder may be: a name that shows it, what it is, and what to do.
_OTHER_FOLDERS = [
    (
        f"{REPAIR_FOLDER}/{MANIFEST_NAME}",
        "holds an unfinished repair",
        "Run `shardprep repair DST` to finish it.",
    ),
    (
        f"{WORK_FOLDER}/{MANIFEST_NAME}",
        "holds an append that was interrupted while its files moved",
        "Run the same `shardprep build --append` again, or `shardprep repair DST`, to finish it.",
    ),
    (
        WORK_FOLDER,
        "holds an unfinished build",
        "Run `shardprep build SRC DST`, or the other command that began it, again to finish it.",
    ),
    (
        "metadata.json",
        "is not a shard folder, but a data set",
        "Name the folder that `shardprep build {folder} DST` writes.",
    ),
    (
        "model.safetensors",
        "is not a shard folder, but a model folder",
        "Name the folder that `shardprep build` wrote.",
    ),
    (
        "config.yaml",
        "is not a shard folder, but a run folder",
        "Name the folder that `shardprep build` wrote; config.yaml says it at data.shards.",
    ),
]
# Entries of a folder among which a shard folder is looked for.
_MOST_ENTRIES = 1000
