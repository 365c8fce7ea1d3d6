"""Whole files of stores, kept on this machine's disk within a budget of bytes.

    CACHE/lock                   held for moments, by whoever makes room or names a file; holds the
                                 id that the system gave itself when it was started
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
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from shardprep.errors import CorruptShardError, StorageError
from shardprep.format import FileInfo, ShardInfo
from shardprep.remote import PATIENCE, Remote
from shardprep.storage import storage_errors

_log = logging.getLogger("shardprep")

FOLDER_VARIABLE, BUDGET_VARIABLE = "SHARDPREP_CACHE", "SHARDPREP_CACHE_GB"

DOWNLOADS = 8
"""Files that a process fetches at once."""

CHUNK = 8 << 20
"""Bytes that are asked for at a time."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Left free on the disk, for others.
_MARGIN = 256 << 20
_POLL_SECONDS = 0.05
# A file may come with other bytes than it should so often.
_TRIES = 5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})(?:\.(?P<bytes>\d+)\.part)?")

_CHANGED = "If the set was built anew meanwhile, start again; else see `shardprep verify`."
_ROOM = (
    "Give the cache more room (data.cache_gb of the trainer, SHARDPREP_CACHE_GB), or take fewer "
    "or smaller shards at a time (lanes, window_shards, --samples-per-shard)."
)


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


@dataclass
class Traffic:
    """What this process has had of the network.

    Attributes:
        files: Files fetched.
        bytes: Bytes that came.
        waited: Seconds for which readers stood still until what they needed had come.
    """

    files: int = 0
    bytes: int = 0
    waited: float = 0.0


