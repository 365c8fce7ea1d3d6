"""What an error of the operating system means: the file is at fault, or the machine.

A file is at fault if it does not exist, or is not what it must be: a pipe, a folder, far too large.
Everything else is trouble of the machine: permissions, limits, memory, a mount, a disk. The file
may be healthy, so nothing is said about its contents, and nothing is changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from shardprep.errors import StorageError

Trouble = OSError | MemoryError


class FileFault(OSError):
    """A file is not what it must be, for instance not a regular file."""


class BadPlaceError(OSError):
    """A place of a file cannot be read, at a second look either.

    Attributes:
        offset: Where the read began, in bytes.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int) -> None:
        what = f"{os.strerror(errno.EIO)} at byte {offset}, twice"
        super().__init__(errno.EIO, what, os.fspath(path))
        self.offset = offset


def _codes(*names: str) -> frozenset[int]:
    """The errors of these names that this system has."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_OF_FILE = _codes("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG")

NO_SPACE = _codes("ENOSPC", "EDQUOT")
"""Errors of a disk that is full, for all or for this user."""

_OF_PLACE = NO_SPACE | _codes("EACCES", "EPERM", "EROFS", "ENOSYS", "ENOTSUP", "EINVAL", "ENOLCK")

OF_PROCESS = _codes("EMFILE", "ENFILE", "ENOMEM")
"""Errors of limits of this process or this machine, whatever it wanted to open."""

_AGAIN = "Then run the same command again."
_MOUNT = (
    "EADDRNOTAVAIL ECOMM ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH EKEYEXPIRED "
    "EKEYREJECTED ENETDOWN ENETRESET ENETUNREACH ENODEV ENOLINK ENONET ENOTCONN ENXIO EPIPE EPROTO "
    "EREMOTEIO ESHUTDOWN ESTALE ETIMEDOUT"
)
_LACKING = "EAFNOSUPPORT EINVAL ENOSYS ENOTSUP ENOTTY EOPNOTSUPP EPROTONOSUPPORT"
_REMEDIES = {
    "EACCES EPERM ENOKEY": ("Check who may read and write it, and its folders (ls -l). " + _AGAIN),
    "EROFS": "The file system is read-only: mount it for writing, or name another place.",
    "ENOSPC": "The disk is full: free space or inodes (df -h, df -i). " + _AGAIN,
    "EDQUOT": "Your quota is used up: remove files, or ask for more. " + _AGAIN,
    "EFBIG": "The file is larger than the file system or ulimit -f allows.",
    "EIO": (
        "The disk failed: see the system's log (dmesg), and copy what matters to another disk. "
        + _AGAIN
    ),
    "EMFILE": "Raise the limit on open files (ulimit -n). " + _AGAIN,
    "ENFILE": "The whole system has too many open files: end programs, or raise fs.file-max.",
    "ENOMEM": "Memory is short: end other programs, or give this one more. " + _AGAIN,
    "EAGAIN EBUSY ETXTBSY EDEADLK": "Another program is using it: wait for it to end. " + _AGAIN,
    "ENOLCK": "The file system has no locks left, or none at all: name a place on a local disk.",
    "EXDEV": "Both names must lie on one file system: name another place.",
    "ENOENT": "Make sure that the folder exists, and that its disk is mounted. " + _AGAIN,
    "EEXIST ENOTEMPTY EISDIR ENOTDIR ELOOP": (
        "Something else has this name: remove it, or name another place."
    ),
    "ENAMETOOLONG EILSEQ": "The file system does not take this name: name another place.",
    _MOUNT: "Check the network and the mount of its file system (df). " + _AGAIN,
    _LACKING: "The file system lacks a function that this takes: name a place on a local disk.",
}
_REMEDY = {code: text for names, text in _REMEDIES.items() for code in _codes(*names.split())}


def blames_file(error: OSError) -> bool:
    """Whether the file is at fault, not the machine."""
    if isinstance(error, FileFault):
        return True
    # What a link leads to may lie on a disk that is not mounted now.
    return error.errno in _OF_FILE and not _is_dangling(error)


def remedy_of(error: Trouble) -> str:
    """What the user can do about an error, as a sentence."""
    if isinstance(error, MemoryError):
        return _REMEDY[errno.ENOMEM]
    if _is_dangling(error):
        return f"It is a link to a file that is not there: mount its disk, or fetch it. {_AGAIN}"
    return _REMEDY.get(error.errno or 0, f"Check the disk or the mount. {_AGAIN}")


def storage_error(
    error: Trouble, path: str | os.PathLike[str] | None = None, doing: str = ""
) -> StorageError:
    """The StorageError for an error of the operating system, with the remedy that fits.

    Args:
        error: The error.
        path: What it concerns, if the error does not say so.
        doing: What failed, such as "cannot be read"; nothing by default.
    """
    if isinstance(error, MemoryError):
        named, what = None, os.strerror(errno.ENOMEM)
    else:
        named, what = _named(error), error.strerror or str(error) or type(error).__name__
    return StorageError(
        f"{doing}: {what}" if doing else what, file=named or path, remedy=remedy_of(error)
    )


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], elsewhere: str = "") -> Iterator[None]:
    """Turn every error of the operating system about `path` into a StorageError.

    Args:
        path: What is written or read.
        elsewhere: How to name another place, a sentence; added where that may help.
    """
    try:
        yield
    except OSError as error:
        found = storage_error(error, path)
        if elsewhere and error.errno in _OF_PLACE:
            found.remedy = f"{found.remedy} {elsewhere}"
        raise found from error


@contextlib.contextmanager
def machine_errors(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn trouble of the machine while `path` is read into a StorageError.

    An error for which the file is to blame passes as it is.
    """
    try:
        yield
    except OSError as error:
        if blames_file(error):
            raise
        raise storage_error(error, path, "cannot be read") from error
    except MemoryError as error:
        raise storage_error(error, path, "cannot be read") from error


def _named(error: OSError) -> str | None:
    """The path that an error names, if any."""
    named: Any = error.filename
    return None if named is None or isinstance(named, int) else os.fsdecode(named)


def _is_dangling(error: OSError) -> bool:
    named = _named(error)
    return error.errno == errno.ENOENT and named is not None and os.path.islink(named)
