"""Imitations of macOS and Windows: what works there works, and the rest is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.called.conftest import Run, digests

# Third-party packages are loaded first: they have their own ways on each system.
IMITATE = """
import os, sys
import click, filelock, fsspec, lazy_loader, msgspec, numpy, tenacity, torch, tqdm, webdataset
import zstandard, asyncio, multiprocessing.connection, multiprocessing.resource_tracker, subprocess
import tempfile, concurrent.futures, concurrent.futures.thread, accelerate, jsonargparse, yaml
import safetensors.torch, importlib.metadata, accelerate.tracking, torch._dynamo

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def imitate(platform, hidden, lacking):
    global HIDDEN
    HIDDEN = hidden
    for name in hidden:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Hide())
    for name in lacking:
        delattr(os, name)
    sys.platform = platform
"""
WINDOWS = (
    IMITATE
    + """
imitate("win32", {"fcntl", "resource", "pwd", "grp", "termios"}, [
    "fork", "register_at_fork", "posix_fadvise", "sched_getaffinity", "sysconf", "O_NONBLOCK",
    "O_CLOEXEC", "O_NOFOLLOW", "fchmod", "pread", "pwrite", "getuid", "setpgid", "killpg",
])
import ctypes
def no_libc(name, *arguments, **options):
    raise TypeError("bad argument type for built-in operation")
ctypes.CDLL = no_libc
"""
)
MACOS = (
    IMITATE
    + """
imitate("darwin", set(), ["posix_fadvise", "sched_getaffinity"])
real = open
def refuse(path, *arguments, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return real(path, *arguments, **options)
import builtins, io, pathlib
builtins.open = io.open = refuse
"""
)
MESSAGE = (
    "shardprep reads and writes shards on Linux and macOS, not on Windows. On Windows, run it in "
    "WSL."
)


ENTRIES = """
import contextlib, io, pkgutil, importlib, shardprep
for module in pkgutil.walk_packages(shardprep.__path__, "shardprep."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in shardprep.__all__:
    getattr(shardprep, name)
shards, new = sys.argv[1:]
for call in (
    lambda: shardprep.open_shards(shards),
    lambda: shardprep.build_shards(shards, new),
    lambda: shardprep.verify_shards(shards),
    lambda: shardprep.repair_shards(shards),
    lambda: shardprep.stream(shards),
    lambda: shardprep.ShardCache(new),
    lambda: shardprep.locate(shards),
):
    try:
        call()
    except shardprep.PlatformError as error:
        print(error)

from shardprep.cli import main
for words in (
    ["inspect", shards],
    ["build", shards, new],
    ["bench", shards],
    ["train", "--data.shards", shards, "--train.runs", new],
    ["--help"],
    ["build", "--help"],
):
    sys.argv = ["shardprep", *words]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            with contextlib.redirect_stdout(io.StringIO()):
                main()
    except SystemExit as stop:
        print(stop.code, said.getvalue().strip())
"""


def test_on_windows_all_can_be_imported_and_every_entry_says_where_it_works(
    python: Run, shards: Path, tmp_path: Path
) -> None:
    done = python("-c", WINDOWS + ENTRIES, shards, tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    functions, commands = 7 * [MESSAGE], 4 * [f"2 error: {MESSAGE}"]
    assert done.stdout.splitlines() == [*functions, *commands, "0 ", "0 "]
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.slow
def test_on_macos_all_but_bench_works(
    python: Run, source: Path, shards: Path, tmp_path: Path
) -> None:
    program = """
import shardprep
source, shards, built = sys.argv[1:]
train = shardprep.open_shards(shards)["train"]
assert train.read(0).shape[1] == 40
for order in ("global", "windowed"):
    loader = shardprep.SegmentLoader(train, batch_size=4, segment_frames=8, order=order, lanes=2)
    assert len(list(loader)) == 5
assert sum(1 for _ in shardprep.stream(shards)) == len(train)
options = shardprep.BuildOptions(samples_per_shard=4, workers=2, codec="zstd")
shardprep.build_shards(source, built, options)
assert shardprep.verify_shards(built, deep=True, against=source).intact
assert len(list(shardprep.SegmentLoader(shardprep.open_shards(built)["train"], batch_size=4))) == 5
(shardprep.locate(built) / "split=val.index.npy").unlink()
assert shardprep.repair_shards(built, source=source).intact
with shardprep.hold_lock(shardprep.locate(built + ".lock")):
    pass
from shardprep_trainer.processes.launch import launcher_identity
assert launcher_identity({"TORCHELASTIC_RUN_ID": "1"}) is None
from shardprep_trainer.train import main
words = ["--config", "smoke", "--data.shards", shards, "--data.batch_size", "4"]
words += ["--train.total_steps", "2", "--train.valid_steps", "2", "--train.trackers", "[]"]
assert main(words) == 0
from shardprep.cli import main
sys.argv = ["shardprep", "bench", shards]
main()
"""
    done = python("-c", MACOS + program, source, shards, tmp_path / "built")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: shardprep bench needs Linux, and this system is darwin"
    )
    assert len(digests(tmp_path / "built")) == len(digests(shards))
