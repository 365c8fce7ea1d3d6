"""Every kind of damage is repaired to the original bytes, or the lost parts are listed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardprep import (
    BuildError,
    FormatError,
    SourceError,
    StorageError,
    build_shards,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.build.lock import locked
from shardprep.format.manifest import WORK_FOLDER

Build = Callable[..., Any]
Contents = Callable[[Path], dict[str, str]]
Damage = Callable[[Path], Any]

SHARD, OTHER, INDEX = "train-000001.tar", "train-000000.tar", "split=train.index.npy"
OPTIONS = {"samples_per_shard": 8, "val_fraction": 0.2, "on_error": "skip"}


def flip(name: str, at: Callable[[Path], int]) -> Damage:
    """Flip a bit of a file, at the byte that `at` finds."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at(folder)] ^= 16
        (folder / name).write_bytes(data)

    return damage


def payload(number: int) -> Callable[[Path], int]:
    """A byte of the matrix of an utterance in SHARD."""

    def at(folder: Path) -> int:
        rows = np.load(folder / INDEX)
        row = rows[rows["shard"] == 1][number]
        return int(row["offset"]) + int(row["nbytes"]) // 2

    return at


def of_member(suffix: str) -> Callable[[Path], int]:
    """The first byte of the content of a member of SHARD."""

    def at(folder: Path) -> int:
        data = (folder / SHARD).read_bytes()
        return data.index(suffix.encode() + b"\0") // 512 * 512 + 512

    return at


def cut(folder: Path) -> None:
    os.truncate(folder / SHARD, 3000)


def swap(folder: Path) -> None:
    (folder / SHARD).rename(folder / "x")
    (folder / OTHER).rename(folder / SHARD)
    (folder / "x").rename(folder / OTHER)


