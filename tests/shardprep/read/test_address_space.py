"""Bytes of files come into memory also where a file system has no shared maps, or no maps."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep import Split, StorageError, open_shards
from shardprep.read import address_space, sidecars
from shardprep.read.folder_map import FolderMap

SIZES = [3 * mmap.PAGESIZE + 7, 1, 0, mmap.PAGESIZE]
LACKING = [errno.ENODEV, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS]
Refuse = Callable[..., None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """`refuse(code, sharing)`: maps of files fail; only shared ones, or private ones too."""

    def install(code: int, *, private: bool) -> None:
        original = address_space._mmap

        def refusing(address: Any, size: int, flags: int, handle: int, *more: int) -> Any:
            if handle >= 0 and (private or flags & mmap.MAP_SHARED):
                # As the system does: what was mapped there is gone.
                address_space._libc().munmap(address, size)
                raise OSError(code, os.strerror(code))
            return original(address, size, flags, handle, *more)

        monkeypatch.setattr(address_space, "_mmap", refusing)

        class NoMap(mmap.mmap):
            def __new__(cls, *arguments: Any, **options: Any) -> Any:
                if private or options.get("access") != mmap.ACCESS_COPY:
                    raise OSError(code, os.strerror(code))
                return super().__new__(cls, *arguments, **options)

        monkeypatch.setattr(mmap, "mmap", NoMap)

    return install


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Path, int]]:
    for number, size in enumerate(SIZES):
        (tmp_path / str(number)).write_bytes(os.urandom(size))
    return [(tmp_path / str(number), size) for number, size in enumerate(SIZES)]


@pytest.mark.parametrize("code", LACKING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("private", [False, True])
def test_bytes_are_the_same_without_shared_maps(
    files: list[tuple[Path, int]], refuse: Refuse, code: int, private: bool
) -> None:
    refuse(code, private=private)
    shards = FolderMap(files)
    shards.map_all()
    ends = [*shards.begins[1:], len(shards.bytes)]
    for (path, size), begin, end in zip(files, shards.begins, ends, strict=True):
        assert shards.bytes[begin : begin + size].tobytes() == path.read_bytes()
        assert not shards.bytes[begin + size : end].any()


def test_copies_cannot_be_written_and_leave_again(
    files: list[tuple[Path, int]], refuse: Refuse
) -> None:
    refuse(errno.ENODEV, private=True)
    space = address_space.AddressSpace(np.array(SIZES))
    with files[0][0].open("rb") as file:
        space.map(0, file.fileno(), files[0][0])
    (entry,) = (
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if int(line.split("-")[0], 16) <= space._address(0) < int(line.split()[0].split("-")[1], 16)
    )
    assert entry.split()[1] == "r--p"
    space.unmap(0)
    assert not space.bytes.any()


def test_what_cannot_be_mapped_and_is_too_large_to_copy_names_the_remedy(
    files: list[tuple[Path, int]], refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(errno.ENODEV, private=True)
    monkeypatch.setattr(address_space, "MOST_COPIED", SIZES[0] + 1)
    shards = FolderMap(files)
    shards.reading(np.array([0, 1, 2]))
    match = "3: its file system cannot be memory-mapped. Copy the set to a local disk"
    with pytest.raises(StorageError, match=re.escape(match)):
        shards.reading(np.array([3]))
    assert shards.bytes[: SIZES[0]].tobytes() == files[0][0].read_bytes()
    assert not shards.bytes[shards.begins[3] :].any()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ESTALE, errno.EMFILE, errno.EIO])
def test_trouble_of_the_machine_is_not_a_lack_of_maps(
    files: list[tuple[Path, int]], refuse: Refuse, code: int
) -> None:
    refuse(code, private=False)
    shards = FolderMap(files)
    with pytest.raises(StorageError, match=f"0: .*{os.strerror(code)}"):
        shards.reading(np.array([0]))
    assert not shards.bytes.any()


@pytest.mark.parametrize("private", [False, True])
def test_a_set_is_read_without_shared_maps(edge_set: Path, refuse: Refuse, private: bool) -> None:
    expected = everything(open_shards(edge_set)["train"])
    refuse(errno.ENODEV, private=private)
    split = open_shards(edge_set)["train"]
    assert not split.locations.flags.writeable
    for one, other in zip(everything(split), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_index_that_is_too_large_to_copy_names_the_remedy(
    edge_set: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(errno.ENODEV, private=True)
    monkeypatch.setattr(sidecars, "MOST_COPIED", 100)
    with pytest.raises(
        StorageError, match="train.index.npy: its file system cannot be memory-mapped"
    ):
        open_shards(edge_set)["train"]


def everything(split: Split) -> list[Any]:
    return [*(split.read(index) for index in range(len(split))), split.locations.copy()]
