"""What a split needs of its shards in memory, wherever the shards lie.

`FolderMap` has the shards of a folder of this machine, `StoreMap` those of a store.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class ShardMap(Protocol):
    """The bytes of all shards of a split, one after another in memory."""

    @property
    def begins(self) -> NDArray[np.int64]:
        """Where each shard begins (shards,), in bytes."""

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """Everything (total,), read-only; a shard's bytes are there while it is being read."""

    @property
    def room(self) -> int | None:
        """Bytes of shards that one reader may want at a time; None for no limit."""

    def reading(self, shards: NDArray[np.int64]) -> contextlib.AbstractContextManager[None]:
        """Keep these shards (B,) mapped while the context lasts.

        Raises:
            CorruptShardError: A shard is missing, or is not the one that the manifest names.
            StorageError: A store gave no answer, the cache has no room, or the system maps no
                more files.
        """

    def map_all(self) -> None:
        """Map every shard of a folder now, so that a later change of the folder does not matter.

        Raises:
            CorruptShardError: A shard is missing, or has another size than expected.
        """

    def renew(self, shard: int) -> bool:
        """Get a damaged shard again; False if there is no other copy."""

    def check_sizes(self) -> None:
        """Make sure that every shard of a folder has the expected size, without opening it.

        Raises:
            CorruptShardError: A shard is missing, or has another size than expected.
        """

    def read_ahead(self, shard: int) -> None:
        """Have a whole shard read into memory, or fetched, in the background.

        Raises:
            CorruptShardError: The shard of a folder is missing, or has another size than expected.
        """

    def want(
        self, before: Sequence[int], due: Sequence[int], later: Sequence[int] = ()
    ) -> list[int]:
        """Change which shards one reader wants; see `WantedShards.want`.

        Args:
            before: What this reader wanted until now.
            due: Shards that it is about to read.
            later: Those after them, which may wait.

        Returns:
            What it wants now.
        """


class WantedShards:
    """The shards that one reader says it will read next; when it is dropped, it wants none.

    Args:
        shards: Where they are mapped.
    """

    def __init__(self, shards: ShardMap) -> None:
        self._map = shards
        self._wanted: list[int] = []
        weakref.finalize(self, _change, shards, self._wanted).atexit = False

    def want(self, due: Sequence[int], later: Sequence[int] = ()) -> None:
        """Say which shards are wanted from now on, instead of those before.

        Shards of a folder are read ahead. Those of a store are fetched ahead, and stay mapped
        until they are wanted no longer.

        Args:
            due: Shards that are about to be read, in the order of their use.
            later: Those after them, which may wait: of a store's, as many as there is room for.

        Raises:
            CorruptShardError: A shard of a folder is missing, or has another size than expected.
        """
        _change(self._map, self._wanted, due, later)

    def close(self) -> None:
        """Want no shard any longer."""
        _change(self._map, self._wanted)


def _change(
    shards: ShardMap, wanted: list[int], due: Sequence[int] = (), later: Sequence[int] = ()
) -> None:
    wanted[:] = shards.want(wanted, due, later)
