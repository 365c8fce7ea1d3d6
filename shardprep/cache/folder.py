"""The folder of a cache: its files, its lock, and room for more within a budget of bytes.

    CACHE/lock                   held for moments, by whoever makes room or names a file; holds the
                                 id that the system gave itself when it was started, and how many
                                 bytes all files have
    CACHE/SHA256                 a file that is whole: its name is the SHA-256 of its bytes
    CACHE/SHA256.BYTES.part      one that is being fetched, from its beginning; BYTES in the end

All processes of a machine share a cache without knowing of one another. Who fetches a file holds
an exclusive lock on its part, who reads one a shared lock on it; both are locks of the operating
system, which end with the process however it dies. What nobody holds makes room for others, the
least recently used first. A part that was left over is continued where it ends. Files are named by
their contents, so that sets that change, or share files, cannot be mixed up.

Nothing is flushed to the disk. When the machine was started anew, all that is in the cache counts
as parts, which are checked before they are used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shardprep.errors import StorageError
from shardprep.format.manifest import FileInfo, ShardInfo

ROOM = (
    "Give the cache more room (data.cache_gb of the trainer, SHARDPREP_CACHE_GB), or take fewer "
    "or smaller shards at a time (lanes, window_shards, --samples-per-shard)."
)

# Bytes that may be promised to files which are being fetched; and the part of the budget that is
# given up at a time where the cache is full.
_ON_THEIR_WAY, _AT_A_TIME = 8 << 30, 50
# Left free for others: so many bytes, or such a part of a small disk.
_MARGIN, _MARGIN_SHARE = 256 << 20, 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})(?:\.(?P<bytes>\d+)\.part)?")


# Parts that threads of this process are fetching.
_claimed: set[int] = set()


def _after_fork() -> None:
    # Whoever is forked shares the locks of its parent, and would keep them as long as it lives.
    for file in _claimed:
        os.close(file)
    _claimed.clear()


os.register_at_fork(after_in_child=_after_fork)


class NoRoomError(Exception):
    """What is in use fills the budget."""


class Held:
    """A file of the cache that stays there until it is let go.

    Attributes:
        path: Where it lies.
        handle: File descriptor, open for reading.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle
        self._close = weakref.finalize(self, os.close, handle)

    def close(self) -> None:
        """Let it go."""
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
        budget: Most bytes that it keeps; None for half of what it and the free disk have.

    Raises:
        OSError: It cannot be made or written to.
    """

    def __init__(self, path: Path, budget: int | None) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._doubt_after_restart()
        self.budget = self._half() if budget is None else budget

    def open(self, info: FileInfo | ShardInfo) -> Held | None:
        """A file that is here, held; None if it is not."""
        path = self.path / info.sha256
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        held = Held(path, handle)
        # Waits for nobody long: an exclusive lock is held only while a file is removed.
        fcntl.flock(handle, fcntl.LOCK_SH)
        found = os.fstat(handle)
        if found.st_nlink and found.st_size == info.bytes:
            with contextlib.suppress(OSError):
                os.utime(path)
            return held
        held.close()
        if found.st_nlink:
            # Cut short by a power cut, or by hand; perhaps another has put a whole one there since.
            self._remove(path, found)
        return None

    def discard(self, held: Held) -> None:
        """Remove a file that is not what its name says; who holds it may go on."""
        self._remove(held.path, os.stat(held.path))

    def _remove(self, path: Path, found: os.stat_result) -> None:
        """Remove a file, unless another is in its place by now."""
        with self.lock() as lock, contextlib.suppress(FileNotFoundError):
            if os.path.samestat(found, os.lstat(path)):
                path.unlink()
                self._count(lock, -found.st_size)

    def claim(self, info: FileInfo | ShardInfo) -> int | None:
        """The part of a file, locked, with room for all of it; None if another has it.

        Raises:
            NoRoomError: There is no room for it now.
            StorageError: There never will be.
        """
        path = self.part(info)
        if info.bytes > self.budget:
            raise StorageError(
                f"the cache keeps at most {self.budget} bytes, and a file has {info.bytes}",
                file=self.path,
                remedy=ROOM,
            )
        with self.lock() as lock:
            if (self.path / info.sha256).exists():
                return None
            new = not path.exists()
            if new and not self._make_room(lock, info.bytes):
                raise NoRoomError
            # Counted before it is there: whoever is killed leaves too much counted, never too
            # little, and where room is short all is counted anew.
            self._count(lock, info.bytes if new else 0)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # What is left over had its room once; others may have taken that of the disk.
                if not new and not self._make_room(lock, 0):
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
        """Let go of a part, which stays where it is."""
        _claimed.discard(file)
        os.close(file)

    def name(self, file: int, info: FileInfo | ShardInfo) -> Held:
        """Give a part that is whole, and locked by `file`, its name; held for reading."""
        with self.lock():
            os.rename(self.part(info), self.path / info.sha256)
            # From the exclusive lock to that of a reader, while nobody can remove it.
            fcntl.flock(file, fcntl.LOCK_SH)
        _claimed.discard(file)
        return Held(self.path / info.sha256, file)

    def drop(self, info: FileInfo | ShardInfo) -> None:
        """Remove a part, for who has it locked."""
        with self.lock() as lock, contextlib.suppress(FileNotFoundError):
            self.part(info).unlink()
            self._count(lock, -info.bytes)

    def stored(self, info: FileInfo | ShardInfo) -> int:
        """How much of a file has come that is being fetched, in bytes; -1 if it is not."""
        try:
            return self.part(info).stat().st_size
        except FileNotFoundError:
            return -1

    def _make_room(self, lock: int, size: int) -> bool:
        """Have so many bytes free of the budget and of the disk, for who holds the lock."""
        disk = shutil.disk_usage(self.path)
        free = disk.free - min(_MARGIN, disk.total // _MARGIN_SHARE)
        used = self._used(lock)
        if used is not None and used + size <= self.budget <= free + used - _ON_THEIR_WAY:
            # To look at every file takes a while where there are many.
            return True
        entries = self._entries()
        used = sum(entry.size for entry in entries)
        self._set_used(lock, used)
        promised = sum(entry.size - entry.stored for entry in entries)
        lacking = size - min(self.budget - used, free - promised)
        if lacking <= 0:
            return True
        # And some more, so as not to look at every file for each that comes.
        return self.evict(lock, max(lacking, self.budget // _AT_A_TIME), entries) >= lacking

    def evict(self, lock: int, wanted: int, entries: list[_Entry] | None = None) -> int:
        """Remove the least recently used of what nobody holds; returns the bytes it had.

        Args:
            lock: Of the cache, which the caller holds.
            wanted: Bytes to free.
            entries: What there is, where that is known.
        """
        freed = 0
        for entry in sorted(self._entries() if entries is None else entries):
            if freed >= wanted:
                break
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                    freed += entry.size
                except BlockingIOError:
                    pass
                finally:
                    os.close(handle)
        self._count(lock, -freed)
        return freed

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

    def part(self, info: FileInfo | ShardInfo) -> Path:
        """Where a file lies while it is being fetched."""
        return self.path / f"{info.sha256}.{info.bytes}.part"

    @contextlib.contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the cache's lock, for moments; gives the lock file's descriptor."""
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            # A process that was forked meanwhile would keep it as long as it lives.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)

    def _doubt_after_restart(self) -> None:
        """Make parts of all files if the system was started since they were written."""
        start = _BOOT_ID.read_bytes().strip() if _BOOT_ID.exists() else b"unknown"
        with self.lock() as lock:
            if self._noted(lock)[:1] == [start]:
                return
            for entry in self._entries():
                if not entry.path.endswith(".part"):
                    self._doubt(entry)
            os.ftruncate(lock, 0)
            os.pwrite(lock, start + b"\n", 0)

    def _doubt(self, entry: _Entry) -> None:
        handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            # Who reads it has been here since; perhaps it is another machine's cache as well.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(entry.path, f"{entry.path}.{entry.size}.part")
        except BlockingIOError:
            pass
        finally:
            os.close(handle)

    def _noted(self, lock: int) -> list[bytes]:
        """The lines of the lock file: the system's start, and the bytes of all files."""
        return os.pread(lock, 200, 0).split(b"\n")

    def _used(self, lock: int) -> int | None:
        """Bytes of all files as they were counted; None if they were not."""
        noted = self._noted(lock)
        return int(noted[1]) if len(noted) > 1 and noted[1].isdigit() else None

    def _set_used(self, lock: int, used: int) -> None:
        start = self._noted(lock)[0]
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%s\n%d\n" % (start, max(used, 0)), 0)

    def _count(self, lock: int, change: int) -> None:
        if change and (used := self._used(lock)) is not None:
            self._set_used(lock, used + change)

    def _half(self) -> int:
        held = sum(entry.stored for entry in self._entries())
        return (held + shutil.disk_usage(self.path).free) // 2
