"""Segments of uncompressed matrices, by one gather of the mapped memory.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import needs
from shardprep.format import codecs
from shardprep.read.gather.contract import Indices
from shardprep.read.shard_map import ShardMap


class PlainGather:
    """Segments of uncompressed matrices, gathered from overlapping views of the mapped memory.

    Args:
        shards: The mapped shards.
        dtype: Element type of the matrices.
    """

    def __init__(self, shards: ShardMap, dtype: np.dtype[Any]) -> None:
        with needs("torch"):
            import torch

        self._elements = shards.bytes.view(dtype)
        # The view claims to be writable: PyTorch has no read-only tensors, and warns of them.
        address = {**shards.bytes.__array_interface__, "strides": None}
        address["data"] = (address["data"][0], False)
        self._memory = torch.from_numpy(np.asarray(_View(address, shards.bytes)).view(dtype))
        self._gather = torch.index_select
        self._tensor = torch.from_numpy
        # Every segment of one size, as overlapping views.
        self._views = self._memory.as_strided((0, 1), (1, 1))

    def __call__(
        self,
        begin: Indices,
        end: Indices,
        frames: Indices,
        start: Indices,
        valid: Indices,
        pad_value: float,
        out: NDArray[Any],
    ) -> None:
        """Fill `out`; see `Gather`."""
        length, n_mels = out.shape[1:]
        size, memory = length * n_mels, self._memory
        first = (begin + codecs.NPY_HEADER_BYTES) // out.itemsize + start * n_mels
        rows = out.reshape(-1, size)
        last = len(memory) - size
        if last >= 0:
            # A padded segment is read beyond the end of its utterance. What comes from there is
            # overwritten below.
            views = self._views
            if views.shape[1] != size or not len(views):
                self._views = views = memory.as_strided((last + 1, size), (1, 1))
            at = self._tensor(np.minimum(first, last))
            self._gather(views, 0, at, out=self._tensor(rows))
        if int(valid.min(initial=length)) == length:
            return
        for row in np.flatnonzero(valid < length).tolist():
            count = int(valid[row]) * n_mels
            rows[row, :count] = self._elements[first[row] : first[row] + count]
            rows[row, count:] = pad_value


class _View:
    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner
