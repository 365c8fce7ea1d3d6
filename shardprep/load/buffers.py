"""Buffers that are used again when no view of them is left.

New memory for every batch costs a page fault for every 4 KiB: about as long as to fill it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray


class BufferPool:
    """Gives out arrays, and takes their memory back when the last view of it is gone.

    A batch that somebody keeps is never overwritten.

    Args:
        keep: Most unused buffers that are kept.
    """

    def __init__(self, keep: int) -> None:
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._idle.maxlen,)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with undefined contents; a tensor made by `torch.from_numpy` is a view too."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(nbytes, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        # A view of a view holds the owner of the memory, not the first view. So the lease owns it.
        lease = _Lease(memory)
        array = np.asarray(lease)[:nbytes].view(dtype).reshape(shape)
        weakref.finalize(lease, self._idle.append, memory).atexit = False
        return array


class _Lease:
    """The owner, for NumPy, of an array over `memory`."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__


Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    """The same items in the same order; a thread makes up to `count` of them ahead.

    An error of `items` is raised where its item would come. To close the generator, as a loop
    that is broken off does, waits for the item that is being made and ends the thread.
    """
    if not count:
        yield from items
        return
    done = object()
    with ThreadPoolExecutor(1, "shardprep-prefetch") as thread:
        waiting = deque(thread.submit(next, items, done) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not done:
                waiting.append(thread.submit(next, items, done))
                yield cast(Item, item)
        finally:
            for future in waiting:
                future.cancel()
