"""One process holds a lock file at a time, with the system's locks and without them."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardprep import LockHeldError, StorageError, hold_lock
from shardprep.storage import courtesies, lock

HOLD = """
import sys
from pathlib import Path
from shardprep.storage import lock

if sys.argv[2]:
    def refuse(*arguments):
        raise OSError(int(sys.argv[2]), "refused")

    lock.fcntl = type("NoLocks", (), {"flock": refuse, "LOCK_EX": 0, "LOCK_NB": 0})
with lock.hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""

KINDS = ["", errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES]


@pytest.fixture(params=KINDS, ids=lambda code: errno.errorcode[code] if code else "flock")
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the system's locks, and with an error of each kind in their place."""
    monkeypatch.setattr(courtesies, "_noted", set())
    if request.param:
        refuse_locks(monkeypatch, request.param)
    return request.param


def refuse_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work" / "lock"


@pytest.fixture
def other(path: Path, code: Any) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock in the same way."""
    command = [sys.executable, "-c", HOLD, str(path), str(code)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def held(path: Path) -> bool:
    try:
        with hold_lock(path):
            return False
    except LockHeldError:
        return True


def test_a_held_lock_is_refused_by_the_name_of_its_holder(
    path: Path, other: subprocess.Popen[str]
) -> None:
    with pytest.raises(LockHeldError) as caught, hold_lock(path):
        pass
    assert f"is in use by process {other.pid} on {lock.socket.gethostname()}" in str(caught.value)


def test_the_lock_of_a_killed_process_is_free(path: Path, other: subprocess.Popen[str]) -> None:
    other.kill()
    other.wait()
    assert not held(path)
    assert not held(path)


def test_the_lock_of_a_process_that_ends_well_is_free(
    path: Path, other: subprocess.Popen[str]
) -> None:
    other.communicate("\n")
    assert other.returncode == 0
    assert not held(path)


def test_a_process_does_not_hold_a_lock_twice(path: Path, code: Any) -> None:
    with hold_lock(path):
        assert held(path)
    assert not held(path)


def test_an_error_within_frees_the_lock(path: Path, code: Any) -> None:
    with pytest.raises(KeyError), hold_lock(path):
        raise KeyError
    assert not held(path)


def test_a_forked_child_neither_keeps_nor_frees_the_lock(path: Path, code: Any) -> None:
    ours, childs = os.pipe()
    with hold_lock(path):
        child = os.fork()
        if not child:
            os.close(childs)
            # Until the parent has closed its end.
            os.read(ours, 1)
            os._exit(0)
        assert held(path)
    try:
        assert not held(path)
    finally:
        os.close(childs)
        os.waitpid(child, 0)
        os.close(ours)


def test_a_child_that_leaves_the_context_does_not_free_the_lock(path: Path, code: Any) -> None:
    with hold_lock(path):
        if child := os.fork():
            os.waitpid(child, 0)
            assert held(path)
    if not child:
        os._exit(0)


def test_a_folder_that_is_removed_and_made_again_has_a_lock_of_its_own(
    path: Path, code: Any
) -> None:
    with hold_lock(path):
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
        with hold_lock(path):
            pass
        with hold_lock(path):
            assert held(path)
    assert not held(path)


def test_one_note_says_that_there_are_no_locks(
    path: Path, code: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not held(path)
        assert not held(path)
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == (1 if code else 0)
    assert all("has no locks" in note for note in notes)


def forge(path: Path, **changed: Any) -> None:
    """The file of a holder that is this process but for some fields."""
    holder = json.loads(lock.msgspec.json.encode(lock._this_process()))
    path.parent.mkdir(exist_ok=True)
    Path(f"{path}.holder").write_text(json.dumps({**holder, **changed}))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"began": "1"}, False),
        ({"pid": 2**22 + 1}, False),
        ({"boot": "before", "machine": "m"}, False),
        ({"boot": "before", "machine": ""}, True),
        ({"boot": "before", "machine": "another"}, True),
        ({"host": "another", "began": "1"}, True),
        ({"numbers": "pid:[1]", "began": "1"}, True),
        ({}, True),
    ],
)
def test_only_a_holder_that_has_certainly_ended_is_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], expected: bool
) -> None:
    own = lock._this_process()
    here = lock._Holder(own.pid, "node", "m", own.boot, own.numbers, own.began)
    monkeypatch.setattr(lock, "_this_process", lambda: here)
    refuse_locks(monkeypatch, errno.ENOLCK)
    forge(path, **changed)
    assert held(path) == expected


def test_a_holder_of_another_machine_is_named_with_the_file_to_remove(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.ENOLCK)
    forge(path, host="node7", pid=12)
    file = Path(f"{path}.holder")
    with pytest.raises(LockHeldError, match="process 12 on node7") as caught, hold_lock(path):
        pass
    assert f"If it no longer runs, remove {file}." in str(caught.value)
    file.unlink()
    assert not held(path)


def test_a_holder_file_counts_where_locks_work_too(path: Path) -> None:
    forge(path, host="node7")
    assert held(path)


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"{}", b"[" * 100_000])
def test_a_holder_file_that_names_nobody_is_not_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    refuse_locks(monkeypatch, errno.ENOLCK)
    path.parent.mkdir()
    Path(f"{path}.holder").write_bytes(content)
    with (
        pytest.raises(LockHeldError, match=re.escape(f"remove {path}.holder")),
        hold_lock(path),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ENOMEM, errno.ENOSPC])
def test_trouble_of_the_machine_is_not_a_lack_of_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse_locks(monkeypatch, code)
    with pytest.raises(StorageError) as caught, hold_lock(path):
        pass
    assert not isinstance(caught.value, LockHeldError)
    assert os.strerror(code) in str(caught.value)


def test_a_file_system_whose_file_numbers_change_has_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.os.path, "samestat", lambda one, other: False)
    with hold_lock(path):
        assert held(path)
    assert not held(path)


def test_a_lock_that_cannot_be_unlocked_ends_with_its_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lock.fcntl.flock

    def flock(handle: int, kind: int) -> None:
        if kind == lock.fcntl.LOCK_UN:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        original(handle, kind)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    for _ in range(2):
        with hold_lock(path):
            pass
