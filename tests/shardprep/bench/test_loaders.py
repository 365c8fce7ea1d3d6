"""Every loader that is compared delivers the same samples in the same shape."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shardprep import BuildReport, Split, open_shards
from shardprep.bench import memory_limit as limit
from shardprep.bench.loaders import (
    SegmentShape,
    decode_bytes,
    decode_member,
    epochs,
    file_candidate,
    shard_candidate,
    webdataset_candidate,
)
from shardprep.bench.measure import Candidate
from shardprep.bench.memory_limit import limit_candidates, limit_rows, memory_limit
from shardprep.source.dataset import scan_dataset

# webdataset relies on the garbage collector to close its files.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

# One speaker per utterance, so that the label tells which utterance it is. Some are shorter than
# a segment, some longer.
LENGTHS = {f"s{number:02d}": [3 + 2 * number] for number in range(16)}
SHAPE = SegmentShape(4, 12, 7, np.dtype("<f2"))
BATCHES = len(LENGTHS) // SHAPE.batch_size


@pytest.fixture
def folders(
    source_of: Callable[..., Path], build: Callable[..., BuildReport], tmp_path: Path
) -> dict[str, Path]:
    source = source_of(LENGTHS)
    for codec in ("none", "zstd"):
        build(source, tmp_path / codec, codec=codec, samples_per_shard=4, val_fraction=0.0)
    return {"source": source, "none": tmp_path / "none", "zstd": tmp_path / "zstd"}


def candidates(folders: dict[str, Path]) -> Iterator[Candidate]:
    shard_set = open_shards(folders["none"])
    split = shard_set["train"]
    by_key = scan_dataset(folders["source"]).by_key
    files = [
        (folders["source"] / by_key[str(key)].path, int(label))
        for key, label in zip(split.keys, split.labels, strict=True)
    ]
    for workers in (0, 2):
        yield file_candidate(files, SHAPE, workers)
        for codec in ("none", "zstd"):
            shards = open_shards(folders[codec]).fetch("train")
            decode = decode_member
            yield webdataset_candidate(codec, shards, SHAPE, workers, decode)
    for codec in ("none", "zstd"):
        yield shard_candidate(codec, open_shards(folders[codec]), "train", SHAPE)


def is_segment_of(segment: np.ndarray, mel: np.ndarray) -> bool:
    """Whether a segment is a run of frames of a matrix, padded if short; by a naive loop."""
    length = min(len(segment), len(mel))
    return bool((segment[length:] == -20).all()) and any(
        np.array_equal(segment[:length], mel[start : start + length])
        for start in range(len(mel) - length + 1)
    )


def test_all_loaders_give_segments_of_every_utterance_once_an_epoch(
    folders: dict[str, Path],
) -> None:
    split = open_shards(folders["none"])["train"]
    mels = {int(label): split.read(index) for index, label in enumerate(split.labels)}
    names = []
    for candidate in candidates(folders):
        names.append(candidate.name)
        with contextlib.closing(candidate.start()) as batches:  # type: ignore[type-var]
            for epoch in range(2):
                seen: list[int] = []
                for mel, label in itertools.islice(batches, BATCHES):
                    assert mel.shape == (4, 12, 7), candidate.name
                    assert mel.dtype == torch.float16, candidate.name
                    assert label.shape == (4,), candidate.name
                    for segment, own in zip(mel.numpy(), label.tolist(), strict=True):
                        assert is_segment_of(segment, mels[own]), candidate.name
                    seen += label.tolist()
                assert sorted(seen) == sorted(mels), (candidate.name, epoch)
    assert len(set(names)) == len(names) == 8


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_loaders_of_bytes_give_them_widened(
    source_of: Callable[..., Path], build: Callable[..., BuildReport], tmp_path: Path, codec: str
) -> None:
    build(source_of(LENGTHS), tmp_path / "s", dtype="uint8", codec=codec, val_fraction=0.0)
    shard_set = open_shards(tmp_path / "s")
    split = shard_set["train"]
    mels = {int(label): split.read(index) for index, label in enumerate(split.labels)}
    shape = SegmentShape(4, 12, 7, split.dtype)
    shards = shard_set.fetch("train")
    for candidate in (
        webdataset_candidate(codec, shards, shape, 0, decode_bytes),
        shard_candidate(codec, shard_set, "train", shape),
    ):
        with contextlib.closing(candidate.start()) as batches:  # type: ignore[type-var]
            for mel, label in itertools.islice(batches, BATCHES):
                assert mel.dtype == torch.float32
                for segment, own in zip(mel.numpy(), label.tolist(), strict=True):
                    assert is_segment_of(segment, mels[own]), candidate.name


def test_orders_and_segments_are_random(folders: dict[str, Path]) -> None:
    for candidate in candidates(folders):
        with contextlib.closing(candidate.start()) as batches:  # type: ignore[type-var]
            drawn = list(itertools.islice(batches, 6 * BATCHES))
        rows = [
            (int(own), segment)
            for mel, label in drawn
            for own, segment in zip(label, mel, strict=True)
        ]
        order = [own for own, _ in rows]
        epochs_seen = {tuple(order[at : at + 16]) for at in range(0, len(order), 16)}
        assert len(epochs_seen) > 1, candidate.name
        longest = {segment.numpy().tobytes() for own, segment in rows if own == len(LENGTHS) - 1}
        assert len(longest) > 1, candidate.name


def test_files_to_warm_are_those_that_are_read(folders: dict[str, Path]) -> None:
    for candidate in candidates(folders):
        kinds = {path.suffix for path in candidate.files}
        assert kinds == ({".pt"} if candidate.kind == "files" else {".tar"})
        assert len(candidate.files) == (16 if candidate.kind == "files" else 4)


def test_a_loader_that_gives_nothing_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="no batch in a whole epoch"):
        next(epochs([]))


def test_the_limit_copies_as_many_bytes_as_a_batch_has() -> None:
    for candidate in limit_candidates(10, SHAPE):
        with contextlib.closing(candidate.start()) as batches:  # type: ignore[type-var]
            mel, label = next(batches)
        assert mel.nbytes == 4 * SHAPE.nbytes == 4 * 12 * 7 * 2
        assert mel.shape == (4, 12, 7)
        assert len(label) == 4
        assert candidate.kind == "limit"


@pytest.mark.parametrize("method", ["np.take", "torch.index_select"])
def test_the_limit_draws_every_row_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def numbered(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        return np.broadcast_to(np.arange(shape[0], dtype=dtype)[:, None], shape).copy()

    threads = torch.get_num_threads()
    monkeypatch.setattr(limit.np, "ones", numbered)
    try:
        with contextlib.closing(memory_limit(12, SHAPE, method, 1)) as batches:  # type: ignore[type-var]
            drawn = [mel.clone() for mel, _ in itertools.islice(batches, 6)]
    finally:
        torch.set_num_threads(threads)
    for epoch in (drawn[:3], drawn[3:]):
        rows = torch.cat(epoch)
        assert sorted(rows[:, 0, 0].tolist()) == list(range(12))
        assert (rows == rows[:, :1, :1]).all()


def test_the_limit_is_as_large_as_the_split_unless_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, edge_set: Path
) -> None:
    split: Split = open_shards(edge_set)["train"]
    nbytes = sum(split.read(index).nbytes for index in range(len(split)))
    rows = limit_rows(nbytes, SHAPE)
    assert nbytes - SHAPE.nbytes < rows * SHAPE.nbytes <= nbytes
    monkeypatch.setattr(limit, "free_memory", lambda: 20 * SHAPE.nbytes)
    assert limit_rows(nbytes, SHAPE) == 10
    monkeypatch.setattr(limit, "free_memory", lambda: 0)
    assert limit_rows(nbytes, SHAPE) == SHAPE.batch_size
