"""Trouble of the machine is never called damage, and nothing is changed because of it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep import (
    StorageError,
    VerifyReport,
    build_shards,
    open_shards,
    repair_shards,
    verify_shards,
)
from shardprep.build.work_folder import FolderWork
from shardprep.format.manifest import SET_ASIDE_FOLDER

Contents = Callable[[Path], dict[str, str]]
FailingDisk = Callable[..., None]
Run = Callable[..., subprocess.CompletedProcess[str]]

MACHINE = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
MACHINE += (errno.ETIMEDOUT, errno.ENODEV, errno.EIO, errno.EINVAL, errno.ENOSYS, errno.ENOTCONN)
SHARD, INDEX = "train-000001.tar", "split=train.index.npy"
FILES = (SHARD, INDEX, "rejects.jsonl", "manifest.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, edge_source: Path) -> Path:
    from shardprep import BuildOptions

    source = Path(shutil.copytree(edge_source, tmp_path_factory.mktemp("source") / "Dataset"))
    (source / "ann-004.pt").write_bytes(b"garbage")
    options = BuildOptions(samples_per_shard=8, val_fraction=0.2, on_error="skip", workers=1)
    build_shards(source, source.parent / "shards", options)
    return source.parent / "shards"


@pytest.fixture
def source(original: Path) -> Path:
    return original.parent / "Dataset"


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """`refuse(name, code)`: files of this name cannot be opened."""
    original = os.open

    def install(name: str, code: int) -> None:
        def refusing(path: Any, *arguments: Any, **options: Any) -> int:
            if str(path).endswith(name):
                raise OSError(code, os.strerror(code), str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refusing)

    return install


def damage(folder: Path, name: str, at: int = -1) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 16
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("code", MACHINE, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_opened_is_not_damaged(
    shards: Path, contents: Contents, refuse: Callable[[str, int], None], name: str, code: int
) -> None:
    before = contents(shards)
    refuse(name, code)
    if name == "manifest.json":
        with pytest.raises(StorageError, match=os.strerror(code)):
            verify_shards(shards, deep=True)
    else:
        report = verify_shards(shards, deep=True)
        assert not report.faults
        assert not report.intact
        assert {fault.file for fault in report.unread} == {name}
        assert os.strerror(code) in report.unread[0].what
    for drop in (False, True):
        with pytest.raises(StorageError, match=f"{name}: .*{os.strerror(code)}"):
            repair_shards(shards, drop=drop)
    assert contents(shards) == before


def test_nothing_is_dropped_while_another_file_cannot_be_read(
    shards: Path, contents: Contents, refuse: Callable[[str, int], None]
) -> None:
    damage(shards, "train-000000.tar")
    before = contents(shards)
    refuse(SHARD, errno.ESTALE)
    report = verify_shards(shards)
    assert [fault.file for fault in report.faults] == ["train-000000.tar"]
    assert [fault.file for fault in report.unread] == [SHARD]
    with pytest.raises(StorageError, match=SHARD):
        repair_shards(shards, drop=True)
    assert contents(shards) == before


def test_a_shard_that_trouble_reaches_later_is_not_dropped(
    shards: Path, contents: Contents, failing_disk: FailingDisk
) -> None:
    damage(shards, SHARD)
    before = contents(shards)
    # The first reads find the damage. Then the mount goes away.
    count = len(list(reads_of(shards, SHARD)))
    failing_disk(SHARD, After(count), code=errno.ESTALE)
    with pytest.raises(StorageError, match=os.strerror(errno.ESTALE)):
        repair_shards(shards, drop=True)
    assert contents(shards) == before


class After:
    """All places of a file, after so many were asked for."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __contains__(self, place: object) -> bool:
        self.left -= 1
        return self.left < 0


def reads_of(folder: Path, name: str) -> Iterator[int]:
    """The bytes that `failing_disk` is asked about while a file is read once."""
    yield from range((folder / name).stat().st_size)


