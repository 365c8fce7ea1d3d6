"""Segments of matrices in zstd chunks, in shares that threads inflate and place.

Axis legend: B batch, T frames, F mel bins; C chunks with a part of a segment of the batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.format import codecs
from shardprep.read.gather.contract import DamagedChunk, Indices
from shardprep.read.gather.shares import threads, work_on
from shardprep.read.gather.widen import pad
from shardprep.read.shard_map import ShardMap

# Most bytes of seek tables that are read at a time; a batch that needs more is cut.
_MOST_TABLES = 8 << 20

# Inflated bytes of a share: few enough for the cache of a core, enough to be worth a thread. Only
# a share of a single segment may have more.
_LEAST_HELD, _MOST_HELD = 128 << 10, 1 << 20

# Larger than the memory that the library takes for a share: 1 MiB for 512 KiB of zstd or more.
_LARGER = 3 << 20

# Shares for each thread, if they are large enough: what a late thread has not begun goes to others.
_SHARES = 2


@dataclass(frozen=True)
class _Chunks:
    """The chunks with a part of each segment, one segment after another.

    Attributes:
        stops: How many chunks the segments up to each one have together (B,).
        at: Where each chunk begins in the map (C,), in bytes.
        nbytes: Its size there (C,).
        inflated: Its size when it is inflated (C,).
        held: Size of all inflated chunks of each segment (B,).
        skipped: How far into them the segment begins (B,), in bytes.
        wanted: Size of the segment without padding (B,).
        inside: Whether they lie inside their member (B,).
    """

    stops: Indices
    at: Indices
    nbytes: Indices
    inflated: Indices
    held: Indices
    skipped: Indices
    wanted: Indices
    inside: NDArray[np.bool_]

    def of(self, rows: slice) -> slice:
        """The chunks of some segments."""
        first = int(self.stops[rows.start - 1]) if rows.start else 0
        return slice(first, int(self.stops[rows.stop - 1]))


class ZstdGather:
    """Segments of matrices that are stored in chunks; inflates only chunks with a part of one.

    Args:
        shards: The mapped shards.
        chunk_frames: Frames a chunk.
    """

    def __init__(self, shards: ShardMap, chunk_frames: int) -> None:
        _keep_memory()
        self._memory = memory = shards.bytes
        self._chunk = chunk_frames
        # The number of four bytes that begins at each byte.
        count = max(0, len(memory) - 3)
        self._numbers: NDArray[np.uint32] = np.ndarray((count,), "<u4", memory, strides=(1,))

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
        """Fill `out`; see `Gather`. Of several damaged segments, the error names the first."""
        width, count = out.shape[2] * out.itemsize, threads()
        tables = codecs.ENTRY_BYTES * ((start + valid - 1) // self._chunk + 2)
        for rows in _cut(tables, _MOST_TABLES):
            own = (begin[rows], end[rows], frames[rows], start[rows], valid[rows])
            chunks = self._find_chunks(*own, width)
            equal = int(chunks.held.sum()) // (_SHARES * count) + int(chunks.held.max())
            shares = _cut(chunks.held, min(max(equal, _LEAST_HELD), _MOST_HELD))
            part = out[rows]
            try:
                work_on(
                    [functools.partial(self._fill, chunks, share, part) for share in shares], count
                )
            except DamagedChunk as error:
                raise DamagedChunk(rows.start + error.row, str(error)) from None
        pad(out, valid, pad_value)

    def _find_chunks(
        self,
        begin: Indices,
        end: Indices,
        frames: Indices,
        start: Indices,
        valid: Indices,
        width: int,
    ) -> _Chunks:
        """Read the seek tables; a frame has `width` bytes."""
        first, last = start // self._chunk, (start + valid - 1) // self._chunk
        # Entry 0 is the npy header, so that chunk c is entry c + 1.
        entries = last + 2
        begins = np.cumsum(entries) - entries
        table = end - codecs.table_bytes_from_end(frames, self._chunk)
        where = np.repeat(table - begins * codecs.ENTRY_BYTES, entries)
        where += np.arange(len(where)) * codecs.ENTRY_BYTES
        nbytes = self._numbers[where].astype(np.int64)
        # The sums run over all utterances: take away those of the utterances before.
        before = np.cumsum(nbytes) - nbytes
        counts = last - first + 1
        stops = np.cumsum(counts)
        wanted = np.repeat(begins + first + 1 - (stops - counts), counts)
        wanted += np.arange(len(wanted))
        at = before[wanted] + np.repeat(begin - before[begins], counts)
        nbytes = nbytes[wanted]
        # Only the last chunk of an utterance may be shorter.
        full = self._chunk * width
        shortest = np.minimum(frames * width - last * full, full)
        inflated = np.full(len(at), full)
        inflated[stops - 1] = shortest
        return _Chunks(
            stops,
            at,
            nbytes,
            inflated,
            held=(counts - 1) * full + shortest,
            skipped=start * width - first * full,
            wanted=valid * width,
            # No size is negative: where the last chunk is inside, all are.
            inside=(at + nbytes)[stops - 1] <= end,
        )

    def _fill(self, chunks: _Chunks, rows: slice, out: NDArray[Any]) -> None:
        """Fill some rows of `out`, but not their padding."""
        own, held = chunks.of(rows), chunks.held[rows]
        try:
            if not chunks.inside[rows].all():
                raise ValueError("a seek table is damaged")
            inflated = codecs.inflate_joined(
                self._memory, chunks.at[own], chunks.nbytes[own], chunks.inflated[own]
            )
        except ValueError:
            raise self._damage(chunks, rows) from None
        begins = np.cumsum(held) - held + chunks.skipped[rows]
        ends = begins + chunks.wanted[rows]
        size = out[0].nbytes
        flat = out.reshape(-1).view(np.uint8).data
        goals = range(rows.start * size, rows.stop * size, size)
        for goal, begin, end in zip(goals, begins.tolist(), ends.tolist(), strict=True):
            flat[goal : goal + end - begin] = inflated[begin:end]

    def _damage(self, chunks: _Chunks, rows: slice) -> DamagedChunk:
        """The error about the first of these segments that cannot be inflated."""
        for row in range(rows.start, rows.stop):
            own = chunks.of(slice(row, row + 1))
            if not chunks.inside[row]:
                return DamagedChunk(row, "its seek table is damaged")
            try:
                codecs.inflate_many(
                    self._memory, chunks.at[own], chunks.nbytes[own], chunks.inflated[own]
                )
            except ValueError as error:
                return DamagedChunk(row, str(error))
        raise AssertionError("every segment can be inflated by itself")


@functools.cache
def _keep_memory() -> None:
    """Have the C library keep the memory of a share for the next one.

    glibc gives memory back to the system unless a larger block was given back before. New pages
    for every share take half as long as the inflating.
    """
    np.empty(_LARGER, np.uint8)


def _cut(sizes: Indices, most: int) -> list[slice]:
    """Cut rows of these sizes (B,) so that a part with several has `most` or less together."""
    ends = np.cumsum(sizes)
    parts, at, done = [], 0, 0
    while at < len(ends):
        stop = max(at + 1, int(np.searchsorted(ends, done + most, "right")))
        parts.append(slice(at, stop))
        at, done = stop, int(ends[stop - 1])
    return parts
