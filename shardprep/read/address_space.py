"""Maps files one after another into one read-only stretch of memory.

Every byte of a split then has one address, so that a whole batch is one gather. Python's own mmap
cannot place files side by side, and keeps a file descriptor open for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import StorageError
from shardprep.storage.courtesies import NOT_HERE
from shardprep.storage.trouble import storage_error

# The same on Linux and macOS.
_MAP_FIXED = 0x10
_MADV_WILLNEED = 3
_FAILED = ctypes.c_void_p(-1).value

NO_SHARED_MAPS = NOT_HERE | {errno.ENODEV}
"""Errors of a file system that has no shared memory maps, or no maps at all."""

MOST_COPIED = 1 << 30
"""Most bytes of files that are read into memory where they cannot be mapped."""

NOT_MAPPED = "its file system cannot be memory-mapped"
TO_LOCAL_DISK = (
    "Copy the set to a local disk; for a set behind a URL, put the cache there (SHARDPREP_CACHE, "
    "data.cache_folder)."
)


@functools.cache
def _libc() -> Any:
    """The C library. Loaded when it is needed: on Windows it has other functions."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class AddressSpace:
    """A place in memory for each of some files; a file can be mapped there, and unmapped.

    A file that is not mapped reads as zeros, and so do the bytes between a file and the next one.

    Args:
        sizes: Size of each file in bytes (files,).

    Attributes:
        begins: Where each file begins (files,), in bytes; on a page boundary.
        bytes: Everything (total,) uint8, read-only; valid as long as a view of it exists.
        mapped: Whether each file is mapped (files,).

    Raises:
        StorageError: The system has not so many addresses.
    """

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        self._sizes = sizes
        self._pages = -(-sizes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.begins: NDArray[np.int64] = np.cumsum(self._pages) - self._pages
        self._stretch = _Stretch(int(self._pages.sum()))
        self.bytes: NDArray[np.uint8] = np.asarray(self._stretch)
        self.mapped = np.zeros(len(sizes), bool)
        # Files that could not be mapped, and were read instead.
        self._copied: set[int] = set()

    def missing(self, files: NDArray[np.int64]) -> list[int]:
        """Those of some files (B,) that are not mapped, each once, in ascending order."""
        found: list[int] = np.unique(files[~self.mapped[files]]).tolist()
        return found

    def map(self, file: int, handle: int, path: Path) -> None:
        """Map a file by its descriptor, which may be closed afterwards.

        A file system may have no shared maps (FUSE with direct_io), or none at all. A private map
        shows the same bytes; the bytes of small files are copied.

        Raises:
            StorageError: The system maps no more files, or not this one.
        """
        try:
            if self._sizes[file]:
                self._place(file, handle, path)
            self.mapped[file] = True
        except OSError as error:
            raise _no_map(error, path) from error
        finally:
            # Where mapping failed, there may be a hole, which other memory could fill.
            if not self.mapped[file]:
                with contextlib.suppress(StorageError):
                    self.unmap(file)

    def unmap(self, file: int) -> None:
        """Let a file read as zeros again.

        Raises:
            StorageError: The system maps no more memory.
        """
        self.mapped[file] = False
        self._copied.discard(file)
        try:
            self._map_zeros(file, mmap.PROT_READ)
        except OSError as error:
            raise _no_map(error) from error

    def _place(self, file: int, handle: int, path: Path) -> None:
        """Map a file to its place, or copy it there."""
        for sharing in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            try:
                _mmap(self._address(file), int(self._sizes[file]), sharing | _MAP_FIXED, handle)
                return
            except OSError as error:
                if error.errno not in NO_SHARED_MAPS:
                    raise
        self._copy(file, handle, path)

    def _map_zeros(self, file: int, protection: int) -> None:
        size = int(self._pages[file])
        if size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED
            _mmap(self._address(file), size, flags, -1, protection)

    def _copy(self, file: int, handle: int, path: Path) -> None:
        """Read a whole file to its place in memory."""
        size = int(self._sizes[file])
        if size + sum(int(self._sizes[other]) for other in self._copied) > MOST_COPIED:
            raise StorageError(NOT_MAPPED, file=path, remedy=TO_LOCAL_DISK)
        self._map_zeros(file, mmap.PROT_READ | mmap.PROT_WRITE)
        place = memoryview((ctypes.c_char * size).from_address(self._address(file))).cast("B")
        done = 0
        # Where the file ends before `size`, zeros stay.
        while done < size and (count := os.preadv(handle, [place[done:]], done)):
            done += count
        _libc().mprotect(self._address(file), int(self._pages[file]), mmap.PROT_READ)
        self._copied.add(file)

    def read_ahead(self, file: int) -> None:
        """Ask the system to read a mapped file into memory, in the background."""
        # Advice: where the system refuses it, each page is read when it is touched.
        _libc().madvise(self._address(file), int(self._pages[file]), _MADV_WILLNEED)

    def _address(self, file: int) -> int:
        return int(self._stretch.address + self.begins[file])


class _Stretch:
    """A stretch of address space, released when the last array over it is gone."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANON
        try:
            self.address = _mmap(None, max(size, mmap.PAGESIZE), flags, -1)
        except OSError as error:
            raise _no_map(error) from error
        self.__array_interface__ = {
            "data": (self.address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }
        weakref.finalize(self, _libc().munmap, self.address, max(size, mmap.PAGESIZE))


def _mmap(
    address: int | None, size: int, flags: int, handle: int, protection: int = mmap.PROT_READ
) -> Any:
    found = _libc().mmap(address, size, protection, flags, handle, 0)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _no_map(error: OSError, path: Path | None = None) -> StorageError:
    if error.errno != errno.ENOMEM:
        return storage_error(error, path, "cannot be mapped into memory")
    return StorageError(
        f"the system maps no more memory: {error.strerror}",
        file=path,
        remedy="Raise the limits on address space (ulimit -v) and on mappings "
        "(sysctl vm.max_map_count), or build with more --samples-per-shard.",
    )
