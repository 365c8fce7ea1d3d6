"""`read` gives what was packed or an error, and `segments` what a naive loop over `read` gives."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardprep import CorruptShardError, Split, open_shards
from shardprep.format.manifest import FileInfo, encode_manifest
from shardprep.read.manifest_file import load_manifest

SETS = [(dtype, codec) for dtype in ("float16", "float32", "uint8") for codec in ("none", "zstd")]


def naive(split: Split, indices: Any, starts: Any, length: int, pad: float) -> NDArray[Any]:
    """Take segments from whole utterances, one by one."""
    segments = []
    for index, start in zip(indices, starts, strict=True):
        segment = split.read(int(index))[start : start + length]
        filled = np.full((length, split.n_mels), pad, split.dtype)
        filled[: len(segment)] = segment
        segments.append(filled)
    return np.stack(segments)


@pytest.mark.parametrize("kind", SETS, ids="-".join)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_segments_equal_a_loop_over_read_bit_for_bit(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str], data: st.DataObject
) -> None:
    split = open_shards(edge_sets[kind])["train"]
    indices = data.draw(st.lists(st.integers(0, len(split) - 1), min_size=1, max_size=12))
    starts = [data.draw(st.integers(0, int(split.frames[i]) - 1)) for i in indices]
    length = data.draw(st.sampled_from([1, 2, 63, 64, 65, 128, 200, 600]))
    pad = data.draw(st.sampled_from([-20.0, 0.0, 1.5]))
    expected = naive(split, indices, starts, length, pad)
    segments = split.segments(indices, starts, length, pad)
    assert segments.dtype == split.dtype == np.dtype("float32" if kind[0] == "uint8" else kind[0])
    assert segments.tobytes() == expected.tobytes()
    out = np.full(expected.shape, np.nan, split.dtype)
    assert split.segments(np.array(indices), np.array(starts), length, pad, out=out) is out
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", SETS, ids="-".join)
def test_the_whole_split_can_be_read_as_segments_in_one_call(
    edge_sets: dict[tuple[str, str], Path], kind: tuple[str, str]
) -> None:
    for split in open_shards(edge_sets[kind]).values():
        # Every utterance of every shard, from its first frame, its middle and its last one.
        for starts in (np.zeros(len(split), int), split.frames // 2, split.frames - 1):
            for length in (1, 64, 517):
                segments = split.segments(np.arange(len(split)), starts, length)
                expected = naive(split, range(len(split)), starts, length, -20.0)
                assert segments.tobytes() == expected.tobytes()


def test_columns_describe_the_utterances(edge_set: Path) -> None:
    for split in open_shards(edge_set).values():
        assert (split.labels.dtype, split.frames.dtype) == (np.int32, np.int64)
        assert len(split) == len(split.keys) == len(split.labels) == len(split.frames)
        for index, key in enumerate(split.keys):
            speaker = str(key).partition("-")[0]
            expected = ["ann", "bob", "cleo", "test"].index(speaker)
            assert split.labels[index] == (-1 if speaker == "test" else expected)
            assert len(split.read(index)) == split.frames[index]


def test_read_gives_a_copy(edge_set: Path) -> None:
    split = open_shards(edge_set)["train"]
    before = split.read(0).copy()
    split.read(0)[:] = 0
    np.testing.assert_array_equal(split.read(0), before)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(
    ("indices", "starts", "length", "error"),
    [
        ([-1], [0], 5, IndexError),
        ([10**6], [0], 5, IndexError),
        ([0], [-1], 5, IndexError),
        ([0], [10**6], 5, IndexError),
        ([0], ["frames"], 5, IndexError),
        ([0, 1], [0], 5, ValueError),
        ([[0]], [[0]], 5, ValueError),
        ([0], [0], 0, ValueError),
    ],
)
def test_segments_out_of_range_are_refused(
    edge_sets: dict[tuple[str, str], Path],
    codec: str,
    indices: list[Any],
    starts: list[Any],
    length: int,
    error: type[Exception],
) -> None:
    split = open_shards(edge_sets["float16", codec])["train"]
    at = [int(split.frames[0]) if start == "frames" else start for start in starts]
    with pytest.raises(error):
        split.segments(indices, at, length)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_read_out_of_range_is_refused(edge_set: Path, index: int) -> None:
    with pytest.raises(IndexError):
        open_shards(edge_set)["train"].read(index)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, 5, 7), np.float16),
        np.empty((1, 5, 7), np.float32),
        np.empty((1, 7, 5), np.float16).swapaxes(1, 2),
    ],
    ids=["shape", "dtype", "order"],
)
def test_buffer_that_does_not_fit_is_refused(edge_set: Path, out: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="contiguous array"):
        open_shards(edge_set)["train"].segments([0], [0], 5, out=out)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_read_finds_every_flipped_bit_of_a_payload(
    damaged: Callable[..., Path], edge_sets: dict[tuple[str, str], Path], codec: str
) -> None:
    row = open_shards(edge_sets["float16", codec])["train"].locations[3]
    shard = f"train-{row['shard']:06d}.tar"
    folder = damaged(codec, shard, lambda data: None)
    split = open_shards(folder)["train"]
    for bit in range(0, 8 * int(row["nbytes"]), 41):
        with open(folder / shard, "r+b") as file:
            file.seek(int(row["offset"]) + bit // 8)
            (byte,) = file.read(1)
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte ^ 1 << bit % 8]))
            file.flush()
            with pytest.raises(CorruptShardError, match="crc32") as caught:
                split.read(3)
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte]))
    assert caught.value.file == str(folder / shard)
    assert caught.value.key == str(split.keys[3])
    assert len(split.read(3)) == row["frames"]


def test_segments_find_a_damaged_zstd_chunk(
    damaged: Callable[..., Path], edge_sets: dict[tuple[str, str], Path]
) -> None:
    row = open_shards(edge_sets["float16", "zstd"])["train"].locations[3]

    def flip(data: bytearray) -> None:
        data[int(row["offset"]) + int(row["nbytes"]) // 2] ^= 1

    split = open_shards(damaged("zstd", f"train-{row['shard']:06d}.tar", flip))["train"]
    with pytest.raises(
        CorruptShardError, match=r"train-\d+\.tar: \S+: a chunk cannot be"
    ) as caught:
        split.segments([2, 3, 4], [0, 0, 0], int(row["frames"]))
    assert caught.value.key == row["key"].decode()


@pytest.mark.parametrize("cut", [1, 512, 5000])
def test_truncated_shard_is_refused_with_both_sizes(damaged: Callable[..., Path], cut: int) -> None:
    folder = damaged("none", "train-000001.tar", lambda data: data.__delitem__(slice(-cut, None)))
    size = (folder / "train-000001.tar").stat().st_size
    with pytest.raises(CorruptShardError, match=f"has {size} bytes, expected {size + cut}"):
        open_shards(folder)["train"]


def test_a_shard_that_is_removed_after_opening_is_refused(damaged: Callable[..., Path]) -> None:
    folder = damaged("none", "train-000001.tar", lambda data: None)
    split = open_shards(folder)["train"]
    index = int(np.flatnonzero(split.locations["shard"] == 1)[0])
    (folder / "train-000001.tar").write_bytes(b"")
    for call in (lambda: split.read(index), lambda: split.segments([index], [0], 1)):
        with pytest.raises(CorruptShardError, match="has 0 bytes, expected"):
            call()


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_intact_finds_the_damaged_utterances(
    damaged_split: Callable[..., tuple[Split, list[int]]], codec: str
) -> None:
    split, bad = damaged_split([2, 7], codec)
    indices = np.array([7, 0, 2, 27, 7])
    assert split.intact(indices).tolist() == [False, True, False, True, False]
    with pytest.raises(IndexError):
        split.intact([28])
    with pytest.raises(IndexError):
        split.intact([-1])


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.__setitem__(-1, data[-1] ^ 1),
        lambda data: data.__setitem__(20, data[20] ^ 1),
        lambda data: data.append(0),
        lambda data: data.clear(),
    ],
    ids=["key", "header", "longer", "empty"],
)
def test_altered_index_is_refused_on_opening(
    damaged: Callable[..., Path], edit: Callable[[bytearray], Any]
) -> None:
    folder = damaged("none", "split=train.index.npy", edit)
    with pytest.raises(CorruptShardError, match=r"train\.index\.npy"):
        open_shards(folder)["train"]


def sign_index(folder: Path, rows: NDArray[Any]) -> None:
    """Replace the index of train, and sign it in the manifest."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    (folder / "split=train.index.npy").write_bytes(buffer.getvalue())
    manifest = load_manifest(folder)
    train = manifest.splits["train"]
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    index = FileInfo(train.index.file, len(buffer.getvalue()), sha256)
    forged = msgspec.structs.replace(
        manifest,
        splits={**manifest.splits, "train": msgspec.structs.replace(train, index=index)},
    )
    (folder / "manifest.json").write_bytes(encode_manifest(forged))


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("shard", 99, "shard number"),
        ("offset", 2**40 * 512, "offset"),
        ("offset", 2**63, "offset"),
        ("offset", 2**64 - 512, "offset"),
        ("offset", 513, "offset"),
        ("nbytes", 2, "size"),
        ("nbytes", 2**32 - 1, "size|offset"),
        ("label", 3, "label"),
        ("label", -2, "label"),
        ("frames", 0, "number of frames"),
        ("frames", 2**32 - 1, "size"),
    ],
)
def test_index_that_points_outside_is_refused_even_when_signed(
    damaged: Callable[..., Path], codec: str, field: str, value: int, named: str
) -> None:
    folder = damaged(codec, "split=train.index.npy", lambda data: None)
    rows = np.load(folder / "split=train.index.npy")
    rows[field][2] = np.array(value).astype(rows.dtype[field])
    sign_index(folder, rows)
    with pytest.raises(CorruptShardError, match=f"the ({named}) in the index does not fit"):
        open_shards(folder)["train"]


def test_index_of_other_rows_is_refused_even_when_signed(damaged: Callable[..., Path]) -> None:
    folder = damaged("none", "split=train.index.npy", lambda data: None)
    rows = np.load(folder / "split=train.index.npy")
    for forged in (rows[:-1], rows["frames"], rows.reshape(1, -1)):
        sign_index(folder, forged)
        with pytest.raises(CorruptShardError):
            open_shards(folder)["train"]


def test_a_split_is_pickled_without_its_shards(edge_set: Path) -> None:
    split = open_shards(edge_set)["train"]
    before = len(pickle.dumps(split))
    segments = split.segments(np.arange(len(split)), np.zeros(len(split), int), 30)
    sent = pickle.dumps(split)
    assert len(sent) == before
    again = pickle.loads(sent).segments(np.arange(len(split)), np.zeros(len(split), int), 30)
    np.testing.assert_array_equal(again, segments)
