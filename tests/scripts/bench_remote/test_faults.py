"""The script that measures shards behind a network notices losses, and writes its results."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scripts.bench_remote import faults as remote_faults


@pytest.mark.slow
@pytest.mark.remote
def test_it_runs_and_keeps_earlier_results_of_other_parts(tmp_path: Path) -> None:
    out = tmp_path / "remote.json"
    out.write_text('{"warm": {"ratio": 1.0}}')
    command = [sys.executable, "-m", "scripts.bench_remote", "--scale", "0.1", "--rounds", "1"]
    command += ["--only", "cold", "--only", "budget", "--out", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["warm"] == {"ratio": 1.0}
    rates = found["cold"]["mb_per_s"]
    best = max(rates["s3fs.get"], rates["botocore, 8 threads"])
    assert found["cold"]["ratio"] == pytest.approx(rates["loader"] / best)
    assert 0 < found["budget"]["peak"] <= found["budget"]["budget"]


def test_a_file_whose_contents_do_not_match_its_name_is_noticed(tmp_path: Path) -> None:
    true = tmp_path / "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    true.write_bytes(b"test")
    assert remote_faults.is_intact(true)
    true.write_bytes(b"text")
    assert not remote_faults.is_intact(true)


def test_the_largest_size_of_a_folder_is_found(tmp_path: Path) -> None:
    with remote_faults.watching(tmp_path) as peak:
        (tmp_path / "a").write_bytes(bytes(1000))
        (tmp_path / "b").write_bytes(bytes(500))
        waiting = threading.Event()
        while peak[0] < 1500 and not waiting.wait(0.01):
            pass
        (tmp_path / "a").unlink()
    assert peak == [1500]
