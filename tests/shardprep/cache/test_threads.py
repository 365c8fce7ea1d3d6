"""Background threads run their jobs, and do not keep a program from ending."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shardprep.cache.threads import BackgroundThreads


def test_a_program_ends_while_files_are_on_their_way(tmp_path: Path) -> None:
    program = """
import sys, threading, time
from shardprep.cache.threads import BackgroundThreads
threads = BackgroundThreads(2, "slow")
began = threading.Event()
for _ in range(5):
    threads.submit(lambda: (began.set(), time.sleep(6000)))
assert threads.submit(print).cancel()
began.wait()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_future_has_what_its_job_returns_or_raises() -> None:
    threads = BackgroundThreads(3, "jobs")
    assert [threads.submit(int, text).result() for text in "123"] == [1, 2, 3]
    with pytest.raises(ValueError, match="invalid literal"):
        threads.submit(int, "x").result()
