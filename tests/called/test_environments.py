"""Environments that lack something: a home, the folder one is in, a locale, assertions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import shardprep
from shardprep import StorageError
from shardprep.cache import shard_cache
from tests.called.conftest import OPTIONS, Run, digests

USE = f"""
import sys, shardprep
source, shards, built = sys.argv[1:]
train = shardprep.open_shards(shards)["train"]
assert train.read(0).shape[1] == 40
shardprep.build_shards(source, built, {OPTIONS})
assert shardprep.verify_shards(built, deep=True, against=source).intact
assert shardprep.repair_shards(built).intact
"""


# PyTorch, which these need, does not even start in a folder that was removed.
LOAD = """
assert sum(1 for _ in shardprep.stream(shards)) == len(train)
for batch in shardprep.SegmentLoader(train, batch_size=4, segment_frames=8):
    pass
for batch in shardprep.UtteranceLoader(train, max_frames=4000):
    pass
"""


@pytest.mark.parametrize(
    "flags",
    [
        ["-OO"],
        *(
            pytest.param(f, marks=pytest.mark.slow)
            for f in (["-W", "error"], ["-I"], ["-X", "dev"])
        ),
    ],
    ids="".join,
)
def test_flags_of_the_interpreter_change_nothing(
    python: Run, source: Path, shards: Path, tmp_path: Path, flags: list[str]
) -> None:
    # -I ignores PYTHONPATH.
    paths = [str(Path(shardprep.__file__).parents[1])]
    program = f"import sys; sys.path[:0] = {paths!r}\n{USE}{LOAD}"
    done = python(*flags, "-c", program, source, shards, tmp_path / "built")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert digests(tmp_path / "built") == digests(shards)


@pytest.mark.parametrize("words", [["--help"], ["build", "--help"], ["train", "--help"]])
def test_help_needs_no_docstrings(python: Run, words: list[str]) -> None:
    done = python("-OO", "-m", "shardprep", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sage:" in done.stdout


def test_without_assertions_a_user_s_error_is_an_error(
    python: Run, source: Path, tmp_path: Path
) -> None:
    done = python("-OO", "-m", "shardprep", "build", source, tmp_path / "built", "--level", "3")
    assert done.returncode == 2
    assert "--level goes with --codec zstd" in done.stderr


REMOVED = """
import os, sys
folder = sys.argv[3] + ".gone"
os.mkdir(folder)
os.chdir(folder)
os.rmdir(folder)
"""


def test_a_folder_that_was_removed_is_good_enough_to_work_in(
    python: Run, source: Path, shards: Path, tmp_path: Path
) -> None:
    done = python("-c", REMOVED + USE, source, shards, tmp_path / "built")
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "built") == digests(shards)


def test_what_needs_pytorch_says_that_the_folder_was_removed(python: Run, tmp_path: Path) -> None:
    program = REMOVED + "sys.argv[1:] = ['train', '--print-config']\n"
    program += "from shardprep.cli import main\nmain()"
    done = python("-c", program, "", "", tmp_path / "x")
    assert done.returncode == 6
    assert done.stderr.startswith("error: the current folder was removed, and PyTorch")
    assert len(done.stderr.splitlines()) == 1


def test_a_relative_path_from_a_removed_folder_is_refused(python: Run, tmp_path: Path) -> None:
    program = REMOVED + "import shardprep\nshardprep.open_shards('shards')"
    done = python("-c", program, "", "", tmp_path / "x")
    assert done.stderr.splitlines()[-1].startswith("shardprep.errors.FormatError: shards: ")


@pytest.mark.parametrize("home", [None, "relative"])
def test_without_a_home_the_cache_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "SHARDPREP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    # A user without an entry in the password file, as in many containers.
    monkeypatch.setattr(shard_cache.os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(StorageError, match="SHARDPREP_CACHE.*Set SHARDPREP_CACHE"):
        shardprep.ShardCache()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(StorageError):
        shardprep.ShardCache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert shardprep.ShardCache().folder.path == tmp_path / "xdg" / "shardprep"


def test_a_folder_needs_no_home(python: Run, source: Path, shards: Path, tmp_path: Path) -> None:
    program = f"import os; os.environ.pop('HOME', None)\n{USE}"
    done = python("-c", program, source, shards, tmp_path / "built")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A data set whose names are not ASCII."""
    root = tmp_path / "Größe"
    root.mkdir()
    torch.save(torch.zeros(30, 4), root / "straße.pt")
    listed = {"zoë": [{"feature_path": "straße.pt", "mel_len": 30}]}
    text = json.dumps({"n_mels": 4, "speakers": listed}, ensure_ascii=False)
    (root / "metadata.json").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("variables", "works"),
    [
        ({"LC_ALL": "C"}, True),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "1"}, True),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, False),
    ],
)
def test_names_that_are_not_ascii_work_or_the_locale_is_named(
    python: Run, foreign: Path, tmp_path: Path, variables: dict[str, str], works: bool
) -> None:
    words = ["build", os.fspath(foreign), tmp_path / "built", "--workers=1"]
    done = python("-m", "shardprep", *words, env=variables)
    assert "Traceback" not in done.stderr
    if works:
        assert done.returncode == 0
        assert shardprep.open_shards(tmp_path / "built").speakers == ("zoë",)
    else:
        assert done.returncode == 2
        assert "Set PYTHONUTF8=1" in done.stderr
        assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(
    source: Path, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        options = shardprep.BuildOptions(samples_per_shard=4, workers=2)
        shardprep.build_shards(source, tmp_path / "built", options)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "built").iterdir()}
    assert modes == {0o666 & ~umask}
