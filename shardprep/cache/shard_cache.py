"""Files of stores, kept on this machine's disk; `shardprep.cache.folder` says how."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardprep.cache.download import Download
from shardprep.cache.folder import ROOM, CacheFolder, Held, NoRoomError
from shardprep.cache.threads import BackgroundThreads
from shardprep.errors import StorageError
from shardprep.format.manifest import FileInfo, ShardInfo
from shardprep.storage.local import sha256_of
from shardprep.storage.remote import PATIENCE, Remote
from shardprep.storage.trouble import BadPlaceError, storage_errors
from shardprep.system import at_fork, check_supported, loader_workers

_log = logging.getLogger("shardprep")

FOLDER_VARIABLE, BUDGET_VARIABLE = "SHARDPREP_CACHE", "SHARDPREP_CACHE_GB"
READERS_VARIABLE = "LOCAL_WORLD_SIZE"

DOWNLOADS = 8
"""Files that a process fetches at once."""

_POLL_SECONDS = 0.05

_ELSEWHERE = f"{FOLDER_VARIABLE} (data.cache_folder of the trainer) names another folder."


class Borrower(Protocol):
    """Keeps files of the cache in use, and can give some of them back early.

    Attributes:
        in_use: Bytes of these files.
    """

    in_use: int

    def give_back(self, *, urgent: bool) -> None:
        """Give back files that nobody will use soon; if urgent, also one that somebody will."""

    def reset_after_fork(self) -> None:
        """Have nothing in use and nothing on its way; for a process that was just forked."""


@dataclass
class Traffic:
    """What this process has fetched.

    Attributes:
        files: Files fetched.
        bytes: Bytes that came.
        waited: Seconds that readers waited for files to come.
    """

    files: int = 0
    bytes: int = 0
    waited: float = 0.0


class ShardCache:
    """The cache in a folder; any number of processes may have one each.

    Args:
        folder: Its folder; by default the one that SHARDPREP_CACHE names, or shardprep/ in the
            user's folder of caches. It must lie on a disk of this machine: locks in a network
            folder are not reliable.
        budget: Most bytes that it keeps; by default SHARDPREP_CACHE_GB (1 GB = 10^9 bytes), or
            half of its own bytes and the free disk together.
        readers: Processes of this machine that share the budget, by default as many as torchrun
            started here (LOCAL_WORLD_SIZE). Each has at most its part in use at a time.
        patience: Seconds for which a store may give no answer before that is an error.

    Attributes:
        folder: The folder and its budget, a `CacheFolder`.
        traffic: What this object has fetched.

    Raises:
        StorageError: The folder cannot be made, or a variable is not a positive number.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        budget: int | None = None,
        *,
        readers: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        check_supported()
        # Files are opened later, perhaps when the program has gone to another folder.
        path = Path(folder or os.environ.get(FOLDER_VARIABLE) or _default_folder()).absolute()
        with storage_errors(path, _ELSEWHERE):
            self.folder = CacheFolder(path, _asked_budget() if budget is None else budget)
        self.readers = readers or max(1, int(_number(READERS_VARIABLE) or 1))
        self.patience = patience
        self.traffic = Traffic()
        self._borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()
        self._begin()
        _caches.add(self)

    def _begin(self) -> None:
        self._counting = threading.Lock()
        # Bytes of files that are being opened or fetched for a borrower just now.
        self._arriving = 0
        self._threads: BackgroundThreads | None = None

    def reset_after_fork(self) -> None:
        """Have nothing on its way; a process that was just forked has none of the threads."""
        self._begin()
        for borrower in list(self._borrowers):
            borrower.reset_after_fork()

    def __reduce__(self) -> Any:
        # Threads and counters stay behind.
        return _reopen, (self.folder.path, self.folder.budget, self.readers, self.patience)

    @property
    def share(self) -> int:
        """Bytes that this process may have in use at a time."""
        return self.folder.budget // (self.readers * loader_workers())

    @property
    def threads(self) -> BackgroundThreads:
        """Threads that fetch ahead."""
        with self._counting:
            if self._threads is None:
                self._threads = BackgroundThreads(DOWNLOADS, "shardprep-fetch")
            return self._threads

    def count_wait(self, seconds: float) -> None:
        """Add to the time that readers waited."""
        with self._counting:
            self.traffic.waited += seconds

    def add_borrower(self, borrower: Borrower) -> None:
        """Ask this borrower to give files back when room is short."""
        with self._counting:
            self._borrowers.add(borrower)

    def _give_back(self, *, urgent: bool) -> None:
        with self._counting:
            borrowers = list(self._borrowers)
        for borrower in borrowers:
            borrower.give_back(urgent=urgent)

    def hold(self, remote: Remote, info: FileInfo | ShardInfo, *, wait: bool = True) -> Held:
        """A file of a store, fetched if the cache does not have it, and checked by its sha256.

        Args:
            remote: Where it comes from.
            info: Its size and sha256.
            wait: Whether to wait for room.

        Raises:
            NoRoomError: Files in use leave no room, and `wait` is off.
            StorageError: The store gave no answer in time, or there was no room in time.
            CorruptShardError: The store has no such file, or other bytes.
        """
        self._keep_to_share(info.bytes, wait=wait)
        try:
            return self._hold(remote, info, wait=wait)
        finally:
            with self._counting:
                self._arriving -= info.bytes

    def renew(self, remote: Remote, info: FileInfo | ShardInfo) -> bool:
        """Fetch a damaged file again.

        Returns:
            False if the cache has the bytes of the manifest: then these are the ones in the store.
        """
        with (
            storage_errors(self.folder.path, _ELSEWHERE),
            contextlib.closing(self.hold(remote, info)) as held,
        ):
            # A place that the disk cannot read is damage, too: the store has another copy.
            with contextlib.suppress(BadPlaceError):
                if sha256_of(held.path) == info.sha256:
                    return False
            _log.warning("%s: was damaged in the cache; fetched again (%s)", remote, held.path)
            self.folder.discard(held)
        self.hold(remote, info).close()
        return True

    def _keep_to_share(self, size: int, *, wait: bool) -> None:
        """Count a file as arriving, and have others given back until the share suffices.

        Without shares, a rank could wait for room that another rank keeps, which waits for it.

        Raises:
            NoRoomError: The share does not suffice, and `wait` is off.
        """
        with self._counting:
            self._arriving += size
        if self._in_use() > self.share:
            self._give_back(urgent=False)
        if self._in_use() > self.share and not wait:
            with self._counting:
                self._arriving -= size
            raise NoRoomError
        before = 0
        while (now := self._in_use()) > self.share and now != before:
            before = now
            self._give_back(urgent=True)

    def _in_use(self) -> int:
        with self._counting:
            return self._arriving + sum(borrower.in_use for borrower in self._borrowers)

    def _hold(self, remote: Remote, info: FileInfo | ShardInfo, *, wait: bool) -> Held:
        full_since = None
        come, came_at = -1, time.monotonic()
        while True:
            try:
                with storage_errors(self.folder.path, _ELSEWHERE):
                    if (held := self.folder.open(info)) is not None:
                        return held
                    if (part := self.folder.claim(info)) is not None:
                        return self._fetch(part, remote, info)
                # Another process or thread is fetching it.
                full_since = None
                if (now := self.folder.stored(info)) != come:
                    come, came_at = now, time.monotonic()
                elif time.monotonic() - came_at > self.patience:
                    raise StorageError(
                        f"another process is fetching it, and nothing has come for "
                        f"{self.patience:.0f} s",
                        file=remote,
                        remedy=f"See which process has {self.folder.part(info)} open, and end it.",
                    )
            except NoRoomError:
                if full_since is None:
                    full_since = time.monotonic()
                    self._give_back(urgent=False)
                    continue
                if not wait:
                    raise
                self._give_back(urgent=True)
                if time.monotonic() - full_since > self.patience:
                    raise StorageError(
                        f"there was no room for {remote} ({info.bytes} bytes) for "
                        f"{self.patience:.0f} s: what is in use fills the cache's "
                        f"{self.folder.budget} bytes, or the disk",
                        file=self.folder.path,
                        remedy=ROOM,
                    ) from None
            time.sleep(_POLL_SECONDS)

    def _fetch(self, part: int, remote: Remote, info: FileInfo | ShardInfo) -> Held:
        held = Download(self.folder, part, remote, info, self._count_bytes).run()
        with self._counting:
            self.traffic.files += 1
        return held

    def _count_bytes(self, count: int) -> None:
        with self._counting:
            self.traffic.bytes += count


_caches: weakref.WeakSet[ShardCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_caches):
        cache.reset_after_fork()


at_fork(_after_fork)


def _default_folder() -> Path:
    """Where caches belong.

    Raises:
        StorageError: This user has no home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # By the standard, a relative path counts as none.
    if not os.path.isabs(caches):
        caches = os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):
        raise StorageError(
            "there is no folder for the cache: HOME is not set, and this user has no home",
            key=FOLDER_VARIABLE,
            remedy=f"Set {FOLDER_VARIABLE} (data.cache_folder of the trainer) to a folder on a "
            "disk of this machine.",
        )
    return Path(caches) / "shardprep"


def _asked_budget() -> int | None:
    gigabytes = _number(BUDGET_VARIABLE)
    return None if gigabytes is None else max(1, int(gigabytes * 1e9))


def _number(variable: str) -> float | None:
    """The number in a variable of the environment; None if the variable is not set."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        number = float(text)
        if not 0 < number < float("inf"):
            raise ValueError
    except ValueError:
        raise StorageError(f"is {text!r}, expected a positive number", key=variable) from None
    return number


def _reopen(folder: Path, budget: int, readers: int, patience: float) -> ShardCache:
    return ShardCache(folder, budget, readers=readers, patience=patience)
