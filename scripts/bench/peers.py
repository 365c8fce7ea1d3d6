"""The other libraries that feed random segments to PyTorch, each set up as its documentation says.

A peer converts a split into its own format once, and then gives candidates for
`measure_in_rounds`, with and without workers. All store float16 matrices, shuffle, and give the
same batches.

- webdataset: one plain `.npy` or one `.npy.zst`, a single zstd frame, for each utterance; a shuffle
  buffer; the workers make the batches.
- mosaicml-streaming: MDS, uncompressed, float16 arrays; `StreamingDataset` with its batch size, and
  `LocalDataset`, which is for data on a local disk.
- litdata: chunks of 64 MB of raw bytes, which it reads faster than arrays; `transform` takes the
  segments.
- lhotse: Shar with numpy features, `DynamicCutSampler` over a lazy, shuffled cut set.
- datasets: Arrow on disk, map-style, which reads a batch at a time. Measured with an `Array2D`
  column in torch format, as its guide for PyTorch advises, and with a column of bytes without a
  format, which the guide does not mention but which is much faster.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch.utils.data import DataLoader

from scripts.bench.peer_formats import (
    import_streaming,
    write_datasets,
    write_lhotse,
    write_litdata,
    write_mds,
    write_webdataset,
)
from shardprep.bench.loaders import (
    SHUFFLE_BUFFER,
    Batch,
    Sample,
    SegmentShape,
    data_loader,
    epochs,
    from_webdataset,
)
from shardprep.bench.measure import Candidate

WORKERS = (0, 2)

# Names of set-ups that no documentation advises. They are measured nevertheless.
NOT_ADVISED = ("datasets bytes",)


@dataclass(frozen=True)
class Peer:
    """A library to compare with, in one of its set-ups.

    Attributes:
        name: What the tables call it.
        package: The library.
        module: Its name in an import.
        format: Name of the folder that `convert` writes; peers of the same format share it.
        convert: Writes the training split of a shard folder into an empty folder.
        start: Makes batches from such a folder with a number of workers.
    """

    name: str
    package: str
    module: str
    format: str
    convert: Callable[[Path, Path], None]
    start: Callable[[Path, SegmentShape, int], Iterator[Batch]]

    @property
    def installed(self) -> bool:
        """Whether the library can be imported."""
        return find_spec(self.module) is not None

    def candidates(self, folder: Path, shape: SegmentShape) -> list[Candidate]:
        """Its loaders of a converted split, with each number of workers."""
        return [
            Candidate(
                f"{self.name}, {workers} workers",
                self.package,
                partial(self.start, folder, shape, workers),
                files_below(folder),
                workers,
            )
            for workers in WORKERS
        ]


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def as_sample(item: Mapping[str, Any], shape: SegmentShape) -> Sample:
    """A segment and the label of what a peer gives: the mel is bytes, an array or a tensor."""
    mel = item["mel"]
    if isinstance(mel, bytes | bytearray | memoryview):
        mel = np.frombuffer(mel, shape.dtype).reshape(-1, shape.n_mels)
    return shape.cut(np.asarray(mel)), int(item["label"])


def collate_items(items: Sequence[Mapping[str, Any]], shape: SegmentShape) -> Batch:
    """Take segments of a peer's items, pad and stack them."""
    return shape.collate([as_sample(item, shape) for item in items])


def decode_webdataset(members: Mapping[str, Any]) -> Sample:
    """The mel matrix and the label of an utterance that `write_webdataset` wrote."""
    payload = members.get("npy")
    if payload is None:
        payload = zstandard.ZstdDecompressor().decompress(members["npy.zst"])
    return np.load(io.BytesIO(payload)), int(members["cls"])


def start_webdataset(folder: Path, shape: SegmentShape, workers: int) -> Iterator[Batch]:
    """Batches of webdataset."""
    urls = [str(path) for path in files_below(folder)]
    return from_webdataset(urls, shape, workers, decode_webdataset)


