"""For every kind of damage, `verify` names the file, the utterance and what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from shardprep import (
    BuildReport,
    CorruptShardError,
    StorageError,
    VerifyReport,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.format.manifest import encode_manifest
from shardprep.read.manifest_file import load_manifest
from shardprep.source import reader
from shardprep.storage.local import sha256_of

SHARD = "train-000001.tar"


@pytest.fixture(params=["float16", "uint8"])
def shards(
    request: pytest.FixtureRequest, edge_sets: dict[tuple[str, str], Path], tmp_path: Path
) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(edge_sets[request.param, "none"], tmp_path / "shards"))


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def faults(report: VerifyReport) -> dict[str, str]:
    return {fault.file: fault.what for fault in report.faults}


def test_a_set_that_is_replaced_meanwhile_is_not_called_damaged(shards: Path) -> None:
    def replace(nbytes: int) -> None:
        # As a build with --overwrite does when its set is complete.
        (shards / "manifest.json").unlink(missing_ok=True)
        (shards / SHARD).unlink(missing_ok=True)

    with pytest.raises(CorruptShardError, match="the set was changed while it was being read"):
        verify_shards(shards, advance=replace)


@pytest.mark.parametrize(
    "kind", [("float16", "none"), ("float32", "zstd"), ("uint8", "none")], ids="-".join
)
def test_intact_set_has_no_fault(
    edge_sets: dict[tuple[str, str], Path], edge_source: Path, kind: tuple[str, str]
) -> None:
    read: list[int] = []
    report = verify_shards(edge_sets[kind], deep=True, against=edge_source, advance=read.append)
    assert report.intact
    assert report.samples == 41
    # Two files are no part of the set: the times of the source files, and the dataset card.
    others = ("source-times.npy", "README.md")
    files = [path for path in edge_sets[kind].iterdir() if path.name not in others]
    assert report.files == len(files)
    sizes = {path.name: path.stat().st_size for path in files}
    assert report.bytes == sum(sizes.values()) - sizes["manifest.json"]
    tars = sum(size for name, size in sizes.items() if name.endswith(".tar"))
    assert sum(read) == report.bytes + tars


@pytest.mark.parametrize("deep", [False, True])
def test_every_flipped_bit_is_found(shards: Path, deep: bool) -> None:
    rng = random.Random(int(deep))
    # The dataset card is no part of the set.
    files = sorted(path for path in shards.iterdir() if path.name != "README.md")
    for _ in range(10 if deep else 60):
        path = rng.choice(files)
        bit = rng.randrange(8 * path.stat().st_size)

        def flip(data: bytearray, bit: int = bit) -> None:
            data[bit // 8] ^= 1 << bit % 8

        edit(path, flip)
        assert path.name in faults(verify_shards(shards, deep=deep)), (path.name, bit)
        edit(path, flip)
    assert verify_shards(shards, deep=True).intact


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 512, 1024, 4000, -10_240, -1])
def test_truncation_is_found(shards: Path, keep: int, deep: bool) -> None:
    size = (shards / SHARD).stat().st_size
    edit(shards / SHARD, lambda data: data.__delitem__(slice(keep, None)))
    report = verify_shards(shards, deep=deep)
    assert f"has {keep % size if keep < 0 else keep} bytes, expected {size}" in [
        fault.what for fault in report.faults if fault.file == SHARD
    ]
    assert {fault.file for fault in report.faults} == {SHARD}


def remove(shards: Path) -> None:
    (shards / SHARD).unlink()


def swap(shards: Path) -> None:
    (shards / SHARD).rename(shards / "other")
    (shards / "train-000000.tar").rename(shards / SHARD)
    (shards / "other").rename(shards / "train-000000.tar")


def add(shards: Path) -> None:
    (shards / "train-000009.tar").write_bytes(b"")


def alter_manifest(shards: Path) -> None:
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(text.replace('"ann"', '"eve"'))


def other_bytes(shards: Path) -> None:
    # A bit that does not change the value of a number.
    text = (shards / "manifest.json").read_text()
    manifest = load_manifest(shards)
    build = msgspec.structs.replace(manifest.build, val_fraction=1e-07)
    text = encode_manifest(msgspec.structs.replace(manifest, build=build)).decode()
    assert "1e-7" in text
    (shards / "manifest.json").write_text(text.replace("1e-7", "1E-7"))


def lose_index(shards: Path) -> None:
    (shards / "split=val.index.npy").unlink()


def other_index(shards: Path) -> None:
    shutil.copy(shards / "split=val.index.npy", shards / "split=train.index.npy")


def folder_for_shard(shards: Path) -> None:
    (shards / SHARD).unlink()
    (shards / SHARD).mkdir()


STRUCTURAL: dict[str, tuple[Callable[[Path], None], dict[str, str]]] = {
    "missing shard": (remove, {SHARD: "is missing"}),
    "swapped shards": (swap, {SHARD: "", "train-000000.tar": ""}),
    "extra shard": (add, {"train-000009.tar": "does not belong to the set"}),
    "altered manifest": (alter_manifest, {"manifest.json": "was altered"}),
    "manifest in other bytes": (
        other_bytes,
        {"manifest.json": "not the bytes that a build writes"},
    ),
    "missing index": (lose_index, {"split=val.index.npy": "is missing"}),
    "index of another split": (other_index, {"split=train.index.npy": "expected"}),
    "folder in a shard's place": (folder_for_shard, {SHARD: ""}),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", STRUCTURAL)
def test_structural_damage_names_the_file(shards: Path, name: str, deep: bool) -> None:
    damage, expected = STRUCTURAL[name]
    damage(shards)
    report = verify_shards(shards, deep=deep)
    assert not report.intact
    assert {fault.file for fault in report.faults} == set(expected)
    # A fault of a file is not repeated for each utterance in it.
    assert len(report.faults) <= 3 * len(expected) or name.startswith("swapped")
    for file, what in expected.items():
        assert any(what in fault.what for fault in report.faults if fault.file == file)


def test_index_of_another_build_is_found(
    shards: Path, edge_source: Path, tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    build(edge_source, tmp_path / "other", samples_per_shard=8, val_fraction=0.2, seed=1)
    shutil.copy(tmp_path / "other" / "split=train.index.npy", shards / "split=train.index.npy")
    assert "split=train.index.npy" in faults(verify_shards(shards))
    shutil.copy(tmp_path / "other" / SHARD, shards / SHARD)
    assert {"split=train.index.npy", SHARD} <= set(faults(verify_shards(shards)))


def test_unfinished_build_is_reported(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    (shards / ".shardprep-build").mkdir()
    (fault,) = verify_shards(shards).faults
    assert fault.file == "manifest.json"
    assert "unfinished build" in fault.what


def forge(shards: Path, member: str, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the bytes of a member (as many as before) and correct the sha256 in the manifest."""
    with tarfile.open(shards / SHARD) as tar:
        info = tar.getmember(member)
        file = tar.extractfile(info)
        assert file is not None
        new = change(file.read())
    assert len(new) == info.size
    edit(
        shards / SHARD,
        lambda data: data.__setitem__(slice(info.offset_data, info.offset_data + info.size), new),
    )
    manifest = load_manifest(shards)
    train = manifest.splits["train"]
    infos = tuple(
        msgspec.structs.replace(one, sha256=sha256_of(shards / one.file)) for one in train.shards
    )
    splits = {**manifest.splits, "train": msgspec.structs.replace(train, shards=infos)}
    (shards / "manifest.json").write_bytes(
        encode_manifest(msgspec.structs.replace(manifest, splits=splits))
    )


