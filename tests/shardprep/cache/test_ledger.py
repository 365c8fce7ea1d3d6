"""A cache on a file system that cannot keep it names that, and a place that can."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardprep import ShardCache, StorageError
from shardprep.cache import ledger
from shardprep.format.manifest import FileInfo
from shardprep.storage import courtesies
from shardprep.storage.local import sha256_of
from shardprep.storage.remote import Remote

LACKING = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF)
FAILING = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT)
Refuse = Callable[[int, int], None]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Remote, FileInfo]:
    """A file of a store."""
    data = os.urandom(3000)
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(Remote, "read", lambda remote, begin, end: data[begin:end])
    return Remote("fake://store/file"), FileInfo("file", 3000, sha256_of(tmp_path / "file"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """`refuse_locks(code, after)`: all locks but the first ones fail."""
    original = fcntl.flock

    def install(code: int, after: int) -> None:
        left = after

        def flock(handle: int, kind: int) -> None:
            nonlocal left
            if kind != fcntl.LOCK_UN:
                left -= 1
                if left < 0:
                    raise OSError(code, os.strerror(code))
            original(handle, kind)

        monkeypatch.setattr(ledger.fcntl, "flock", flock)

    return install


@pytest.mark.parametrize("code", LACKING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("after", range(6))
def test_a_file_system_without_locks_is_named_with_a_way_out(
    place: Path, file: tuple[Remote, FileInfo], refuse_locks: Refuse, code: int, after: int
) -> None:
    refuse_locks(code, after)
    with pytest.raises(StorageError, match="has no locks.*SHARDPREP_CACHE") as caught:
        use(place, file)
    assert caught.value.file == str(place)
    assert "free space" not in str(caught.value)


def use(place: Path, file: tuple[Remote, FileInfo]) -> None:
    """Take as many locks as a file needs that is fetched, and read again."""
    cache = ShardCache(place, 10_000, patience=0.5)
    cache.hold(*file).close()
    cache.hold(*file).close()
    ShardCache(place, 10_000).hold(*file).close()


@pytest.mark.parametrize("code", FAILING, ids=lambda code: errno.errorcode[code])
@pytest.mark.parametrize("after", range(6))
def test_a_lock_that_fails_is_not_a_lack_of_locks(
    place: Path, file: tuple[Remote, FileInfo], refuse_locks: Refuse, code: int, after: int
) -> None:
    refuse_locks(code, after)
    with pytest.raises(StorageError, match=os.strerror(code)) as caught:
        use(place, file)
    assert "no locks" not in str(caught.value)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_made_names_the_variable(
    place: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(place))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match=f"{os.strerror(code)}.*SHARDPREP_CACHE"):
        ShardCache(place)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL])
def test_a_disk_that_does_not_tell_its_room_has_a_cache(
    place: Path,
    file: tuple[Remote, FileInfo],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    def refuse(path: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(courtesies, "_noted", set())
    monkeypatch.setattr(shutil, "disk_usage", refuse)
    for _ in range(2):
        cache = ShardCache(place)
        assert cache.hold(*file).path.stat().st_size == 3000
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == 1
    assert "SHARDPREP_CACHE_GB" in notes[0]
    with pytest.raises(StorageError, match="keeps at most 2000 bytes"):
        ShardCache(place, 2000).hold(file[0], FileInfo("other", 3000, "0" * 64))


def test_a_place_of_the_cache_that_the_disk_cannot_read_is_fetched_again(
    place: Path, file: tuple[Remote, FileInfo], failing_disk: Callable[..., None]
) -> None:
    cache = ShardCache(place)
    cache.hold(*file).close()
    failing_disk(file[1].sha256, {1000}, times=2)
    assert cache.renew(*file)
    assert cache.traffic.files == 2


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_what_was_done_under_a_lock_is_done_where_unlocking_fails(
    place: Path, file: tuple[Remote, FileInfo], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original = fcntl.flock

    def flock(handle: int, kind: int) -> None:
        if kind == fcntl.LOCK_UN:
            raise OSError(code, os.strerror(code))
        original(handle, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    shards = ShardCache(place, 10_000, patience=0)
    # Once to fetch it, once to find it: no part stays claimed, and the lock is free.
    for _ in range(2):
        shards.hold(*file).close()
    assert shards.traffic.files == 1
