"""The ways to read one split that are measured against each other, and the limit of memory.

All give batches (mel (B, T, F), label (B,)) of random segments without end, shuffled, each
utterance once an epoch: from the files as the course does, from the shards by webdataset, and by
`SegmentLoader`. The limit gathers as many bytes from an array in memory, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shardprep.bench.turns import Candidate, free_memory
from shardprep.format import codecs
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import CodecInfo
from shardprep.load.segments import SegmentLoader
from shardprep.read.shard_set import ShardSet, open_shards
from shardprep.storage.remote import Location

Batch = tuple[Tensor, Tensor]
Sample = tuple[NDArray[Any], int]

# Samples in webdataset's shuffle buffer, as its documentation has it; shards are shuffled as well.
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class SegmentShape:
    """What is asked of every loader.

    Attributes:
        batch_size: Segments B a batch.
        frames: Mel frames T a segment.
        n_mels: Mel bins F.
        dtype: Element type.
        pad_value: Fills a segment behind the end of a short utterance.
    """

    batch_size: int
    frames: int
    n_mels: int
    dtype: np.dtype[Any]
    pad_value: float = -20.0

    @property
    def nbytes(self) -> int:
        """Bytes of one segment."""
        return self.frames * self.n_mels * self.dtype.itemsize

    def cut(self, mel: NDArray[Any]) -> NDArray[Any]:
        """A random run of at most `frames` frames of a matrix (T, F)."""
        start = random.randint(0, max(len(mel) - self.frames, 0))
        return mel[start : start + self.frames]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad segments and stack them: (B, T, F) and (B,)."""
        shape = (len(samples), self.frames, self.n_mels)
        batch = np.full(shape, self.pad_value, self.dtype)
        for row, (segment, _) in zip(batch, samples, strict=True):
            row[: len(segment)] = segment
        return torch.from_numpy(batch), torch.tensor([label for _, label in samples])


class FileDataset(Dataset[Sample]):
    """One `.pt` file a sample, opened when asked for, as the course's code has it."""

    def __init__(self, files: Sequence[tuple[Path, int]], shape: SegmentShape) -> None:
        self._files, self._shape = files, shape

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        path, label = self._files[index]
        mel = torch.load(path, weights_only=True).numpy()
        return self._shape.cut(mel), label


def file_candidate(
    files: Sequence[tuple[Path, int]], shape: SegmentShape, workers: int
) -> Candidate:
    """The files (path, label), one a sample."""
    start = partial(from_files, files, shape, workers)
    paths = [path for path, _ in files]
    return Candidate(f"files, {workers} workers", "files", start, paths, workers)


def from_files(
    files: Sequence[tuple[Path, int]], shape: SegmentShape, workers: int
) -> Iterator[Batch]:
    """Batches from a folder of `.pt` files, through the course's Dataset and DataLoader."""
    dataset = FileDataset(files, shape)
    return epochs(data_loader(dataset, shape, workers, shuffle=True, drop_last=True))


def webdataset_candidate(
    name: str,
    shards: Sequence[Path],
    shape: SegmentShape,
    workers: int,
    decode: Callable[[dict[str, Any]], Sample],
) -> Candidate:
    """Tar shards, read by webdataset; `decode` makes (mel, label) of a sample's members."""
    start = partial(from_webdataset, [str(path) for path in shards], shape, workers, decode)
    return Candidate(f"{name}, {workers} workers", "webdataset", start, shards, workers)


def from_webdataset(
    urls: Sequence[str],
    shape: SegmentShape,
    workers: int,
    decode: Callable[[dict[str, Any]], Sample],
) -> Iterator[Batch]:
    """Batches from tar shards through webdataset, batched within the workers."""

    def cut(sample: dict[str, Any]) -> Sample:
        mel, label = decode(sample)
        return shape.cut(mel), label

    dataset = (
        wds.WebDataset(
            list(urls),
            shardshuffle=len(urls),
            # An order of its own for every epoch.
            detshuffle=True,
            empty_check=False,
            select_files=lambda name: not name.endswith(".json"),
        )
        .shuffle(SHUFFLE_BUFFER)
        .map(cut)
        .batched(shape.batch_size, collation_fn=shape.collate, partial=True)
    )
    return epochs(
        DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    )


def decode_member(sample: dict[str, Any]) -> Sample:
    """The mel matrix and the label of a webdataset sample of our shards."""
    label = int(sample.get("cls", NO_LABEL))
    if "mel.npy.zst" in sample:
        return codecs.decode(sample["mel.npy.zst"], CodecInfo("zstd")), label
    return codecs.decode(sample["mel.npy"], CodecInfo("none")), label


def shard_candidate(name: str, shard_set: ShardSet, split: str, shape: SegmentShape) -> Candidate:
    """A shard set, read by `SegmentLoader`."""
    start = partial(from_shards, shard_set.path, split, shape)
    return Candidate(f"{name}, one process", "shardprep", start, shard_set.fetch(split))


def from_shards(place: Location, split: str, shape: SegmentShape) -> Iterator[Batch]:
    """Batches from the memory maps of a shard set, in one process."""
    loader = SegmentLoader(
        open_shards(place)[split],
        batch_size=shape.batch_size,
        segment_frames=shape.frames,
        pad_value=shape.pad_value,
    )
    for batch in epochs(loader):
        yield batch["mel"], batch["label"]


def epochs(loader: Iterable[Any]) -> Iterator[Any]:
    """All batches of a loader, epoch after epoch."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise RuntimeError("the loader gave no batch in a whole epoch")


def data_loader(dataset: Any, shape: SegmentShape, workers: int, **options: Any) -> DataLoader[Any]:
    """A DataLoader with the settings that all who use one share."""
    return DataLoader(
        dataset,
        shape.batch_size,
        collate_fn=shape.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )


def limit_candidates(rows: int, shape: SegmentShape) -> list[Candidate]:
    """Every way at hand to gather from an array of `rows` segments; the fastest is the limit."""
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
    """Segments in the limit's array: the split's matrices, or what half the free memory holds."""
    return max(min(split_bytes, free_memory() // 2) // shape.nbytes, shape.batch_size)


def memory_limit(rows: int, shape: SegmentShape, method: str, threads: int) -> Iterator[Batch]:
    """Random segments from an array (rows, T * F) in memory, copied into one buffer repeatedly.

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
                # Any other mode than "raise" lets it write to `out` without a buffer between.
                np.take(source, index, axis=0, out=out, mode="clip")
            else:
                torch.index_select(tensors[0], 0, torch.from_numpy(index), out=tensors[1])
            yield mel, label
