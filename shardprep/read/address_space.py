"""Maps files one after another into one read-only stretch of memory.

Every byte of a split then has one address, so that a whole batch is one gather. Python's own mmap
cannot place files side by side, and keeps a file descriptor open for each.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import StorageError

_MAP_FIXED = 0x10
_MADV_WILLNEED = 3
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


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

    def missing(self, files: NDArray[np.int64]) -> list[int]:
        """Those of some files (B,) that are not mapped, each once, in ascending order."""
        found: list[int] = np.unique(files[~self.mapped[files]]).tolist()
        return found

    def map(self, file: int, handle: int) -> None:
        """Map a file by its descriptor, which may be closed afterwards.

        Raises:
            StorageError: The system maps no more files.
        """
        size = int(self._sizes[file])
        if size:
            _mmap(self._address(file), size, mmap.MAP_SHARED | _MAP_FIXED, handle)
        self.mapped[file] = True

    def unmap(self, file: int) -> None:
        """Let a file read as zeros again."""
        self.mapped[file] = False
        size = int(self._pages[file])
        if size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED
            _mmap(self._address(file), size, flags, -1)

    def read_ahead(self, file: int) -> None:
        """Ask the system to read a mapped file into memory, in the background."""
        # Advice: where the system refuses it, each page is read when it is touched.
        _libc.madvise(self._address(file), int(self._pages[file]), _MADV_WILLNEED)

    def _address(self, file: int) -> int:
        return int(self._stretch.address + self.begins[file])


class _Stretch:
    """A stretch of address space, released when the last array over it is gone."""

    def __init__(self, size: int) -> None:
        self.address = _mmap(None, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANON, -1)
        self.__array_interface__ = {
            "data": (self.address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }
        weakref.finalize(self, _libc.munmap, self.address, max(size, mmap.PAGESIZE))


def _mmap(address: int | None, size: int, flags: int, handle: int) -> Any:
    found = _libc.mmap(address, size, mmap.PROT_READ, flags, handle, 0)
    if found == _FAILED:
        raise StorageError(
            f"the system maps no more memory: {os.strerror(ctypes.get_errno())}",
            remedy="Raise the limits on address space (ulimit -v) and on mappings "
            "(sysctl vm.max_map_count), or build with more --samples-per-shard.",
        )
    return found
