"""Buffers that are used again when no view of them is left.

New memory for every batch costs a page fault for every 4 KiB: about as long as to fill it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

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
        nbytes = math.prod(shape) * dtype.itemsize
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(nbytes, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        # A view of a view holds the owner of the memory, not the first view. So the lease owns it.
        lease = _Lease(memory, self._idle)
        return np.asarray(lease)[:nbytes].view(dtype).reshape(shape)


class _Lease:
    """The owner, for NumPy, of an array over `memory`; gives it back at its end."""

    def __init__(self, memory: NDArray[np.uint8], idle: deque[NDArray[np.uint8]]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._idle = memory, idle

    def __del__(self) -> None:
        self._idle.append(self._memory)
