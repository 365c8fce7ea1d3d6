"""`verify --deep` of adopted tars compares every row of the index with the tar's own headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shardprep import adopt_shards, open_shards, verify_shards
from shardprep.format.manifest import MANIFEST_NAME, encode_manifest, index_name


@pytest.fixture
def adopted(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    members: list[tuple[str, Any]] = []
    for number in range(6):
        mel = rng.normal(size=(4, 40)).astype(np.float16)
        members += [(f"d/{number:09d}.mel.npy", mel), (f"d/{number:09d}.txt", b"words")]
    write_tar(tmp_path / "in" / "a.tar", members)
    adopt_shards(tmp_path / "in", tmp_path / "set", workers=1)
    return tmp_path / "set"


def with_rows(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the index of a set, with its sha256 and the manifest's fingerprint."""
    path = folder / index_name("train")
    rows = np.load(path)
    change(rows)
    np.save(path, rows)
    manifest = open_shards(folder).manifest
    split = manifest.splits["train"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    index = msgspec.structs.replace(split.index, sha256=sha256)
    splits = {"train": msgspec.structs.replace(split, index=index)}
    data = encode_manifest(msgspec.structs.replace(manifest, splits=splits))
    (folder / MANIFEST_NAME).write_bytes(data)


def test_a_set_is_intact_whatever_else_the_tar_has(adopted: Path) -> None:
    report = verify_shards(adopted, deep=True)
    assert report.intact
    assert report.samples == 6


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("key", b"d/000000009", "the tar has 'd/000000002.mel.npy' where the index has"),
        ("crc32", 5, "do not match the crc32 in the index"),
        ("offset", 512, "no member lies where the index says"),
    ],
)
def test_a_row_that_is_not_of_the_tar_is_found(
    adopted: Path, field: str, value: object, what: str
) -> None:
    def change(rows: Any) -> None:
        rows[field][2] = value

    with_rows(adopted, change)
    faults = verify_shards(adopted, deep=True).faults
    assert {fault.file for fault in faults} == {"train-000000.tar"}
    assert any(what in fault.what for fault in faults), faults


def test_a_tar_that_is_cut_is_found(adopted: Path, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.tar"
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:9000] + bytes(len(data) - 9000))
    faults = verify_shards(adopted, deep=True).faults
    lost = {fault.key for fault in faults if "no member lies" in fault.what}
    assert lost
    assert "d/000000000" not in lost
