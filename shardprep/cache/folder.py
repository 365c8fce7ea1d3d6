"""The folder of a cache: its files, and room for more within a budget of bytes.

    CACHE/lock                   held for moments, by whoever makes room or names a file; see
                                 `shardprep.cache.ledger`
    CACHE/SHA256                 a complete file: its name is the SHA-256 of its bytes
    CACHE/SHA256.BYTES.part      a file that is being fetched, from its beginning on; it will have
                                 BYTES bytes

All processes of a machine share a cache without knowing of one another. A process that fetches a
file holds an exclusive lock on its part, a process that reads a file a shared lock on it. Both are
locks of the operating system, which end with the process however it ends. Files without a lock
make room for others, the least recently used first. A part that was left behind is continued where
it ends. Files are named by their contents, so sets that change, or share files, are never mixed up.

Nothing is flushed to the disk. After a restart of the system, every file in the cache counts as a
part, which is checked before it is used again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import weakref
from pathlib import Path
from typing import NamedTuple

from shardprep.cache.ledger import Ledger, hold_ledger, lock
from shardprep.errors import StorageError
from shardprep.format.manifest import FileInfo, ShardInfo
from shardprep.storage.courtesies import NOT_HERE, note_once
from shardprep.storage.local import exists
from shardprep.system import at_fork, fcntl

ROOM = (
    "Give the cache more room (data.cache_gb of the trainer, SHARDPREP_CACHE_GB), or take fewer "
    "or smaller shards at a time (lanes, window_shards, --samples-per-shard)."
)
"""Remedy where a cache is too small."""

# Bytes of the disk that files which are being fetched may still take. While so many are free, no
# file has to be looked at.
_ON_THEIR_WAY = 8 << 30
# If the cache is full, this part of the budget is freed at a time.
_AT_A_TIME = 50
# Left free on the disk for others: so many bytes, or this part of a small disk.
_MARGIN, _MARGIN_SHARE = 256 << 20, 20
# Bytes of the cache on a disk that does not tell how much is free.
_UNTOLD = 8 << 30
_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})(?:\.(?P<bytes>\d+)\.part)?")

# Descriptors of the parts that threads of this process are fetching.
_claimed: set[int] = set()


def _after_fork() -> None:
    # A forked process shares the locks of its parent, and would keep them as long as it lives.
    for file in _claimed:
        os.close(file)
    _claimed.clear()


at_fork(_after_fork)


class NoRoomError(Exception):
    """The files in use fill the budget."""


class Held:
    """A file of the cache, which stays there until it is closed.

    Attributes:
        path: Where it lies.
        handle: File descriptor, open for reading.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle
        self._close = weakref.finalize(self, os.close, handle)

    def close(self) -> None:
        """Allow the cache to remove the file."""
        self._close()


class _Entry(NamedTuple):
    used_ns: int
    path: str
    #: Bytes that it will have.
    size: int
    #: Bytes that are there.
    stored: int