@pytest.mark.parametrize("gone", ["removed", "empty"])
def test_a_folder_that_goes_away_is_not_a_damaged_set(
    shards: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    from shardprep.check import file_faults, verify

    def vanish(*arguments: Any) -> Any:
        shutil.rmtree(shards)
        if gone == "empty":
            shards.mkdir()
        monkeypatch.undo()
        return file_faults.fault_of(*arguments)

    monkeypatch.setattr(verify, "fault_of", vanish)
    report = verify_shards(shards)
    assert not report.faults
    assert report.unread


def test_a_shard_behind_a_link_to_nowhere_is_neither_missing_nor_dropped(
    shards: Path, tmp_path: Path
) -> None:
    (shards / SHARD).rename(tmp_path / "elsewhere.tar")
    (shards / SHARD).symlink_to(tmp_path / "elsewhere.tar")
    assert verify_shards(shards, deep=True).intact
    (tmp_path / "elsewhere.tar").unlink()
    report = verify_shards(shards)
    assert not report.faults
    assert "is a link to a file that is not there" in report.unread[0].what
    with pytest.raises(StorageError, match="is a link to a file that is not there"):
        repair_shards(shards, drop=True)
    assert (shards / SHARD).is_symlink()


def rows_of_shard(folder: Path) -> np.ndarray:
    rows = np.load(folder / INDEX)
    return np.asarray(rows[rows["shard"] == 1])


def middle(row: Any) -> int:
    return int(row["offset"]) + int(row["nbytes"]) // 2


def faulty(report: VerifyReport) -> list[tuple[str, str]]:
    assert not report.unread
    return [(fault.file, fault.key) for fault in report.faults]


@pytest.mark.parametrize("times", [0, 1])
def test_a_read_that_fails_once_changes_nothing(
    shards: Path, contents: Contents, failing_disk: FailingDisk, times: int
) -> None:
    before = contents(shards)
    failing_disk(SHARD, {middle(rows_of_shard(shards)[3])}, times=times)
    assert verify_shards(shards, deep=True).intact
    assert repair_shards(shards, drop=True).dropped == []
    assert contents(shards) == before


def test_a_bad_place_damages_the_utterance_that_lies_there(
    shards: Path, failing_disk: FailingDisk
) -> None:
    row = rows_of_shard(shards)[3]
    failing_disk(SHARD, {middle(row)})
    for deep in (False, True):
        report = verify_shards(shards, deep=deep)
        assert faulty(report) == [(SHARD, row["key"].decode())]
        assert "Input/output error" in report.faults[0].what


def test_what_the_disk_reads_is_kept_and_the_old_file_set_aside(
    shards: Path, original: Path, failing_disk: FailingDisk
) -> None:
    row = rows_of_shard(shards)[3]
    keys = set(map(str, open_shards(shards)["train"].keys))
    failing_disk(f"shards/{SHARD}", {middle(row)}, times=Once(shards / SHARD))
    said: list[list[str]] = []

    def announce(lost: list[Any]) -> None:
        assert (shards / SHARD).read_bytes() == (original / SHARD).read_bytes()
        said.append([reject.key for reject in lost])

    report = repair_shards(shards, drop=True, before_drop=announce)
    lost = row["key"].decode()
    assert said == [[lost]]
    assert [reject.key for reject in report.dropped] == [lost]
    assert "could not be read" in report.dropped[0].reason
    aside = shards / SET_ASIDE_FOLDER / f"{SHARD}.0"
    assert aside.read_bytes() == (original / SHARD).read_bytes()
    assert any(f"{SET_ASIDE_FOLDER}/{SHARD}.0" in note for note in report.notes)
    assert set(map(str, open_shards(shards)["train"].keys)) == keys - {lost}


@pytest.mark.parametrize("name", [SHARD, INDEX])
def test_the_source_restores_what_the_disk_cannot_read(
    shards: Path, source: Path, original: Path, contents: Contents, failing_disk: FailingDisk,
    name: str,
) -> None:  # fmt: skip
    place = middle(rows_of_shard(shards)[3]) if name == SHARD else 200
    failing_disk(f"shards/{name}", {place}, times=Once(shards / name))
    report = repair_shards(shards, source=source, workers=1)
    assert report.intact
    found = contents(shards)
    assert found.pop(f"{SET_ASIDE_FOLDER}/{name}.0") == contents(original)[name]
    assert found == contents(original)


class Once(int):
    """So many failures as there are while the old file lies in its place."""

    def __new__(cls, path: Path) -> Once:
        own = super().__new__(cls, 1)
        own.path = path  # type: ignore[attr-defined]
        own.inode = path.stat().st_ino  # type: ignore[attr-defined]
        return own

    def __sub__(self, other: int) -> Once:
        return self

    def __bool__(self) -> bool:
        path: Path = self.path  # type: ignore[attr-defined]
        return path.exists() and path.stat().st_ino == self.inode  # type: ignore[attr-defined]


def test_a_repair_killed_after_it_set_a_file_aside_loses_no_more(
    shards: Path, failing_disk: FailingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows_of_shard(shards)[3]
    failing_disk(f"shards/{SHARD}", {middle(row)}, times=Once(shards / SHARD))

    def kill(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FolderWork, "install", kill)
        with pytest.raises(KeyboardInterrupt):
            repair_shards(shards, drop=True)
    assert not (shards / SHARD).exists()
    report = repair_shards(shards, drop=True)
    assert [reject.key for reject in report.dropped] == [row["key"].decode()]
    assert verify_shards(shards, deep=True).intact


def test_a_disk_that_reads_nothing_of_a_file_has_not_damaged_it(
    shards: Path, contents: Contents, failing_disk: FailingDisk
) -> None:
    before = contents(shards)
    failing_disk(SHARD, range(1 << 30))
    report = verify_shards(shards, deep=True)
    assert not report.faults
    assert [fault.file for fault in report.unread] == [SHARD]
    with pytest.raises(StorageError, match=r"nothing of it can be read.*disk failed"):
        repair_shards(shards, drop=True)
    assert contents(shards) == before


def test_commands_end_with_6_and_say_what_was_not_read(
    run_cli: Run, shards: Path, tmp_path: Path
) -> None:
    damage(shards, "train-000000.tar")
    (shards / SHARD).rename(tmp_path / SHARD)
    (shards / SHARD).symlink_to(tmp_path / "gone" / SHARD)
    done = run_cli("verify", shards)
    assert done.returncode == 6
    assert f"{SHARD}: not verified, cannot be read: No such file" in done.stdout
    assert "1 fault, 1 file not verified" in done.stdout
    assert "repair" not in done.stderr
    done = run_cli("repair", shards, "--drop")
    assert done.returncode == 6
    assert re.search(rf"error: .*{SHARD}: cannot be read", done.stderr)
    assert "--drop" not in done.stderr


def test_drop_names_what_it_removes_before_it_does(run_cli: Run, shards: Path) -> None:
    row = rows_of_shard(shards)[3]
    damage(shards, SHARD, middle(row))
    key = row["key"].decode()
    done = run_cli("repair", shards, "--drop")
    assert done.returncode == 0
    assert f"shardprep: leaving out {key}: its stored bytes were damaged in {SHARD}" in done.stderr
