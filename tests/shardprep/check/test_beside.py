"""What no reader takes for a part of a set is left alone; a stray shard or index is a fault."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from shardprep import open_shards, repair_shards, verify_shards
from shardprep.check.beside import names_in, notes_on_others, stray_faults
from shardprep.storage import connections

Cli = Callable[..., subprocess.CompletedProcess[str]]
HARMLESS = (
    "README.md",
    ".gitattributes",
    ".DS_Store",
    ".nfs00001",
    "._train-000000.tar",
    "._split=train.index.npy",
    "Thumbs.db",
    "notes.txt",
    "train-000000.tar.gz",
    "train-000000.tar.x1.tmp",
    "split=train.index.npy.bak",
    "backup/manifest.json",
    "backup/split=train.index.npy",
    ".git/objects/pack.tar",
    "__MACOSX/train-000000.tar",
    "a folder/with/files",
)
STRAY = (
    "train-000009.tar",
    "test-000000.tar",
    "dev-000000.tar",
    "backup of train-000000.tar",
    "TRAIN-000000.TAR",
    "old/train-000000.tar",
    "old/of/last/year/x.tar",
    "split=dev.index.npy",
    "rejects.jsonl",
)


@pytest.fixture
def shards(edge_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(edge_set, tmp_path / "shards"))


def put(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"what is this")


def test_what_no_reader_takes_is_one_note_and_stays(shards: Path, run_cli: Cli) -> None:
    for name in HARMLESS:
        put(shards, name)
    done = run_cli("verify", shards, "--deep")
    assert done.returncode == 0
    assert ": intact (" in done.stdout
    assert "repair" not in done.stderr
    (note,) = [line for line in done.stderr.splitlines() if "note: " in line]
    assert "no part of the set, left alone: .DS_Store, ._split=train.index.npy, " in note
    # Five are named, and a folder counts once.
    others = {name.split("/")[0] for name in HARMLESS} - {"README.md"}
    assert note.endswith(f" and {len(others) - 5} more")
    for options in ((), ("--drop",)):
        done = run_cli("repair", shards, *options)
        assert done.returncode == 0
        assert ": intact (0 files repaired, 0 utterances dropped" in done.stdout
    left = [name for name in HARMLESS if not name.endswith(".tmp")]
    assert all((shards / name).exists() for name in left)
    # Half a file of a build is ours to remove.
    assert not (shards / "train-000000.tar.x1.tmp").exists()


@pytest.mark.parametrize("name", [name for name in STRAY if name != "test-000000.tar"])
def test_what_readers_may_take_is_a_fault_that_says_how_to_be_rid_of_it(
    shards: Path, name: str
) -> None:
    put(shards, name)
    (fault,) = verify_shards(shards).faults
    assert fault.file == name
    assert fault.what.startswith("does not belong to the set")
    report = repair_shards(shards)
    if "`shardprep repair` removes it" in fault.what:
        assert report.removed == [name]
        assert report.intact
    else:
        assert "remove it, or move it elsewhere" in fault.what
        assert (report.removed, [left.file for left in report.faults]) == ([], [name])
        (shards / name).unlink()
    assert verify_shards(shards).intact


def test_a_folder_or_a_dead_link_of_a_shards_name_is_a_fault(shards: Path) -> None:
    (shards / "train-000008.tar").mkdir()
    (shards / "train-000009.tar").symlink_to("nowhere")
    found = [fault.file for fault in verify_shards(shards).faults]
    assert found == ["train-000008.tar", "train-000009.tar"]


def test_a_linked_folder_is_not_entered(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", "x.tar")
    (shards / "link").symlink_to(tmp_path / "elsewhere")
    assert verify_shards(shards).intact


def test_a_set_in_a_store_is_judged_alike(edge_set: Path) -> None:
    place = "memory://beside/shards"
    store = fsspec.filesystem("memory")
    try:
        for path in edge_set.iterdir():
            store.pipe(f"{place}/{path.name}", path.read_bytes())
        for name in HARMLESS:
            store.pipe(f"{place}/{name}", b"what is this")
        report = verify_shards(place)
        assert report.intact
        assert len(report.notes) == 1
        for name in ("old/train-000000.tar", "split=dev.index.npy"):
            store.pipe(f"{place}/{name}", b"what is this")
        found = {fault.file: fault.what for fault in verify_shards(place).faults}
        assert sorted(found) == ["old/train-000000.tar", "split=dev.index.npy"]
        assert all("remove it, or move it elsewhere" in what for what in found.values())
    finally:
        store.store.clear()
        connections.forget_connections()


def test_names_below_hidden_folders_are_not_listed(tmp_path: Path) -> None:
    for name in (*HARMLESS, *STRAY):
        put(tmp_path, name)
    found = names_in(tmp_path)
    assert "old/of/last/year/x.tar" in found
    assert not any(name.startswith(".git/") for name in found)


def test_names_of_the_set_are_neither_strays_nor_notes(edge_set: Path) -> None:
    manifest = open_shards(edge_set).manifest
    names = [*manifest.files(), "manifest.json", "source-times.npy", ".shardprep-build"]
    assert not list(stray_faults(names, manifest, repairable=True))
    assert not list(notes_on_others([*names, ".shardprep-build/lock"], manifest))
    assert {fault.file for fault in stray_faults(STRAY, manifest, repairable=True)} == {
        name for name in STRAY if name not in manifest.files()
    }


@pytest.mark.parametrize("bit", [0, 1000, 1400, 2000, -1])
def test_a_flipped_bit_in_the_times_of_the_source_is_found_and_removed(
    shards: Path, edge_set: Path, bit: int
) -> None:
    path = shards / "source-times.npy"
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    (fault,) = verify_shards(shards).faults
    assert fault.file == "source-times.npy"
    assert "is damaged; remove it" in fault.what
    report = repair_shards(shards)
    assert (report.intact, report.removed) == (True, ["source-times.npy"])
    assert report.fingerprint == open_shards(edge_set).manifest.fingerprint


@pytest.mark.parametrize(
    ("damage", "intact"),
    [
        (lambda path: path.unlink(), True),
        (lambda path: path.write_bytes(b""), False),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), False),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), False),
        (lambda path: os.truncate(path, 10**9), False),
        (lambda path: (path.unlink(), os.mkfifo(path)), False),
        (lambda path: (path.unlink(), path.mkdir()), False),
    ],
    ids=["missing", "empty", "short", "long", "huge", "pipe", "folder"],
)
def test_times_of_the_source_may_be_missing_but_not_damaged(
    shards: Path, damage: Callable[[Path], object], intact: bool
) -> None:
    damage(shards / "source-times.npy")
    assert [fault.file for fault in verify_shards(shards).faults] == (
        [] if intact else ["source-times.npy"]
    )


def test_times_of_another_data_set_are_no_damage(
    shards: Path, source_of: Callable[..., Path], tmp_path: Path, build: Callable[..., object]
) -> None:
    build(source_of({"ann": [3, 4, 5]}), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "source-times.npy", shards)
    assert verify_shards(shards).intact
