"""A set is a mapping of splits, and notices when its folder is changed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep import (
    CorruptShardError,
    FormatError,
    StorageError,
    open_shards,
)
from shardprep.format.manifest import Manifest
from shardprep.read import manifest_file


def test_set_is_a_mapping_of_splits(edge_set: Path) -> None:
    shard_set = open_shards(str(edge_set))
    assert shard_set.splits == tuple(shard_set) == ("train", "val", "test")
    assert len(shard_set) == 3
    assert shard_set.speakers == ("ann", "bob", "cleo")
    assert shard_set["train"] is shard_set["train"]
    assert sum(map(len, shard_set.values())) == 41
    assert "val" in shard_set
    assert "dev" not in shard_set
    with pytest.raises(FormatError, match="no split 'dev'; the set has train, val, test"):
        shard_set["dev"]


@pytest.mark.parametrize("name", ["train-000001.tar", "split=train.index.npy"])
def test_missing_file_is_named_on_opening(damaged: Callable[..., Path], name: str) -> None:
    folder = damaged("none", name, lambda data: None)
    (folder / name).unlink()
    with pytest.raises(CorruptShardError, match="cannot be read: No such file") as caught:
        open_shards(folder)["train"]
    assert caught.value.file == str(folder / name)
    assert "shardprep repair" in str(caught.value)


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_set_that_is_replaced_while_it_is_read_is_noticed(
    damaged: Callable[..., Path], edge_source: Path, build: Callable[..., Any], opened_before: bool
) -> None:
    folder = damaged("none", "train-000001.tar", lambda data: None)
    shard_set = open_shards(folder)
    split = shard_set["train"]
    before = [split.read(i) for i in range(len(split))] if opened_before else []
    # The same sizes, other contents.
    build(edge_source, folder, samples_per_shard=8, val_fraction=0.2, seed=1, overwrite=True)
    with pytest.raises(CorruptShardError, match=f"fingerprint was {split.fingerprint} and is now"):
        shard_set.check_unchanged()
    if opened_before:
        # Mapped files stay as they were.
        for index, mel in enumerate(before):
            np.testing.assert_array_equal(split.read(index), mel)
    else:
        sizes = [info.bytes for info in shard_set.manifest.splits["train"].shards]
        (folder / "train-000000.tar").write_bytes(bytes(sizes[0]))
        with pytest.raises(CorruptShardError, match="changed while it was being read"):
            split.segments([0], [0], 1)


def test_the_manifest_is_read_once_while_it_is_unchanged(
    edge_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[object] = []
    original = manifest_file.decode_manifest

    def decode(data: bytes, path: Any) -> Manifest:
        reads.append(path)
        return original(data, path)

    monkeypatch.setattr(manifest_file, "decode_manifest", decode)
    shard_set = open_shards(edge_set)
    for split in shard_set.values():
        split.map_all()
    shard_set.check_unchanged()
    assert len(reads) == 1


def test_an_unchanged_set_passes(damaged: Callable[..., Path]) -> None:
    folder = damaged("none", "train-000001.tar", lambda data: None)
    shard_set = open_shards(folder)
    shard_set.check_unchanged()
    # Copied back, it has another inode and another time.
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    with pytest.raises(CorruptShardError, match="no manifest"):
        shard_set.check_unchanged()
    (folder / "manifest.json").write_bytes(data)
    shard_set.check_unchanged()


MACHINE = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MACHINE += (errno.ETIMEDOUT, errno.ENODEV, errno.EIO, errno.EINVAL, errno.ENOSYS, errno.EHOSTDOWN)


@pytest.mark.parametrize("code", MACHINE, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("open", "manifest.json"),
        ("open", "split=train.index.npy"),
        ("open", "train-000000.tar"),
        ("stat", "manifest.json"),
        ("stat", "train-000000.tar"),
    ],
)
def test_a_file_that_the_machine_cannot_open_is_not_called_damaged(
    edge_set: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str, name: str
) -> None:
    original = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match=f"{name}: .*{os.strerror(code)}") as caught:
        open_shards(edge_set)["train"].segments([0], [0], 1)
    assert "repair" not in str(caught.value)
    assert "damaged" not in str(caught.value)


def test_a_set_that_goes_away_as_a_whole_is_not_called_changed(
    edge_set: Path, tmp_path: Path
) -> None:
    for gone in (shutil.rmtree, empty):
        shutil.copytree(edge_set, tmp_path / "shards")
        split = open_shards(tmp_path / "shards")["train"]
        gone(tmp_path / "shards")
        with pytest.raises(StorageError, match="mounted"):
            split.read(0)
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def test_a_shard_behind_a_link_to_nowhere_is_not_called_missing(
    edge_set: Path, tmp_path: Path
) -> None:
    shutil.copytree(edge_set, tmp_path / "shards")
    shard = tmp_path / "shards" / "train-000000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    open_shards(tmp_path / "shards")["train"].read(0)
    (tmp_path / "elsewhere.tar").unlink()
    with pytest.raises(StorageError, match="It is a link to a file that is not there"):
        open_shards(tmp_path / "shards")["train"]


def test_a_split_that_is_not_there_is_not_in_a_set(edge_set: Path) -> None:
    shards = open_shards(edge_set)
    assert ("train" in shards, "other" in shards, 3 in shards) == (True, False, False)
