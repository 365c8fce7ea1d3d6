"""Buffers that are used again once nobody looks at them any more.

New memory for every batch costs a page fault for every 4 KiB of it, about as long as filling it.
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
    """Hands out arrays, and takes their memory back when the last view of one is gone.

    A batch that is kept is therefore never overwritten: another buffer takes its place.

    Args:
        keep: Most buffers that lie idle.
    """

    def __init__(self, keep: int) -> None:
        self._idle: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of undefined contents; tensors made by `torch.from_numpy` count as views."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(nbytes, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        # Views of a view hold the array that owns the memory, and not the view: it must own it.
        lease = _Lease(memory)
        array = np.asarray(lease)[:nbytes].view(dtype).reshape(shape)
        weakref.finalize(lease, self._idle.append, memory).atexit = False
        return array


class _Lease:
    """Owner of an array over `memory`, as NumPy sees it."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.__array_interface__ = memory.__array_interface__


Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    """The same items in the same order, up to `count` of them made ahead.

    An error of `items` is raised where its item would come. Closing the generator, as the end of
    a broken-off loop does, waits for the item that is being made and ends the thread.
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
