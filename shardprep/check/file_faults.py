"""What is wrong with one file of a set. Only what was read and found wrong is a fault.

A file that the machine cannot read now is no fault but a StorageError. Where a disk fails at a
place, and fails there again, what lies at that place is lost; the rest of the file is not.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from shardprep.errors import CorruptShardError, StorageError
from shardprep.format.manifest import FileInfo, ShardInfo
from shardprep.read.manifest_file import check_present
from shardprep.read.sidecars import check_file
from shardprep.storage.local import open_regular, read_span
from shardprep.storage.trouble import BadPlaceError, blames_file, remedy_of, storage_error

# Bytes that are read to find out whether a disk gives anything of a file.
_PROBE = 512
# What a disk reads at a time, in bytes.
_PAGE = 4096


class Finding(NamedTuple):
    """What is wrong with a file.

    Attributes:
        what: In words.
        has_bad_places: Whether the disk cannot read all of it.
    """

    what: str
    has_bad_places: bool = False


def fault_of(path: Path, info: FileInfo | ShardInfo) -> Finding | None:
    """What is wrong with a file of a set; None if it has the bytes of the manifest.

    Raises:
        StorageError: The machine cannot read it now.
    """
    try:
        check_file(path, info)
    except CorruptShardError as error:
        return Finding(error.what)
    except BadPlaceError as error:
        _check_disk(path, error)
        return Finding(f"cannot be read everywhere: {error.strerror}", has_bad_places=True)
    except OSError as error:
        if not blames_file(error):
            raise storage_error(error, path, "cannot be read") from error
        if error.errno != errno.ENOENT:
            return Finding(f"cannot be read: {error.strerror}")
        check_present(path.parent)
        return Finding("is missing")
    return None


def bad_rows(path: Path, rows: NDArray[Any]) -> Iterator[tuple[int, str]]:
    """The index rows of a shard (N,) whose matrices the disk cannot read: number and words.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    for number, payload in enumerate(payloads(path, rows)):
        if isinstance(payload, BadPlaceError):
            yield number, f"its stored bytes cannot be read: {payload.strerror}"


def payloads(path: Path, rows: NDArray[Any]) -> Iterator[bytes | BadPlaceError | None]:
    """The stored bytes of each row of a shard; None if the file is missing or of a wrong kind.

    Raises:
        StorageError: The machine cannot read the shard now.
    """
    try:
        with open_regular(path) as file:
            for row in rows:
                try:
                    yield read_span(file, int(row["offset"]), int(row["nbytes"]))
                except BadPlaceError as error:
                    yield error
    except OSError as error:
        if not blames_file(error):
            raise storage_error(error, path, "cannot be read") from error
        yield from (None for _ in rows)


def read_legible(path: Path, most: int) -> bytes:
    """The first `most` bytes of a damaged file; zeros where the disk cannot read it.

    There are none if it is missing or of a wrong kind.

    Raises:
        StorageError: The machine cannot read it now.
    """
    try:
        with open_regular(path) as file:
            size = min(os.fstat(file.fileno()).st_size, most)
            try:
                return read_span(file, 0, size)
            except BadPlaceError:
                pages = range(0, size, _PAGE)
                return b"".join(_page(file, at, min(_PAGE, size - at)) for at in pages)
    except OSError as error:
        if not blames_file(error):
            raise storage_error(error, path, "cannot be read") from error
        return b""


def _page(file: io.BufferedReader, offset: int, size: int) -> bytes:
    try:
        return read_span(file, offset, size)
    except BadPlaceError:
        return bytes(size)


def _check_disk(path: Path, error: BadPlaceError) -> None:
    """Make sure that the disk gives some of a file: otherwise the disk is at fault as a whole."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for offset in (0, size // 2, size - _PROBE):
            try:
                if read_span(file, max(offset, 0), _PROBE):
                    return
            except BadPlaceError:
                continue
    raise StorageError(
        f"nothing of it can be read: {error.strerror}", file=path, remedy=remedy_of(error)
    ) from error
