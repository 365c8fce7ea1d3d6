"""Segments of matrices in zstd chunks, by one call that inflates all chunks of a batch.

Axis legend: B batch, T frames, F mel bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.format import codecs
from shardprep.read.gather.contract import DamagedChunk, Indices
from shardprep.read.shard_map import ShardMap

# Most bytes of seek tables and inflated chunks at a time; a batch that needs more is halved.
_MOST_HELD = 64 << 20


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
