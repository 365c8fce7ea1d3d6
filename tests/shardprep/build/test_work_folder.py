"""However a build ends, the next build continues to the same bytes, and keeps others out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep import (
    BuildError,
    BuildReport,
    FormatError,
    StorageError,
    open_shards,
    verify_shards,
)
from shardprep.build.work_folder import FolderWork
from shardprep.format.manifest import WORK_FOLDER

Build = Callable[..., BuildReport]
Contents = Callable[[Path], dict[str, str]]


@pytest.fixture
def source(make_dataset: Callable[..., Path]) -> Path:
    root = make_dataset(speakers=2, utterances=4, test_utterances=2)
    sorted(root.glob("*.pt"))[0].write_bytes(b"garbage")
    return root


OPTIONS = {"samples_per_shard": 3, "on_error": "skip"}


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, build: Build) -> Path:
    """A build that was interrupted after its shards, before its manifest."""
    shards = tmp_path / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardprep.build.writer.publish_set", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(source, shards, **OPTIONS)
    return shards


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    tars = (*folder.glob("*.tar"), *folder.glob(f"{WORK_FOLDER}/*.tar"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tars}


def test_undamaged_shards_are_kept_and_not_written_again(
    source: Path, unfinished: Path, build: Build
) -> None:
    before = identity(unfinished)
    report = build(source, unfinished, workers=2, **OPTIONS)
    assert identity(unfinished) == before
    assert (report.shards_kept, report.utterances_read, len(report.rejects)) == (4, 0, 1)


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "no record", "broken record"])
def test_damaged_shard_is_written_again_and_the_others_kept(
    source: Path, tmp_path: Path, unfinished: Path, build: Build, contents: Contents, damage: str
) -> None:
    shard = unfinished / WORK_FOLDER / "train-000001.tar"
    record = unfinished / WORK_FOLDER / "train-000001.tar.json"
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[3000] ^= 4
    if damage == "flipped bit":
        shard.write_bytes(data)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif damage == "cut short":
        shard.write_bytes(data[:-512])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-9])
    before = identity(unfinished)
    assert build(source, unfinished, **OPTIONS).shards_kept == 3
    changed = {name for name, one in identity(unfinished).items() if before[name] != one}
    assert changed == {shard.name}
    build(source, tmp_path / "fresh", **OPTIONS)
    assert contents(unfinished) == contents(tmp_path / "fresh")


def test_shard_whose_source_file_changed_is_written_again(
    source: Path, tmp_path: Path, unfinished: Path, build: Build, contents: Contents
) -> None:
    testdata = json.loads((source / "testdata.json").read_text())
    one, other = (source / entry["feature_path"] for entry in testdata["utterances"])
    before = identity(unfinished)
    # As long as before, so that only its time shows the change.
    one.write_bytes(bytes(reversed(one.read_bytes())))
    build(source, unfinished, **OPTIONS)
    changed = {name for name, stat in identity(unfinished).items() if before[name] != stat}
    assert changed == {"test-000000.tar"}
    build(source, tmp_path / "fresh", **OPTIONS)
    assert contents(unfinished) == contents(tmp_path / "fresh")
    assert list(open_shards(unfinished)["test"].keys) == [other.stem]


def test_other_options_replace_an_unfinished_build_without_a_trace(
    source: Path, tmp_path: Path, unfinished: Path, build: Build, contents: Contents
) -> None:
    other = {"samples_per_shard": 5, "on_error": "skip", "codec": "zstd", "val_fraction": 0}
    assert build(source, unfinished, **other).shards_kept == 0
    build(source, tmp_path / "fresh", **other)
    assert contents(unfinished) == contents(tmp_path / "fresh")


def test_set_that_is_overwritten_stays_in_use_until_the_new_one_is_complete(
    source: Path,
    tmp_path: Path,
    build: Build,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards, other = tmp_path / "shards", {**OPTIONS, "samples_per_shard": 2}
    build(source, shards, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr("shardprep.build.writer.publish_set", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(source, shards, overwrite=True, **other)
    assert verify_shards(shards, deep=True).intact
    # Asking for either set without --overwrite leaves the new one as it is.
    assert build(source, shards, **OPTIONS).up_to_date
    with pytest.raises(BuildError, match="finished set"):
        build(source, shards, **other)
    build(source, tmp_path / "fresh", **other)
    expected = contents(tmp_path / "fresh")
    tars = sum(name.endswith(".tar") for name in expected)
    assert build(source, shards, overwrite=True, **other).shards_kept == tars
    assert contents(shards) == expected


def test_foreign_files_in_an_unfinished_folder_stay(
    source: Path, unfinished: Path, build: Build
) -> None:
    (unfinished / "notes.txt").write_text("mine")
    (unfinished / "train-00.tar").write_text("mine")
    build(source, unfinished, **OPTIONS)
    assert (unfinished / "notes.txt").read_text() == "mine"
    assert (unfinished / "train-00.tar").read_text() == "mine"


def test_folder_of_another_program_is_not_taken_for_ours(
    source: Path, tmp_path: Path, build: Build
) -> None:
    for name in (".build/x.o", "main.c"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("mine")
    with pytest.raises(BuildError, match="not empty and holds no shards"):
        build(source, tmp_path / "project", **OPTIONS)
    assert (tmp_path / "project" / ".build" / "x.o").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("suffix", ["", ".json"])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_shard_that_cannot_be_read_now_is_not_written_again(
    source: Path,
    unfinished: Path,
    build: Build,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    suffix: str,
    call: str,
) -> None:
    before = contents(unfinished)
    original = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(f"train-000001.tar{suffix}"):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        if (call, suffix) == ("stat", ".json"):
            # A record is opened without another look.
            build(source, unfinished, workers=1, **OPTIONS)
            return
        with pytest.raises(StorageError, match=f"train-000001.*{os.strerror(code)}"):
            build(source, unfinished, workers=1, **OPTIONS)
    assert contents(unfinished) == before
    assert build(source, unfinished, **OPTIONS).shards_kept == 4


def test_a_folder_of_several_disks_takes_a_set(
    source: Path,
    tmp_path: Path,
    build: Build,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = os.replace

    def replace(before: Path, after: Path) -> None:
        if Path(before).parent != Path(after).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        original(before, after)

    build(source, tmp_path / "one", **OPTIONS)
    monkeypatch.setattr(os, "replace", replace)
    build(source, tmp_path / "several", workers=1, **OPTIONS)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
def test_a_work_folder_that_an_open_file_keeps_is_left(
    source: Path, tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original, kept = shutil.rmtree, []

    def rmtree(folder: Path, **options: Any) -> None:
        original(folder, **options)
        if folder.name == WORK_FOLDER:
            # As NFS does with the lock, which is open.
            folder.mkdir()
            (folder / ".nfs0001").touch()
            kept.append(folder / ".nfs0001")
            raise OSError(code, os.strerror(code), str(folder))

    shards = tmp_path / "shards"
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    build(source, shards, **OPTIONS)
    assert kept
    assert verify_shards(shards).intact
    kept[-1].unlink()
    assert build(source, shards, **OPTIONS).up_to_date
    monkeypatch.undo()
    assert build(source, shards, **OPTIONS).up_to_date
    assert verify_shards(shards).intact


def test_unfinished_set_does_not_open(unfinished: Path) -> None:
    with pytest.raises(FormatError, match="unfinished build"):
        open_shards(unfinished)


@contextlib.contextmanager
def held(shards: Path) -> Iterator[None]:
    """Lock the folder in another process, as another build would, until the block ends."""
    code = (
        "import sys; from pathlib import Path; from shardprep.build.work_folder import FolderWork\n"
        "with FolderWork.claim(Path(sys.argv[1]), True):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, shards], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            other.kill()


def test_second_build_is_refused_while_the_first_runs(
    source: Path, tmp_path: Path, unfinished: Path, build: Build, contents: Contents
) -> None:
    with held(unfinished):
        before = contents(unfinished)
        for overwrite in (False, True):
            with pytest.raises(
                BuildError, match=r"another build .* in this folder: it is in use by process \d+ on"
            ):
                build(source, unfinished, overwrite=overwrite, **OPTIONS)
        assert contents(unfinished) == before
    # The lock ended with its process.
    build(source, unfinished, **OPTIONS)
    build(source, tmp_path / "fresh", **OPTIONS)
    assert contents(unfinished) == contents(tmp_path / "fresh")


def test_set_that_another_build_finishes_meanwhile_stays_as_it_is(
    source: Path, tmp_path: Path, build: Build, contents: Contents
) -> None:
    build(source, tmp_path / "shards", **OPTIONS)
    before = contents(tmp_path / "shards")
    (tmp_path / "shards" / WORK_FOLDER).mkdir()
    with FolderWork.claim(tmp_path / "shards", overwrite=False) as work:
        assert work is None
    assert contents(tmp_path / "shards") == before


@pytest.mark.parametrize("place", ["file/shards", "file"])
def test_place_that_cannot_be_a_folder_is_a_storage_error(
    source: Path, tmp_path: Path, build: Build, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file"):
        build(source, tmp_path / place, **OPTIONS)
    assert (tmp_path / "file").read_text() == "mine"
