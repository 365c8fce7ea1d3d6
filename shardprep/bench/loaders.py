"""The loaders that are measured against each other, all reading the same split.

They read the `.pt` files as the homework's code does, the shards by webdataset, and the shards by
`SegmentLoader`. Each gives shuffled batches (mel (B, T, F), label (B,)) of random segments without
end, with each utterance once an epoch.
"""

from __future__ import annotations

import json
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

from shardprep.bench.measure import Candidate
from shardprep.format import codecs
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import CodecInfo
from shardprep.format.quantised import dequantise, scale_of
from shardprep.load.segments import SegmentLoader
from shardprep.read.shard_set import ShardSet, open_shards
from shardprep.storage.remote import Location

Batch = tuple[Tensor, Tensor]
Sample = tuple[NDArray[Any], int]

# Samples in webdataset's shuffle buffer, as in its documentation; shards are shuffled as well.
SHUFFLE_BUFFER = 1000


@dataclass(frozen=True)
class SegmentShape:
    """What every loader must deliver.

    Attributes:
        batch_size: Segments B of a batch.
        frames: Mel frames T of a segment.
        n_mels: Mel bins F.
        dtype: Element type.
        pad_value: Fills the rest of a segment where an utterance is shorter.
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
        """A random segment of a matrix (T, F): `frames` frames, or all where there are fewer."""
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
    """One `.pt` file per utterance, loaded on access, like the homework's Dataset."""

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
    """The loader of the files, given as (path, label)."""
    start = partial(from_files, files, shape, workers)
    paths = [path for path, _ in files]
    return Candidate(f"files, {workers} workers", "files", start, paths, workers)


def from_files(
    files: Sequence[tuple[Path, int]], shape: SegmentShape, workers: int
) -> Iterator[Batch]:
    """Batches from `.pt` files, through the homework's Dataset and a DataLoader."""
    dataset = FileDataset(files, shape)
    return epochs(data_loader(dataset, shape, workers, shuffle=True, drop_last=True))


def webdataset_candidate(
    name: str,
    shards: Sequence[Path],
    shape: SegmentShape,
    workers: int,
    decode: Callable[[dict[str, Any]], Sample],
) -> Candidate:
    """The loader of tar shards by webdataset; `decode` makes (mel, label) of a sample's members."""
    start = partial(from_webdataset, [str(path) for path in shards], shape, workers, decode)
    return Candidate(f"{name}, {workers} workers", "webdataset", start, shards, workers)


def from_webdataset(
    urls: Sequence[str],
    shape: SegmentShape,
    workers: int,
    decode: Callable[[dict[str, Any]], Sample],
) -> Iterator[Batch]:
    """Batches from tar shards through webdataset; the workers make whole batches."""

    def cut(sample: dict[str, Any]) -> Sample:
        mel, label = decode(sample)
        return shape.cut(mel), label

    unread = () if decode is decode_bytes else ".json"
    dataset = (
        wds.WebDataset(
            list(urls),
            shardshuffle=len(urls),
            # A different order in every epoch.
            detshuffle=True,
            empty_check=False,
            select_files=lambda name: not name.endswith(unread),
        )
        .shuffle(SHUFFLE_BUFFER)
        .map(cut)
        .batched(shape.batch_size, collation_fn=shape.collate, partial=True)
    )
    return epochs(
        DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    )


def decode_adopted(member: str, sample: dict[str, Any]) -> Sample:
    """The mel matrix of a webdataset sample of adopted tars; its label may be no number."""
    return codecs.decode(sample[member], CodecInfo("none")), NO_LABEL


def decode_member(sample: dict[str, Any]) -> Sample:
    """The mel matrix and the label of a webdataset sample of our shards."""
    label = int(sample.get("cls", NO_LABEL))
    if "mel.npy.zst" in sample:
        return codecs.decode(sample["mel.npy.zst"], CodecInfo("zstd")), label
    return codecs.decode(sample["mel.npy"], CodecInfo("none")), label


def decode_bytes(sample: dict[str, Any]) -> Sample:
    """The same of shards of uint8, widened to float32."""
    mel, label = decode_member(sample)
    return dequantise(mel, *scale_of(json.loads(sample["json"]))), label


def shard_candidate(name: str, shard_set: ShardSet, split: str, shape: SegmentShape) -> Candidate:
    """The loader of a shard set by `SegmentLoader`."""
    start = partial(from_shards, shard_set.path, split, shape)
    return Candidate(f"{name}, one process", "shardprep", start, shard_set.fetch(split))


def from_shards(place: Location, split: str, shape: SegmentShape) -> Iterator[Batch]:
    """Batches from the memory maps of a shard set, in one process."""
    loader = SegmentLoader(
        open_shards(place)[split],
        batch_size=shape.batch_size,
        segment_frames=shape.frames,
        pad_value=shape.pad_value,
        rank=0,
        world_size=1,
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
    """A DataLoader with the settings that all candidates share."""
    return DataLoader(
        dataset,
        shape.batch_size,
        collate_fn=shape.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )
