"""A call fails when it is asked to, below its folder, in every process, and no other does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.torture.errors.failing_calls import (
    KINDS,
    FailingCalls,
    can_compile,
    compile_library,
)

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs gcc")

# What Python has for each kind of call; `file` is open for reading and writing.
CALLS: dict[str, list[str]] = {
    "open": [
        "open('a').close()",
        "os.listdir(here + '/folder')",
        "open(here + '/new', 'w').close()",
    ],
    "read": ["file.read(1)", "os.pread(file.fileno(), 1, 0)", "os.preadv(file.fileno(), [x], 0)"],
    "mmap": ["mmap.mmap(file.fileno(), 0)"],
    "fsync": ["os.fsync(file.fileno())", "os.fdatasync(file.fileno())"],
    "fchmod": ["os.fchmod(file.fileno(), 0o644)", "os.chmod('a', 0o644)"],
    "flock": ["fcntl.flock(file, fcntl.LOCK_SH)", "fcntl.lockf(file, fcntl.LOCK_EX)"],
    "rename": ["os.rename('a', 'b')", "os.replace('b', here + '/a')"],
    "link": ["os.link('a', 'c')"],
    "unlink": ["os.unlink('new')", "os.rmdir(here + '/folder')"],
    "statvfs": ["os.statvfs('a')", "shutil.disk_usage(here + '/a')"],
    "shm": ["SharedMemory(create=True, size=10).unlink()", "Lock()"],
}
PROGRAM = """
import fcntl, json, mmap, os, shutil, sys
from multiprocessing import Lock
from multiprocessing.shared_memory import SharedMemory
from scripts.torture.errors import failing_calls

settings, here, lines = sys.argv[1:]
x = bytearray(1)
os.chdir(here)
file = open(here + "/a", "r+b", buffering=0)
failing_calls.use(settings)
told = []
for line in json.loads(lines):
    try:
        exec(line)
        told.append(0)
    except OSError as error:
        told.append(error.errno)
print(json.dumps(told))
"""
Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def run(library: Path, tmp_path: Path) -> Run:
    """`run(settings, lines) -> errno of each line, 0 for none`, in the folder `root`."""
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "root" / "a").write_bytes(b"abc")

    def run(calls: FailingCalls, lines: list[str], folder: str = "root") -> list[int]:
        words = [sys.executable, "-c", PROGRAM, calls.file, tmp_path / folder, json.dumps(lines)]
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(library)},
        )
        assert done.returncode == 0, done.stderr
        told: list[int] = json.loads(done.stdout)
        return told

    return run


LINES = [line for lines in CALLS.values() for line in lines]


def test_calls_are_counted_by_their_kind(run: Run, tmp_path: Path) -> None:
    calls = FailingCalls(tmp_path / "settings", tmp_path / "root")
    assert run(calls, LINES) == [0] * len(LINES)
    expected = {kind: len(lines) for kind, lines in CALLS.items()}
    # Shared memory is opened, and locks of processes are opened once or twice by the C library.
    assert {**calls.counts, "shm": 2} == expected
    assert calls.counts["shm"] >= 2
    assert calls.refused == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_call_of_a_kind_fails_and_no_other(run: Run, tmp_path: Path, kind: str) -> None:
    calls = FailingCalls(tmp_path / "settings", tmp_path / "root", kind, errno.EDQUOT, 1)
    told = dict(zip(LINES, run(calls, LINES), strict=True))
    assert told[CALLS[kind][0]] == errno.EDQUOT
    assert calls.refused == 1
    assert calls.path.startswith("/dev/shm" if kind == "shm" else str(tmp_path / "root"))
    # What needs a file that another line should have made or moved may miss it.
    others = {n for line, n in told.items() if line not in CALLS[kind]}
    assert others <= {0, errno.ENOENT}


@pytest.mark.parametrize(
    ("number", "lasting", "expected"), [(2, False, "0x00"), (2, True, "0xx0"), (9, True, "0000")]
)
def test_a_later_call_fails_once_or_from_then_on_for_its_path(
    run: Run, tmp_path: Path, number: int, lasting: bool, expected: str
) -> None:
    calls = FailingCalls(
        tmp_path / "settings", tmp_path / "root", "open", errno.EIO, number, lasting=lasting
    )
    told = run(calls, ["open('a')", "open('a')", "open(here + '/a')", "open(here + '/b', 'w')"])
    assert told == [errno.EIO if sign == "x" else 0 for sign in expected]


def test_other_folders_are_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted" / "a").write_bytes(b"abc")
    calls = FailingCalls(tmp_path / "settings", tmp_path / "root", "open", errno.EIO, 1)
    assert run(calls, ["open('a')", "os.listdir(here)"], folder="rooted") == [0, 0]
    assert set(calls.counts.values()) == {0}


def test_processes_that_a_process_starts_count_too(run: Run, tmp_path: Path) -> None:
    calls = FailingCalls(tmp_path / "settings", tmp_path / "root", "open", errno.EIO, 3)
    start = "import subprocess; subprocess.call(['sh', '-c', 'read line <a'])"
    lines: list[Any] = ["open('a')", start, "open('a')"]
    assert run(calls, lines) == [0, 0, errno.EIO]
