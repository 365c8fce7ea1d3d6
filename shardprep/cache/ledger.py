"""The lock file of a cache: who holds it may change the cache, and keeps its count of bytes.

The file has two lines: the id that the system gave itself at its start, and the bytes of all files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

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
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield Ledger(handle)
    finally:
        # Unlocked first: a process that was forked meanwhile has the same open file, and would
        # keep the lock as long as it lives.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _boot_id() -> bytes:
    return _BOOT_ID.read_bytes().strip() if _BOOT_ID.exists() else b"unknown"
