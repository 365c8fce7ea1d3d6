"""How each peer stores the training split: one function for each format, from shards to a folder.

All keep the element type of the shards, float16 by default, and store the label with each matrix.
"""

from __future__ import annotations

import functools
import io
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

import shardprep
from shardprep.system import usable_cores

SHARD_SAMPLES = 1000
CHUNK_BYTES = "64MB"
FRAME_SECONDS = 0.01


@functools.lru_cache(maxsize=1)
def training_split(shards: Path) -> shardprep.Split:
    """The split that all peers convert; opened once in each process."""
    return shardprep.open_shards(shards)["train"]


def item_at(index: int, shards: Path, pack: Callable[[Any], Any] = np.asarray) -> dict[str, Any]:
    """One utterance as a peer stores it."""
    split = training_split(shards)
    return {"mel": pack(split.read(index)), "label": int(split.labels[index])}


def items(shards: Path, pack: Callable[[Any], Any] = np.asarray) -> Iterator[dict[str, Any]]:
    """All utterances as a peer stores them."""
    return (item_at(index, shards, pack) for index in range(len(training_split(shards))))


def write_webdataset(shards: Path, folder: Path, suffix: str) -> None:
    """Write tars of `<key>.npy` or `<key>.npy.zst`, and `<key>.cls`."""
    split = training_split(shards)
    compressor = zstandard.ZstdCompressor(level=3)
    for first in range(0, len(split), SHARD_SAMPLES):
        with tarfile.open(folder / f"{first // SHARD_SAMPLES:06d}.tar", "w") as tar:
            for index in range(first, min(first + SHARD_SAMPLES, len(split))):
                buffer = io.BytesIO()
                np.save(buffer, split.read(index))
                plain = buffer.getvalue()
                packed = compressor.compress(plain) if suffix.endswith("zst") else plain
                label = str(int(split.labels[index])).encode()
                for extension, payload in ((suffix, packed), ("cls", label)):
                    member = tarfile.TarInfo(f"{split.keys[index]}.{extension}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))


def import_streaming() -> Any:
    """Import mosaicml-streaming, with empty modules for imports that reading MDS does not need.

    The library imports transformers and torchvision for its text and vision data sets. The versions
    that it asks for conflict with those of the other peers.
    """
    for name in (
        *("transformers", "transformers.feature_extraction_utils"),
        *("transformers.tokenization_utils_base", "transformers.models"),
        *("transformers.models.auto", "transformers.models.auto.tokenization_auto"),
        *("torchvision", "torchvision.datasets", "torchvision.transforms"),
        "torchvision.transforms.functional",
    ):
        sys.modules[name] = _EmptyModule(name)
    import streaming

    return streaming


class _EmptyModule(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def write_mds(shards: Path, folder: Path) -> None:
    """Write MDS shards."""
    columns = {"mel": f"ndarray:{training_split(shards).dtype.name}", "label": "int"}
    with import_streaming().MDSWriter(out=str(folder), columns=columns) as writer:
        for item in items(shards):
            writer.write(item)


def write_litdata(shards: Path, folder: Path) -> None:
    """Write chunks of raw bytes."""
    import litdata

    litdata.optimize(
        fn=partial(item_at, shards=shards, pack=np.ndarray.tobytes),
        inputs=list(range(len(training_split(shards)))),
        output_dir=str(folder),
        chunk_bytes=CHUNK_BYTES,
        num_workers=usable_cores(),
        start_method="fork",
        verbose=False,
    )


def write_lhotse(shards: Path, folder: Path) -> None:
    """Write Shar: cuts, and their features as numpy arrays."""
    from lhotse import Features, MonoCut, SupervisionSegment
    from lhotse.features.io import MemoryRawWriter
    from lhotse.shar import SharWriter

    split, memory = training_split(shards), MemoryRawWriter()
    with SharWriter(str(folder), fields={"features": "numpy"}, shard_size=SHARD_SAMPLES) as writer:
        for index, item in enumerate(items(shards)):
            key, frames = str(split.keys[index]), len(item["mel"])
            span = {"start": 0.0, "duration": frames * FRAME_SECONDS}
            features = Features(
                type="fbank",
                num_frames=frames,
                num_features=split.n_mels,
                frame_shift=FRAME_SECONDS,
                sampling_rate=16000,
                storage_type=memory.name,
                storage_path="",
                storage_key=memory.write(key, item["mel"]),
                recording_id=key,
                channels=0,
                **span,
            )
            speaker = SupervisionSegment(key, key, speaker=str(item["label"]), **span)
            writer.write(MonoCut(key, channel=0, features=features, supervisions=[speaker], **span))


def write_datasets(shards: Path, folder: Path, as_bytes: bool) -> None:
    """Write an Arrow data set."""
    import datasets

    split = training_split(shards)
    mel = datasets.Array2D((None, split.n_mels), split.dtype.name)
    features = datasets.Features(
        mel=datasets.Value("binary") if as_bytes else mel, label=datasets.Value("int64")
    )
    made = datasets.Dataset.from_generator(
        partial(items, shards, np.ndarray.tobytes if as_bytes else np.asarray),
        features=features,
        cache_dir=str(folder / "cache"),
    )
    made.save_to_disk(str(folder / "arrow"))
    shutil.rmtree(folder / "cache")
