"""The shards of a folder of this machine: each is mapped when it is first read, and stays."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError
from shardprep.read.address_space import AddressSpace
from shardprep.storage.local import open_regular
from shardprep.storage.sniff import wrong_size
from shardprep.storage.trouble import machine_errors
from shardprep.system import at_fork


class FolderMap:
    """A `ShardMap` of files of this machine.

    Args:
        files: Path and expected size in bytes of each shard.
        confirm: Called after a file was opened; raises if the file may belong to another set.
        remedy: What helps where a file is damaged.

    Attributes:
        begins: See `ShardMap`.
        bytes: See `ShardMap`.
        room: See `ShardMap`.
    """

    room: int | None = None

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        confirm: Callable[[], None] = lambda: None,
        remedy: str = REPAIR,
    ) -> None:
        self._files = files
        self._confirm = confirm
        self._remedy = remedy
        self._space = AddressSpace(np.array([size for _, size in files], np.int64))
        self.begins, self.bytes = self._space.begins, self._space.bytes
        self._missing = len(files)
        self._lock = threading.Lock()
        _maps.add(self)

    def reset_after_fork(self) -> None:
        """Be unlocked: another thread of the parent may have been mapping a shard."""
        self._lock = threading.Lock()

    def reading(self, shards: NDArray[np.int64]) -> contextlib.AbstractContextManager[None]:
        """See `ShardMap.reading`."""
        if self._missing:
            for shard in self._space.missing(shards):
                self._map(shard)
        return contextlib.nullcontext()

    def map_all(self) -> None:
        """See `ShardMap.map_all`."""
        self.reading(np.arange(len(self._files)))

    def renew(self, shard: int) -> bool:
        """The folder has no other copy."""
        return False

    def check_sizes(self) -> None:
        """See `ShardMap.check_sizes`."""
        for path, expected in self._files:
            with self._faults(path):
                self._check_size(path, os.stat(path).st_size, expected)

    def read_ahead(self, shard: int) -> None:
        """See `ShardMap.read_ahead`: the file is read in one sweep."""
        self.reading(np.array([shard]))
        self._space.read_ahead(shard)

    def want(
        self, before: Sequence[int], due: Sequence[int], later: Sequence[int] = ()
    ) -> list[int]:
        """See `ShardMap.want`: what was not wanted before is read ahead."""
        for shard in due:
            if shard not in before:
                self.read_ahead(shard)
        return list(due)

    def _map(self, shard: int) -> None:
        with self._lock:
            # Another thread may have mapped it meanwhile.
            if not self._space.missing(np.array([shard])):
                return
            path, expected = self._files[shard]
            with self._faults(path), open_regular(path) as file:
                self._check_size(path, os.fstat(file.fileno()).st_size, expected)
                self._confirm()
                self._space.map(shard, file.fileno(), path)
            self._missing -= 1

    def _check_size(self, path: Path, found: int, expected: int) -> None:
        if found != expected:
            raise wrong_size(path, found, expected, self._remedy)

    @contextlib.contextmanager
    def _faults(self, path: Path) -> Iterator[None]:
        """Errors while a shard is opened: its own, or trouble of the machine."""
        try:
            with machine_errors(path):
                yield
        except OSError as error:
            # A shard that is missing may belong to a set that is gone as a whole.
            self._confirm()
            raise CorruptShardError(
                f"cannot be read: {error.strerror}", file=path, remedy=self._remedy
            ) from None


_maps: weakref.WeakSet[FolderMap] = weakref.WeakSet()


def _after_fork() -> None:
    for one in list(_maps):
        one.reset_after_fork()


at_fork(_after_fork)
