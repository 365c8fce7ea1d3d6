"""Sets in a store read like sets in a folder, also if a file of the cache is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shardprep import (
    CorruptShardError,
    Remote,
    ShardCache,
    StorageError,
    open_shards,
)
from shardprep.load.read_ahead import PLANNED, plan_for_cache
from shardprep.read.files import StoreFiles
from shardprep.read.manifest_file import load_manifest
from shardprep.storage import connections

URL = "memory://set"


@pytest.fixture
def stored(edge_set: Path) -> Iterator[str]:
    """`edge_set`, in a store in memory."""
    store = fsspec.filesystem("memory")
    for path in edge_set.iterdir():
        store.pipe(f"/set/{path.name}", path.read_bytes())
    yield URL
    store.store.clear()
    connections.forget_connections()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10_000_000, patience=2)


def flip(path: Path, at: int) -> None:
    """Replace a file, which others may have open, by a copy with one changed byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def in_cache(cache: ShardCache, name: str) -> Path:
    return cache.folder.path / load_manifest(Remote(URL)).files()[name].sha256


def test_every_utterance_equals_the_one_of_the_folder(
    stored: str, cache: ShardCache, edge_set: Path
) -> None:
    far, near = open_shards(stored, cache), open_shards(edge_set)
    assert far.splits == near.splits
    for name in near.splits:
        assert (far[name].keys == near[name].keys).all()
        for index in range(len(near[name])):
            assert np.array_equal(far[name].read(index), near[name].read(index))
    assert far.network_seconds > near.network_seconds == 0
    far.check_unchanged()


def test_a_shard_that_was_damaged_in_the_cache_comes_again(
    stored: str, cache: ShardCache, edge_set: Path
) -> None:
    train = open_shards(stored, cache)["train"]
    expected = train.read(0)
    row = train.locations[0]
    name = f"train-{row['shard']:06d}.tar"
    flip(in_cache(cache, name), int(row["offset"]) + 200)
    again = open_shards(stored, cache)["train"]
    assert np.array_equal(again.read(0), expected)
    assert in_cache(cache, name).read_bytes() == (edge_set / name).read_bytes()


def test_an_index_that_was_damaged_in_the_cache_comes_again(
    stored: str, cache: ShardCache, edge_set: Path
) -> None:
    keys = open_shards(stored, cache)["val"].keys
    flip(in_cache(cache, "split=val.index.npy"), 300)
    assert (open_shards(stored, cache)["val"].keys == keys).all()


def test_damage_in_the_store_is_an_error_with_a_remedy(
    stored: str, cache: ShardCache, edge_set: Path
) -> None:
    store = fsspec.filesystem("memory")
    data = bytearray((edge_set / "split=train.index.npy").read_bytes())
    data[300] ^= 1
    store.pipe("/set/split=train.index.npy", bytes(data))
    with pytest.raises(CorruptShardError, match="times") as caught:
        open_shards(stored, cache)["train"]
    assert caught.value.file == f"{URL}/split=train.index.npy"
    # The sha256 of this set are those of a damaged payload: only its crc32 shows the damage.
    train = open_shards(edge_set)["train"]
    assert "repair DST" in str(train.damaged(0))
    store.pipe("/set/split=train.index.npy", (edge_set / "split=train.index.npy").read_bytes())
    far = open_shards(stored, cache)["train"]
    assert "build SRC URL --overwrite" in str(far.damaged(0))


def test_more_than_the_cache_keeps_is_refused_before_it_is_fetched(
    stored: str, tmp_path: Path
) -> None:
    small = ShardCache(tmp_path / "small", 30_000, patience=60)
    with pytest.raises(StorageError, match=r"takes \d+ bytes, and the cache keeps at most 30000"):
        open_shards(stored, small).fetch("train")
    assert small.traffic.bytes == 0


def test_files_are_lent_for_a_while(stored: str, cache: ShardCache, edge_set: Path) -> None:
    files = StoreFiles(Remote(stored), cache)
    info = load_manifest(edge_set).splits["test"].shards[0]
    with files.lend(info) as path:
        assert path.read_bytes() == (edge_set / info.file).read_bytes()
        with cache.folder.lock() as lock:
            assert not cache.folder.evict(lock, 1)
    with cache.folder.lock() as lock:
        assert cache.folder.evict(lock, 1) == info.bytes


def test_a_set_that_is_replaced_is_noticed(
    stored: str, cache: ShardCache, edge_sets: dict[tuple[str, str], Path]
) -> None:
    shards = open_shards(stored, cache)
    manifest = edge_sets["float32", "none"] / "manifest.json"
    fsspec.filesystem("memory").pipe("/set/manifest.json", manifest.read_bytes())
    with pytest.raises(CorruptShardError, match="was changed while it was being read"):
        shards.check_unchanged()
    fsspec.filesystem("memory").rm("/set/manifest.json")
    with pytest.raises(CorruptShardError, match="no manifest"):
        shards.check_unchanged()


def test_batches_are_planned_as_from_the_disk_if_the_whole_split_has_room(edge_set: Path) -> None:
    train = open_shards(edge_set)["train"]
    size = int(train.shard_bytes.sum())
    assert plan_for_cache(train, "global", 8, 4, size) == PLANNED
    assert plan_for_cache(train, "windowed", 8, 4, size) == PLANNED
    with pytest.raises(StorageError, match=r"order global needs .* GB .* windowed, or give"):
        plan_for_cache(train, "global", 8, 4, size - 1)
    with pytest.raises(StorageError, match=r"fewer lanes or window_shards"):
        plan_for_cache(train, "windowed", 8, 4, size - 1)


def test_the_cache_may_be_removed_while_nobody_reads(
    stored: str, cache: ShardCache, edge_set: Path
) -> None:
    open_shards(stored, cache)["val"].read(0)
    shutil.rmtree(cache.folder.path)
    cache.folder.path.mkdir()
    assert open_shards(stored, cache)["val"].read(0).size
