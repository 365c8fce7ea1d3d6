"""The files of a data set to pack: those of a folder of this machine, or those of a store."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shardprep.source.missing import ABSENT, Absences, remove_hint, why_dangling
from shardprep.storage.local import read_at_most
from shardprep.storage.remote import Location, Remote, modified_ns
from shardprep.storage.trouble import (
    FileFault,
    blames_file,
    machine_errors,
    storage_error,
)

# What stores call the version of an object, beside its time. Times of a folder can be set to any
# value, and copies keep them; the time of the last change of an inode cannot be set.
_TAGS = ("ETag", "etag", "generation", "version_id", "Content-MD5")
# A web server is asked for each file: so many requests at a time.
_REQUESTS = 64
# Entries of a folder among which a data set is looked for.
_MOST_ENTRIES = 1000


class FileState(NamedTuple):
    """What a place says of a file.

    Attributes:
        nbytes: Size in bytes.
        version: A number that changes when the file does; 0 if the place does not say.
    """

    nbytes: int
    version: int


class AbsentError(ValueError):
    """There is no file of such a name."""


class Listing(Protocol):
    """What `scan_dataset` needs of the place where a data set lies."""

    def expect(self, paths: Iterable[str]) -> None:
        """Say which files `look` will be asked for."""

    def look(self, relative: str) -> FileState:
        """Look at a file of the data set.

        Raises:
            AbsentError: There is no such file.
            ValueError: It lies outside, or is no file; in words for `Reject.reason`.
            StorageError: The machine or the store gives no answer.
        """

    def why_absent(self, relative: str) -> str:
        """Why there is no such file, in words for `Reject.reason`."""

    def hint_of(self, path: str) -> str | None:
        """Which end of a path is a file here, and what to remove; None if none is, or unknown."""

    def size(self, name: str) -> int:
        """Size of a JSON file in bytes.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is a link to nothing; in words that follow its name.
        """

    def read(self, name: str, most: int) -> bytes:
        """The bytes of a JSON file.

        Raises:
            OSError: It cannot be read, or has more than `most` bytes.
            ValueError: It lies outside; in words that follow its name.
        """

    def count(self) -> int:
        """How many files there are."""

    def folders(self) -> list[str]:
        """Names of some folders in the place, to look for a data set in them."""


class FolderListing:
    """The files of a folder.

    Args:
        root: The folder.
        follow_links: Whether a file may be a link out of the folder, or lie in a linked folder.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self._root = root
        self._follow_links = follow_links
        self._real_root = os.path.realpath(root)
        # Each folder within it that was looked at, and whether it really lies within.
        self._folders: dict[str, bool] = {}
        self._absences = Absences(root)

    def expect(self, paths: Iterable[str]) -> None:
        """Nothing: to look at a file costs one system call."""

    def look(self, relative: str) -> FileState:
        """See `Listing.look`."""
        path = os.path.join(self._root, relative)
        is_link = False
        try:
            info = os.lstat(path)
            if is_link := stat.S_ISLNK(info.st_mode):
                info = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            if is_link:
                raise ValueError(why_dangling(path)) from None
            raise AbsentError(ABSENT) from None
        except OSError as error:
            if not blames_file(error):
                raise storage_error(error, path, "cannot be read") from error
            raise ValueError(f"the file cannot be read: {error.strerror}") from None
        self._check_inside(path, is_link)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, a socket or a device"
            raise ValueError(f"not a regular file, but {kind}")
        return FileState(info.st_size, _number(info.st_mtime_ns, info.st_ctime_ns))

    def why_absent(self, relative: str) -> str:
        """See `Listing.why_absent`."""
        return self._absences.why(relative)

    def hint_of(self, path: str) -> str | None:
        """See `Listing.hint_of`."""
        return self._absences.further_in(path)

    def size(self, name: str) -> int:
        """See `Listing.size`."""
        path = self._root / name
        try:
            return path.stat().st_size
        except FileNotFoundError:
            if path.is_symlink():
                raise ValueError(why_dangling(os.fspath(path)).removeprefix("the file ")) from None
            raise

    def read(self, name: str, most: int) -> bytes:
        """See `Listing.read`."""
        path = self._root / name
        self._check_inside(os.fspath(path), path.is_symlink())
        return read_at_most(path, most)

    def count(self) -> int:
        """See `Listing.count`."""
        with machine_errors(self._root):
            return sum(len(names) for _, _, names in os.walk(self._root, onerror=_raise))

    def folders(self) -> list[str]:
        """See `Listing.folders`."""
        try:
            with os.scandir(self._root) as entries:
                found = [e.name for e in itertools.islice(entries, _MOST_ENTRIES) if e.is_dir()]
        except OSError:
            return []
        return sorted(found)

    def _check_inside(self, path: str, is_link: bool) -> None:
        """ValueError if a file lies outside, and was not asked for with `follow_links`."""
        if self._follow_links:
            return
        if not (self._is_inside(path) if is_link else self._is_folder_inside(path)):
            raise ValueError(
                "a link leads out of the data set; --follow-links takes such files, if you trust "
                "the data set"
            )

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
            raise AbsentError(ABSENT)
        if info.get("size") is None:
            raise ValueError("the server does not tell its size")
        return FileState(int(info["size"]), _store_version(info))

    def why_absent(self, relative: str) -> str:
        """See `Listing.why_absent`."""
        return ABSENT

    def hint_of(self, path: str) -> str | None:
        """See `Listing.hint_of`: the end that is the whole name is looked for, no other."""
        name = path.rpartition("/")[2]
        above = path.removesuffix(name)
        return remove_hint(name, above) if name and name in self._found else None

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

    def folders(self) -> list[str]:
        """See `Listing.folders`."""
        return (
            ["Dataset"]
            if self._root.is_http
            else sorted({name.partition("/")[0] for name in self._found if "/" in name})
        )

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


def listing_of(root: Location, follow_links: bool = False) -> Listing:
    """The files of a data set; see `FolderListing` for `follow_links`. A store has no links."""
    return StoreListing(root) if isinstance(root, Remote) else FolderListing(root, follow_links)
