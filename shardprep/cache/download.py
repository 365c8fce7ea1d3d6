"""Downloads a file of a store into its part in the cache, checks it, and gives it its name."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from io import FileIO
from typing import Any

from shardprep.cache.folder import CacheFolder, Held, NoRoomError
from shardprep.errors import CorruptShardError
from shardprep.format.manifest import FileInfo, ShardInfo
from shardprep.storage.remote import Remote

_log = logging.getLogger("shardprep")

CHUNK = 8 << 20
"""Bytes that are requested at a time."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
# How often a file may come with wrong bytes.
_TRIES = 5
_CHANGED = "If the set was built again meanwhile, start again; else see `shardprep verify`."


class Download:
    """The download of one file.

    Args:
        folder: The cache.
        part: Descriptor of the file's part, claimed.
        remote: Where the file comes from.
        info: Its size and sha256.
        came: Called with the number of bytes of every answer.
    """

    def __init__(
        self,
        folder: CacheFolder,
        part: int,
        remote: Remote,
        info: FileInfo | ShardInfo,
        came: Callable[[int], None],
    ) -> None:
        self._folder = folder
        self._part = part
        self._remote = remote
        self._info = info
        self._came = came

    def run(self) -> Held:
        """Fetch what the part lacks, check it, and give it its name.

        Raises:
            NoRoomError: The disk is full.
            StorageError: The store gave no answer.
            CorruptShardError: The store has no such file, or other bytes.
        """
        try:
            self._fill(FileIO(self._part, "r+", closefd=False))
            return self._folder.name(self._part, self._info)
        except BaseException:
            self._folder.unclaim(self._part)
            raise

    def _fill(self, file: FileIO) -> None:
        """Fetch until the part has the bytes of the manifest."""
        size = self._info.bytes
        for _ in range(_TRIES):
            file.seek(0)
            if os.fstat(file.fileno()).st_size > size:
                file.truncate(0)
            digest = hashlib.sha256()
            while data := file.read(CHUNK):
                digest.update(data)
            if self._complete(file, digest) and digest.hexdigest() == self._info.sha256:
                return
            if file.tell() >= size:
                file.truncate(0)
            _log.warning("%s: came with other bytes than expected; fetched again", self._remote)
        self._folder.drop(self._info)
        raise CorruptShardError(
            f"its bytes are not those that the manifest names, {_TRIES} times",
            file=self._remote,
            remedy=_CHANGED,
        )

    def _complete(self, file: FileIO, digest: Any) -> bool:
        """Fetch and write what the part lacks; False if it has to be tried again."""
        while (done := file.tell()) < self._info.bytes:
            end = min(done + CHUNK, self._info.bytes)
            try:
                data = self._remote.read(done, end)
            except FileNotFoundError:
                raise CorruptShardError("is missing", file=self._remote, remedy=_CHANGED) from None
            self._came(len(data))
            if len(data) > end - done:
                # A server without ranges sends the whole file.
                data = data[done : self._info.bytes]
            if not data:
                return False
            if self._write(file, data):
                digest.update(data)
        return True

    def _write(self, file: FileIO, data: bytes) -> bool:
        """Append to the part; if the disk is full, free some of it and return False.

        Raises:
            NoRoomError: Nothing can be freed.
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
            with self._folder.lock() as ledger:
                freed = self._folder.evict(ledger, self._info.bytes - begin)
            if not freed:
                raise NoRoomError from None
            _log.warning(
                "%s: the disk is full; removed files of %d bytes", self._folder.path, freed
            )
            return False
        return True