class ShardCache:
    """The cache in a folder; any number of processes may have one each.

    Args:
        folder: Where; by default what SHARDPREP_CACHE names, or shardprep/ in the user's folder
            of caches. On a disk of this machine: locks of network folders are not to be relied on.
        budget: Most bytes that it keeps; by default SHARDPREP_CACHE_GB (1 GB = 10^9 bytes), or
            half of what it and the free disk have.
        readers: Processes of this machine that share the budget, by default as many as torchrun
            started here (LOCAL_WORLD_SIZE). Each keeps at most its part in use at a time.
        patience: Seconds for which a store may give no answer before that is an error.

    Attributes:
        traffic: What was fetched by this object.

    Raises:
        StorageError: The folder cannot be made, or a variable is no number.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        budget: int | None = None,
        *,
        readers: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.folder = Path(folder or os.environ.get(FOLDER_VARIABLE) or _default_folder())
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._doubt_after_restart()
            self.budget = budget or _asked_budget() or self._default_budget()
        self.readers = readers or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.patience = patience
        self.traffic = Traffic()
        self._counting = threading.Lock()
        self._lenders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def __reduce__(self) -> Any:
        # Threads and counters stay behind.
        return _reopen, (self.folder, self.budget, self.readers, self.patience)

    @property
    def share(self) -> int:
        """Bytes that this process may have in use at a time."""
        return self.budget // self.readers

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Threads that fetch ahead."""
        # A process that was forked has none of its parent's.
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(DOWNLOADS, "shardprep-fetch")
        return self._threads[1]

    def count_wait(self, seconds: float) -> None:
        """Add to the time for which readers stood still."""
        with self._counting:
            self.traffic.waited += seconds

    def lends(self, lender: Any) -> None:
        """Have `lender.give_back()` called when room is short."""
        self._lenders.add(lender)

    def hold(self, remote: Remote, info: FileInfo | ShardInfo, *, wait: bool = True) -> Held:
        """A file of a store, fetched if it is not here, checked by its sha256.

        Args:
            remote: Where it comes from.
            info: Its size and sha256.
            wait: Whether to wait for room, and for another process that is fetching the file.

        Raises:
            NoRoomError: What others hold leaves no room, and `wait` is off.
            StorageError: The store gave no answer in time, or there is no room for it.
            CorruptShardError: The store has no such file, or other bytes.
        """
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with storage_errors(self.folder):
                    if (held := self._open(info)) is not None:
                        return held
                    if (part := self._claim(info)) is not None:
                        with os.fdopen(part, "r+b", buffering=0) as file:
                            return self._fetch(file, remote, info)
            except NoRoomError:
                for lender in list(self._lenders):
                    lender.give_back()
                if not wait:
                    raise
            if time.monotonic() > deadline:
                raise StorageError(
                    f"the cache has had no room for {remote} ({info.bytes} bytes) for "
                    f"{self.patience:.0f} s: what is in use fills its {self.budget} bytes, or "
                    "the disk",
                    file=self.folder,
                    remedy=_ROOM,
                )
            time.sleep(_POLL_SECONDS)

    def _open(self, info: FileInfo | ShardInfo) -> Held | None:
        """A file that is here, held; None if it is not."""
        path = self.folder / info.sha256
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
            # Cut short by a power cut, or by hand.
            path.unlink(missing_ok=True)
        return None

    def _claim(self, info: FileInfo | ShardInfo) -> int | None:
        """The part of a file, locked, with room for all of it; None if another has it.

        Raises:
            NoRoomError: There is no room for it now.
            StorageError: There never will be.
        """
        path = self._part(info)
        if info.bytes > self.budget:
            raise StorageError(
                f"the cache keeps at most {self.budget} bytes, and a file has {info.bytes}",
                file=self.folder,
                remedy=_ROOM,
            )
        with self._lock():
            if (self.folder / info.sha256).exists():
                return None
            new = not path.exists()
            if new and not self._make_room(info.bytes):
                raise NoRoomError
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            return handle

    def _fetch(self, file: FileIO, remote: Remote, info: FileInfo | ShardInfo) -> Held:
        """Fetch what a part lacks, check it, and give it its name.

        Raises:
            NoRoomError: The disk is full.
            CorruptShardError: The store has no such file, or other bytes.
        """
        part, path = self._part(info), self.folder / info.sha256
        for _ in range(_TRIES):
            file.seek(0)
            if os.fstat(file.fileno()).st_size > info.bytes:
                file.truncate(0)
            digest = hashlib.sha256()
            while data := file.read(CHUNK):
                digest.update(data)
            if self._complete(file, remote, info, digest) and digest.hexdigest() == info.sha256:
                with self._lock():
                    os.rename(part, path)
                    # From the exclusive lock to that of a reader, while nobody can remove it.
                    fcntl.flock(file.fileno(), fcntl.LOCK_SH)
                with self._counting:
                    self.traffic.files += 1
                return Held(path, os.dup(file.fileno()))
            if file.tell() >= info.bytes:
                file.truncate(0)
            _log.warning("%s: came with other bytes than it should; fetched again", remote)
        with self._lock():
            part.unlink(missing_ok=True)
        raise CorruptShardError(
            f"its bytes are not those that the manifest names, {_TRIES} times",
            file=remote,
            remedy=_CHANGED,
        )

    def _complete(
        self, file: FileIO, remote: Remote, info: FileInfo | ShardInfo, digest: Any
    ) -> bool:
        """Fetch and write what a part lacks; False if the store has no more before its end."""
        while (done := file.tell()) < info.bytes:
            end = min(done + CHUNK, info.bytes)
            try:
                data = remote.read(done, end) if end - done < info.bytes else remote.read()
            except FileNotFoundError:
                raise CorruptShardError("is missing", file=remote, remedy=_CHANGED) from None
            with self._counting:
                self.traffic.bytes += len(data)
            if len(data) > end - done:
                # A server without ranges sends the whole file.
                data = data[done : info.bytes]
            if not data:
                return False
            if self._write(file, data, info.bytes - done):
                digest.update(data)
        return True

    def _write(self, file: FileIO, data: bytes, lacking: int) -> bool:
        """Append to a part; if the disk is full, make room on it and return False.

        Raises:
            NoRoomError: Nothing can be given up for it.
        """
        begin, view = file.tell(), memoryview(data)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            file.seek(begin)
            file.truncate()
            if error.errno not in _FULL:
                raise
            with self._lock():
                freed = self._evict(lacking)
            if not freed:
                raise NoRoomError from None
            _log.warning("%s: the disk is full; the cache gave up %d bytes", self.folder, freed)
            return False
        return True

    def _make_room(self, size: int) -> bool:
        """Have so many bytes free of the budget and of the disk, for who holds the lock."""
        entries = self._entries()
        budget = self.budget - sum(entry.size for entry in entries)
        promised = sum(entry.size - entry.stored for entry in entries)
        disk = shutil.disk_usage(self.folder).free - promised - _MARGIN
        lacking = size - min(budget, disk)
        return lacking <= 0 or self._evict(lacking) >= lacking

    def _evict(self, wanted: int) -> int:
        """Remove the least recently used of what nobody holds; returns the bytes it had."""
        freed = 0
        for entry in sorted(self._entries()):
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
        return freed

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.folder) as files:
            for file in files:
                if (name := _NAME.fullmatch(file.name)) and file.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        info = file.stat(follow_symlinks=False)
                        size = int(name["bytes"] or info.st_size)
                        found.append(_Entry(info.st_mtime_ns, file.path, size, info.st_size))
        return found

    def _part(self, info: FileInfo | ShardInfo) -> Path:
        return self.folder / f"{info.sha256}.{info.bytes}.part"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _doubt_after_restart(self) -> None:
        """Make parts of all files if the system was started since they were written."""
        start = _BOOT_ID.read_bytes() if _BOOT_ID.exists() else b"unknown"
        with self._lock() as handle:
            if os.pread(handle, len(start) + 1, 0) == start:
                return
            for entry in self._entries():
                if not entry.path.endswith(".part"):
                    os.rename(entry.path, f"{entry.path}.{entry.size}.part")
            os.truncate(handle, 0)
            os.pwrite(handle, start, 0)

    def _default_budget(self) -> int:
        held = sum(entry.stored for entry in self._entries())
        return (held + shutil.disk_usage(self.folder).free) // 2


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "shardprep"


def _asked_budget() -> int | None:
    text = os.environ.get(BUDGET_VARIABLE)
    if not text:
        return None
    try:
        gigabytes = float(text)
        if not 0 < gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise StorageError(
            f"is {text!r}, expected a positive number", key=BUDGET_VARIABLE
        ) from None
    return int(gigabytes * 1e9)


def _reopen(folder: Path, budget: int, readers: int, patience: float) -> ShardCache:
    return ShardCache(folder, budget, readers=readers, patience=patience)
