"""Output that nobody reads, or that cannot be written, costs no traceback and goes nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardprep.cli.streams import READER_LEFT
from tests.called.conftest import Run, digests

CLI = [sys.executable, "-m", "shardprep"]


def run(words: list[object], redirection: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with a redirection of the shell."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", *CLI, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("words", [["inspect", "SHARDS"], ["inspect", "SHARDS", "--json"], ["-h"]])
def test_a_reader_that_leaves_ends_the_command_quietly(
    shards: Path, words: list[str], tmp_path: Path
) -> None:
    words = [str(shards) if word == "SHARDS" else word for word in words]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody:
        done = subprocess.run(
            [*CLI, *words], stdout=nobody, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert (done.returncode, done.stderr) == (READER_LEFT, "")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_matter(
    source: Path, shards: Path, tmp_path: Path, redirection: str
) -> None:
    words = ["build", source, "built", "--workers=2", "--samples-per-shard=4"]
    done = run(words, redirection, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # Nothing that was printed went into a file of the set.
    assert digests(tmp_path / "built") == digests(shards)
    (tmp_path / "built" / "split=val.index.npy").write_bytes(b"damaged")
    done = run(["verify", "built"], redirection, tmp_path)
    assert done.returncode == 1
    assert ("split=val.index.npy" in done.stdout) == (">&-" not in redirection.replace("2>&-", ""))
    assert "Traceback" not in done.stderr


def test_a_full_disk_behind_stdout_is_an_error(shards: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = run(["inspect", shards], "> /dev/full", tmp_path)
    assert done.returncode == 6
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "No space left on device" in line


def test_a_name_that_the_terminal_cannot_show_is_shown_in_ascii(
    python: Run, tmp_path: Path, shards: Path
) -> None:
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = python("-m", "shardprep", "inspect", shards, env=latin, encoding="latin-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u25" in done.stdout
    done = python("-m", "shardprep", "verify", tmp_path / "größe", env=latin, encoding="latin-1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
