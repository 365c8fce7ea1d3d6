"""All shards of a split in one read-only stretch of memory, mapped one after another.

A segment anywhere in the split is then one address, so that a whole batch is one gather. Python's
own mmap cannot place files side by side, and keeps a file descriptor open for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError, StorageError
from shardprep.storage.local import open_regular
from shardprep.storage.remote import Location

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


class ShardMap:
    """The bytes of some files, each from a page boundary on; a file is mapped when first needed.

    What lies between the end of a file and the next one reads as zeros, and so does a file that
    is not mapped yet.

    Args:
        files: Path and expected size in bytes of each file.
        confirm: Called after a file was mapped; raises if it may be one of another set.

    Attributes:
        begins: Where each file begins (files,), in bytes.
        bytes: Everything (total,) uint8, read-only; lives as long as anybody holds a view.
        room: Bytes that a `Window` may want at a time; None for as many as there are.
    """

    room: int | None = None

    def __init__(
        self, files: Sequence[tuple[Location, int]], confirm: Callable[[], None] = lambda: None
    ) -> None:
        self._files = files
        self._confirm = confirm
        sizes = np.array([size for _, size in files], np.int64)
        self._pages = -(-sizes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.begins: NDArray[np.int64] = np.cumsum(self._pages) - self._pages
        self._region = _Region(int(self._pages.sum()))
        self.bytes: NDArray[np.uint8] = np.asarray(self._region)
        self._mapped = np.zeros(len(files), bool)
        self._missing = len(files)
        self._lock: contextlib.AbstractContextManager[Any] = threading.Lock()

    def need(self, shards: NDArray[np.int64]) -> None:
        """Make sure that these files (B,) are mapped.

        Raises:
            CorruptShardError: A file is missing, or has another size than expected.
            StorageError: The system maps no more files.
        """
        if self._missing:
            for shard in np.unique(shards[~self._mapped[shards]]).tolist():
                self._map(shard)

    def map_all(self) -> None:
        """Map every file, so that later reads are of what is there now, come what may.

        Raises:
            CorruptShardError: A file is missing, or has another size than expected.
        """
        self.need(np.arange(len(self._files)))

    def reading(self, shards: NDArray[np.int64]) -> contextlib.AbstractContextManager[None]:
        """Have these files (B,) mapped while something is read from them; raises as `need` does."""
        self.need(shards)
        return contextlib.nullcontext()

    def window(self) -> Window:
        """What one reader says of the files that it will read next."""
        return Window(self)

    def renew(self, shard: int) -> bool:
        """Get a file anew that is not as it should be; False if there is no other."""
        return False

    def check_sizes(self) -> None:
        """Look at every file, without opening it.

        Raises:
            CorruptShardError: A file is missing, or has another size than expected.
        """
        for path, expected in self._files:
            try:
                _check_size(path, os.stat(path).st_size, expected)
            except OSError as error:
                raise _unreadable(path, error) from None

    def read_ahead(self, shard: int) -> None:
        """Ask the system to read a whole file into memory, in one sweep and in the background.

        Raises:
            CorruptShardError: The file is missing, or has another size than expected.
        """
        self.need(np.array([shard]))
        address = self._region.address + int(self.begins[shard])
        # Advice: where it is refused, the pages are read one by one as they are touched.
        _libc.madvise(address, int(self._pages[shard]), _MADV_WILLNEED)

    def _map(self, shard: int) -> None:
        with self._lock:
            if self._mapped[shard]:
                return
            path, expected = self._files[shard]
            try:
                with open_regular(path) as file:
                    _check_size(path, os.fstat(file.fileno()).st_size, expected)
                    self._region.put(int(self.begins[shard]), expected, file.fileno())
            except OSError as error:
                raise _unreadable(path, error) from None
            self._confirm()
            self._mapped[shard] = True
            self._missing -= 1


class Window:
    """Has the files read ahead that are wanted next, and were not wanted before.

    Args:
        shards: Where they are mapped.
    """

    def __init__(self, shards: ShardMap) -> None:
        self._shards = shards
        self._wanted: set[int] = set()

    def want(self, due: Sequence[int], later: Sequence[int] = ()) -> None:
        """Say what is wanted from now on, in order, instead of what was wanted before.

        Args:
            due: Files that are about to be read.
            later: Those after them, which may wait.

        Raises:
            CorruptShardError: A file is missing, or has another size than expected.
        """
        for shard in due:
            if shard not in self._wanted:
                self._shards.read_ahead(shard)
        self._wanted = set(due)

    def close(self) -> None:
        """Want nothing any more."""
        self._wanted = set()


def _check_size(path: Location, found: int, expected: int) -> None:
    if found != expected:
        raise CorruptShardError(f"has {found} bytes, expected {expected}", file=path, remedy=REPAIR)


def _unreadable(path: Location, error: OSError) -> CorruptShardError:
    return CorruptShardError(f"cannot be read: {error.strerror}", file=path, remedy=REPAIR)


class _Region:
    """A stretch of address space; an array over it is the last to hold it."""

    def __init__(self, size: int) -> None:
        self.address = _mmap(None, max(size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANON, -1)
        self.__array_interface__ = {
            "data": (self.address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }
        weakref.finalize(self, _libc.munmap, self.address, max(size, mmap.PAGESIZE))

    def put(self, begin: int, size: int, handle: int) -> None:
        """Map a file of `size` bytes from byte `begin` on."""
        if size:
            _mmap(self.address + begin, size, mmap.MAP_SHARED | _MAP_FIXED, handle)

    def clear(self, begin: int, size: int) -> None:
        """Have `size` bytes from `begin` on read as zeros again."""
        if size:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED
            _mmap(self.address + begin, size, flags, -1)


def _mmap(address: int | None, size: int, flags: int, handle: int) -> Any:
    found = _libc.mmap(address, size, mmap.PROT_READ, flags, handle, 0)
    if found == _FAILED:
        raise StorageError(
            f"the system maps no more memory: {os.strerror(ctypes.get_errno())}",
            remedy="Raise the limits on address space (ulimit -v) and on mappings "
            "(sysctl vm.max_map_count), or build with more --samples-per-shard.",
        )
    return found
