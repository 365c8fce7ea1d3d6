"""The limit for every loader: gathering random segments from one array in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from shardprep.bench.loaders import Batch, SegmentShape
from shardprep.bench.machine import free_memory
from shardprep.bench.measure import Candidate


def limit_candidates(rows: int, shape: SegmentShape) -> list[Candidate]:
    """Several ways to gather from an array of `rows` segments; the fastest is the limit."""
    ways = [("np.take", 1), ("torch.index_select", 1)]
    if torch.get_num_threads() > 1:
        ways.append(("torch.index_select", torch.get_num_threads()))
    return [
        Candidate(
            f"{method}, {threads} thread{'s' if threads > 1 else ''}",
            "limit",
            partial(memory_limit, rows, shape, method, threads),
        )
        for method, threads in ways
    ]


def limit_rows(split_bytes: int, shape: SegmentShape) -> int:
    """Segments in the array: as many bytes as the split, or half of the free memory if less."""
    return max(min(split_bytes, free_memory() // 2) // shape.nbytes, shape.batch_size)


def memory_limit(rows: int, shape: SegmentShape, method: str, threads: int) -> Iterator[Batch]:
    """Random segments from an array (rows, T * F) in memory, copied into one buffer.

    Each row is drawn once an epoch, like the utterances of a loader.
    """
    torch.set_num_threads(threads)
    source = np.ones((rows, shape.frames * shape.n_mels), shape.dtype)
    out = np.empty((shape.batch_size, source.shape[1]), shape.dtype)
    order = np.random.default_rng(0).permutation(rows)
    batches = [
        order[at : at + shape.batch_size]
        for at in range(0, rows - shape.batch_size + 1, shape.batch_size)
    ]
    mel = torch.from_numpy(out).view(-1, shape.frames, shape.n_mels)
    label = torch.zeros(shape.batch_size, dtype=torch.int64)
    tensors = torch.from_numpy(source), torch.from_numpy(out)
    while True:
        for index in batches:
            if method == "np.take":
                # With mode "raise", NumPy would write to a buffer first and copy it to `out`.
                np.take(source, index, axis=0, out=out, mode="clip")
            else:
                torch.index_select(tensors[0], 0, torch.from_numpy(index), out=tensors[1])
            yield mel, label