class CacheFolder:
    """A folder of files that are named by their contents; any number of processes may use it.

    Args:
        path: The folder; made if need be.
        budget: Most bytes that it keeps; None for half of its own bytes and the free disk together.

    Raises:
        OSError: The folder cannot be made or written to.
    """

    def __init__(self, path: Path, budget: int | None) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._check_restart()
        self.budget = self._half() if budget is None else budget

    def lock(self) -> contextlib.AbstractContextManager[Ledger]:
        """Hold the cache's lock, for moments."""
        return hold_ledger(self.path / "lock")

    def open(self, info: FileInfo | ShardInfo) -> Held | None:
        """A file of the cache, held; None if the cache does not have it."""
        path = self.path / info.sha256
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        held = Held(path, handle)
        # This waits for moments only: an exclusive lock is held while a file is removed.
        lock(handle, fcntl.LOCK_SH, self.path)
        found = os.fstat(handle)
        if found.st_nlink and found.st_size == info.bytes:
            with contextlib.suppress(OSError):
                os.utime(path)
            return held
        held.close()
        if found.st_nlink:
            # Truncated, by a power cut or by hand. Another process may have replaced it since.
            self._remove(path, found)
        return None

    def discard(self, held: Held) -> None:
        """Remove a damaged file; processes that hold it can still read it."""
        self._remove(held.path, os.stat(held.path))

    def _remove(self, path: Path, found: os.stat_result) -> None:
        """Remove a file, unless another file has its place by now."""
        with self.lock() as ledger, contextlib.suppress(FileNotFoundError):
            if os.path.samestat(found, os.lstat(path)):
                path.unlink()
                ledger.add(-found.st_size)

    def claim(self, info: FileInfo | ShardInfo) -> int | None:
        """Lock the part of a file, with room for the whole file.

        Returns:
            Descriptor of the part; None if another process or thread has claimed it, or if the
            file is complete.

        Raises:
            NoRoomError: There is no room for the file now.
            StorageError: The file is larger than the budget.
        """
        path = self.part(info)
        if info.bytes > self.budget:
            raise StorageError(
                f"the cache keeps at most {self.budget} bytes, and a file has {info.bytes}",
                file=self.path,
                remedy=ROOM,
            )
        with self.lock() as ledger:
            if exists(self.path / info.sha256):
                return None
            new = not exists(path)
            if new and not self._make_room(ledger, info.bytes):
                raise NoRoomError
            # Counted before the part exists: a process that is killed leaves too much counted,
            # never too little, and all is counted again when room is short.
            ledger.add(info.bytes if new else 0)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
                # A part that was left behind was given room once. The disk may be full since.
                if not new and not self._make_room(ledger, 0):
                    raise NoRoomError
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                self.unclaim(handle)
                raise
            _claimed.add(handle)
            return handle

    def unclaim(self, file: int) -> None:
        """Unlock a part, which stays where it is."""
        _claimed.discard(file)
        os.close(file)

    def name(self, file: int, info: FileInfo | ShardInfo) -> Held:
        """Give a part that is complete, and locked by `file`, its name; held for reading."""
        with self.lock():
            os.rename(self.part(info), self.path / info.sha256)
            # From the exclusive lock to the shared lock of a reader, while nobody can remove it.
            lock(file, fcntl.LOCK_SH, self.path)
        _claimed.discard(file)
        return Held(self.path / info.sha256, file)

    def drop(self, info: FileInfo | ShardInfo) -> None:
        """Remove a part; the caller has claimed it."""
        with self.lock() as ledger, contextlib.suppress(FileNotFoundError):
            self.part(info).unlink()
            ledger.add(-info.bytes)

    def stored(self, info: FileInfo | ShardInfo) -> int:
        """Bytes that the part of a file has so far; -1 if there is no part."""
        try:
            return self.part(info).stat().st_size
        except FileNotFoundError:
            return -1

    def part(self, info: FileInfo | ShardInfo) -> Path:
        """Where a file lies while it is being fetched."""
        return self.path / f"{info.sha256}.{info.bytes}.part"

    def evict(self, ledger: Ledger, wanted: int, entries: list[_Entry] | None = None) -> int:
        """Remove files that nobody holds, the least recently used first.

        Args:
            ledger: Of the cache, whose lock the caller holds.
            wanted: Bytes to free.
            entries: All files, if they are known.

        Returns:
            Bytes freed.
        """
        freed = 0
        for entry in sorted(self._entries() if entries is None else entries):
            if freed >= wanted:
                break
            # A file of another user may be one that only that user removes.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
                    os.unlink(entry.path)
                    freed += entry.size
                except BlockingIOError:
                    pass
                finally:
                    os.close(handle)
        ledger.add(-freed)
        return freed

    def _make_room(self, ledger: Ledger, size: int) -> bool:
        """Make sure that `size` bytes of the budget and of the disk are free.

        Returns:
            False if they are not.
        """
        free = self._free()
        used = ledger.used
        if used is not None and used + size <= self.budget <= free + used - _ON_THEIR_WAY:
            # To look at every file takes a while if there are many.
            return True
        entries = self._entries()
        used = sum(entry.size for entry in entries)
        ledger.used = used
        promised = sum(entry.size - entry.stored for entry in entries)
        lacking = size - min(self.budget - used, free - promised)
        if lacking <= 0:
            return True
        # Some more is freed, so that the next files need not look at every file again.
        return self.evict(ledger, max(lacking, self.budget // _AT_A_TIME), entries) >= lacking

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.path) as files:
            for file in files:
                if (name := _NAME.fullmatch(file.name)) and file.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        info = file.stat(follow_symlinks=False)
                        size = int(name["bytes"] or info.st_size)
                        found.append(_Entry(info.st_mtime_ns, file.path, size, info.st_size))
        return found

    def _check_restart(self) -> None:
        """Make all files parts if the system was started since they were written."""
        with self.lock() as ledger:
            if ledger.is_of_this_start:
                return
            for entry in self._entries():
                if not entry.path.endswith(".part"):
                    self._make_part(entry)
            ledger.begin()

    def _make_part(self, entry: _Entry) -> None:
        handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # A file that is being read was opened after the start; perhaps by another machine
            # that has the same folder as its cache.
            lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, self.path)
            os.rename(entry.path, f"{entry.path}.{entry.size}.part")
        except BlockingIOError:
            pass
        finally:
            os.close(handle)

    def _half(self) -> int:
        held = sum(entry.stored for entry in self._entries())
        disk = self._disk()
        if disk is None:
            note_once(
                "room",
                f"the file system of {self.path} does not tell how much is free: the cache keeps "
                f"at most {_UNTOLD >> 30} GiB, or as many GB as SHARDPREP_CACHE_GB says",
            )
        return _UNTOLD if disk is None else (held + disk[1]) // 2

    def _free(self) -> int:
        """Bytes of the disk that the cache may still fill; where nobody knows, without end."""
        disk = self._disk()
        if disk is None:
            return 1 << 62
        total, free = disk
        return free - min(_MARGIN, total // _MARGIN_SHARE)

    def _disk(self) -> tuple[int, int] | None:
        """Total and free bytes of the disk; None if the file system does not tell."""
        try:
            disk = shutil.disk_usage(self.path)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            return None
        return disk.total, disk.free
