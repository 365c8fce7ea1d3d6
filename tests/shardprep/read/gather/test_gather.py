"""Segments of the longest utterances, of a set smaller than a segment, and of damaged chunks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from shardprep import CorruptShardError, SegmentLoader, Split, open_shards
from shardprep.format import codecs
from shardprep.format.manifest import FileInfo, encode_manifest
from shardprep.read.gather import zstd
from shardprep.read.manifest_file import load_manifest

LONGEST = 7193


def naive(split: Split, indices: NDArray[Any], starts: NDArray[Any], length: int) -> NDArray[Any]:
    out = np.full((len(indices), length, split.n_mels), -20.0, split.dtype)
    for row, (index, start) in enumerate(zip(indices, starts, strict=True)):
        segment = split.read(int(index))[start : start + length]
        out[row, : len(segment)] = segment
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("lengths", [(1, LONGEST, 2, 128, LONGEST - 1, 1), (3,), (LONGEST,)])
def test_segments_of_any_length_from_utterances_of_any_length(
    source_of: Callable[..., Path],
    build: Callable[..., Any],
    tmp_path: Path,
    dtype: str,
    codec: str,
    lengths: tuple[int, ...],
) -> None:
    options = {"dtype": dtype, "codec": codec, "val_fraction": 0.0, "samples_per_shard": 2}
    build(source_of({"ann": lengths}), tmp_path / "shards", **options)
    split = open_shards(tmp_path / "shards")["train"]
    # The start, the middle and the end of every utterance, also of the first and last of a shard.
    indices = np.repeat(np.arange(len(split)), 3)
    frames = split.frames[indices]
    starts = np.select([np.arange(len(indices)) % 3 == k for k in (0, 1)], [0, frames // 2])
    starts[2::3] = frames[2::3] - 1
    for length in (1, 64, 128, LONGEST, LONGEST + 200):
        segments = split.segments(indices, starts, length)
        assert segments.tobytes() == naive(split, indices, starts, length).tobytes()


def test_no_segments_are_an_empty_batch(edge_sets: dict[tuple[str, str], Path]) -> None:
    for codec in ("none", "zstd"):
        split = open_shards(edge_sets["float16", codec])["train"]
        assert split.segments([], [], 5).shape == (0, 5, 7)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shares_of_any_size_on_any_number_of_threads_fill_the_same_batch(
    edge_sets: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    threads: int,
) -> None:
    split = open_shards(edge_sets[dtype, "zstd"])["train"]
    rng = np.random.default_rng(0)
    indices = rng.integers(0, len(split), 200)
    starts = rng.integers(0, split.frames[indices])
    expected = naive(split, indices, starts, 130).tobytes()
    monkeypatch.setattr(zstd, "threads", lambda: threads)
    for least, most in ((1, 1), (1, 10_000), (1, 1 << 20), (1 << 20, 1 << 20)):
        monkeypatch.setattr(zstd, "_LEAST_HELD", least)
        monkeypatch.setattr(zstd, "_MOST_HELD", most)
        assert split.segments(indices, starts, 130).tobytes() == expected


def test_seek_tables_of_many_bytes_are_read_in_parts(
    edge_sets: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_shards(edge_sets["float16", "zstd"])["train"]
    indices = np.arange(len(split))
    starts = split.frames - 1
    expected = naive(split, indices, starts, 9).tobytes()
    monkeypatch.setattr(zstd, "_MOST_TABLES", 100)
    assert split.segments(indices, starts, 9).tobytes() == expected


def test_forked_workers_read_what_their_parent_reads(
    edge_sets: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zstd, "threads", lambda: 2)
    monkeypatch.setattr(zstd, "_LEAST_HELD", 1)
    split = open_shards(edge_sets["float16", "zstd"])["train"]
    # The threads that help the parent exist when the workers are forked.
    expected = list(SegmentLoader(split, batch_size=5, segment_frames=100, seed=1))
    workers = DataLoader(
        SegmentLoader(split, batch_size=5, segment_frames=100, seed=1),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
    )
    for batch, same in zip(workers, expected, strict=True):
        assert torch.equal(batch["mel"], same["mel"])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("most", [1, 20_000, 1 << 30])
def test_of_several_damaged_segments_the_first_is_named(
    damaged_split: Callable[..., tuple[Split, list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    most: int,
) -> None:
    split, hurt = damaged_split([3, 11, 17], "zstd")
    monkeypatch.setattr(zstd, "threads", lambda: threads)
    monkeypatch.setattr(zstd, "_LEAST_HELD", 1)
    monkeypatch.setattr(zstd, "_MOST_HELD", most)
    monkeypatch.setattr(zstd, "_MOST_TABLES", max(most // 100, 1))
    whole = int(split.frames.max())
    for order in (np.arange(len(split)), np.arange(len(split))[::-1]):
        with pytest.raises(CorruptShardError) as caught:
            split.segments(order, np.zeros_like(order), whole)
        first = next(index for index in order if index in hurt)
        assert caught.value.key == split.keys[first]


@pytest.mark.parametrize("where", ["frame", "table"])
def test_damaged_chunk_names_its_file_and_its_utterance(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(edge_sets["float16", "zstd"], folder)
    split = open_shards(folder)["train"]
    hurt = int(np.argmax(split.frames))
    row = split.locations[hurt]
    manifest = load_manifest(folder)
    file = folder / manifest.splits["train"].shards[int(row["shard"])].file
    data = bytearray(file.read_bytes())
    begin, end = int(row["offset"]), int(row["offset"]) + int(row["nbytes"])
    # Entry 1 of the table, after the footer's nine bytes, is the size of the first chunk.
    entries = 1 - (-int(split.frames[hurt]) // 64)
    at = begin + 150 if where == "frame" else end - 9 - 8 * (entries - 1) + 2
    data[at] ^= 255
    file.write_bytes(data)
    fresh = open_shards(folder)["train"]
    everything = np.arange(len(fresh))
    with pytest.raises(CorruptShardError, match="chunk cannot be inflated") as caught:
        fresh.segments(everything, np.zeros_like(everything), 64)
    assert (caught.value.key, caught.value.file) == (str(fresh.keys[hurt]), str(file))
    others = everything[everything != hurt]
    segments = fresh.segments(others, np.zeros_like(others), 64)
    assert segments.tobytes() == naive(fresh, others, np.zeros_like(others), 64).tobytes()


def test_a_split_keeps_few_bytes_for_each_utterance(edge_set: Path) -> None:
    split = open_shards(edge_set)["train"]
    held = [value for value in vars(split).values() if isinstance(value, np.ndarray)]
    own = [array for array in held if array.base is None]
    assert sum(array.nbytes for array in own) <= 32 * len(split)
    assert sum(array.nbytes for array in held) > sum(array.nbytes for array in own)


def test_signed_index_with_a_huge_count_is_refused_before_anything_is_mapped(
    edge_set: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "signed"
    shutil.copytree(edge_set, folder)
    path = folder / "split=train.index.npy"
    data = path.read_bytes().replace(b"'shape': (28,)", b"'shape': (99,)")
    path.write_bytes(data)
    manifest = load_manifest(folder)
    train = manifest.splits["train"]
    info = FileInfo(path.name, len(data), hashlib.sha256(data).hexdigest())
    splits = {**manifest.splits, "train": msgspec.structs.replace(train, index=info)}
    signed = msgspec.structs.replace(manifest, splits=splits)
    (folder / "manifest.json").write_bytes(encode_manifest(signed))
    with pytest.raises(CorruptShardError, match="is no index"):
        open_shards(folder)["train"]


def test_a_batch_that_needs_much_memory_is_read_in_parts(
    edge_sets: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_shards(edge_sets["float16", "zstd"])["train"]
    indices = np.arange(len(split))
    whole = split.segments(indices, split.frames // 3, 128)
    sizes: list[int] = []
    inflate = codecs.inflate_many

    def counting(*arguments: Any) -> Any:
        chunks = inflate(*arguments)
        sizes.append(sum(map(len, chunks)))
        return chunks

    monkeypatch.setattr(codecs, "inflate_many", counting)
    monkeypatch.setattr("shardprep.read.gather.zstd._MOST_HELD", 4096)
    np.testing.assert_array_equal(split.segments(indices, split.frames // 3, 128), whole)
    assert len(sizes) > 4
    assert max(sizes) <= 4096
