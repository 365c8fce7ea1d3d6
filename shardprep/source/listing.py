"""The files of a data set to pack: those of a folder of this machine, or those of a store."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shardprep.storage.local import read_at_most
from shardprep.storage.remote import Location, Remote, modified_ns
from shardprep.storage.trouble import (
    FileFault,
    blames_file,
    machine_errors,
    storage_error,
)

_ABSENT = "the file does not exist"
# What stores call the version of an object, beside its time. Times of a folder can be set to any
# value, and copies keep them; the time of the last change of an inode cannot be set.
_TAGS = ("ETag", "etag", "generation", "version_id", "Content-MD5")
# A web server is asked for each file: so many requests at a time.
_REQUESTS = 64


class FileState(NamedTuple):
    """What a place says of a file.

    Attributes:
        nbytes: Size in bytes.
        version: A number that changes when the file does; 0 if the place does not say.
    """

    nbytes: int
    version: int


class Listing(Protocol):
    """What `scan_dataset` needs of the place where a data set lies."""

    def expect(self, paths: Iterable[str]) -> None:
        """Say which files `look` will be asked for."""

    def look(self, relative: str) -> FileState:
        """Look at a file of the data set.

        Raises:
            ValueError: The file does not exist, or lies outside; in words for `Reject.reason`.
            StorageError: The machine cannot look at it now.
        """

    def size(self, name: str) -> int:
        """Size of a JSON file in bytes. FileNotFoundError if there is none."""

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a JSON file. OSError if there are more than `most`."""

    def count(self) -> int:
        """How many files there are."""


class FolderListing:
    """The files of a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        # Each folder within it that was looked at, and whether it really lies within.
        self._folders: dict[str, bool] = {}

    def expect(self, paths: Iterable[str]) -> None:
        """Nothing: to look at a file costs one system call."""

    def look(self, relative: str) -> FileState:
        """See `Listing.look`."""
        path = os.path.join(self._root, relative)
        try:
            info = os.lstat(path)
            if is_link := stat.S_ISLNK(info.st_mode):
                info = os.stat(path)
        except FileNotFoundError:
            raise ValueError(_ABSENT) from None
        except OSError as error:
            if not blames_file(error):
                raise storage_error(error, path, "cannot be read") from error
            raise ValueError(f"the file cannot be read: {error.strerror}") from None
        if not (self._is_inside(path) if is_link else self._is_folder_inside(path)):
            raise ValueError("the path leads outside the data set through a link")
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        return FileState(info.st_size, _number(info.st_mtime_ns, info.st_ctime_ns))

    def size(self, name: str) -> int:
        """See `Listing.size`."""
        return self._root.joinpath(name).stat().st_size

    def read(self, name: str, most: int) -> bytes:
        """See `Listing.read`."""
        return read_at_most(self._root / name, most)

    def count(self) -> int:
        """See `Listing.count`."""
        with machine_errors(self._root):
            return sum(len(names) for _, _, names in os.walk(self._root, onerror=_raise))

    def _is_inside(self, path: str) -> bool:
        return os.path.commonpath([self._real_root, os.path.realpath(path)]) == self._real_root

    def _is_folder_inside(self, path: str) -> bool:
        # Most files share their folder, and to resolve a path costs a system call for each part.
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._is_inside(folder)
        return self._folders[folder]


def _raise(error: OSError) -> None:
    # os.walk would leave out what it cannot list: right for a folder such as lost+found only.
    if not isinstance(error, PermissionError):
        raise error


class StoreListing:
    """The files of a store, listed once; a web server has no list, and is asked for each file."""

    def __init__(self, root: Remote) -> None:
        self._root = root
        self._found: dict[str, dict[str, Any]] = {} if root.is_http else root.listing()

    def expect(self, paths: Iterable[str]) -> None:
        """See `Listing.expect`: a web server is asked for many files at a time."""
        if self._root.is_http:
            wanted = list(dict.fromkeys(paths))
            with ThreadPoolExecutor(_REQUESTS) as threads:
                for path, info in zip(wanted, threads.map(self._ask, wanted), strict=True):
                    if info is not None:
                        self._found[path] = info

    def look(self, relative: str) -> FileState:
        """See `Listing.look`."""
        info = self._found.get(relative)
        if info is None or info.get("type", "file") != "file":
            raise ValueError(_ABSENT)
        if info.get("size") is None:
            raise ValueError("the server does not tell its size")
        return FileState(int(info["size"]), _store_version(info))

    def size(self, name: str) -> int:
        """See `Listing.size`."""
        if name not in self._found and (info := self._ask(name)) is not None:
            self._found[name] = info
        if name not in self._found:
            raise FileNotFoundError(name)
        # Where the server does not tell the size, reading the file finds it.
        return int(self._found[name].get("size") or 0)

    def read(self, name: str, most: int) -> bytes:
        """See `Listing.read`."""
        data = (self._root / name).read(0, most + 1)
        if len(data) > most:
            raise FileFault(errno.EFBIG, f"it has more than {most} bytes")
        return data

    def count(self) -> int:
        """See `Listing.count`."""
        return len(self._found)

    def _ask(self, relative: str) -> dict[str, Any] | None:
        try:
            return (self._root / relative).info()
        except FileNotFoundError:
            return None


def _store_version(info: dict[str, Any]) -> int:
    """A number that changes when a file of a store does; 0 if the store says nothing of it."""
    said = [info.get(name) for name in _TAGS]
    time_ns = modified_ns(info)
    return _number(said, time_ns) if any(said) or time_ns else 0


def _number(*parts: Any) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def listing_of(root: Location) -> Listing:
    """The files of a data set."""
    return StoreListing(root) if isinstance(root, Remote) else FolderListing(root)