def several(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def lost(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def reformat(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")


# Damage that the set itself can repair, and damage that needs the source.
BY_ITSELF: dict[str, Damage] = {
    "tar header": flip(SHARD, lambda folder: 5),
    "label": flip(SHARD, of_member(".cls")),
    "JSON": flip(SHARD, of_member(".json")),
    "end of the tar": flip(SHARD, lambda folder: -3),
    "index": flip(INDEX, lambda folder: -3),
    "index lost": lost(INDEX),
    "index of another split": lambda folder: shutil.copy(
        folder / "split=val.index.npy", folder / INDEX
    ),
    "shards swapped": swap,
    "shard renamed": lambda folder: (folder / SHARD).rename(folder / "train-000007.tar"),
    "manifest reformatted": reformat,
    "left over": lambda folder: (folder / "train-000009.tar").write_bytes(b""),
}
BY_SOURCE: dict[str, Damage] = {
    "matrix": flip(SHARD, payload(2)),
    "truncated": cut,
    "shard lost": lost(SHARD),
    "shard and index": several(flip(SHARD, payload(0)), flip(INDEX, lambda folder: -3)),
    "rejects": flip("rejects.jsonl", lambda folder: 4),
    "everything": lambda folder: [p.write_bytes(b"") for p in folder.glob("[!mR]*")],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, edge_source: Path) -> Path:
    """`edge_source` with a file that the build leaves out."""
    root = Path(shutil.copytree(edge_source, tmp_path_factory.mktemp("source") / "Dataset"))
    (root / "ann-004.pt").write_bytes(b"garbage")
    return root


@pytest.fixture(scope="module", params=["float16-none", "uint8-zstd"])
def original(request: pytest.FixtureRequest, source: Path) -> Path:
    """An intact set of two or more shards per split, with a list of rejects; do not change it."""
    from shardprep import BuildOptions

    shards = source.parent / request.param
    dtype, codec = request.param.split("-")
    options: Any = {**OPTIONS, "dtype": dtype, "codec": codec, "workers": 1}
    build_shards(source, shards, BuildOptions(**options))
    return shards


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


@pytest.mark.parametrize("name", [*BY_ITSELF, *BY_SOURCE])
def test_with_the_source_every_byte_is_restored(
    original: Path, shards: Path, source: Path, contents: Contents, name: str
) -> None:
    {**BY_ITSELF, **BY_SOURCE}[name](shards)
    assert not verify_shards(shards).intact
    report = repair_shards(shards, source=source, workers=1)
    assert report.intact
    assert not report.dropped
    assert report.repaired or report.removed
    assert contents(shards) == contents(original)
    assert report.fingerprint == open_shards(original).manifest.fingerprint


@pytest.mark.parametrize("name", BY_ITSELF)
@pytest.mark.parametrize("drop", [False, True])
def test_damage_beside_the_matrices_needs_no_source(
    original: Path, shards: Path, contents: Contents, name: str, drop: bool
) -> None:
    BY_ITSELF[name](shards)
    report = repair_shards(shards, drop=drop)
    assert report.intact
    assert not report.dropped
    assert contents(shards) == contents(original)


@pytest.mark.parametrize("name", BY_SOURCE)
def test_without_a_source_what_is_lost_stays_as_it_is(
    original: Path, shards: Path, contents: Contents, name: str
) -> None:
    BY_SOURCE[name](shards)
    before = contents(shards)
    report = repair_shards(shards)
    assert not report.intact
    assert {fault.file for fault in report.faults} <= before.keys() | {SHARD}
    after = contents(shards)
    for file, sha256 in after.items():
        assert sha256 in (before.get(file), contents(original)[file])


def test_half_a_file_that_a_build_left_is_removed(
    original: Path, shards: Path, contents: Contents
) -> None:
    (shards / f"{SHARD}.ab_12.tmp").write_bytes(b"")
    report = repair_shards(shards)
    assert (report.intact, report.removed) == (True, [f"{SHARD}.ab_12.tmp"])
    assert contents(shards) == contents(original)


def values(shards: Path) -> dict[str, bytes]:
    """Every matrix and label by key."""
    return {
        f"{name}/{key}": split.read(i).tobytes() + split.labels[i].tobytes()
        for name, split in open_shards(shards).items()
        for i, key in enumerate(split.keys)
    }


@pytest.mark.parametrize(("name", "gone"), [("matrix", 1), ("truncated", None), ("shard lost", 7)])
def test_dropping_leaves_out_what_is_lost_and_lists_it(
    original: Path,
    shards: Path,
    source: Path,
    build: Build,
    contents: Contents,
    name: str,
    gone: int | None,
) -> None:
    BY_SOURCE[name](shards)
    report = repair_shards(shards, drop=True)
    assert report.intact
    assert verify_shards(shards, deep=True).intact
    before, after = values(original), values(shards)
    keys = {f"train/{reject.key}" for reject in report.dropped}
    assert after == {key: mel for key, mel in before.items() if key not in keys}
    assert len(keys) == len(report.dropped) == (gone or len(keys))
    assert 0 < len(keys) <= 7
    found, was = open_shards(shards), open_shards(original)
    assert found.rejects == (*was.rejects, *report.dropped)
    for reject in report.dropped:
        assert reject.file == f"{reject.key}.pt"
        assert reject.speaker == reject.key.partition("-")[0]
        assert "damaged" in reject.reason
    assert found.manifest.fingerprint == report.fingerprint != was.manifest.fingerprint
    # Every utterance of the source is packed or listed.
    assert verify_shards(shards, against=source).intact
    with pytest.raises(BuildError, match="a finished set, built from another source"):
        build(source, shards, **OPTIONS, codec=was.manifest.codec.name, dtype=was.dtype)
    # The source can still repair the set, to its state after the drop.
    now = contents(shards)
    flip(OTHER, lambda folder: 1000)(shards)
    assert repair_shards(shards, source=source).intact
    assert contents(shards) == now
    flip(OTHER, lambda folder: 1000)(shards)
    flip(INDEX, lambda folder: -3)(shards)
    with pytest.raises(SourceError, match="or the set was repaired with --drop since"):
        repair_shards(shards, source=source)


def test_a_dropped_test_utterance_keeps_its_place_in_testdata_json(
    source_of: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    root = source_of({"ann": [5, 6, 7]}, [8, 9, 10, 11, 12, 13])
    text = json.loads((root / "testdata.json").read_text())
    listed = text["utterances"]
    listed.insert(2, listed[0])
    (root / "testdata.json").write_text(json.dumps(text))
    (root / listed[1]["feature_path"]).write_bytes(b"garbage")
    build(root, tmp_path / "shards", on_error="skip", samples_per_shard=2, val_fraction=0)
    shards = tmp_path / "shards"
    before = open_shards(shards).test_entries
    assert [entry.index for entry in before] == [0, None, 0, 1, 2, 3, 4]
    flip("test-000001.tar", lambda folder: 600)(shards)
    lost = repair_shards(shards, drop=True).dropped
    after = open_shards(shards).test_entries
    assert [entry.file for entry in after] == [entry["feature_path"] for entry in listed]
    gone = [n for n, entry in enumerate(after) if "damaged in test-000001" in entry.reason]
    assert [line.entry for line in lost] == gone == [3]
    assert [entry.index for entry in after] == [0, None, 0, None, 1, 2, 3]


def test_without_its_index_a_lost_test_utterance_comes_last(
    source_of: Callable[..., Path], tmp_path: Path, build: Build
) -> None:
    shards = tmp_path / "shards"
    build(source_of({"ann": [5, 6, 7]}, [8, 9, 10]), shards, val_fraction=0)
    (shards / "split=test.index.npy").write_bytes(b"")
    rest = (shards / "test-000000.tar").read_bytes()
    (shards / "test-000000.tar").write_bytes(rest[:-100])
    report = repair_shards(shards, drop=True)
    assert report.lost == 3
    assert any("positions of lost test utterances" in note for note in report.notes)
    assert open_shards(shards).test_entries == ()


def test_confirmed_rows_of_a_damaged_index_are_used(original: Path, shards: Path) -> None:
    BY_SOURCE["shard and index"](shards)
    report = repair_shards(shards, drop=True)
    assert report.intact
    (reject,) = report.dropped
    assert (reject.file, reject.key, report.lost) == (SHARD, "", 1)
    assert reject.reason == "lost with their rows of the index: 1 of its utterances"
    split = open_shards(original)["train"]
    key = split.keys[split.locations["shard"] == 1][0]
    rest = {k: v for k, v in values(original).items() if k != f"train/{key}"}
    assert values(shards) == rest


def test_a_shard_without_any_index_is_dropped(original: Path, shards: Path) -> None:
    several(flip(SHARD, payload(0)), lost(INDEX))(shards)
    report = repair_shards(shards, drop=True)
    split = open_shards(original)["train"]
    own = split.locations["shard"] == 1
    assert report.lost == own.sum()
    gone = {f"train/{key}" for key in split.keys[own]}
    assert values(shards) == {k: v for k, v in values(original).items() if k not in gone}


@pytest.mark.parametrize(
    "field", ["label", "frames", "crc32", "key", "offset", "far offset", "minimum", "step"]
)
def test_a_wrong_row_is_not_used(original: Path, shards: Path, field: str) -> None:
    rows = np.load(shards / INDEX)
    place = int(np.flatnonzero(rows["shard"] == 1)[2])
    if field in ("minimum", "step"):
        if field not in rows.dtype.names:
            pytest.skip("only rows of uint8 have a scale")
        rows[field][place] = np.nextafter(rows[field][place], np.float32(9))
    elif field == "far offset":
        # Where no file system lets a program seek.
        rows["offset"][place] = 2**63 - 512
    else:
        rows[field][place] = b"other" if field == "key" else rows[field][place] ^ 1
    np.save(shards / INDEX, rows)
    flip(SHARD, payload(0))(shards)
    report = repair_shards(shards, drop=True)
    assert report.intact
    assert report.lost == 2
    before, after = values(original), values(shards)
    assert len(after) == len(before) - 2
    assert after.items() <= before.items()


def test_a_damaged_list_of_rejects_keeps_its_readable_lines(original: Path, shards: Path) -> None:
    text = (shards / "rejects.jsonl").read_bytes()
    (shards / "rejects.jsonl").write_bytes(text + b"{nonsense\n")
    assert repair_shards(shards, drop=True).intact
    assert open_shards(shards).rejects == open_shards(original).rejects


def test_nothing_left_is_an_error_and_changes_nothing(shards: Path, contents: Contents) -> None:
    for path in shards.glob("*.tar"):
        path.write_bytes(b"")
    before = contents(shards)
    with pytest.raises(BuildError, match="no utterance of the set is undamaged"):
        repair_shards(shards, drop=True)
    assert contents(shards) == before


def test_source_that_has_changed_is_not_used(
    shards: Path, source: Path, tmp_path: Path, contents: Contents
) -> None:
    flip(SHARD, payload(2))(shards)
    key = str(np.load(shards / INDEX)["key"][np.load(shards / INDEX)["shard"] == 1][2].decode())
    before = contents(shards)
    other = Path(shutil.copytree(source, tmp_path / "Other"))
    # Of the same size, so that only the bytes show the change.
    mel = torch.load(other / f"{key}.pt", weights_only=True)
    torch.save(mel + 1, other / f"{key}.pt")
    report = repair_shards(shards, source=other, workers=1)
    assert [fault.file for fault in report.faults] == [SHARD]
    assert contents(shards) == before
    (other / f"{key}.pt").unlink()
    report = repair_shards(shards, source=other, workers=1)
    assert not report.intact
    assert any(key in note and "not in the data set" in note for note in report.notes)
    assert contents(shards) == before


def test_only_what_is_damaged_is_taken_from_the_source(
    original: Path, shards: Path, source: Path, tmp_path: Path, contents: Contents
) -> None:
    flip(SHARD, payload(2))(shards)
    key = np.load(shards / INDEX)["key"][np.load(shards / INDEX)["shard"] == 1][2].decode()
    other = Path(shutil.copytree(source, tmp_path / "Other"))
    for path in other.glob("*.pt"):
        if path.stem != key:
            path.unlink()
    assert repair_shards(shards, source=other).intact
    assert contents(shards) == contents(original)


def test_a_pending_repair_is_finished_before_a_build(
    shards: Path, source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    manifest = open_shards(shards).manifest
    kind = {"codec": manifest.codec.name, "dtype": manifest.dtype}
    flip(SHARD, payload(2))(shards)
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    repair_shards(copy, drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardprep.build.work_folder.os.replace", stop_at_shards(os.replace))
        with pytest.raises(Stopped):
            repair_shards(shards, drop=True)
    assert not (shards / "manifest.json").exists()
    (fault,) = verify_shards(shards).faults
    assert "shardprep repair DST" in fault.what
    with pytest.raises(BuildError, match="finished set, built from another source"):
        build(source, shards, **OPTIONS, **kind)
    assert contents(shards).items() >= contents(copy).items()
    build(source, shards, **OPTIONS, **kind, overwrite=True)
    assert verify_shards(shards, deep=True, against=source).intact
    assert not [p for p in shards.iterdir() if p.name.startswith(".")]


class Stopped(Exception):
    pass


def stop_at_shards(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stop before a shard is moved to its place."""

    def call(source: Any, target: Any) -> None:
        if str(target).endswith((SHARD, INDEX)) and Path(target).parent.name == "shards":
            raise Stopped
        function(source, target)

    return call


def test_a_repair_keeps_an_unfinished_build(
    shards: Path, source: Path, build: Build, original: Path, contents: Contents
) -> None:
    manifest = open_shards(shards).manifest
    kind = {"codec": manifest.codec.name, "dtype": manifest.dtype}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardprep.build.writer.publish_indexes", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(source, shards, **{**OPTIONS, "seed": 1}, **kind, overwrite=True)
    made = contents(shards / WORK_FOLDER)
    assert len(made) > 4
    flip(SHARD, payload(2))(shards)
    assert repair_shards(shards, source=source).intact
    assert contents(shards / WORK_FOLDER) == made
    shutil.rmtree(shards / WORK_FOLDER)
    assert contents(shards) == contents(original)


@pytest.mark.parametrize("name", [SHARD, "train-000099.tar", "manifest.json"])
def test_a_folder_in_the_place_of_a_file_does_not_destroy_the_set(
    shards: Path, source: Path, build: Build, name: str
) -> None:
    manifest = open_shards(shards).manifest
    kind = {"codec": manifest.codec.name, "dtype": manifest.dtype}
    kept = (shards / "manifest.json").read_bytes()
    (shards / name).unlink(missing_ok=True)
    (shards / name).mkdir()
    with pytest.raises(BuildError, match="a folder is in the place|is not the manifest"):
        build(source, shards, **{**OPTIONS, "seed": 1}, **kind, overwrite=True)
    if name != "manifest.json":
        assert (shards / "manifest.json").read_bytes() == kept
        (shards / name).rmdir()
        assert repair_shards(shards, source=source).intact


@pytest.mark.parametrize("name", [SHARD, INDEX])
@pytest.mark.parametrize("how", ["alone", "source", "drop"])
def test_a_folder_in_the_place_of_a_file_is_named_by_a_repair(
    shards: Path, source: Path, contents: Contents, name: str, how: str
) -> None:
    (shards / name).unlink()
    (shards / name).mkdir()
    flip(OTHER, lambda folder: 700)(shards)
    before = contents(shards)
    options: dict[str, Any] = {"source": {"source": source}, "drop": {"drop": True}}.get(how, {})
    with pytest.raises(BuildError, match=f"{name}: a folder is in the place of a file"):
        repair_shards(shards, **options)
    assert contents(shards) == before
    (shards / name).rmdir()
    assert repair_shards(shards, source=source).intact


def test_what_cannot_be_read_does_not_stop_a_repair(shards: Path, source: Path) -> None:
    flip("train-000002.tar", lambda folder: 700)(shards)
    (shards / SHARD).unlink()
    (shards / SHARD).symlink_to("/proc/self/mem")
    (shards / "notes").symlink_to("/proc/self/mem")
    assert repair_shards(shards, source=source).intact


def test_a_folder_that_holds_no_set_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    for folder in (tmp_path / "letters", source):
        before = sorted(folder.iterdir())
        with pytest.raises(FormatError, match="is not a shard folder"):
            repair_shards(folder)
        assert sorted(folder.iterdir()) == before


def test_files_of_others_are_left_alone(shards: Path) -> None:
    (shards / "notes.txt").write_text("mine")
    assert repair_shards(shards, drop=True).intact
    assert (shards / "notes.txt").read_text() == "mine"


def test_intact_set_stays_as_it_is(original: Path, shards: Path, contents: Contents) -> None:
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    report = repair_shards(shards)
    assert report.intact
    assert not report.repaired
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == times
    assert contents(shards) == contents(original)


def test_folder_without_a_set_or_in_use_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere: does not exist\. Run `shardprep build"):
        repair_shards(tmp_path / "nowhere")
    with locked(shards), pytest.raises(BuildError, match="another build or repair is running"):
        repair_shards(shards)
    (shards / "manifest.json").write_text("{}")
    with pytest.raises(FormatError):
        repair_shards(shards)


REPAIR = """
from shardprep import repair_shards

prepare = shutil.copytree

def act(damaged, folder):
    repair_shards(folder, drop=True)
"""


def test_repair_killed_at_any_step_continues_to_the_same_set(
    shards: Path, contents: Contents, killed_at_every_step: Callable[[str, Path], list[Path]]
) -> None:
    several(flip(SHARD, payload(2)), flip("split=val.index.npy", lambda folder: -3))(shards)
    folders = killed_at_every_step(REPAIR, shards)
    dropped = repair_shards(shards, drop=True).dropped
    assert len(dropped) == 1
    expected = contents(shards)
    assert len(folders) > 25
    for folder in folders:
        report = repair_shards(folder, drop=True)
        assert report.intact
        assert contents(folder) == expected, folder


def test_command_says_what_it_did(
    run_cli: Callable[..., subprocess.CompletedProcess[str]], shards: Path, source: Path
) -> None:
    key = str(open_shards(shards)["train"].keys[np.load(shards / INDEX)["shard"].searchsorted(1)])
    flip(SHARD, payload(0))(shards)
    done = run_cli("repair", shards)
    assert done.returncode == 1
    assert f"{SHARD}: its sha256 is not the one in the manifest" in done.stdout
    assert "give the data set as --source SRC" in done.stderr
    assert "--drop" not in done.stderr
    assert run_cli("repair", shards, "--drop", "--source", source).returncode == 2
    copy = Path(shutil.copytree(shards, shards.parent / "copy"))
    done = run_cli("repair", shards, "--source", source, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{SHARD}: restored" in done.stdout
    done = run_cli("repair", copy, "--drop")
    assert done.returncode == 0
    assert f"{key}: dropped, its stored bytes were damaged in {SHARD}" in done.stdout
    assert "1 utterance dropped" in done.stdout
    assert run_cli("verify", copy, "--deep").returncode == 0


def test_failing_disk_is_a_storage_error(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(SHARD, of_member(".cls"))(shards)

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match="No space left"):
            repair_shards(shards)
    assert repair_shards(shards).intact


def test_command_is_brief_about_many(
    run_cli: Callable[..., subprocess.CompletedProcess[str]], shards: Path
) -> None:
    for path in shards.glob("train-*.tar"):
        path.write_bytes(b"")
    split = open_shards(shards).manifest.splits["train"]
    done = run_cli("repair", shards, "--drop")
    assert done.returncode == 0
    assert done.stdout.count(": dropped, ") == 20 < split.samples
    assert f"... and {split.samples - 20} more; rejects.jsonl lists them all" in done.stdout
    assert f"{split.samples} utterances dropped" in done.stdout
