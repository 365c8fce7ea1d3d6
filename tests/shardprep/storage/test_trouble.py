"""Only a file that is missing or of a wrong kind is at fault; all else is the machine's trouble."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardprep import StorageError
from shardprep.storage.local import exists, open_regular, read_at_most
from shardprep.storage.trouble import (
    BadPlaceError,
    FileFault,
    blames_file,
    machine_errors,
    storage_error,
    storage_errors,
)

FailingDisk = Callable[..., None]

OF_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
OF_MACHINE = {
    errno.EACCES: "ls -l",
    errno.EPERM: "ls -l",
    errno.EROFS: "read-only",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EIO: "disk failed",
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "open files",
    errno.ENOMEM: "[Mm]emory",
    errno.ESTALE: "mount",
    errno.ETIMEDOUT: "mount",
    errno.EHOSTDOWN: "mount",
    errno.ENOTCONN: "mount",
    errno.ENODEV: "mount",
    errno.ENXIO: "mount",
    errno.EBUSY: "wait",
    errno.ENOLCK: "local disk",
    errno.EXDEV: "one file system",
    errno.EINVAL: "lacks a function",
    errno.ENOSYS: "lacks a function",
    errno.EOPNOTSUPP: "lacks a function",
}


def error_of(code: int, path: object = None) -> OSError:
    return OSError(code, os.strerror(code), path)


@pytest.mark.parametrize("code", OF_FILE, ids=lambda code: errno.errorcode[code])
def test_a_missing_file_or_one_of_a_wrong_kind_is_at_fault(code: int) -> None:
    with pytest.raises(OSError, match=os.strerror(code)), machine_errors("file"):
        raise error_of(code)


@pytest.mark.parametrize("code", OF_MACHINE, ids=lambda code: errno.errorcode[code])
def test_trouble_of_the_machine_has_a_remedy_that_fits(code: int) -> None:
    for wrapped in (machine_errors, storage_errors):
        with pytest.raises(StorageError) as caught, wrapped("shard.tar"):
            raise error_of(code)
        text = str(caught.value)
        assert re.match(r"shard\.tar: .*" + os.strerror(code), text)
        assert re.search(OF_MACHINE[code], text)
        assert caught.value.exit_code == 6
        assert "repair" not in text


@pytest.mark.parametrize("code", sorted(set(errno.errorcode) - {errno.ENOSPC}))
def test_only_a_full_disk_is_told_to_free_space(code: int) -> None:
    assert "free space" not in str(storage_error(error_of(code)))


def test_an_unknown_error_is_the_machines() -> None:
    assert not blames_file(OSError(9999, "odd"))
    assert not blames_file(OSError("odd"))
    assert str(storage_error(OSError("odd"), "file")).startswith("file: odd. Check the disk")


def test_the_path_of_the_error_comes_first() -> None:
    assert storage_error(error_of(errno.EACCES, Path("inner")), "outer").file == "inner"
    assert storage_error(error_of(errno.EACCES, b"inner"), "outer").file == "inner"
    assert storage_error(error_of(errno.EACCES, 7), "outer").file == "outer"


def test_short_memory_is_the_machines() -> None:
    match = r"file: cannot be read: .* [Mm]emory"
    with pytest.raises(StorageError, match=match), machine_errors("file"):
        raise MemoryError


def test_a_link_to_nowhere_is_not_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "file")
    for path in (tmp_path / "link", tmp_path / "nothing"):
        with pytest.raises((StorageError, FileNotFoundError)) as caught, machine_errors(path):
            open_regular(path)
        assert isinstance(caught.value, StorageError) == (path.name == "link")
    match = "It is a link to a file that is not there"
    with pytest.raises(StorageError, match=match), machine_errors(tmp_path / "link"):
        os.stat(tmp_path / "link")


def test_pipes_folders_sockets_and_huge_files_are_at_fault(tmp_path: Path) -> None:
    import socket

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket", "", "large"):
            with pytest.raises(FileFault), machine_errors(tmp_path):
                read_at_most(tmp_path / name, 10)


def test_existence_is_not_denied_where_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exists(tmp_path)
    assert not exists(tmp_path / "a")
    (tmp_path / "a").touch()
    assert not exists(tmp_path / "a" / "b")

    def refuse(path: Any) -> None:
        raise error_of(errno.EACCES)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(PermissionError):
        exists(tmp_path)


def test_a_read_that_fails_once_is_read_again(tmp_path: Path, failing_disk: FailingDisk) -> None:
    data = os.urandom(100_000)
    (tmp_path / "file").write_bytes(data)
    failing_disk("file", {50_000}, times=1)
    assert read_at_most(tmp_path / "file", len(data)) == data


def test_a_place_that_fails_twice_is_named(tmp_path: Path, failing_disk: FailingDisk) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    failing_disk("file", {50_000}, times=2)
    with pytest.raises(BadPlaceError) as caught:
        read_at_most(tmp_path / "file", 100_000)
    assert caught.value.filename == str(tmp_path / "file")
    assert caught.value.offset <= 50_000
    with pytest.raises(StorageError, match="twice"), machine_errors("file"):
        raise caught.value


def test_other_errors_of_reading_are_not_tried_again(
    tmp_path: Path, failing_disk: FailingDisk
) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    failing_disk("file", {0}, times=1, code=errno.ESTALE)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        read_at_most(tmp_path / "file", 10)
