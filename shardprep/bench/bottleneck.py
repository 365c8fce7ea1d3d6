"""What limits our loader: the time of each part of a batch, and waiting for the disk."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardprep.bench.loaders import SegmentShape, from_shards
from shardprep.bench.measure import measure
from shardprep.load.orders.epoch import epoch_order, segment_starts
from shardprep.load.read_ahead import PLANNED
from shardprep.read.shard_set import open_shards
from shardprep.read.split import Split
from shardprep.storage.remote import Location

# The same batches are gathered again and again: more than the caches of a processor hold.
_DRAWN_BATCHES = 512
# Page faults per batch. A cold cache causes many; fewer than one cost next to nothing.
_MANY_FAULTS = 1.0
_WHOLLY_CACHED = 0.99


@dataclass(frozen=True)
class Stages:
    """Seconds that a batch takes, in total and for each part measured alone.

    Attributes:
        batch: Total: from one batch of the loader to the next.
        order: Computing which utterances come next and where their segments start.
        gather: `Split.segments`: copying or inflating them.
    """

    batch: float
    order: float
    gather: float

    @property
    def rest(self) -> float:
        """All else: tensors, buffers, threads. 0 where the loader works ahead."""
        return max(self.batch - self.order - self.gather, 0.0)


def time_stages(place: Location, name: str, shape: SegmentShape, seconds: float) -> Stages:
    """Time a loader, and each of its parts alone, for `seconds` each."""
    rate = measure(from_shards(place, name, shape), seconds)
    split = open_shards(place)[name]
    drawn = list(itertools.islice(_draws(split, shape), _DRAWN_BATCHES))
    out = np.empty((shape.batch_size, shape.frames, shape.n_mels), split.dtype)
    batches = itertools.cycle(drawn)

    def gather() -> None:
        split.segments(*next(batches), shape.frames, shape.pad_value, out)

    blocks = _blocks(split, shape)
    planned: list[int] = []
    per_block = _seconds_per_call(lambda: planned.append(len(next(blocks)[0])), seconds)
    return Stages(
        shape.batch_size / rate.samples_per_s,
        per_block * len(planned) / sum(planned) * shape.batch_size,
        _seconds_per_call(gather, seconds),
    )


def _blocks(split: Split, shape: SegmentShape) -> Iterator[tuple[Any, Any]]:
    """Indices and segment starts of many full batches at once, without end."""
    end = len(split) // shape.batch_size * shape.batch_size
    step = max(1, PLANNED // shape.batch_size) * shape.batch_size
    for epoch in itertools.count():
        order = epoch_order(len(split), 0, epoch)
        for at in range(0, end, step):
            indices = order(np.arange(at, min(at + step, end), dtype=np.int64))
            frames = split.frames[indices]
            yield indices, segment_starts(indices, frames, shape.frames, seed=0, epoch=epoch)


def _draws(split: Split, shape: SegmentShape) -> Iterator[tuple[Any, Any]]:
    """Indices and segment starts batch by batch, without end."""
    for indices, starts in _blocks(split, shape):
        for at in range(0, len(indices), shape.batch_size):
            own = slice(at, at + shape.batch_size)
            yield indices[own], starts[own]


def _seconds_per_call(call: Callable[[], object], seconds: float) -> float:
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < seconds:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


def cached_share(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache, 0 to 1; 1 where there are no pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    cached = pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            bits = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            place, wanted = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
            failed = libc.mincore(place, wanted, ctypes.c_void_p(bits.ctypes.data))
            # A map cannot be closed while an array refers to it.
            del view
            if failed:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            cached += int((bits & 1).sum())
            pages += len(bits)
    return cached / pages if pages else 1.0


def name_bottleneck(
    stages: Stages, codec: str, *, faults: int, batches: int, cached: float, to_limit: float
) -> str:
    """One sentence that names the bottleneck.

    Args:
        stages: Where the time goes.
        codec: Codec of the shards.
        faults: Major page faults of the process during the measurements.
        batches: Number of batches in these measurements.
        cached: Share of the shards in the page cache.
        to_limit: Our rate relative to the limit.
    """
    if faults >= _MANY_FAULTS * batches or cached < _WHOLLY_CACHED:
        return (
            f"The disk: {faults:,} page faults in {batches:,} batches waited for it, and the page "
            f"cache holds {cached:.0%} of the shards."
        )
    parts = {
        "computing the order and the segment starts": stages.order,
        "handing the batches over": stages.rest,
        "copying the segments out of the maps"
        if codec == "none"
        else "inflating the chunks that the segments touch": stages.gather,
    }
    part = max(parts, key=lambda name: parts[name])
    share = parts[part] / max(stages.batch, sum(parts.values()))
    where = "Memory" if part.startswith("copying") else "The processor"
    return (
        f"{where}: {part} takes {share:.0%} of a batch's time; "
        f"the loader runs at {to_limit:.2f} of the limit."
    )