def key_in(shards: Path) -> str:
    split = open_shards(shards)["train"]
    return str(split.keys[int(np.flatnonzero(split.locations["shard"] == 1)[2])])


@pytest.mark.parametrize(
    ("member", "change", "what"),
    [
        (".mel.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "crc32"),
        (".cls", lambda data: b"9", "is not the label"),
        (".json", lambda data: data.replace(b"frames", b"fromes"), "does not agree"),
        (".json", lambda data: data.replace(b'": ', b'":9', 2), "does not agree"),
        (".json", lambda data: b"[" * len(data), "does not agree"),
    ],
    ids=["mel", "label", "field", "number", "no JSON"],
)
def test_deep_names_the_damaged_utterance_though_the_checksums_fit(
    shards: Path, member: str, change: Callable[[bytes], bytes], what: str
) -> None:
    key = key_in(shards)
    forge(shards, key + member, change)
    assert verify_shards(shards).intact
    report = verify_shards(shards, deep=True)
    assert {(fault.file, fault.key) for fault in report.faults} == {(SHARD, key)}
    assert any(what in fault.what for fault in report.faults)


@pytest.mark.parametrize("shards", ["uint8"], indirect=True)
@pytest.mark.parametrize("name", ["minimum", "step"])
def test_deep_compares_the_scale_in_the_json_with_the_index(shards: Path, name: str) -> None:
    def change(data: bytes) -> bytes:
        about = json.loads(data)
        value = repr(about[name])
        other = value[:-1] + ("1" if value[-1] != "1" else "2")
        return data.replace(value.encode(), other.encode())

    key = key_in(shards)
    forge(shards, f"{key}.json", change)
    assert verify_shards(shards).intact
    (fault,) = verify_shards(shards, deep=True).faults
    assert (fault.key, fault.what) == (key, f"'{key}.json' does not agree with the index")


def test_deep_finds_values_that_are_not_finite(
    edge_source: Path, tmp_path: Path, build: Callable[..., BuildReport]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardprep.source.features.np.isfinite", np.ones_like)
        original = reader.load_features

        def poisoned(path: Path, *expected: Any, **kind: Any) -> NDArray[np.float32]:
            mel = original(path, *expected, **kind)
            if "bob-003" not in str(path):
                return mel
            return np.where(np.arange(len(mel))[:, None] == 0, np.float32("nan"), mel)

        patch.setattr(reader, "load_features", poisoned)
        build(edge_source, tmp_path / "shards")
    assert verify_shards(tmp_path / "shards").intact
    (fault,) = verify_shards(tmp_path / "shards", deep=True).faults
    assert (fault.key, fault.what) == ("bob-003", "has values that are not finite")


def test_shards_that_were_not_fetched_are_no_damage(
    edge_set: Path, tmp_path: Path, contents: Callable[[Path], dict[str, str]]
) -> None:
    """A clone without Git LFS has pointers in place of the shards: none may be dropped."""
    folder = Path(shutil.copytree(edge_set, tmp_path / "shards"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    others = ("manifest.json", "README.md")
    names = [path.name for path in folder.iterdir() if path.name not in others]
    for name in names:
        (folder / name).write_bytes(pointer)
    report = verify_shards(folder)
    assert not report.faults
    assert {fault.file for fault in report.unread} == set(names)
    assert all("run `git lfs pull`" in fault.what for fault in report.unread)
    before = contents(folder)
    with pytest.raises(StorageError, match="run `git lfs pull`"):
        repair_shards(folder, drop=True)
    assert contents(folder) == before
    with pytest.raises(StorageError, match=r"split=train.index\.npy: is a Git LFS pointer"):
        open_shards(folder)["train"]
    (folder / "manifest.json").write_bytes(pointer)
    for command in (open_shards, verify_shards, repair_shards):
        with pytest.raises(
            StorageError, match=r"manifest\.json: is a Git LFS pointer.*`git lfs pul"
        ):
            command(folder)
