"""Fill a batch of segments from a `ShardMap`, by one gather or one call that inflates all chunks.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import needs
from shardprep.format import codecs
from shardprep.read.shard_map import ShardMap

Indices = NDArray[np.int64]

# Most bytes of seek tables and inflated chunks at a time; a batch that needs more is halved.
_MOST_HELD = 64 << 20


class Gather(Protocol):
    """Copies segments out of a map, for codec "none" or "zstd"."""

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
        """Fill `out` with a segment of each utterance.

        Args:
            begin: Where the payload of each utterance begins in the map (B,), in bytes.
            end: Where it ends (B,), in bytes.
            frames: Length of each utterance (B,), in frames.
            start: First frame of each segment (B,).
            valid: Frames of each segment that are not padding (B,).
            pad_value: Fills the padding.
            out: Segments (B, T, F) of the stored dtype.

        Raises:
            DamagedChunk: A segment cannot be decoded.
        """


class DamagedChunk(ValueError):
    """A segment cannot be decoded.

    Attributes:
        row: Which segment of the batch, from 0.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


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
            views = memory.as_strided((last + 1, size), (1, 1))
            at = self._tensor(np.minimum(first, last))
            self._gather(views, 0, at, out=self._tensor(rows))
        for row in np.flatnonzero(valid < length).tolist():
            count = int(valid[row]) * n_mels
            rows[row, :count] = self._elements[first[row] : first[row] + count]
            rows[row, count:] = pad_value


class _View:
    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self._owner = owner


class ZstdGather:
    """Segments of matrices that are stored in chunks; inflates only chunks with a part of one.

    Args:
        shards: The mapped shards.
        chunk_frames: Frames a chunk.
        threads: Threads that inflate.
    """

    def __init__(self, shards: ShardMap, chunk_frames: int, threads: int) -> None:
        self._shards = shards
        self._chunk = chunk_frames
        self._threads = threads

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
        chunk, width = self._chunk, n_mels * out.itemsize
        first, last = start // chunk, (start + valid - 1) // chunk
        held = codecs.ENTRY_BYTES * (last + 2) + (last - first + 1) * chunk * width
        if len(start) > 1 and int(held.sum()) > _MOST_HELD:
            self._halves((begin, end, frames, start, valid), pad_value, out)
            return
        at, nbytes = self._chunk_spans(begin, end, frames, first, last)
        number = _ragged(first, last - first + 1)
        row = np.repeat(np.arange(len(start)), last - first + 1)
        inflated = np.minimum(frames[row] - number * chunk, chunk) * width
        beyond = (at < begin[row]) | (at + nbytes > end[row])
        if beyond.any():
            raise DamagedChunk(int(row[np.argmax(beyond)]), "its seek table is damaged")
        try:
            chunks = codecs.inflate_many(self._shards.bytes, at, nbytes, inflated, self._threads)
        except ValueError as error:
            raise DamagedChunk(self._find(at, nbytes, inflated, row), str(error)) from None
        # In bytes: the part of each chunk that its segment needs, and where it goes in `out`.
        skip = np.maximum(start[row] - number * chunk, 0) * width
        stop = np.minimum((start + valid)[row] - number * chunk, chunk) * width
        goal = (np.maximum(number * chunk, start[row]) - start[row]) * width
        goal += row * length * width
        flat = out.reshape(-1).view(np.uint8).data
        for data, a, b, to in zip(chunks, skip.tolist(), stop.tolist(), goal.tolist(), strict=True):
            flat[to : to + b - a] = memoryview(data)[a:b]
        for short in np.flatnonzero(valid < length).tolist():
            out[short, int(valid[short]) :] = pad_value

    def _halves(
        self,
        of_each: tuple[Indices, Indices, Indices, Indices, Indices],
        pad_value: float,
        out: NDArray[Any],
    ) -> None:
        half = len(out) // 2
        for at in (slice(half), slice(half, None)):
            begin, end, frames, start, valid = (values[at] for values in of_each)
            try:
                self(begin, end, frames, start, valid, pad_value, out[at])
            except DamagedChunk as error:
                raise DamagedChunk(error.row + (at.start or 0), str(error)) from None

    def _chunk_spans(
        self, begin: Indices, end: Indices, frames: Indices, first: Indices, last: Indices
    ) -> tuple[Indices, Indices]:
        """Where the chunks first to last of each utterance lie in the map: begins and sizes."""
        table = end - codecs.table_bytes_from_end(frames, self._chunk)
        # Entry 0 is the npy header, so that chunk c is entry c + 1.
        sizes = last + 2
        entry = _ragged(np.zeros_like(sizes), sizes)
        where = np.repeat(table, sizes) + entry * codecs.ENTRY_BYTES
        fields = np.lib.stride_tricks.sliding_window_view(self._shards.bytes, 4)
        nbytes = fields[where].view("<u4")[:, 0].astype(np.int64)
        ends = np.cumsum(nbytes)
        # The sums run over all utterances: take away those of the utterances before.
        offsets = np.repeat(begin - (ends - nbytes)[np.cumsum(sizes) - sizes], sizes)
        wanted = entry > np.repeat(first, sizes)
        return (ends - nbytes + offsets)[wanted], nbytes[wanted]

    def _find(self, at: Indices, nbytes: Indices, inflated: Indices, row: Indices) -> int:
        """The row of the first chunk that cannot be inflated."""
        for i in range(len(at)):
            one = slice(i, i + 1)
            try:
                codecs.inflate_many(self._shards.bytes, at[one], nbytes[one], inflated[one], 1)
            except ValueError:
                return int(row[i])
        raise AssertionError("every chunk can be inflated by itself")


def _ragged(first: Indices, counts: Indices) -> Indices:
    """first[0], first[0] + 1, ... (counts[0] numbers), then the same from first[1] on, ..."""
    offsets = np.repeat(first - (np.cumsum(counts) - counts), counts)
    numbers: Indices = np.arange(int(counts.sum())) + offsets
    return numbers