def start_mds(folder: Path, shape: SegmentShape, workers: int, local: bool) -> Iterator[Batch]:
    """Batches of `LocalDataset` or `StreamingDataset`."""
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    # Take segments in the worker, so that it does not send complete utterances.
    base = streaming.LocalDataset if local else streaming.StreamingDataset

    class Segments(base):  # type: ignore[misc, valid-type]
        def __getitem__(self, at: Any) -> Any:
            return as_sample(super().__getitem__(at), shape)

    if local:
        options: dict[str, Any] = {"shuffle": True}
        dataset = Segments(local=str(folder))
    else:
        options = {}
        dataset = Segments(local=str(folder), shuffle=True, batch_size=shape.batch_size)
    try:
        yield from epochs(data_loader(dataset, shape, workers, drop_last=True, **options))
    finally:
        # The library cleans up when the interpreter ends, which a forked process never reaches.
        streaming.base.util.clean_stale_shared_memory()


def start_litdata(folder: Path, shape: SegmentShape, workers: int) -> Iterator[Batch]:
    """Batches of litdata's own loader."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(folder), shuffle=True, drop_last=True, transform=partial(as_sample, shape=shape)
    )
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=shape.batch_size,
        collate_fn=shape.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    return epochs(loader)


class CutBatches(torch.utils.data.Dataset[Batch]):
    """A dataset in lhotse's sense: makes a batch of the cuts that a sampler has chosen."""

    def __init__(self, shape: SegmentShape) -> None:
        self._shape = shape

    def __getitem__(self, cuts: Any) -> Batch:
        return self._shape.collate(
            [
                (self._shape.cut(cut.load_features()), int(cut.supervisions[0].speaker))
                for cut in cuts
            ]
        )


def start_lhotse(folder: Path, shape: SegmentShape, workers: int) -> Iterator[Batch]:
    """Batches of Shar, with the sampler in the worker."""
    from lhotse import CutSet
    from lhotse.dataset import DynamicCutSampler, IterableDatasetWrapper
    from lhotse.dataset.dataloading import make_worker_init_fn

    # As the guide of lhotse advises, every worker reads all shards without end, in its own order.
    cuts = CutSet.from_shar(
        in_dir=str(folder), shuffle_shards=True, stateful_shuffle=True, seed="randomized"
    ).repeat()
    sampler = DynamicCutSampler(
        cuts, max_cuts=shape.batch_size, shuffle=True, shuffle_buffer_size=SHUFFLE_BUFFER
    )
    loader = DataLoader(
        IterableDatasetWrapper(CutBatches(shape), sampler),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=make_worker_init_fn(rank=0, world_size=1) if workers else None,
    )
    return epochs(loader)


def start_datasets(
    folder: Path, shape: SegmentShape, workers: int, as_bytes: bool
) -> Iterator[Batch]:
    """Batches of a map-style data set, which gives DataLoader a batch at a time."""
    import datasets

    # Tensors of this size gain nothing from several threads, which only disturb each other.
    torch.set_num_threads(1)
    dataset = datasets.load_from_disk(str(folder / "arrow"))
    return epochs(
        DataLoader(
            dataset if as_bytes else dataset.with_format("torch"),
            shape.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=partial(collate_items, shape=shape),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    )


PEERS = (
    Peer(
        "webdataset .npy",
        "webdataset",
        "webdataset",
        "webdataset-npy",
        partial(write_webdataset, suffix="npy"),
        start_webdataset,
    ),
    Peer(
        "webdataset .npy.zst",
        "webdataset",
        "webdataset",
        "webdataset-zst",
        partial(write_webdataset, suffix="npy.zst"),
        start_webdataset,
    ),
    Peer(
        "mosaicml-streaming",
        "mosaicml-streaming",
        "streaming",
        "mds",
        write_mds,
        partial(start_mds, local=False),
    ),
    Peer(
        "mosaicml LocalDataset",
        "mosaicml-streaming",
        "streaming",
        "mds",
        write_mds,
        partial(start_mds, local=True),
    ),
    Peer("litdata", "litdata", "litdata", "litdata", write_litdata, start_litdata),
    Peer("lhotse Shar", "lhotse", "lhotse", "shar", write_lhotse, start_lhotse),
    Peer(
        "datasets Array2D",
        "datasets",
        "datasets",
        "arrow",
        partial(write_datasets, as_bytes=False),
        partial(start_datasets, as_bytes=False),
    ),
    Peer(
        "datasets bytes",
        "datasets",
        "datasets",
        "arrow-bytes",
        partial(write_datasets, as_bytes=True),
        partial(start_datasets, as_bytes=True),
    ),
)
