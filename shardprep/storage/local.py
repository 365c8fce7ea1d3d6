"""Files of this machine: a file gets its final name only when it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from shardprep.errors import StorageError

_BLOCK = 1 << 20


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating-system error about `path` into a StorageError with a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            error.strerror or str(error),
            file=error.filename or path,
            remedy="Check free space and permissions, then run the same command again.",
        ) from error


@contextlib.contextmanager
def publish(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file under a temporary name and rename it to `path` after a clean finish.

    The data are flushed to the disk before the rename, and the folder after it: after a power cut,
    `path` is complete or does not exist.

    Args:
        path: The final name; an existing file is replaced, a missing folder made.
        scratch: Folder of the temporary name, on the same file system; by default that of `path`.

    Yields:
        The file, to write to.

    Raises:
        StorageError: The file cannot be written. Nothing is left behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f"{path.name}.", suffix=".tmp", dir=scratch or path.parent
        )
        try:
            with os.fdopen(handle, "wb", buffering=_BLOCK) as file:
                yield file
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def publish_bytes(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Publish `data` as the file `path`; see `publish`."""
    with publish(path, scratch) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (new names, removed names) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fetch(path: str | os.PathLike[str]) -> None:
    """Have the system read a file into its cache, without waiting for it.

    An error is ignored here: the reader of the file will get it.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: The file cannot be opened, or is a pipe, a device or a folder. Those could keep
            their reader waiting, or never end.
    """
    # Without O_NONBLOCK, to open a pipe waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return io.BufferedReader(io.FileIO(handle))


def read_at_most(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        OSError: The file cannot be read, is larger, or is not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            what = f"it has {size} bytes, more than the {most} that such a file may have"
            raise OSError(errno.EFBIG, what, os.fspath(path))
        return file.read(size)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex digits. OSError if it is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
