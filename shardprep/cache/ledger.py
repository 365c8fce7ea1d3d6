"""The lock file of a cache: who holds it may change the cache, and keeps its count of bytes.

The file has two lines: the id that the system gave itself at its start, and the bytes of all files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from shardprep.errors import StorageError
from shardprep.storage.courtesies import NOT_HERE
from shardprep.system import fcntl

NO_LOCKS = NOT_HERE | {errno.ENOLCK, errno.ENODEV, errno.EBADF}
"""Errors of a file system without locks; EBADF: NFS locks only files that are open for writing."""

TO_LOCAL_DISK = "Put the cache on a local disk: SHARDPREP_CACHE (data.cache_folder of the trainer)."
"""Remedy where the cache lies on a file system that it cannot use."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Ledger:
    """What the lock file says; only for the holder of the lock.

    Args:
        handle: Descriptor of the lock file.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @property
    def used(self) -> int | None:
        """Bytes of all files as they were counted; None if they were not counted yet."""
        lines = self._lines()
        return int(lines[1]) if len(lines) > 1 and lines[1].isdigit() else None

    @used.setter
    def used(self, used: int) -> None:
        self._write(b"%s\n%d\n" % (self._lines()[0], max(used, 0)))

    def add(self, change: int) -> None:
        """Change the count of bytes, if there is one."""
        if change and (used := self.used) is not None:
            self.used = used + change

    @property
    def is_of_this_start(self) -> bool:
        """Whether the file was written since the system was started."""
        return self._lines()[:1] == [_boot_id()]

    def begin(self) -> None:
        """Note the start of the system; the bytes are to be counted again."""
        self._write(_boot_id() + b"\n")

    def _lines(self) -> list[bytes]:
        return os.pread(self._handle, 200, 0).split(b"\n")

    def _write(self, data: bytes) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, data, 0)


@contextlib.contextmanager
def hold_ledger(path: Path) -> Iterator[Ledger]:
    """Hold the lock of a cache, for moments.

    Args:
        path: The lock file; made if need be.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock(handle, fcntl.LOCK_EX, path.parent)
        try:
            yield Ledger(handle)
        finally:
            # Unlocked first: a process that was forked meanwhile has the same open file, and
            # would keep the lock as long as it lives. Where this fails, closing the file unlocks it
            # too, and what was done under the lock is done.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def lock(handle: int, kind: int, folder: Path) -> None:
    """Lock an open file of a cache.

    Args:
        handle: Its descriptor.
        kind: LOCK_EX or LOCK_SH of `fcntl`, perhaps with LOCK_NB.
        folder: The folder of the cache.

    Raises:
        BlockingIOError: Another process has it locked, and `kind` has LOCK_NB.
        StorageError: The file system has no locks.
    """
    try:
        fcntl.flock(handle, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise StorageError(
            f"the file system of the cache has no locks ({error.strerror}), and the processes of "
            "this machine share the cache by them",
            file=folder,
            remedy=TO_LOCAL_DISK,
        ) from error


def _boot_id() -> bytes:
    return _BOOT_ID.read_bytes().strip() if _BOOT_ID.exists() else b"unknown"
