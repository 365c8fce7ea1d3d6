"""An index whose keys no build writes is refused, even if its checksum is right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shardprep import CorruptShardError
from shardprep.format.index import index_dtype
from shardprep.format.manifest import FileInfo, SplitInfo
from shardprep.read.files import FolderFiles
from shardprep.read.sidecars import load_index


def index_of(folder: Path, keys: list[bytes]) -> SplitInfo:
    """A split whose index has these keys in fields of 6 bytes."""
    rows = np.zeros(len(keys), index_dtype(6))
    for row, key in zip(rows, keys, strict=True):
        row["key"] = key
    np.save(folder / "split=train.index.npy", rows)
    data = (folder / "split=train.index.npy").read_bytes()
    entry = FileInfo("split=train.index.npy", len(data), hashlib.sha256(data).hexdigest())
    return SplitInfo(len(keys), 0, entry, ())


@pytest.mark.parametrize("keys", [[b"a"], [b"abcdef"], [b"a", "é".encode(), b"b c/d-"]])
def test_keys_of_a_build_are_accepted(tmp_path: Path, keys: list[bytes]) -> None:
    assert load_index(FolderFiles(tmp_path), index_of(tmp_path, keys))["key"].tolist() == keys


@pytest.mark.parametrize(
    "key", [b"", b"a.b", b"..", b"a\0b", b"\0ab", b"a\nb", b"\x1b[2J", b"a\x7f", b"\xff", b"\xc3"]
)
@pytest.mark.parametrize("block", [1, 2, 1 << 18])
def test_other_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bytes, block: int
) -> None:
    monkeypatch.setattr("shardprep.read.sidecars._BLOCK", block)
    for keys in ([key, b"good"], [b"good", b"good", key]):
        with pytest.raises(CorruptShardError, match=r"train\.index\.npy: is no index"):
            load_index(FolderFiles(tmp_path), index_of(tmp_path, keys))


def test_pickled_index_is_never_opened(tmp_path: Path) -> None:
    split = index_of(tmp_path, [b"a"])
    np.savez(tmp_path / "train.index.npz", a=np.zeros(3))
    (tmp_path / "train.index.npz").rename(tmp_path / "split=train.index.npy")
    data = (tmp_path / "split=train.index.npy").read_bytes()
    entry = FileInfo("split=train.index.npy", len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(CorruptShardError, match="is no index"):
        load_index(FolderFiles(tmp_path), msgspec.structs.replace(split, index=entry))
