"""Only a complete file gets its final name, and what is written survives a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardprep import StorageError
from shardprep.storage import courtesies
from shardprep.storage.local import (
    fetch,
    lasting,
    move,
    open_regular,
    publish,
    publish_bytes,
    read_at_most,
    sha256_of,
)


def test_name_appears_only_after_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with publish(path) as file:
        file.write(b"x" * 3_000_000)
        file.flush()
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1
    assert path.read_bytes() == b"x" * 3_000_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(b"old")

    def fail() -> None:
        with publish(path) as file:
            file.write(b"new")
            raise kind

    with pytest.raises(kind):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_full_disk_is_a_storage_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    path = tmp_path / "shard.tar"
    with pytest.raises(StorageError, match=r"shard\.tar: No space left on device\. The disk"):
        publish_bytes(path, b"data")
    assert list(tmp_path.iterdir()) == []


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            if name == "fsync":
                target = os.readlink(f"/proc/self/fd/{arguments[0]}")
                calls[-1] += " folder" if os.path.isdir(target) else " file"
                if not os.path.isdir(target):
                    assert os.path.getsize(target) == 5
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spy(name, getattr(os, name)))
    publish_bytes(tmp_path / "shard.tar", b"bytes")
    assert calls == ["fsync file", "replace", "fsync folder"]


# What a file system says that cannot do something, and what it says when it fails to do it.
LACKING = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES)
FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`refuse(call, code, folders)`: a call of `os` fails, for folders or for files."""
    monkeypatch.setattr(courtesies, "_noted", set())

    def install(call: str, code: int, *, folders: bool) -> None:
        original = getattr(os, call)

        def refusing(target: Any, *arguments: Any, **options: Any) -> Any:
            path = f"/proc/self/fd/{target}" if isinstance(target, int) else target
            if os.path.isdir(path) == folders:
                raise OSError(code, os.strerror(code))
            return original(target, *arguments, **options)

        monkeypatch.setattr(os, call, refusing)

    return install


@pytest.mark.parametrize("code", LACKING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize(
    ("call", "folders", "notes"),
    [("fsync", True, 1), ("fsync", False, 1), ("open", True, 1), ("fchmod", False, 0)],
)
def test_a_courtesy_that_a_file_system_lacks_is_passed_over_with_one_note(
    tmp_path: Path,
    refuse: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    code: int,
    call: str,
    folders: bool,
    notes: int,
) -> None:
    refuse(call, code, folders=folders)
    for name in ("a", "b"):
        publish_bytes(tmp_path / name, b"data")
        assert (tmp_path / name).read_bytes() == b"data"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == notes
    assert all("may not survive a power cut" in note for note in said)


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("code", [errno.EBADF, errno.EISDIR])
def test_systems_that_open_no_folders_take_files(
    tmp_path: Path, refuse: Callable[..., None], call: str, code: int
) -> None:
    refuse(call, code, folders=True)
    publish_bytes(tmp_path / "a", b"data")
    assert (tmp_path / "a").read_bytes() == b"data"


@pytest.mark.parametrize("code", FAILING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize(
    ("call", "folders"), [("fsync", True), ("fsync", False), ("open", True), ("fchmod", False)]
)
def test_a_failure_is_not_taken_for_a_lack(
    tmp_path: Path, refuse: Callable[..., None], code: int, call: str, folders: bool
) -> None:
    refuse(call, code, folders=folders)
    with pytest.raises(StorageError, match=os.strerror(code)):
        publish_bytes(tmp_path / "a", b"data")


def test_a_file_moves_between_the_disks_of_one_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").write_bytes(b"new")
    (tmp_path / "a").write_bytes(b"old")
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "cross-device")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    move(tmp_path / "other" / "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "other"]


def test_scratch_folder_takes_the_temporary_name(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with publish(tmp_path / "shard.tar", scratch):
        assert len(list(scratch.iterdir())) == 1
        assert list(tmp_path.iterdir()) == [scratch]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_follows_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        publish_bytes(tmp_path / "shard.tar", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "shard.tar").stat().st_mode & 0o777 == mode


def test_sha256_of_a_file_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom(2_500_000)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_fetching_reads_ahead_and_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"x" * 10_000)
    asked: list[tuple[str, int, int, int]] = []

    def advise(handle: int, offset: int, length: int, advice: int) -> None:
        asked.append((os.readlink(f"/proc/self/fd/{handle}"), offset, length, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    before = os.listdir("/proc/self/fd")
    fetch(path)
    assert asked == [(str(path), 0, 0, os.POSIX_FADV_WILLNEED)]
    assert os.listdir("/proc/self/fd") == before


def test_an_error_of_fetching_is_left_to_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ESPIPE, "Illegal seek")

    fetch(tmp_path / "missing.pt")
    (tmp_path / "a.pt").touch()
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    before = os.listdir("/proc/self/fd")
    fetch(tmp_path / "a.pt")
    assert os.listdir("/proc/self/fd") == before


def test_pipes_devices_and_folders_are_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)


def test_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_at_most(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than the 4"):
        read_at_most(tmp_path / "a", 4)


def test_a_device_or_an_open_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        device = Path(os.devnull)
    with publish(device) as file:
        file.write(b"lost")
    assert stat.S_ISCHR(os.lstat(device).st_mode)
    with open(tmp_path / "out", "wb") as out:
        out.write(b"before ")
        out.flush()
        for name in (f"/dev/fd/{out.fileno()}", f"/proc/self/fd/{out.fileno()}"):
            with publish(Path(name)) as file:
                file.write(b"row ")
        out.write(b"after")
    assert (tmp_path / "out").read_bytes() == b"before row row after"


def test_a_path_out_of_a_removed_folder_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "kept"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert lasting(Path("../kept")) == tmp_path / "kept"
    assert lasting(Path("nowhere")) == Path("nowhere")
