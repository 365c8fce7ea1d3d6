"""Files side by side in memory: their bytes, zeros in between, errors that name the file."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from shardprep import CorruptShardError, StorageError
from shardprep.read.folder_map import FolderMap

SIZES = [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 7, 10]


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, int]]:
    for number, size in enumerate(SIZES):
        (tmp_path / str(number)).write_bytes(os.urandom(size))
    return [(tmp_path / str(number), size) for number, size in enumerate(SIZES)]


def test_each_file_begins_at_begins_and_zeros_follow(files: list[tuple[Path, int]]) -> None:
    shards = FolderMap(files)
    shards.reading(np.array([2, 0, 2, 3, 1]))
    ends = [*shards.begins[1:], len(shards.bytes)]
    for (path, size), begin, end in zip(files, shards.begins, ends, strict=True):
        assert shards.bytes[begin : begin + size].tobytes() == path.read_bytes()
        assert not shards.bytes[begin + size : end].any()


def test_only_what_is_needed_is_opened(files: list[tuple[Path, int]]) -> None:
    files[1][0].unlink()
    shards = FolderMap(files)
    shards.reading(np.array([0, 3]))
    assert not shards.bytes[shards.begins[2] :][:100].any()
    with pytest.raises(CorruptShardError, match="cannot be read: No such file") as caught:
        shards.reading(np.array([3, 1]))
    assert caught.value.file == str(files[1][0])


def test_reading_ahead_maps_the_file(files: list[tuple[Path, int]]) -> None:
    shards = FolderMap(files)
    shards.read_ahead(2)
    begin = shards.begins[2]
    assert shards.bytes[begin : begin + SIZES[2]].tobytes() == files[2][0].read_bytes()


def test_file_of_another_size_is_refused(files: list[tuple[Path, int]]) -> None:
    files[2] = (files[2][0], SIZES[2] + 1)
    with pytest.raises(CorruptShardError, match=f"has {SIZES[2]} bytes, expected {SIZES[2] + 1}"):
        FolderMap(files).reading(np.array([2]))


def test_no_file_descriptor_is_kept(files: list[tuple[Path, int]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    shards = FolderMap(files)
    shards.reading(np.arange(4))
    assert len(os.listdir("/proc/self/fd")) == before


def test_bytes_cannot_be_written_and_outlive_the_map(files: list[tuple[Path, int]]) -> None:
    shards = FolderMap(files)
    shards.reading(np.arange(4))
    view = shards.bytes[shards.begins[3] :][:10]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    del shards
    gc.collect()
    assert view.tobytes() == files[3][0].read_bytes()


def test_memory_is_given_back(files: list[tuple[Path, int]]) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(files[2][0]))

    shards = FolderMap(files)
    shards.reading(np.arange(4))
    assert mappings() == 1
    del shards
    gc.collect()
    assert mappings() == 0


def test_a_lack_of_address_space_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="maps no more memory.*vm.max_map_count"):
        FolderMap([(tmp_path / "huge", 1 << 60)])
