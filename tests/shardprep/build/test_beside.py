"""The card of a new set, and notes on files that describe the former one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import BuildReport, open_shards, repair_shards, verify_shards
from shardprep.build.beside import notes_beside
from shardprep.format.card import card

Build = Callable[..., BuildReport]

SIDE_FILES = (
    ".nv-meta/index.sqlite",
    "train-000000.tar.idx",
    "train-000000.idx",
    "index.json",
    "shards.json",
    "shardindex.json",
    "index.json.zstd",
    "train.json",
    "shar_index.json",
    "cuts.000000.jsonl.gz",
    ".cache/huggingface/download/train-000000.tar.metadata",
)
OTHERS = ("manifest.json", "README.md", "notes.txt", "train-000000.tar", "labels.json", ".git/x")


@pytest.fixture
def source(source_of: Callable[..., Path]) -> Path:
    return source_of({"ann": (5, 6, 7, 8), "bob": (9, 10)}, (11,))


def card_of(shards: Path) -> str:
    return card(open_shards(shards).manifest)


def put(shards: Path, *names: str) -> None:
    for name in names:
        (shards / name).parent.mkdir(parents=True, exist_ok=True)
        (shards / name).write_text("theirs")


def test_a_build_writes_the_card_and_equal_builds_equal_ones(
    source: Path, tmp_path: Path, build: Build
) -> None:
    for name in ("a", "b"):
        build(source, tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == card_of(tmp_path / name)
    assert (tmp_path / "a/README.md").read_bytes() == (tmp_path / "b/README.md").read_bytes()
    report = verify_shards(tmp_path / "a", deep=True)
    assert report.intact
    assert report.notes == []


def test_a_card_of_a_build_is_replaced_and_damage_to_it_is_none(
    source: Path, tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    build(source, shards)
    path = shards / "README.md"
    path.write_text(path.read_text() + "more\n")
    assert verify_shards(shards).intact
    report = build(source, shards, overwrite=True, codec="zstd")
    assert path.read_text() == card_of(shards)
    assert not [note for note in report.notes if "README.md" in note]


@pytest.mark.parametrize("own", ["text", "folder", "large", "no permission"])
def test_a_readme_of_someone_stays_and_a_note_says_so(
    source: Path, tmp_path: Path, build: Build, own: str
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    path = shards / "README.md"
    if own == "folder":
        path.mkdir()
    elif own == "large":
        build(source, shards)
        path.write_text(path.read_text() + "words " * (1 << 18))
    elif own == "no permission":
        path.symlink_to("/proc/self/mem")
    else:
        path.write_text("---\nlicense: mit\n---\nmine\n")
    before = path.lstat()
    report = build(source, shards, overwrite=True)
    assert any("README.md" in note and "docs/readers.md" in note for note in report.notes)
    assert path.lstat().st_ino == before.st_ino
    assert path.lstat().st_size == before.st_size


def test_side_files_are_named_after_a_build_replaces_the_set(
    source: Path, tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    assert not any("former set" in note for note in build(source, shards).notes)
    put(shards, ".nv-meta/index.sqlite", "train-000000.tar.idx", "notes.txt")
    assert not any("former set" in note for note in build(source, shards).notes)
    report = build(source, shards, overwrite=True, dtype="float32")
    (note,) = [note for note in report.notes if "former set" in note]
    assert ": .nv-meta, train-000000.tar.idx; remove them" in note
    assert (shards / "train-000000.tar.idx").read_text() == "theirs"


def test_side_files_are_named_and_the_card_is_new_after_utterances_were_dropped(
    source: Path, tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    build(source, shards, val_fraction=0)
    before = (shards / "README.md").read_text()
    put(shards, "index.json")
    assert not any("former set" in note for note in repair_shards(shards).notes)
    split = open_shards(shards)["train"]
    shard = shards / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(split.locations["offset"][1]) + 200] ^= 1
    shard.write_bytes(data)
    report = repair_shards(shards, drop=True)
    assert report.lost == 1
    assert any("former set: index.json; remove" in note for note in report.notes)
    assert (shards / "README.md").read_text() == card_of(shards) != before


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_of_other_readers_are_known(name: str) -> None:
    (note,) = notes_beside([name, *OTHERS], own_card=False)
    assert f"former set: {name.split('/')[0]}; " in note


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_of_other_readers_are_no_damage(edge_set: Path, tmp_path: Path, name: str) -> None:
    shards = Path(shutil.copytree(edge_set, tmp_path / "shards"))
    put(shards, name)
    assert verify_shards(shards, deep=True).intact
    assert repair_shards(shards, drop=True).lost == 0
    assert (shards / name).read_text() == "theirs"


def test_other_files_are_not_taken_for_those_of_readers() -> None:
    assert list(notes_beside(OTHERS, own_card=False)) == []
